"""Devices that torch finds on this machine."""

from __future__ import annotations

import importlib.util

import torch

from mace_lora.errors import ConfigError

_KINDS = ("cpu", "cuda", "mps", "xpu")
# Packages that mace-torch imports for Intel's GPUs
_XPU_PACKAGES = ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch")


def check_device(name: str, dtype: str = "", called: str = "--device=") -> None:
    """Refuse a device that is not there, before torch does it in its own words.

    Args:
        name: cpu, cuda, cuda:1, mps or xpu.
        dtype: the precision, if one is asked for: float32 or float64.
        called: what messages put before the name.

    Raises:
        ConfigError: there is no such device, or it can't compute in this precision.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"{called}{name!s}: no kind of device; {' or '.join(_found())} is expected"
        ) from None
    kind = device.type
    if kind not in _KINDS or _count(kind) == 0:
        raise ConfigError(
            f"{called}{name}: torch finds no {kind.upper()} device; "
            f"use {called}{' or '.join(_found())}"
        )
    if device.index is not None and device.index >= _count(kind):
        raise ConfigError(
            f"{called}{name}: torch finds {_count(kind)} such devices, counted from 0"
        )
    if kind == "mps" and dtype == "float64":
        raise ConfigError(
            f"{called}{name} computes in single precision alone: give --default_dtype=float32"
        )
    missing = [p for p in _XPU_PACKAGES if kind == "xpu" and importlib.util.find_spec(p) is None]
    if missing:
        raise ConfigError(f"{called}{name}: mace-torch needs the packages {' and '.join(missing)}")


def _count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    return 1


def _found() -> list[str]:
    return [kind for kind in _KINDS if _count(kind)]
