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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, ClassVar

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
    arguments: tuple[object, ...]
    state: dict[str, object]
    entries: list[object]

    def __new__(cls, *arguments: object, **keywords: object) -> Made:
        made = object.__new__(cls)
        made.arguments = (*arguments, *keywords.values())
        made.state, made.entries = {}, []
        return made

    def __init__(self, *arguments: object, **keywords: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        # (attributes, slots) where a class has slots; anything else is a form of its own
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict):
                self.state.update(part)

    # What a pickle does to subclasses of list and dict
    def append(self, entry: object) -> None:
        self.entries.append(entry)

    def extend(self, entries: Iterable[object]) -> None:
        self.entries.extend(entries)

    def __setitem__(self, key: object, entry: object) -> None:
        self.entries.append((key, entry))

    @property
    def children(self) -> dict[str, Made]:
        """As a torch module: its submodules by name, in order."""
        kept = self.held(_CHILDREN)
        return {name: child for name, child in kept.items() if isinstance(child, Made)}

    def tensors(self, place: str) -> dict[str, torch.Tensor]:
        """As a torch module: its own tensors, of `_parameters` or `_buffers`, by name."""
        kept = self.held(place)
        return {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}

    def held(self, place: str) -> dict[str, object]:
        """A table among its attributes, an empty one where there is none."""
        kept = self.state.get(place) or {}
        if not isinstance(kept, dict):
            raise UnreadableFile(f"a {self.name} whose {place} are no table")
        return kept

    def get(self, path: str, default: object = None) -> object:
        """What `path` names, such as `radial_embedding.cutoff_fn.p`; `default` if nothing."""
        here: object = self
        for name in path.split("."):
            if not isinstance(here, Made):
                return default
            places = (here.state, *map(here.held, _PLACES))
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


def read(path: str | Path) -> object:
    """The object in a file of `torch.save`: a `Made`, a container, a tensor or a plain value.

    All tensors are on the CPU, whatever device they were saved from.

    Raises:
        Compiled: a TorchScript archive.
        UnreadableFile: no file of `torch.save`, or a broken one.
    """
    with open(path, "rb") as file:
        return _read(file)


def archive(content: bytes) -> object:
    """The object in a TorchScript archive, such as e3nn keeps in its layers; code is left out."""
    with zipfile.ZipFile(io.BytesIO(content)) as stored:
        return _of_zip(stored)


