"""What identifies a base model, whatever its precision, device, kernels or adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch

from mace_lora.adapters.base import Adapter, plain_name


def base_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The base model's own parameters by their original names, without any adapter's."""
    foreign = {id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
    return {plain_name(n): p for n, p in model.named_parameters() if id(p) not in foreign}


def fingerprint(model: torch.nn.Module, without: Collection[str] = ()) -> str:
    """A SHA-256 over the base parameters in single precision, and their names and shapes.

    Single precision, so that a float32 file and its float64 copy are the same base.

    Args:
        without: names of parameters that don't count.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_state(model).items()):
        if name in without:
            continue
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
