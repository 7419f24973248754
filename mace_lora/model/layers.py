"""Which weights of a MACE model are matrices, and where in the tensor those matrices lie.

The only module that knows kinds of base layers. Everything that can be adapted in weight space is
described as a `WeightLayout`: a list of matrices (one per path of the layer) inside one tensor.
Adapters see matrices and never ask what layer they came from: what they need to know of it is data
of the layout. A new kind of base layer is one more entry in `_KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

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
    "other": "what is no matrix: biases, norms, embeddings of charge and spin, single numbers",
}


# Constants of a model that can be trained in full: buffers, by the ends of their names
_CONSTANTS = ("scale_shift.scale", "scale_shift.shift", "atomic_energies_fn.atomic_energies")

# What a reader of a kind of layer finds: its layout, or why it is not adapted
_Found: TypeAlias = "WeightLayout | str"


class _Irrep(Protocol):
    """An irrep of e3nn or of cuequivariance; both write it alike."""

    def __mul__(self, other: _Irrep) -> Iterable[_Irrep]: ...


_Irreps: TypeAlias = "Sequence[tuple[int, _Irrep]]"


class _CuetLinear(Protocol):
    irreps_in: _Irreps
    irreps_out: _Irreps
    transpose_in: Any  # its `source.name` is the layout of the input
    transpose_out: Any  # its `target.name` is that of the output


class _CuetTensorProduct(Protocol):
    irreps_in1: _Irreps
    irreps_in2: _Irreps
    irreps_out: _Irreps


class _Path(NamedTuple):
    """A path of a layer: its irrep, the numbers of its input and output block, and its matrix."""

    label: str
    i_in: int
    i_out: int
    rows: int
    cols: int


def _one_matrix(kind: str, shape: tuple[int, ...], rows: int, cols: int) -> WeightLayout:
    group = Group("scalar", rows, cols)
    return WeightLayout(kind, tuple(shape), (group,), (Block(0, rows, cols, 0),))


def _grouped(kind: str, shape: tuple[int, ...], paths: Sequence[_Path]) -> WeightLayout:
    """A layout from the paths of a layer in storage order."""
    labels = list(dict.fromkeys(path.label for path in paths))
    groups, starts = [], []
    for label in labels:
        mine = [path for path in paths if path.label == label]
        row_of, rows = _starts({path.i_in: path.rows for path in mine})
        col_of, cols = _starts({path.i_out: path.cols for path in mine})
        groups.append(Group(label, rows, cols))
        starts.append((row_of, col_of))
    blocks, start = [], 0
    for path in paths:
        group = labels.index(path.label)
        row_of, col_of = starts[group]
        row, col = row_of[path.i_in], col_of[path.i_out]
        blocks.append(Block(start, path.rows, path.cols, group, row, col))
        start += path.rows * path.cols
    return WeightLayout(kind, tuple(shape), tuple(groups), tuple(blocks))


def _starts(sizes: dict[int, int]) -> tuple[dict[int, int], int]:
    """Where each block begins, and the size of all of them."""
    starts, total = {}, 0
    for key, size in sizes.items():
        starts[key] = total
        total += size
    return starts, total


def _size(paths: Iterable[_Path]) -> int:
    return sum(path.rows * path.cols for path in paths)


def _features(irreps: _Irreps, reached: set[int]) -> tuple[IrrepBlock, ...]:
    """The blocks of e3nn's or cuequivariance's irreps; `reached` are those with a path."""
    found, start = [], 0
    for i, (mul, ir) in enumerate(irreps):
        irrep = o3.Irrep(str(ir))
        found.append(IrrepBlock(start, mul, irrep.dim, irrep.p == 1, i in reached))
        start += mul * irrep.dim
    return tuple(found)


def _linear(
    irreps_in: _Irreps, irreps_out: _Irreps, param: torch.Tensor, paths: Sequence[_Path]
) -> WeightLayout:
    """The layout of an equivariant linear layer."""
    return replace(
        _grouped("linear", param.shape, paths),
        inputs=_features(irreps_in, {path.i_in for path in paths}),
        outputs=_features(irreps_out, {path.i_out for path in paths}),
        normalised=True,
        upstream_std=1.0,
    )


def _o3_linear(module: o3.Linear, tensor: str, param: torch.Tensor) -> _Found:
    if tensor != "weight":
        return "a bias, no matrix"
    if param.numel() == 0:
        return "no path from input to output"
    # biases are instructions without an input
    instructions = [ins for ins in module.instructions if ins.i_in != -1]
    if all(len(ins.path_shape) == 2 for ins in instructions):
        paths = [
            _Path(str(module.irreps_in[ins.i_in].ir), ins.i_in, ins.i_out, *ins.path_shape)
            for ins in instructions
        ]
        if _size(paths) == param.numel():
            return _linear(module.irreps_in, module.irreps_out, param, paths)
    return "weights with extra axes (f_in, f_out) are not supported"


def _cuet_linear(module: _CuetLinear, tensor: str, param: torch.Tensor) -> _Found:
    # cuequivariance stores the numbers of e3nn in the same order, with a leading axis of 1.
    paths = [
        _Path(str(ir_in), i, o, mul_in, mul_out)
        for i, (mul_in, ir_in) in enumerate(module.irreps_in)
        for o, (mul_out, ir_out) in enumerate(module.irreps_out)
        if ir_in == ir_out
    ]
    if _size(paths) != param.numel():
        return "a cuequivariance weight layout that is not known"
    orders = {module.transpose_in.source.name, module.transpose_out.target.name}
    if len(orders) > 1:
        return "input and output in different layouts of cuequivariance"
    layout = _linear(module.irreps_in, module.irreps_out, param, paths)
    return replace(layout, component_major=orders == {"ir_mul"})


def _dense(module: torch.nn.Linear, tensor: str, param: torch.Tensor) -> _Found:
    if tensor != "weight":
        return "a bias, no matrix"
    out, fan_in = param.shape
    # torch stores (out, in), and does not divide by the fan-in as e3nn does
    layout = _one_matrix("dense", param.shape, fan_in, out)
    return replace(layout, unit=fan_in**-0.5, transposed=True)


def _radial(module: torch.nn.Module, tensor: str, param: torch.Tensor) -> _Found:
    return _one_matrix("radial", param.shape, *param.shape)


def _tensor_product(module: o3.TensorProduct, tensor: str, param: torch.Tensor) -> _Found:
    with_weight = [ins for ins in module.instructions if ins.has_weight]
    if any(ins.connection_mode != "uvw" for ins in with_weight):
        return "a tensor product whose paths are not fully connected (mode uvw)"
    paths = []
    for ins in with_weight:
        mul1, mul2, mul_out = ins.path_shape
        irreps = module.irreps_in1[ins.i_in1].ir, module.irreps_in2[ins.i_in2].ir
        label = f"{irreps[0]}x{irreps[1]}->{module.irreps_out[ins.i_out].ir}"
        pair = ins.i_in1 * len(module.irreps_in2) + ins.i_in2
        paths.append(_Path(label, pair, ins.i_out, mul1 * mul2, mul_out))
    return _grouped("skip", param.shape, paths)


def _cuet_tensor_product(module: _CuetTensorProduct, tensor: str, param: torch.Tensor) -> _Found:
    # The order of e3nn: first input, second input, output; scalars as the second input.
    paths = [
        _Path(f"{ir1}x{ir2}->{ir_out}", i * len(module.irreps_in2) + j, o, mul1 * mul2, mul_out)
        for i, (mul1, ir1) in enumerate(module.irreps_in1)
        for j, (mul2, ir2) in enumerate(module.irreps_in2)
        for o, (mul_out, ir_out) in enumerate(module.irreps_out)
        if ir_out in ir1 * ir2
    ]
    if _size(paths) != param.numel():
        return "a cuequivariance weight layout that is not known"
    return _grouped("skip", param.shape, paths)


def _contraction(module: torch.nn.Module, tensor: str, param: torch.Tensor) -> _Found:
    zeroed = getattr(module, f"{tensor.replace('.', '_')}_zeroed", None)
    if zeroed is not None and bool(zeroed):
        return "its coupling tensor is zero"
    elements, n_paths, channels = param.shape
    layout = _one_matrix("contraction", param.shape, elements * n_paths, channels)
    # MACE starts these weights at normal(0, 1) / n_paths; lower orders have few paths
    return replace(layout, unit=1 / n_paths, small=tensor != "weights_max")


def _bessel(module: torch.nn.Module, tensor: str, param: torch.Tensor) -> _Found:
    return replace(_one_matrix("basis", param.shape, 1, param.numel()), small=True)


def _named(module: torch.nn.Module, package: str, name: str) -> bool:
    """Whether `module` is of class `name` of `package`, without importing the package."""
    return any(
        cls.__name__ == name and cls.__module__.split(".")[0] == package
        for cls in type(module).__mro__
    )


# Each reader takes the class of layers that the test beside it lets through
_Reader = Callable[[Any, str, torch.Tensor], _Found]
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


def _layout(module: torch.nn.Module, tensor: str, param: torch.Tensor) -> _Found:
    for is_kind, read in _KINDS:
        if is_kind(module):
            return read(module, tensor, param)
    if _reordered(module):
        return "symmetric-contraction weights in cuequivariance's layout"
    if param.numel() == 1:
        return "a single number"
    return f"no matrix ({type(module).__name__}, shape {tuple(param.shape)})"


class _Parameter(NamedTuple):
    """A parameter, the module that holds it, and the layer whose weight it is.

    Holder and layer differ for the lower-order contraction weights, which stand in a ParameterList
    below their Contraction.
    """

    name: str
    holder: torch.nn.Module
    tensor: str  # its name in the holder
    layer: torch.nn.Module
    own_name: str  # its name in the layer
    value: torch.nn.Parameter


def _parameters(model: torch.nn.Module) -> Iterator[_Parameter]:
    modules = dict(model.named_modules())
    for prefix, module in modules.items():
        for tensor, value in module.named_parameters(recurse=False):
            layer, own_name = module, tensor
            if isinstance(module, torch.nn.ParameterList):
                parent, _, name = prefix.rpartition(".")
                layer, own_name = modules[parent], f"{name}.{tensor}"
            full_name = f"{prefix}.{tensor}".lstrip(".")
            yield _Parameter(full_name, module, tensor, layer, own_name, value)


def find_sites(model: torch.nn.Module) -> tuple[list[Site], list[Skipped]]:
    """The weights of `model` that can be adapted, and its other parameters with a reason."""
    sites, skipped = [], []
    for found in _parameters(model):
        layout = _layout(found.layer, found.own_name, found.value)
        if not isinstance(layout, str):
            name = found.name.removesuffix(".weight")
            sites.append(Site(name, found.holder, found.tensor, layout))
        elif found.value.numel():
            skipped.append(Skipped(found.name, found.value.numel(), layout))
    return sites, skipped


def find_tensors(model: torch.nn.Module) -> list[Site]:
    """What can be trained in full: every parameter of `model`, and its E0s, scale and shift.

    Weights in another order than e3nn's, in which adapters are saved, are left out.
    """
    found = []
    for path, module in model.named_modules():
        if _reordered(module):
            continue
        buffers = module.named_buffers(recurse=False)
        constants = [(n, b) for n, b in buffers if f"{path}.{n}".endswith(_CONSTANTS)]
        for tensor, value in [*module.named_parameters(recurse=False), *constants]:
            size = math.prod(value.shape)
            if size:
                # flat: the shape differs between kernels, the order of the numbers doesn't
                layout = replace(_one_matrix("full", (size,), 1, size), small=True)
                name = f"{path}.{tensor}".lstrip(".").removesuffix(".weight")
                found.append(Site(name, module, tensor, layout))
    return found


def find_others(model: torch.nn.Module) -> list[Site]:
    """The parameters of `model` that `find_sites` leaves out, each flat and of kind "other"."""
    known = {site.name for site in find_sites(model)[0]}
    parameters = {id(parameter) for parameter in model.parameters()}
    return [
        replace(site, layout=replace(site.layout, kind="other"))
        for site in find_tensors(model)
        if site.name not in known and id(site.weight) in parameters
    ]


def find_biases(model: torch.nn.Module) -> list[Site]:
    """The biases of `model`, of equivariant and of dense layers."""
    return [site for site in find_tensors(model) if site.tensor == "bias"]


def _reordered(module: torch.nn.Module) -> bool:
    """Whether the numbers of its weights stand in another order than in e3nn's layer."""
    return _named(module, "cuequivariance_torch", "SymmetricContraction")
