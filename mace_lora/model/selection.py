"""Choose the weights that an injection changes: targets, exceptions, what is trained in full."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch

from mace_lora.adapters.layout import Site, Skipped
from mace_lora.adapters.registry import get_method
from mace_lora.config import AdapterConfig
from mace_lora.errors import ConfigError, NoLayerMatched, closest, did_you_mean
from mace_lora.model.layers import KINDS, find_biases, find_others, find_sites, find_tensors


@dataclass(frozen=True)
class Choice:
    """What an injection changes.

    Attributes:
        adapted: the weights that get an adapter of the method.
        in_full: those that are trained in full, E0s, scale and shift included.
        skipped: parameters that are left alone, and why.
    """

    adapted: list[Site]
    in_full: list[Site]
    skipped: list[Skipped]


def choose(model: torch.nn.Module, config: AdapterConfig) -> Choice:
    """The weights of `model` that `config` means.

    Raises:
        ConfigError: a target is not a regular expression.
        NoLayerMatched: a target or another pattern matches nothing, or nothing is left to train.
    """
    method, options = get_method(config.method), config.options
    presets = {"default": method.default_kinds, "all": method.kinds}
    sites, skipped = find_sites(model)
    if "other" in method.kinds:
        sites += find_others(model)
    fitting = [site for site in sites if site.layout.kind in method.kinds]
    skipped += [
        _skip(site, f"{config.method} leaves these alone: {site.layout.kind}")
        for site in sites
        if site.layout.kind not in method.kinds
    ]
    in_full = select(find_tensors(model), options.modules_to_save)
    fitting = _without(fitting, in_full)
    targeted = select(fitting, options.targets, presets, KINDS)
    skipped += [
        _skip(site, f"{site.layout.kind} layer, not among the targets")
        for site in _without(fitting, targeted)
    ]
    excluded = select(targeted, options.exclude, presets, KINDS)
    skipped += [_skip(site, "excluded") for site in excluded]
    frozen = [s for part in options.frozen_parts() for s in _of_part(part, sites)]
    skipped += [_skip(site, "frozen") for site in frozen]
    adapted = _without(targeted, [*excluded, *frozen])
    if not adapted and not in_full:
        named = {"exclude": options.exclude, "freeze": options.frozen_parts()}
        left_out = ", ".join(f"{flag}={' '.join(v)}" for flag, v in named.items() if v)
        raise NoLayerMatched(f"{left_out} leaves nothing to train")
    _check_patterns(options.layer_patterns(), adapted)
    in_full += _without(_biases(model, options.bias, adapted), [*in_full, *adapted, *frozen])
    trained = {site.name for site in [*adapted, *in_full]}
    reasons = {s.name.removesuffix(".weight"): s for s in skipped}  # of several the last
    return Choice(adapted, in_full, [s for name, s in reasons.items() if name not in trained])


def _skip(site: Site, reason: str) -> Skipped:
    return Skipped(site.name, site.weight.numel(), reason)


def _without(sites: list[Site], others: list[Site]) -> list[Site]:
    names = {site.name for site in others}
    return [site for site in sites if site.name not in names]


def _biases(model: torch.nn.Module, which: str, adapted: list[Site]) -> list[Site]:
    """The biases of all layers, of the `adapted` ones, or none.

    Raises:
        NoLayerMatched: there is none.
    """
    if which == "none":
        return []
    found = find_biases(model)
    if which == "adapted":
        modules = {id(site.module) for site in adapted}
        found = [site for site in found if id(site.module) in modules]
    if not found:
        raise NoLayerMatched(f"bias={which}: there is no such bias in this model")
    return found


def _check_patterns(patterns: tuple[str, ...], sites: list[Site]) -> None:
    """Raises NoLayerMatched for a pattern of a rank or an alpha that matches no adapted layer."""
    for pattern in patterns:
        if not any(re.search(pattern, s.name) for s in sites):
            raise NoLayerMatched(_no_match(pattern, sites))


def select(
    sites: list[Site],
    targets: tuple[str, ...],
    presets: dict[str, tuple[str, ...]] | None = None,
    kinds: Collection[str] = (),
) -> list[Site]:
    """The sites that any of `targets` matches: presets, kinds, or expressions over their names.

    Raises:
        NoLayerMatched: naming the target that matches nothing.
        ConfigError: a target is not a regular expression.
    """
    chosen: set[str] = set()
    for target in targets:
        meant = (presets or {}).get(target, (target,) if target in kinds else None)
        if meant is not None:
            matched = {s.name for s in sites if s.layout.kind in meant}
        else:
            try:
                matched = {s.name for s in sites if re.search(target, s.name)}
            except re.error as error:
                raise ConfigError(
                    f"target {target!r} is not a regular expression: {error}"
                ) from None
        if not matched:
            raise NoLayerMatched(_no_match(target, sites))
        chosen |= matched
    return [s for s in sites if s.name in chosen]


def _of_part(part: str, sites: list[Site]) -> list[Site]:
    """The sites in a part of the model, such as `interactions.0`, or `interactions` for all.

    Raises:
        NoLayerMatched: there is no such part.
    """
    found = [site for site in sites if f"{site.name}.".startswith(f"{part}.")]
    if not found:
        raise NoLayerMatched(f"freeze={part}: no such part; {did_you_mean(part, _parts(sites))}")
    return found


def _parts(sites: list[Site]) -> list[str]:
    """The parts in which the sites are, all of a kind after each other."""
    names = {part_of(site.name) for site in sites}
    return sorted(names | {name.partition(".")[0] for name in names})


def _no_match(target: str, sites: list[Site]) -> str:
    names = sorted({s.name for s in sites})
    shown = ", ".join(names[:3]) if names else "none: this model has no layer that can be adapted"
    hint = closest(target, [*_parts(sites), *names, "default", "all", *KINDS])
    return (
        f"target {target!r} matches 0 of {len(names)} layers; layers are named like {shown}, in "
        f"the parts {', '.join(_parts(sites))}; presets are default, all, {', '.join(KINDS)}. "
        f"{hint}"
    ).rstrip()


def part_of(name: str) -> str:
    """The part of a model in which a parameter is: `interactions.0`, `node_embedding`."""
    first, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    return f"{first}.{index}" if index.isdigit() else first
