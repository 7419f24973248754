"""Which weights of a MACE model are matrices, and where in the tensor those matrices lie.

The only module that knows kinds of base layers. Everything that can be adapted in weight space is
described as a `WeightLayout`: a list of matrices (one per path of the layer) inside one tensor.
Adapters see matrices and never ask what layer they came from; a new kind of base layer is one more
entry in `_KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mace_lora import _compat  # noqa: F401  (before e3nn)
from mace_lora.adapters.layout import Block, Group, IrrepBlock, Site, Skipped, WeightLayout
from mace_lora.model.contractions import ContractionWeights

from e3nn import o3  # isort: skip
from e3nn.nn._fc import _Layer as RadialLayer  # isort: skip

KINDS: dict[str, str] = {
    "linear": "equivariant linear layers (e3nn's and cuequivariance's Linear)",
    "dense": "torch.nn.Linear",
    "radial": "layers of e3nn's FullyConnectedNet, the radial networks",
    "skip": "fully connected tensor products with weights of their own, the skip connections",
    "contraction": "symmetric-contraction weights, the product basis",
    "basis": "frequencies of the Bessel basis, where they are parameters",
}


def _one_matrix(kind: str, shape: torch.Size, rows: int, cols: int, **extra) -> WeightLayout:
    group = Group("scalar", rows, cols)
    return WeightLayout(kind, tuple(shape), (group,), (Block(0, rows, cols, 0),), **extra)


def _grouped(
    kind: str, shape: torch.Size, paths: list[tuple[str, int, int, int, int]], **extra
) -> WeightLayout:
    """A layout from paths (irrep, input block, output block, rows, cols) in storage order."""
    labels = list(dict.fromkeys(label for label, *_ in paths))
    groups, blocks, start = [], {}, 0
    offsets: dict[str, tuple[dict[int, int], dict[int, int]]] = {}
    for label in labels:
        rows: dict[int, int] = {}
        cols: dict[int, int] = {}
        mine = [p for p in paths if p[0] == label]
        for _, i, o, r, c in mine:
            rows.setdefault(i, r)
            cols.setdefault(o, c)
        offsets[label] = (_starts(rows), _starts(cols))
        groups.append(Group(label, sum(rows.values()), sum(cols.values())))
    for k, (label, i, o, r, c) in enumerate(paths):
        row, col = offsets[label][0][i], offsets[label][1][o]
        blocks[k] = Block(start, r, c, labels.index(label), row, col)
        start += r * c
    return WeightLayout(kind, tuple(shape), tuple(groups), tuple(blocks.values()), **extra)


def _starts(sizes: dict[int, int]) -> dict[int, int]:
    starts, total = {}, 0
    for key, size in sizes.items():
        starts[key] = total
        total += size
    return starts


def _features(irreps, reached: set[int]) -> tuple[IrrepBlock, ...]:
    """The blocks of e3nn's or cuequivariance's irreps; `reached` are those with a path."""
    found, start = [], 0
    for i, (mul, ir) in enumerate(irreps):
        irrep = o3.Irrep(str(ir))
        found.append(IrrepBlock(start, mul, irrep.dim, irrep.p == 1, i in reached))
        start += mul * irrep.dim
    return tuple(found)


def _linear(
    module: torch.nn.Module,
    param: torch.Tensor,
    paths: list[tuple[str, int, int, int, int]],
    **extra,
) -> WeightLayout:
    """The layout of an equivariant linear layer."""
    return _grouped(
        "linear",
        param.shape,
        paths,
        inputs=_features(module.irreps_in, {p[1] for p in paths}),
        outputs=_features(module.irreps_out, {p[2] for p in paths}),
        **extra,
    )


def _o3_linear(module: o3.Linear, tensor: str, param: torch.Tensor) -> WeightLayout | str:
    if tensor != "weight":
        return "a bias, no matrix"
    if param.numel() == 0:
        return "no path from input to output"
    paths = [
        (str(module.irreps_in[ins.i_in].ir), ins.i_in, ins.i_out, *ins.path_shape)
        for ins in module.instructions
        if ins.i_in != -1  # biases are instructions without an input
    ]
    if any(len(p) != 5 for p in paths) or sum(p[3] * p[4] for p in paths) != param.numel():
        return "weights with extra axes (f_in, f_out) are not supported"
    return _linear(module, param, paths)


def _cuet_linear(module: torch.nn.Module, tensor: str, param: torch.Tensor) -> WeightLayout | str:
    # cuequivariance stores the numbers of e3nn in the same order, with a leading axis of 1.
    paths = [
        (str(ir_in), i, o, mul_in, mul_out)
        for i, (mul_in, ir_in) in enumerate(module.irreps_in)
        for o, (mul_out, ir_out) in enumerate(module.irreps_out)
        if ir_in == ir_out
    ]
    if sum(p[3] * p[4] for p in paths) != param.numel():
        return "a cuequivariance weight layout that is not known"
    layouts = {module.transpose_in.source.name, module.transpose_out.target.name}
    if len(layouts) > 1:
        return "input and output in different layouts of cuequivariance"
    return _linear(module, param, paths, component_major=layouts == {"ir_mul"})


def _dense(module: torch.nn.Linear, tensor: str, param: torch.Tensor) -> WeightLayout | str:
    if tensor != "weight":
        return "a bias, no matrix"
    out, fan_in = param.shape
    # torch does not divide by the fan-in, e3nn does
    return _one_matrix("dense", param.shape, fan_in, out, unit=fan_in**-0.5, transposed=True)


def _radial(module: torch.nn.Module, tensor: str, param: torch.Tensor) -> WeightLayout | str:
    return _one_matrix("radial", param.shape, *param.shape)


def _tensor_product(
    module: o3.TensorProduct, tensor: str, param: torch.Tensor
) -> WeightLayout | str:
    with_weight = [ins for ins in module.instructions if ins.has_weight]
    if any(ins.connection_mode != "uvw" for ins in with_weight):
        return "a tensor product whose paths are not fully connected (mode uvw)"
    paths = []
    for ins in with_weight:
        mul1, mul2, mul_out = ins.path_shape
        irreps = module.irreps_in1[ins.i_in1].ir, module.irreps_in2[ins.i_in2].ir
        label = f"{irreps[0]}x{irreps[1]}->{module.irreps_out[ins.i_out].ir}"
        pair = ins.i_in1 * len(module.irreps_in2) + ins.i_in2
        paths.append((label, pair, ins.i_out, mul1 * mul2, mul_out))
    return _grouped("skip", param.shape, paths)


def _cuet_tensor_product(
    module: torch.nn.Module, tensor: str, param: torch.Tensor
) -> WeightLayout | str:
    # The order of e3nn: first input, second input, output; scalars as the second input.
    paths = [
        (f"{ir1}x{ir2}->{ir_out}", i * len(module.irreps_in2) + j, o, mul1 * mul2, mul_out)
        for i, (mul1, ir1) in enumerate(module.irreps_in1)
        for j, (mul2, ir2) in enumerate(module.irreps_in2)
        for o, (mul_out, ir_out) in enumerate(module.irreps_out)
        if ir_out in ir1 * ir2
    ]
    if sum(p[3] * p[4] for p in paths) != param.numel():
        return "a cuequivariance weight layout that is not known"
    return _grouped("skip", param.shape, paths)


def _contraction(module: torch.nn.Module, tensor: str, param: torch.Tensor) -> WeightLayout | str:
    zeroed = getattr(module, f"{tensor.replace('.', '_')}_zeroed", None)
    if zeroed is not None and bool(zeroed):
        return "its coupling tensor is zero"
    elements, n_paths, channels = param.shape
    # MACE starts these weights at normal(0, 1) / n_paths
    return _one_matrix("contraction", param.shape, elements * n_paths, channels, unit=1 / n_paths)


def _bessel(module: torch.nn.Module, tensor: str, param: torch.Tensor) -> WeightLayout | str:
    return _one_matrix("basis", param.shape, 1, param.numel())


def _named(module: torch.nn.Module, package: str, name: str) -> bool:
    """Whether `module` is of class `name` of `package`, without importing the package."""
    return any(
        cls.__name__ == name and cls.__module__.split(".")[0] == package
        for cls in type(module).__mro__
    )


_Reader = Callable[[torch.nn.Module, str, torch.Tensor], "WeightLayout | str"]
_KINDS: list[tuple[Callable[[torch.nn.Module], bool], _Reader]] = [
    (lambda m: isinstance(m, o3.Linear), _o3_linear),
    (lambda m: isinstance(m, RadialLayer), _radial),
    (lambda m: isinstance(m, torch.nn.Linear), _dense),
    (lambda m: isinstance(m, o3.TensorProduct), _tensor_product),
    (lambda m: isinstance(m, ContractionWeights), _contraction),
    (lambda m: _named(m, "mace", "Contraction"), _contraction),
    (lambda m: _named(m, "mace", "BesselBasis"), _bessel),
    (lambda m: _named(m, "cuequivariance_torch", "Linear"), _cuet_linear),
    (
        lambda m: _named(m, "cuequivariance_torch", "FullyConnectedTensorProduct"),
        _cuet_tensor_product,
    ),
]


def _layout(module: torch.nn.Module, tensor: str, param: torch.Tensor) -> WeightLayout | str:
    for is_kind, read in _KINDS:
        if is_kind(module):
            return read(module, tensor, param)
    if _named(module, "cuequivariance_torch", "SymmetricContraction"):
        return "symmetric-contraction weights in cuequivariance's layout"
    if param.numel() == 1:
        return "a single number"
    return f"no matrix ({type(module).__name__}, shape {tuple(param.shape)})"


def _parameters(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, str, torch.nn.Module, str, torch.nn.Parameter]]:
    """Every parameter: (name, holder, name in the holder, layer, name in the layer, parameter).

    Holder and layer differ for the lower-order contraction weights, which stand in a ParameterList
    below their Contraction.
    """
    modules = dict(model.named_modules())
    for prefix, module in modules.items():
        for tensor, param in module.named_parameters(recurse=False):
            layer, inner = module, tensor
            if isinstance(module, torch.nn.ParameterList):
                parent, _, own = prefix.rpartition(".")
                layer, inner = modules[parent], f"{own}.{tensor}"
            yield f"{prefix}.{tensor}".lstrip("."), module, tensor, layer, inner, param


def find_sites(model: torch.nn.Module) -> tuple[list[Site], list[Skipped]]:
    """The weights of `model` that can be adapted, and its other parameters with a reason."""
    sites, skipped = [], []
    for name, holder, tensor, layer, inner, param in _parameters(model):
        layout = _layout(layer, inner, param)
        if isinstance(layout, str):
            if param.numel():
                skipped.append(Skipped(name, param.numel(), layout))
        else:
            sites.append(Site(name.removesuffix(".weight"), holder, tensor, layout))
    return sites, skipped


def reordered(module: torch.nn.Module) -> bool:
    """Whether the numbers of its weights stand in another order than in e3nn's layer."""
    return _named(module, "cuequivariance_torch", "SymmetricContraction")
