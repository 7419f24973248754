"""Names of mace-torch's: checked before a run, substituted during it, restored after it.

mace-torch's `run_train.run` is one long function that looks its helpers up by name in its module.
We call it as it is and put our own helpers under some of those names while it runs. Builds of one
version differ, so what counts is that each name exists with the parameters that we rely on; the
names and reasons are rows of `substitutions`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any

from mace_lora.errors import UnsupportedUpstream
from mace_lora.upstream.substitutions import ROWS

TESTED = "0.3.16"


def version() -> str:
    """The installed version of mace-torch."""
    try:
        return metadata.version("mace-torch")
    except metadata.PackageNotFoundError:
        raise UnsupportedUpstream(
            f"mace-torch is not installed; install it with: pip install mace-torch=={TESTED}"
        ) from None


def module(name: str) -> ModuleType:
    """The module called `name`. `mace.tools.train` as an attribute would be the function."""
    return importlib.import_module(name)


def holder(key: str) -> tuple[object, str]:
    """The module or class in which `key` of ROWS is looked up, and the name that it has there."""
    row = ROWS[key]
    *path, name = row.attribute.split(".")
    return functools.reduce(getattr, path, module(row.module)), name


def current(key: str) -> Any:
    """What stands under `key` of ROWS now: upstream's own, or ours where it is substituted."""
    return getattr(*holder(key))


def problems(packages: Collection[str] = ("cuequivariance",)) -> list[str]:
    """What of upstream is not as we rely on it: a line each, nothing where all is well.

    Args:
        packages: those that are looked into as well, where they are installed.
    """
    wanted = {"", *(p for p in packages if importlib.util.find_spec(p))}
    return [p for key, row in ROWS.items() if row.package in wanted and (p := _problem(key))]


def _problem(key: str) -> str | None:
    row = ROWS[key]
    full = f"{row.module}.{row.attribute}"
    try:
        value = current(key)
    except (ImportError, AttributeError):
        return f"{full} does not exist"
    if not row.parameters:
        return None
    try:
        known = inspect.signature(value).parameters
    except (TypeError, ValueError):  # written in C
        return None
    missing = [p for p in row.parameters if p not in known]
    return f"{full} has no parameter {', '.join(missing)}" if missing else None


def check(*packages: str) -> None:
    """Raises UnsupportedUpstream where mace-torch (or one of `packages`) is not as relied on."""
    installed = version()
    found = problems(packages) if packages else problems()
    if found:
        raise UnsupportedUpstream(
            f"mace-torch {installed} doesn't fit: {'; '.join(found)}. "
            f"mace_lora is tested with mace-torch {TESTED}: pip install mace-torch=={TESTED}"
        )


# Upstream's own objects while ours stand in their place
_originals: dict[str, Any] = {}


def original(key: str) -> Any:
    """Upstream's own object under `key` of ROWS, whether or not ours stands in its place now."""
    return _originals[key] if key in _originals else current(key)


@contextlib.contextmanager
def substituted(substitutes: Mapping[str, object]) -> Iterator[None]:
    """Put `substitutes` (by key of ROWS) in place; restore what was there, whatever happens."""
    before = {key: current(key) for key in substitutes}
    outermost = {key: value for key, value in before.items() if key not in _originals}
    _originals.update(outermost)
    try:
        for key, value in substitutes.items():
            setattr(*holder(key), value)
        yield
    finally:
        for key, value in before.items():
            setattr(*holder(key), value)
        for key in outermost:
            del _originals[key]
