"""Choose the layers, attach the adapters, freeze everything else, and report all three."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from mace_lora.adapters.base import Adapter, plain_name
from mace_lora.adapters.registry import get_method
from mace_lora.blocks import KINDS, Site, Skipped, find_sites
from mace_lora.config import AdapterConfig
from mace_lora.errors import ConfigError, NoLayerMatched
from mace_lora.report import AdaptedLayer, InjectionReport


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Every adapter in `model` with the name of the weight it changes, in model order."""
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            yield plain_name(path).removesuffix(".weight"), module


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every adapter parameter, by `<weight>.<factor>`: what is trained, and what is saved."""
    return {
        f"{name}.{factor}": parameter
        for name, adapter in adapters(model)
        for factor, parameter in adapter.named_parameters()
    }


def inject(model: torch.nn.Module, config: AdapterConfig) -> InjectionReport:
    """Attach adapters to `model` in place and freeze its own parameters.

    Args:
        model: any MACE model, in e3nn's or cuequivariance's layout, on any device, of any dtype.
        config: the method, its options and its targets.

    Returns:
        What was adapted, what was not and why, and the parameter counts before and after.

    Raises:
        ConfigError: the model carries adapters already.
        NoLayerMatched: a target matches no layer.
    """
    if any(True for _ in adapters(model)):
        raise ConfigError("the model carries adapters already; merge them before injecting others")
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    method = get_method(config.method)
    sites, skipped = find_sites(model)
    presets = {"default": method.default_kinds, "all": method.kinds}
    skipped += [
        Skipped(s.name, s.weight.numel(), f"{config.method} leaves these alone: {s.layout.kind}")
        for s in sites
        if s.layout.kind not in method.kinds
    ]
    sites = [s for s in sites if s.layout.kind in method.kinds]
    chosen, left_out = select(sites, config.options.targets, presets)
    layers = []
    for site in chosen:
        size = site.weight.numel()
        adapter = method.make(site, config.options)
        adapter.config = config
        adapter.attach(site, model)
        trainable = sum(p.numel() for p in adapter.parameters())
        layers.append(AdaptedLayer(site.name, site.layout.kind, size, trainable, adapter.notes()))
    freeze_base(model)
    return InjectionReport(config, layers, skipped + left_out, before, model_parts(model))


def freeze_base(model: torch.nn.Module) -> None:
    """Leave the adapters' parameters trainable, by identity, and nothing else."""
    trainable = {id(p) for p in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


def select(
    sites: list[Site], targets: tuple[str, ...], presets: dict[str, tuple[str, ...]]
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
        kinds = presets.get(target, (target,) if target in KINDS else None)
        if kinds is not None:
            matched = {s.name for s in sites if s.layout.kind in kinds}
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


def model_parts(model: torch.nn.Module) -> dict[str, tuple[int, int, int]]:
    """Per part of the model (interactions.0, readouts.1, ...): total, trainable, adapted layers.

    Totals count the base parameters and the adapters' together.
    """
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        counts = parts.setdefault(_part(name), [0, 0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    for name, _ in adapters(model):
        parts[_part(name)][2] += 1
    return {part: (total, trainable, n) for part, (total, trainable, n) in parts.items()}


def _part(name: str) -> str:
    first, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    return f"{first}.{index}" if index.isdigit() else first
