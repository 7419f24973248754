"""Compiled graphs kept between runs, so that a run like an earlier one neither traces nor compiles.

Tracing a model takes longer than to find its compiled code in inductor's cache, which needs the
traced graph. So the compiled graphs are stored under what the model is made of, and whoever loads
one proves on numbers that it computes this model.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mace_lora.backends import library
from mace_lora.files import whole_file

Runner = Callable[[list[Tensor]], Sequence[Tensor]]
_PACKAGES = ("torch", "e3nn", "mace-torch")


def key_of(model: torch.nn.Module, *more: Any) -> str:
    """Of a graph of `model`: its modules with all their plain values, the shapes of its tensors,
    the versions and the processor that it was compiled for, and `more`."""
    modules = [(n, type(m).__qualname__, _plain_values(vars(m))) for n, m in model.named_modules()]
    tensors = [
        (n, tuple(t.shape), str(t.dtype), t.requires_grad)
        for named in (model.named_parameters(), model.named_buffers())
        for n, t in named
    ]
    versions = [sys.version, *(metadata.version(p) for p in _PACKAGES)]
    machine = [library._processor(), torch.get_num_threads()]
    everything = repr((modules, tensors, versions, machine, _our_source(), more))
    return hashlib.sha256(everything.encode()).hexdigest()[:24]


def _plain_values(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(k, repr(v)) for k, v in sorted(values.items()) if k[0] != "_" and _is_plain(v)]


def _is_plain(value: Any) -> bool:
    """Whether its text says what it is, in every process."""
    if isinstance(value, (tuple, list)):  # e3nn's irreps too
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, f.name)) for f in fields(value))
    return value is None or isinstance(value, (bool, int, float, str))


def _our_source() -> str:
    """Of the code that is traced."""
    found = hashlib.sha256()
    for package in ("mace_lora.backends", "mace_lora.adapters"):
        for file in sorted(resources.files(package).iterdir(), key=lambda f: f.name):
            if file.name.endswith(".py"):
                found.update(file.read_bytes())
    return found.hexdigest()


def _path(key: str) -> Path:
    folder = library.cache_folder() / "graphs"
    folder.mkdir(exist_ok=True)
    return folder / f"{key}.pt"


def alone(key: str) -> AbstractContextManager[Any]:
    """One process at a time compiles a graph; the others wait, and load it."""
    from filelock import FileLock

    return FileLock(_path(key).with_suffix(".lock"))


def store(key: str, names: list[str], graphs: Sequence[Any]) -> None:
    """Keep what inductor has compiled; not where this version of torch can't write it down."""
    try:
        contents = []
        for graph in graphs:
            graph = copy.copy(graph)
            graph.prepare_for_serialization()
            contents.append(pickle.dumps(graph))
        with whole_file(_path(key)) as temporary:
            temporary.write_bytes(pickle.dumps((names, contents)))
    except Exception:  # the next run traces again
        return


def load(key: str) -> tuple[list[str], list[Runner]] | None:
    """The names of the results and the compiled graphs, or None."""
    path = _path(key)
    if not path.exists():
        return None
    try:
        from torch._inductor.output_code import CompiledFxGraphConstants

        names, contents = pickle.loads(path.read_bytes())
        graphs = [pickle.loads(content) for content in contents]
        for graph in graphs:
            graph.after_deserialization(CompiledFxGraphConstants())
    except Exception:  # of another version of torch, or half of inductor's cache was removed
        path.unlink(missing_ok=True)
        return None
    return names, graphs
