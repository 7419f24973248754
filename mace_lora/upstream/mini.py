"""The embedded small pretrained model "mini": build it from its two package files, or write them.

mini is kept as its parameters (safetensors) and its architecture (JSON), not as a pickled module: a
pickle would tie it to one version of mace and run code on loading. All that follows from the
architecture (Clebsch-Gordan coefficients, contraction matrices, radial constants) is rebuilt.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import mace  # noqa: F401  must come before e3nn: it prepares e3nn for current torch versions
import numpy as np
import torch
from e3nn import o3
from mace import modules
from safetensors.torch import load, save

from mace_lora.files import whole_file
from mace_lora.upstream.precision import default_dtype

FORMAT = 1
WEIGHTS = "mini.safetensors"
CARD = "mini.json"

# Buffers which carry data instead of following from the architecture.
DATA_BUFFERS = ("atomic_energies_fn.atomic_energies", "scale_shift.scale", "scale_shift.shift")
_INTERACTIONS = ("interaction_cls", "interaction_cls_first")
_IRREPS = ("hidden_irreps", "MLP_irreps")
_GATES = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "abs": torch.abs, None: None}


def construct(architecture: dict[str, Any], dtype: torch.dtype) -> modules.ScaleShiftMACE:
    """A model of this architecture with random weights, all its constants in `dtype`."""
    arguments = dict(architecture)
    for key in _INTERACTIONS:
        arguments[key] = modules.interaction_classes[arguments[key]]
    for key in _IRREPS:
        arguments[key] = o3.Irreps(arguments[key])
    arguments["gate"] = _GATES[arguments["gate"]]
    # The three data buffers get placeholders of the right shape here, and values on loading.
    arguments["atomic_energies"] = np.zeros((1, len(arguments["atomic_numbers"])))
    arguments["num_elements"] = len(arguments["atomic_numbers"])
    with default_dtype(dtype):
        return modules.ScaleShiftMACE(
            atomic_inter_scale=1.0, atomic_inter_shift=0.0, **arguments
        ).to(dtype)


def _stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors that the weights file holds, by name: parameters and data buffers."""
    buffers = dict(model.named_buffers())
    tensors = {name: p.data for name, p in model.named_parameters()}
    tensors.update({name: buffers[name] for name in DATA_BUFFERS})
    return tensors


def _fill(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` into the model. Raises where names or shapes don't fit exactly."""
    differing = sorted(_stored_tensors(model).keys() ^ weights.keys())
    if differing:
        raise ValueError(f"{WEIGHTS} does not fit its architecture: {differing} in one alone")
    model.load_state_dict(weights, strict=False)  # the other buffers follow from the architecture


def _read(name: str) -> bytes:
    return resources.files("mace_lora").joinpath("data", name).read_bytes()


def load_card() -> dict[str, Any]:
    """The description of mini: architecture, training data, measured errors, licence, units."""
    card: dict[str, Any] = json.loads(_read(CARD))
    if card.get("format") != FORMAT:
        raise ValueError(f"{CARD} has format {card.get('format')!r}, expected {FORMAT}")
    return card


def build(dtype: torch.dtype | None = None) -> torch.nn.Module:
    """mini as an ordinary `mace.modules.ScaleShiftMACE`, in `dtype` (torch's default if None).

    The constants are computed in `dtype`, so that a float64 model is one throughout and not a
    float32 one in wider numbers; the weights themselves are stored in float32.
    """
    model = construct(load_card()["architecture"], dtype or torch.get_default_dtype())
    _fill(model, load(_read(WEIGHTS)))
    return model


def export(
    model: torch.nn.Module, architecture: dict[str, Any], card: dict[str, object], folder: Path
) -> None:
    """Write `model` into `folder` as the two files that `build` reads, the weights in float32."""
    twin = construct(architecture, torch.float32)
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in _stored_tensors(model).items()
    }
    _fill(twin, weights)  # refuses a model that is not of this architecture
    text = {"format": FORMAT, "name": "mini", "class": "ScaleShiftMACE"}
    text |= {"architecture": architecture} | card
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / WEIGHTS) as file:
        file.write_bytes(save(weights, metadata={"name": "mini", "format": "pt"}))
    with whole_file(folder / CARD) as file:
        file.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
