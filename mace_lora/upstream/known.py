"""What can be known of mace-torch without importing it: its flags, and the names of its models.

Importing any part of mace brings torch and e3nn along, which takes seconds. Both are read from the
places where mace-torch keeps them, so that they are those of the installed version.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from mace_lora.errors import FoundationModelError, UnsupportedUpstream, did_you_mean
from mace_lora.parsing import ExistingFile

MINI = "mini"
# Downloaded by mace-torch as well, but in none of its tables
_OTHER_MODELS = ("small_off", "medium_off", "large_off", "mace_omol")
TRUST_HELP = (
    "run .model files, which can be any program, instead of reading them: for files that can't be "
    "read, of a version of mace that is installed"
)
_TABLES = ("mace_mp_urls", "polar_model_urls")


def build_parser() -> argparse.ArgumentParser:
    """mace-torch's own parser for training, with all its flags."""
    try:
        module = importlib.import_module(f"{_tools_alone()}.arg_parser")
    except (ImportError, OSError):  # an import of its own that its package would have served
        module = importlib.import_module("mace.tools.arg_parser")
    build = cast("Callable[[], argparse.ArgumentParser]", module.build_default_arg_parser)
    return build()


def _tools_alone() -> str:
    """The name of a package that is `mace.tools` without what its `__init__` imports."""
    name = "_mace_tools_alone"
    if name not in sys.modules:
        folder = _folder() / "tools"
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # not executed
    return name


def _folder() -> Path:
    spec = importlib.util.find_spec("mace")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedUpstream("mace-torch is not installed: pip install mace-torch")
    return Path(spec.submodule_search_locations[0])


def foundation_models() -> list[str]:
    """Names of foundation models that mace-torch downloads by itself."""
    return sorted({*_in_tables(), *_OTHER_MODELS})


@functools.cache
def _in_tables() -> tuple[str, ...]:
    """The keys of mace-torch's tables of models, as they stand in its source."""
    found: list[str] = []
    source = _folder() / "calculators" / "foundations_models.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if names & set(_TABLES):
                keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
                found += [key for key in keys if isinstance(key, str)]
    return tuple(found)


class ExistingModel(ExistingFile):
    """A foundation model: `mini`, a name that mace-torch knows, or a `.model` file."""

    def check(self, called: str) -> None:
        if self == MINI or self in foundation_models():
            return
        path = Path(self).expanduser()
        if path.is_dir():
            hint = " (an adapter goes to --adapter, beside its base model)"
            raise FoundationModelError(
                f"{called} is a folder; expected a .model file, or a name"
                + hint * (path / "adapter_config.json").exists()
            )
        if not path.is_file():
            raise FoundationModelError(
                f"{called}: there is no such file, and no model of that name; "
                f"{did_you_mean(self, [MINI, *foundation_models()])}"
            )