def _read(file: IO[bytes]) -> object:
    try:
        start = file.read(4)
        if not start:
            raise UnreadableFile("it is empty")
        file.seek(0)
        if start != b"PK\x03\x04":  # an old file may hold archives: look at its beginning
            return _of_legacy(file)
        with zipfile.ZipFile(file) as stored:
            if any(name.endswith("/constants.pkl") for name in stored.namelist()):
                raise Compiled("a TorchScript archive")
            return _of_zip(stored)
    except (MemoryError, FoundationModelError):
        raise
    except zipfile.BadZipFile as error:
        raise UnreadableFile("its end is missing or broken: was it copied in full?") from error
    except Exception as error:  # a broken or malicious pickle can raise anything
        raise UnreadableFile(f"{type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------ torch's two formats


def _of_zip(stored: zipfile.ZipFile) -> object:
    (entry,) = (n for n in stored.namelist() if n.endswith("/data.pkl"))
    folder = entry.removesuffix("data.pkl")
    if folder + "byteorder" in stored.namelist() and stored.read(folder + "byteorder") != b"little":
        raise UnreadableFile("numbers of a big-endian machine")
    storages: dict[str, torch.Tensor] = {}

    def storage(saved: tuple[object, ...]) -> torch.Tensor:
        dtype, key, count = _storage(saved)
        if key not in storages:
            storages[key] = _numbers(stored.read(f"{folder}data/{key}"), dtype, count)
        return storages[key]

    return _Reader(io.BytesIO(stored.read(entry)), storage).load()


def _of_legacy(file: IO[bytes]) -> object:
    """The format of torch before 1.6: pickles in a row, then the numbers of all storages."""
    storages: dict[str, tuple[torch.Tensor, int]] = {}

    def storage(saved: tuple[object, ...]) -> object:
        if saved[0] != "storage":  # a class, with its source
            return saved[1]
        dtype, key, count = _storage(saved)
        if saved[5] is not None:
            raise UnreadableFile("views of storages")
        if key not in storages:
            storages[key] = torch.empty(count, dtype=dtype), count
        return storages[key][0]

    def load() -> object:
        return _Reader(file, storage).load()

    try:
        magic = load()
    except Exception as error:  # of a text, whatever its letters mean to a pickle
        raise UnreadableFile("no file of torch.save") from error
    if magic != _LEGACY_MAGIC:
        raise UnreadableFile("no file of torch.save")
    load(), load()  # protocol, and facts of the machine
    content, keys = load(), load()
    if not isinstance(keys, list):
        raise UnreadableFile("no list of storages")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        target, expected = storages[key]
        if count != expected:
            raise UnreadableFile("storages of other sizes than said")
        raw = file.read(count * target.element_size())
        target.copy_(_numbers(raw, target.dtype, count))
    return content


def _storage(saved: tuple[object, ...]) -> tuple[torch.dtype, str, int]:
    """Kind, key and count of the numbers that a pickle speaks of."""
    kind, key, _, count = saved[1:5]
    if not (isinstance(key, str) and isinstance(count, int)):
        raise UnreadableFile(f"a storage called {key} of {count} numbers")
    return _dtype_of(kind), key, count


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


def _dtype_of(kind: object) -> torch.dtype:
    name = kind.name if isinstance(kind, type) and issubclass(kind, Made) else str(kind)
    if name not in _DTYPES:
        raise UnreadableFile(f"numbers of an unknown kind, {name}")
    return _DTYPES[name]


# ------------------------------------------------------------------------------ the pickle itself


class _Reader(pickle.Unpickler):
    """Makes data, and stand-ins for all else."""

    def __init__(self, file: IO[bytes], storage: Callable[[tuple[object, ...]], object]) -> None:
        super().__init__(file, encoding="latin1")
        self._storage = storage
        self._classes: dict[tuple[str, str], type[Made]] = {}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _DATA:
            return _DATA[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        known = self._classes.get((module, name))
        if known is None:
            known = type(name, (Made,), {"module": module, "name": name})
            self._classes[module, name] = known
        return known

    def persistent_load(self, saved: tuple[object, ...]) -> object:
        return self._storage(saved)


def _tensor(
    storage: object, offset: int, size: Iterable[int], stride: Iterable[int], *_: object
) -> torch.Tensor:
    if not isinstance(storage, torch.Tensor):
        raise UnreadableFile("a tensor without numbers")
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


def _parameter(data: torch.Tensor, requires_grad: bool = True, *_: object) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad=requires_grad and data.is_floating_point())


class _Dtype:
    """A kind of number of NumPy's; a pickle gives it its byte order as a state."""

    def __init__(self, code: str, *_: object) -> None:
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] == "<":
            self.value = self.value.newbyteorder("<")
        elif state[1] == ">":
            self.value = self.value.newbyteorder(">")

    def read(self, raw: object) -> np.ndarray:
        if self.value.hasobject or not isinstance(raw, bytes):
            raise UnreadableFile("an array of objects")
        return np.frombuffer(raw, self.value)


class Array:
    """An array of NumPy's in `value`."""

    def __init__(self, *_: object) -> None:
        self.value: np.ndarray = np.zeros(0)

    def __setstate__(self, state: tuple[object, tuple[int, ...], _Dtype, bool, object]) -> None:
        _, shape, dtype, fortran, raw = state
        flat = dtype.read(raw)
        self.value = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def _scalar(dtype: _Dtype, raw: object = b"") -> object:
    found: object = dtype.read(raw)[0].item()
    return found


def _encoded(text: str, *_: object) -> bytes:
    return text.encode("latin1")


# The only calls that are made, each of a function of this file, of torch's or of Python's own
# containers. Keys are the names by which pickles know them.
_DATA: dict[tuple[str, str], object] = {
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
