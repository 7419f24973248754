"""Which weights of a model are meant by targets, patterns and names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch

from mace_lora.adapters.layout import Block, Group, Site, Skipped, WeightLayout
from mace_lora.errors import ConfigError, NoLayerMatched
from mace_lora.model.layers import KINDS, reordered

# Constants of a model that can be trained in full: buffers, by the ends of their names
CONSTANTS = ("scale_shift.scale", "scale_shift.shift", "atomic_energies_fn.atomic_energies")


def find_tensors(model: torch.nn.Module) -> list[Site]:
    """Every parameter of `model` and its CONSTANTS, as matrices of one row of the kind `full`.

    Weights in another order than e3nn's, in which adapters are saved, are left out.
    """
    found = []
    for path, module in model.named_modules():
        if reordered(module):
            continue
        buffers = module.named_buffers(recurse=False)
        constants = [(n, b) for n, b in buffers if f"{path}.{n}".endswith(CONSTANTS)]
        for tensor, value in [*module.named_parameters(recurse=False), *constants]:
            size = math.prod(value.shape)
            if size:
                layout = WeightLayout(
                    "full",
                    tuple(value.shape),
                    (Group("all", 1, size),),
                    (Block(0, 1, size, 0),),
                )
                name = f"{path}.{tensor}".lstrip(".").removesuffix(".weight")
                found.append(Site(name, module, tensor, layout))
    return found


def saved_in_full(model: torch.nn.Module, patterns: tuple[str, ...]) -> dict[str, Site]:
    """The tensors that any of `patterns` matches, by name.

    Raises:
        NoLayerMatched: naming the pattern that matches nothing.
    """
    if not patterns:
        return {}
    sites = find_tensors(model)
    chosen, _ = select(sites, patterns, {}, kinds=())
    return {site.name: site for site in chosen}


def biases(model: torch.nn.Module, which: str, chosen: list[Site]) -> dict[str, Site]:
    """The biases of all layers, of the `chosen` ones, or none, by name.

    Raises:
        NoLayerMatched: there is none.
    """
    if which == "none":
        return {}
    found = {s.name: s for s in find_tensors(model) if s.tensor == "bias"}
    if which == "adapted":
        modules = {id(s.module) for s in chosen}
        found = {name: s for name, s in found.items() if id(s.module) in modules}
    if not found:
        raise NoLayerMatched(f"bias={which}: there is no such bias in this model")
    return found


def check_patterns(patterns: tuple[str, ...], sites: list[Site]) -> None:
    """Raises NoLayerMatched for a pattern of a rank or an alpha that matches no adapted layer."""
    for pattern in patterns:
        if not any(re.search(pattern, s.name) for s in sites):
            raise NoLayerMatched(_no_match(pattern, sites))


def select(
    sites: list[Site],
    targets: tuple[str, ...],
    presets: dict[str, tuple[str, ...]],
    kinds: Iterable[str] = KINDS,
) -> tuple[list[Site], list[Skipped]]:
    """The sites that any of `targets` matches, and the others as skipped.

    A target is a preset (kinds of layers by name), a kind of layer, or a regular expression that is
    searched for in the names of the sites.

    Raises:
        NoLayerMatched: naming the target that matches nothing.
        ConfigError: a target is no regular expression.
    """
    chosen: set[str] = set()
    for target in targets:
        meant = presets.get(target, (target,) if target in kinds else None)
        if meant is not None:
            matched = {s.name for s in sites if s.layout.kind in meant}
        else:
            try:
                matched = {s.name for s in sites if re.search(target, s.name)}
            except re.error as error:
                raise ConfigError(f"target {target!r} is no regular expression: {error}") from None
        if not matched:
            raise NoLayerMatched(_no_match(target, sites))
        chosen |= matched
    others = [
        Skipped(s.name, s.weight.numel(), f"{s.layout.kind} layer, not among the targets")
        for s in sites
        if s.name not in chosen
    ]
    return [s for s in sites if s.name in chosen], others


def _no_match(target: str, sites: list[Site]) -> str:
    names = sorted({s.name for s in sites})
    shown = ", ".join(names[:3]) if names else "none: this model has no layer that can be adapted"
    return (
        f"target {target!r} matches 0 of {len(names)} layers; layers are named like {shown}; "
        f"presets are default, all, {', '.join(KINDS)}"
    )
