"""Golden numbers of the published ELoRA and MMEA implementations, and our names for theirs.

Computed in float64 by running both implementations; the formulas are in the docstrings of
`mace_lora.adapters`. The files of single layers are whole; of the small models, tests carry one and
without its coupling tensors, which follow from the architecture. Where the complete set lies beside
the project, in ../shared/reference, that is used instead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mace_lora.adapters.full_update import FullUpdate
from mace_lora.adapters.mmea import Mmea
from mace_lora.model.fingerprint import base_state
from mace_lora.model.injection import adapters

HERE = Path(__file__).parents[1]
FOLDERS = (HERE.parent.parent / "shared" / "reference", HERE / "data" / "golden")
FOLDER = next(f for f in FOLDERS if f.is_dir())
TOLERANCE = 1e-10  # relative to the largest element of an array

_MMEA = {
    "adapter_tensor_head.0": "hidden",
    "adapter_scalar.0": "shift",
    "adapter_scale.0": "scale",
}


class Golden(dict):
    """The arrays of one file, as torch tensors where they are numbers."""

    def __init__(self, name: str) -> None:
        content = np.load(FOLDER / f"{name}.npz")
        super().__init__(
            {
                k: torch.from_numpy(content[k]) if content[k].dtype.kind in "fib" else content[k]
                for k in content.files
            }
        )

    def text(self, key: str) -> str:
        return str(self[key])

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}


def cases(prefix: str) -> list[str]:
    """Names of the files that begin with `prefix`."""
    return sorted(p.stem for p in FOLDER.glob(f"{prefix}*.npz"))


def reference_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter of an adapted model by the name it has in the published code.

    A weight that is trained in full is ours as weight plus difference, with equal gradients: it
    stands here for the weight.
    """
    found = dict(base_state(model))
    for name, adapter in adapters(model):
        if isinstance(adapter, Mmea):
            for theirs, ours in _MMEA.items():
                for kind in ("weight", "bias"):
                    found[f"{name}.{theirs}.{kind}"] = getattr(adapter, f"{ours}_{kind}")
        elif not isinstance(adapter, FullUpdate):
            layer = name.removesuffix(".weights_max")
            for k, (a, b) in enumerate(zip(adapter.lora_A, adapter.lora_B, strict=True)):
                found[f"{layer}.LoRA_weight.{2 * k}"] = a
                found[f"{layer}.LoRA_weight.{2 * k + 1}"] = b
    return {k: v for k, v in found.items() if v is not None}


@torch.no_grad()
def load(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Set every parameter of `model` to the published one; all of both must be used."""
    own = reference_parameters(model)
    missing = [k for k in own if k not in values and own[k].numel()]
    assert not missing, missing
    unused = [k for k, v in values.items() if k not in own and v.numel()]
    assert not unused, unused
    for name, parameter in own.items():
        if parameter.numel():
            parameter.copy_(rows_of(values[name], parameter))


def rows_of(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The published array in our shape: contraction factors as a matrix, no unused scale rows."""
    if value.dim() == 3 and parameter.dim() == 2:
        return value.reshape(parameter.shape)
    return value[: parameter.shape[0]] if value.dim() else value


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    size = max(theirs.abs().max().item(), 1e-300)
    difference = (ours - theirs).abs().max().item()
    assert difference <= TOLERANCE * size, f"{what}: {difference:.1e} of {size:.1e}"


def assert_gradients(model: torch.nn.Module, gradients: dict[str, torch.Tensor]) -> None:
    """The gradients that autograd left in `model` against the published ones."""
    own = reference_parameters(model)
    for name, theirs in gradients.items():
        if name not in own:
            assert not theirs.abs().sum(), f"{name} matters in the published code"
            continue
        ours = own[name].grad
        assert not theirs[ours.shape[0] :].abs().sum() or theirs.dim() == 3, name
        assert_close(ours, rows_of(theirs, ours), f"gradient of {name}")
