"""A model of the installed mace-torch with everything that a file says of one.

The class is built anew from its hyperparameters, and every tensor of the file takes its place by
name. Then both are compared, part by part: what the file has and the new model lacks, or has
otherwise, is no detail to pass over, and the file is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Mapping
from typing import cast

import torch
from mace import modules

from mace_lora.errors import FoundationModelError
from mace_lora.upstream import names as upstream
from mace_lora.upstream.bases import changed_bases, close, is_full, same_basis
from mace_lora.upstream.comparing import compare
from mace_lora.upstream.gated import put_back, take_out
from mace_lora.upstream.hyperparameters import DIPOLES, ENERGY, Foreign, arguments, plain
from mace_lora.upstream.precision import default_dtype
from mace_lora.upstream.reading import Made, archive, walk


def model_of(tree: Made) -> torch.nn.Module:
    """The model in `tree`, with its numbers, in its precision, on the CPU.

    Raises:
        Foreign: it can't be rebuilt; the message names what stands in the way.
    """
    kind = tree.name.removeprefix("Gated")
    if kind not in (*ENERGY, *DIPOLES) or tree.module.split(".")[0] not in ("mace", "mace_lora"):
        raise Foreign(f"its class {tree.module}.{tree.name} is none of mace-torch's")
    try:
        gates = take_out(tree)
        model = _without_gates(tree, kind)
        if gates:
            put_back(model, gates)
        return model
    except FoundationModelError:
        raise
    except Exception as error:  # of a file that is not as mace-torch writes it
        raise Foreign(f"{type(error).__name__}: {error}") from error


def _without_gates(tree: Made, kind: str) -> torch.nn.Module:
    dtype = _precision(tree)
    settings = arguments(tree, kind)
    cueq = any(made.module.startswith("cuequivariance_torch.") for _, made in walk(tree))
    if cueq and not modules.wrapper_ops.CUET_AVAILABLE:
        raise FoundationModelError("in cuequivariance's format: pip install cuequivariance-torch")

    def build(reduced: bool) -> torch.nn.Module:
        model = _build(kind, settings, reduced)
        return upstream.original("to_cueq")(model, device="cpu") if cueq else model

    with torch.random.fork_rng(devices=[]), default_dtype(dtype):
        first, *others = _bases(tree)
        model = build(first)
        if not _has_weights_of(model, tree):
            models = (build(other) for other in others)
            model = next((m for m in models if _has_weights_of(m, tree)), model)
        _fill(model, tree)
        compare(model, tree)
        if cueq:
            model = upstream.original("from_cueq")(model, device="cpu")
    return model


def _bases(tree: Made) -> tuple[bool, ...]:
    """What to try for `use_reduced_cg`: the weights say it, or else the attribute of that name."""
    if (
        is_full(tree) or not modules.wrapper_ops.CUET_AVAILABLE
    ):  # without it, mace-torch builds no other
        return (False,)
    said = bool(plain(tree.get("use_reduced_cg", False)))
    return said, not said


def _precision(tree: Made) -> torch.dtype:
    found = {
        value.dtype
        for _, made in walk(tree)
        for value in made.tensors("_parameters").values()
        if value.is_floating_point()
    }
    if len(found) != 1 or not found <= {torch.float32, torch.float64}:
        raise Foreign(f"its parameters are of kinds {sorted(map(str, found))}; one is needed")
    return found.pop()


def _build(kind: str, settings: Mapping[str, object], reduced: bool) -> torch.nn.Module:
    cls = getattr(modules.extensions if kind in ("MACELES", "PolarMACE") else modules, kind)
    known = inspect.signature(cls).parameters
    settings = {**settings, "use_reduced_cg": reduced}
    if "kwargs" not in known:
        settings = {key: value for key, value in settings.items() if key in known}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some blocks print what they are
            return cast(torch.nn.Module, cls(**settings))
    except ImportError as error:  # of MACELES and PolarMACE
        raise FoundationModelError(f"a {kind} needs a package that isn't here: {error}") from error


# ------------------------------------------------------------------------------ numbers


def _has_weights_of(model: torch.nn.Module, tree: Made) -> bool:
    """Whether the file's weights can be this model's as they are."""
    own = {name: p.numel() for name, p in model.named_parameters()}
    for path, made in walk(tree):
        for name, value in made.tensors("_parameters").items():
            if own.get(f"{path}.{name}".lstrip("."), value.numel()) != value.numel():
                return False
    return same_basis(model, tree)


@torch.no_grad()
def _fill(model: torch.nn.Module, tree: Made) -> None:
    own = dict(model.named_modules())
    changed = dict(changed_bases(model, tree))
    for path, made in walk(tree):
        owner = path.removesuffix(".weights")
        if path not in own and (made.tensors("_parameters") or made.tensors("_buffers")):
            raise Foreign(f"it has {path}, a {made.name}, which mace-torch's model lacks")
        for place in ("_parameters", "_buffers"):
            for name, value in made.tensors(place).items():
                if owner in changed and (place == "_parameters" or name.startswith("U_matrix")):
                    continue
                _put(own[path], path, name, value, place)
        for name, code in _code(made).items():
            _put_constants(own[path], path, name, code)
    for path, weights in changed.items():
        for name, value in weights.items():
            part = own[path]
            if name == "weights_max":
                part.weights_max.data.copy_(value)
            else:
                part.weights[int(name)].data.copy_(value)
    missing = _unfilled(model, tree)
    if missing:
        raise Foreign(f"the file has no {missing[0]}, which mace-torch's model needs")


def _put(holder: torch.nn.Module, path: str, name: str, value: torch.Tensor, place: str) -> None:
    """Let `name` of `holder` be the file's tensor: a parameter if it is one there."""
    before = holder._parameters.get(name, holder._buffers.get(name))
    if before is None:
        if value.numel():
            raise Foreign(f"it has {path}.{name}, which mace-torch's model lacks")
        return
    if before.numel() != value.numel():
        raise Foreign(
            f"{path}.{name} has the shape {tuple(value.shape)}; mace-torch builds it with "
            f"{tuple(before.shape)}"
        )
    new = value.detach().clone(memory_format=torch.contiguous_format).reshape(before.shape)
    if before.is_floating_point() != new.is_floating_point():
        new = new.to(before.dtype)
    if place == "_buffers":
        holder._parameters.pop(name, None)
        holder._buffers[name] = new
    elif name in holder._parameters:
        parameter = cast(torch.nn.Parameter, holder._parameters[name])
        parameter.data = new
        parameter.requires_grad_(value.requires_grad)
    else:
        del holder._buffers[name]
        holder.register_parameter(name, torch.nn.Parameter(new, value.requires_grad))


def _unfilled(model: torch.nn.Module, tree: Made) -> list[str]:
    """Parameters with numbers that the file doesn't bring."""
    kept = {
        f"{path}.{name}".lstrip(".")
        for path, made in walk(tree)
        for place in ("_parameters", "_buffers")
        for name in made.tensors(place)
    }
    return [name for name, value in model.named_parameters() if value.numel() and name not in kept]


def _code(made: Made) -> dict[str, bytes]:
    """TorchScript archives of e3nn's generated code, by name."""
    found = made.held("__codegen__")
    return {name: code for name, code in found.items() if isinstance(code, bytes)}


def _put_constants(holder: torch.nn.Module, path: str, name: str, code: bytes) -> None:
    """Take coupling coefficients as the file has them: they are of the precision it was built in.

    A model that was built in single precision and then made a double keeps the rounded ones.
    """
    script = getattr(holder, name, None)
    kept = archive(code)
    if script is None or not isinstance(kept, Made):
        return
    for key, own in script.named_buffers():
        value = kept.state.get(key)
        if not isinstance(value, torch.Tensor):
            continue
        if not close(value.to(own.dtype), own):
            raise Foreign(f"{path} has coupling coefficients of another convention")
        own.copy_(value)
