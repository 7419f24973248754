"""What is in a saved model, read without running any of it.

A `.model` file is a pickle, and a pickle is a program: it names functions and calls them. Here they
are named and not called. Tensors, numbers, texts and containers come out as they are; every object
of a class, and every call of a function, comes out as a `Made`, which holds the name and what was
handed over. Nothing that a file names is imported.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch

from mace_lora.errors import FoundationModelError

# First pickle of torch's files before version 1.6
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CHILDREN = "_modules"
_PLACES = ("_parameters", "_buffers", _CHILDREN)


class UnreadableFile(FoundationModelError):
    """The file is no pickle of torch's, or a broken one."""


class Compiled(UnreadableFile):
    """The file is a TorchScript archive."""


class Made:
    """Stands for an object that a pickle makes: its class by name, its arguments and its state."""

    module: ClassVar[str] = ""
    name: ClassVar[str] = ""
    arguments: tuple[Any, ...]
    state: dict[str, Any]
    entries: list[Any]

    def __new__(cls, *arguments: Any, **keywords: Any) -> Made:
        made = object.__new__(cls)
        made.arguments = (*arguments, *keywords.values())
        made.state, made.entries = {}, []
        return made

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # (attributes, slots) where a class has slots; anything else is a form of its own
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict):
                self.state.update(part)

    # What a pickle does to subclasses of list and dict
    def append(self, entry: Any) -> None:
        self.entries.append(entry)

    def extend(self, entries: Any) -> None:
        self.entries.extend(entries)

    def __setitem__(self, key: Any, entry: Any) -> None:
        self.entries.append((key, entry))

    @property
    def children(self) -> dict[str, Made]:
        """As a torch module: its submodules by name, in order."""
        kept = self.state.get(_CHILDREN) or {}
        return {name: child for name, child in kept.items() if isinstance(child, Made)}

    def tensors(self, place: str) -> dict[str, torch.Tensor]:
        """As a torch module: its own tensors, of `_parameters` or `_buffers`, by name."""
        kept = self.state.get(place) or {}
        return {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}

    def get(self, path: str, default: Any = None) -> Any:
        """What `path` names, such as `radial_embedding.cutoff_fn.p`; `default` if nothing."""
        here: Any = self
        for name in path.split("."):
            if not isinstance(here, Made):
                return default
            places = (here.state, *(here.state.get(place) or {} for place in _PLACES))
            found = [place[name] for place in places if name in place]
            if not found:
                return default
            here = found[0]
        return here


# Parts of contractions that torch.fx traced; they follow from the irreps
_TRACED = ("graph_opt_main", "contractions_weighting", "contractions_features")


def walk(tree: Made, path: str = "") -> Iterator[tuple[str, Made]]:
    """Every part of a model in `tree` that may hold numbers of it, itself first, by path."""
    yield path, tree
    if tree.name == "Gate":  # e3nn's: it has none
        return
    for name, child in tree.children.items():
        if name not in _TRACED:
            yield from walk(child, f"{path}.{name}".lstrip("."))


def read(path: str | Path) -> Any:
    """The object in a file of `torch.save`: a `Made`, a container, a tensor or a plain value.

    All tensors are on the CPU, whatever device they were saved from.

    Raises:
        Compiled: a TorchScript archive.
        UnreadableFile: no file of `torch.save`, or a broken one.
    """
    with open(path, "rb") as file:
        return _read(file)


def archive(content: bytes) -> Any:
    """The object in a TorchScript archive, such as e3nn keeps in its layers; code is left out."""
    with zipfile.ZipFile(io.BytesIO(content)) as stored:
        return _of_zip(stored)


