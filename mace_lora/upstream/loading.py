"""Foundation models in: the embedded one, names that mace-torch downloads, files."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch

from mace_lora.errors import FoundationModelError
from mace_lora.upstream import mini, reading, remaking
from mace_lora.upstream import names as upstream
from mace_lora.upstream.bases import tell_basis
from mace_lora.upstream.hyperparameters import Foreign
from mace_lora.upstream.known import MINI, ExistingModel, foundation_models
from mace_lora.upstream.reading import Compiled, UnreadableFile

_PARTS = ("r_max", "atomic_numbers", "node_embedding", "interactions", "products", "readouts")


def is_ours(name: str) -> bool:
    """Whether `load` loads this model, rather than mace-torch: `mini` and files."""
    return name not in foundation_models()


def given(
    base: torch.nn.Module | str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    flag: str = "",
    copy: bool = False,
) -> torch.nn.Module:
    """A model that a caller names, or gives as it is; the arguments are those of `load`.

    Returns:
        The model itself where it fits already and no `copy` is asked for, or a new one.

    Raises:
        FoundationModelError: neither a model, nor a name or path of one.
    """
    if not isinstance(base, torch.nn.Module):
        return load(base, device or "cpu", dtype, flag)
    tell_basis(base)
    own = next(base.parameters())
    fits = (dtype in (None, own.dtype)) and (device is None or torch.device(device) == own.device)
    return base if fits and not copy else deepcopy(base).to(device=device, dtype=dtype)


def load(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    flag: str = "foundation_model",
    trust: bool = False,
) -> torch.nn.Module:
    """A foundation model: `mini`, one that mace-torch knows by name, or a `.model` file.

    Args:
        name: a name or path. A file is read and the model rebuilt; nothing in the file is run.
        device: where to put it.
        dtype: cast to this precision; None keeps the file's.
        flag: what messages call it; empty for its name alone.
        trust: run what is in the file instead of reading it (see `reading`).

    Raises:
        FoundationModelError: no such file or name, or the file holds no MACE model.
    """
    if not isinstance(name, (str, Path)):
        raise FoundationModelError(
            f"a foundation model is given as a name or a path (mini, medium_off, a .model file), "
            f"found {type(name).__name__}"
        )
    if dtype not in (None, torch.float32, torch.float64):
        raise FoundationModelError(f"dtype={dtype!r}: torch.float32 or torch.float64 is needed")
    name = str(name)
    if name == MINI:
        model = mini.build(dtype)
    elif is_ours(name):
        model = _load_file(name, flag, trust)
    else:
        model = _load_named(name, device, dtype or torch.float64)
    model = model.to(device)
    return model if dtype is None else model.to(dtype)


def _load_named(name: str, device: str | torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A model that mace-torch downloads, or finds in its cache."""
    with loading_named(name):
        return _from_upstream(name, device, dtype)


@contextmanager
def loading_named(name: str) -> Iterator[None]:
    """While mace-torch loads a model that it knows by name.

    Raises:
        FoundationModelError: mace-torch can't.
    """
    try:
        yield
    except Exception as error:  # of a dozen kinds, from the network to unpickling
        reason = error.__cause__ or error
        raise FoundationModelError(
            f"--foundation_model={name}: mace-torch can't load it: "
            f"{type(reason).__name__}: {reason}. Without a network, download its file "
            "elsewhere and give the path"
        ) from error


def _from_upstream(name: str, device: str | torch.device, dtype: torch.dtype) -> torch.nn.Module:
    keywords = {"device": str(device), "default_dtype": str(dtype).removeprefix("torch.")}
    model: torch.nn.Module
    if name in upstream.original("polar_names"):
        model = upstream.original("mace_polar")(model=name, return_raw_model=True, **keywords)
    elif name == "mace_omol":
        model = upstream.original("mace_omol")(**keywords).models[0]
    elif name.endswith("_off"):
        off = upstream.original("mace_off")
        model = off(model=name.removesuffix("_off"), **keywords).models[0]
    else:
        model = upstream.original("mace_mp")(model=name, **keywords).models[0]
    return model


def _load_file(name: str, flag: str, trust: bool) -> torch.nn.Module:
    called = f"--{flag}={name}" if flag else name
    ExistingModel(name).check(called)
    path = Path(name).expanduser()
    try:
        return _run(path) if trust else _rebuilt(path)
    except Compiled:
        reason = (
            "a compiled TorchScript model, which can't be fine-tuned; "
            "give the .model file that was saved beside it"
        )
    except UnreadableFile as error:
        reason = f"the file can't be read as a model ({error}); expected a .model saved by MACE"
    except Foreign as error:
        reason = (
            f"it can't be rebuilt with mace-torch {upstream.version()}: {error}. Nothing in the "
            "file was run. If you know who made it, --trust (trust=True in Python) runs it, which "
            "needs the version of mace that wrote it"
        )
    except FoundationModelError as error:
        reason = str(error)
    raise FoundationModelError(f"{called}: {reason}")


def _rebuilt(path: Path) -> torch.nn.Module:
    """The model in a file, read and not run."""
    return deepcopy(_original(path, hashlib.sha256(path.read_bytes()).hexdigest()))


@functools.lru_cache(maxsize=1)  # one base for several adapters: a copy takes a tenth of the time
def _original(path: Path, digest: str) -> torch.nn.Module:
    del digest  # tells another file of the same name
    content = reading.read(path)
    tree = content if isinstance(content, reading.Made) else reading.Made()  # which has no part
    _check_is_model(content, lambda part: tree.get(part) is not None)
    return remaking.model_of(tree)


def _run(path: Path) -> torch.nn.Module:
    """The model in a file as its pickle makes it, which can run any program."""
    try:
        model = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever unpickling a foreign file raises
        raise UnreadableFile(f"{type(error).__name__}: {error}") from error
    if isinstance(model, torch.jit.ScriptModule):
        raise Compiled("a TorchScript archive")
    _check_is_model(model, lambda part: hasattr(model, part))
    tell_basis(model)
    if any(type(m).__module__.startswith("cuequivariance") for m in model.modules()):
        raise FoundationModelError(
            "a model in cuequivariance's format; convert it first with mace_cueq_to_e3nn, "
            "and train with --enable_cueq=True"
        )
    return cast(torch.nn.Module, model)


def _check_is_model(content: object, has: Callable[[str], bool]) -> None:
    """Raises FoundationModelError for what is no MACE model, but some other content of a file."""
    if isinstance(content, dict):
        raise FoundationModelError(
            "a checkpoint or a state dict, no model; give the .model file of that run"
        )
    missing = [part for part in _PARTS if not has(part)]
    if missing:
        called = type(content).__name__
        raise FoundationModelError(f"not a MACE model: a {called} without {', '.join(missing)}")
