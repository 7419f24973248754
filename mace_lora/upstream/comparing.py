"""Whether a rebuilt model is what its file describes."""

from __future__ import annotations

import math

import torch

from mace_lora.model.bases import ROUNDING
from mace_lora.upstream.hyperparameters import Foreign, own_value, plain
from mace_lora.upstream.reading import Made, walk

# Attributes that say how a thing is computed or shown
_INDIFFERENT = {
    *("training", "use_reduced_cg", "cueq_config", "oeq_config", "conv_fusion", "lammps_mliap"),
    *("forward", "original_forward", "_profiling_str", "_prof_str", "_optimize_einsums"),
    *("_specialized_code", "__codegen__", "_codegen", "already_printed", "_size"),
}
# e3nn's nonlinearity and mace-torch's of the same results: where they have their functions
_GATES = {"_act_scalar": "act_scalars.acts.0.f", "_act_gate": "act_gates.acts.0.f"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def compare(model: torch.nn.Module, tree: Made) -> None:
    """Raises Foreign where the new model is not what the file describes."""
    own = dict(model.named_modules())
    for path, made in walk(tree):
        if any(made.state.get(hooks) for hooks in _HOOKS):
            raise Foreign(f"{path or 'the model'} has hooks: code that changes its results")
        if path not in own:
            continue
        part = own[path]
        called = type(part).__name__
        if made.name != called and (path or made.name.removeprefix("Gated") != called):
            if (made.name, called) == ("Gate", "GatedEquivariantBlock") and _same_gate(part, made):
                continue
            raise Foreign(
                f"{path} is a {made.module}.{made.name}; mace-torch's model has a {called} there"
            )
        if made.module.split(".")[0] in ("mace", "e3nn"):
            _compare_attributes(part, made, path)


def _compare_attributes(part: torch.nn.Module, made: Made, path: str) -> None:
    own = vars(part)
    for name, value in made.state.items():
        if name in _INDIFFERENT or name.startswith(("_backward", "_forward", "_state", "_load")):
            continue
        there = plain(value)
        if not _is_plain(there) or name in ("_parameters", "_buffers", "_modules"):
            continue
        if name not in own:
            if made.module.startswith("mace") and not hasattr(part, name) and there:
                raise Foreign(f"{path}.{name} = {there!r} is not known to mace-torch")
            continue
        here = own_value(own[name])
        if name == "instructions" and made.name == "Linear":
            there, here = _stacked(there), _stacked(here)
        if not _alike(there, here):
            raise Foreign(
                f"{path}.{name}".lstrip(".") + f" is {there!r}; mace-torch builds it with {here!r}"
            )
        if isinstance(there, float) and isinstance(own[name], float):
            setattr(part, name, there)  # constants that were integrated numerically


def _same_gate(part: torch.nn.Module, made: Made) -> bool:
    return all(own_value(vars(part)[k]) == plain(made.get(path)) for k, path in _GATES.items())


def _stacked(instructions: object) -> object:
    """Paths of a linear layer, those of neighbouring inputs to one output as one.

    4x0e + 3x0e has the weights of 7x0e, in the same order.
    """
    if not isinstance(instructions, tuple):
        return instructions
    found: list[tuple[object, int, tuple[int, ...], object]] = []
    for _, output, shape, weight in instructions:
        new = output, shape[0], shape[1:], weight
        last = found[-1] if found else new
        same = found and (output, shape[1:], len(shape)) == (last[0], last[2], 2)
        if same and _alike(last[3], weight):
            found[-1] = output, last[1] + shape[0], last[2], last[3]
        else:
            found.append(new)
    return tuple(found)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _alike(one: object, other: object) -> bool:
    numbers = (bool, int, float)
    if isinstance(one, numbers) and isinstance(other, numbers):
        return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=1e-12)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    return bool(one == other)