def _read(file: IO[bytes]) -> Any:
    try:
        start = file.read(4)
        file.seek(0)
        if start != b"PK\x03\x04":  # an old file may hold archives: look at its beginning
            return _of_legacy(file)
        with zipfile.ZipFile(file) as stored:
            if any(name.endswith("/constants.pkl") for name in stored.namelist()):
                raise Compiled("a TorchScript archive")
            return _of_zip(stored)
    except (MemoryError, FoundationModelError):
        raise
    except Exception as error:  # a broken or malicious pickle can raise anything
        raise UnreadableFile(f"{type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------ torch's two formats


def _of_zip(stored: zipfile.ZipFile) -> Any:
    (entry,) = (n for n in stored.namelist() if n.endswith("/data.pkl"))
    folder = entry.removesuffix("data.pkl")
    if folder + "byteorder" in stored.namelist() and stored.read(folder + "byteorder") != b"little":
        raise UnreadableFile("numbers of a big-endian machine")
    storages: dict[str, torch.Tensor] = {}

    def storage(saved: tuple[Any, ...]) -> torch.Tensor:
        kind, key, _, count = saved[1:5]
        if key not in storages:
            storages[key] = _numbers(stored.read(f"{folder}data/{key}"), _dtype_of(kind), count)
        return storages[key]

    return _Reader(io.BytesIO(stored.read(entry)), storage).load()


def _of_legacy(file: IO[bytes]) -> Any:
    """The format of torch before 1.6: pickles in a row, then the numbers of all storages."""
    storages: dict[str, tuple[torch.Tensor, int]] = {}

    def storage(saved: tuple[Any, ...]) -> Any:
        if saved[0] != "storage":  # a class, with its source
            return saved[1]
        kind, key, _, count, view = saved[1:6]
        if view is not None:
            raise UnreadableFile("views of storages")
        if key not in storages:
            storages[key] = torch.empty(count, dtype=_dtype_of(kind)), count
        return storages[key][0]

    def load() -> Any:
        return _Reader(file, storage).load()

    if load() != _LEGACY_MAGIC:
        raise UnreadableFile("no file of torch.save")
    load(), load()  # protocol, and facts of the machine
    content = load()
    for key in load():
        (count,) = struct.unpack("<q", file.read(8))
        target, expected = storages[key]
        if count != expected:
            raise UnreadableFile("storages of other sizes than said")
        raw = file.read(count * target.element_size())
        target.copy_(_numbers(raw, target.dtype, count))
    return content


def _numbers(raw: bytes, dtype: torch.dtype, count: int) -> torch.Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype)[:count]


_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _dtype_of(kind: type[Made]) -> torch.dtype:
    if kind.name not in _DTYPES:
        raise UnreadableFile(f"numbers of an unknown kind, {kind.name}")
    return _DTYPES[kind.name]


# ------------------------------------------------------------------------------ the pickle itself


class _Reader(pickle.Unpickler):
    """Makes data, and stand-ins for all else."""

    def __init__(self, file: IO[bytes], storage: Callable[[tuple[Any, ...]], Any]) -> None:
        super().__init__(file, encoding="latin1")
        self._storage = storage
        self._classes: dict[tuple[str, str], type[Made]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DATA:
            return _DATA[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        known = self._classes.get((module, name))
        if known is None:
            known = type(name, (Made,), {"module": module, "name": name})
            self._classes[module, name] = known
        return known

    def persistent_load(self, saved: Any) -> Any:
        return self._storage(saved)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    if not isinstance(storage, torch.Tensor):
        raise UnreadableFile("a tensor without numbers")
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


def _parameter(data: Any, requires_grad: bool = True, *_: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad=requires_grad and data.is_floating_point())


class _Dtype:
    """A kind of number of NumPy's; a pickle gives it its byte order as a state."""

    def __init__(self, code: str, *_: Any) -> None:
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])

    def read(self, raw: Any) -> np.ndarray[Any, Any]:
        if self.value.hasobject or not isinstance(raw, bytes):
            raise UnreadableFile("an array of objects")
        return np.frombuffer(raw, self.value)


class Array:
    """An array of NumPy's in `value`."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray[Any, Any] = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        flat = dtype.read(raw)
        self.value = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def _scalar(dtype: _Dtype, raw: Any = b"") -> Any:
    return dtype.read(raw)[0].item()


def _encoded(text: str, *_: Any) -> bytes:
    return text.encode("latin1")


# The only calls that are made, each of a function of this file, of torch's or of Python's own
# containers. Keys are the names by which pickles know them.
_DATA: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,
    ("builtins", "complex"): complex,
    ("torch", "Size"): tuple,
    ("torch", "device"): str,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("_codecs", "encode"): _encoded,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): Array,
    **{
        (f"numpy.{core}.multiarray", name): made
        for core in ("core", "_core")
        for name, made in (("_reconstruct", Array), ("scalar", _scalar))
    },
}
