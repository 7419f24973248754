"""Choose the layers, attach the adapters, freeze everything else, and report all three."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mace_lora.adapters.base import Adapter, plain_name
from mace_lora.adapters.layout import Skipped
from mace_lora.adapters.low_rank import FullUpdate
from mace_lora.adapters.registry import get_method
from mace_lora.config import AdapterConfig
from mace_lora.errors import ConfigError, NoLayerMatched
from mace_lora.model.layers import find_sites
from mace_lora.model.report import AdaptedLayer, InjectionReport
from mace_lora.model.selection import biases, check_patterns, saved_in_full, select


def check_model(model: object) -> None:
    """Raises ConfigError unless `model` is a torch module, such as a name or a path of one."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"a model is needed, found {model!r}: load one with load_foundation or load_adapter"
        )


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Every adapter in `model` with the name of the weight it changes, in model order.

    Raises:
        ConfigError: `model` is no torch module.
    """
    check_model(model)
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            yield plain_name(path).removesuffix(".weight"), module


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every adapter parameter, by `<weight>.<factor>`: what is trained, and what is saved.

    For an optimiser: `torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-3)`. Shapes are
    (rows, rank) for a factor A and (rank, columns) for B. Empty where there are no adapters.

    Raises:
        ConfigError: `model` is no torch module.
    """
    return {
        f"{name}.{factor}": parameter
        for name, adapter in adapters(model)
        for factor, parameter in adapter.named_parameters()
    }


@contextmanager
def disable_adapter(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Within `with disable_adapter(model):` it predicts as before the injection.

    Its adapters stay attached, and take effect again after the block, also after an error in it.
    E0s, scale and shift are those that the adapter's run started with.
    """
    hooks = [
        # the last input is what an adapter changes: a weight, or the output of a layer
        adapter.register_forward_hook(lambda _, inputs, output: inputs[-1])
        for _, adapter in adapters(model)
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def inject(model: torch.nn.Module, config: AdapterConfig) -> InjectionReport:
    """Attach adapters to `model` in place and freeze its own parameters.

    Args:
        model: any MACE model, in e3nn's or cuequivariance's layout, on any device, of any dtype.
        config: the method, its options and its targets.

    Returns:
        What was adapted, what was not and why, and the parameter counts before and after.

    An adapted model can be copied with `deepcopy`, trained, and moved to another device or
    precision. torch doesn't pickle it: write it with `save_adapter`, or `merge` it first.

    Raises:
        ConfigError: the model carries adapters already, or an argument is of a wrong type.
        NoLayerMatched: a target matches no layer.
    """
    if any(True for _ in adapters(model)):
        raise ConfigError("the model carries adapters already; merge them before injecting others")
    if not isinstance(config, AdapterConfig):
        raise ConfigError(
            f"an AdapterConfig is needed, found {config!r}: make one with "
            'AdapterConfig.create("lora", rank=8)'
        )
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    method = get_method(config.method)
    sites, skipped = find_sites(model)
    presets = {"default": method.default_kinds, "all": method.kinds}
    skipped += [
        Skipped(s.name, s.weight.numel(), f"{config.method} leaves these alone: {s.layout.kind}")
        for s in sites
        if s.layout.kind not in method.kinds
    ]
    options = config.options
    in_full = saved_in_full(model, options.modules_to_save)
    sites = [s for s in sites if s.layout.kind in method.kinds and s.name not in in_full]
    chosen, left_out = select(sites, options.targets, presets)
    if options.exclude:
        excluded = {s.name for s in select(chosen, options.exclude, presets)[0]}
        left_out += [
            Skipped(s.name, s.weight.numel(), "excluded") for s in chosen if s.name in excluded
        ]
        chosen = [s for s in chosen if s.name not in excluded]
    if not chosen and not in_full:
        raise NoLayerMatched(f"exclude={' '.join(options.exclude)} leaves nothing to train")
    check_patterns(options.layer_patterns(), chosen)
    in_full |= biases(model, options.bias, chosen)
    made = [(s, method.make(s, options.for_layer(s.name))) for s in chosen]
    made += [(s, FullUpdate(s.layout, options)) for s in in_full.values()]
    layers = []
    for site, adapter in made:
        size = site.weight.numel()
        adapter.config = config
        adapter.attach(site, model)
        trainable = sum(p.numel() for p in adapter.parameters())
        layers.append(AdaptedLayer(site.name, site.layout.kind, size, trainable, adapter.notes()))
    freeze_base(model)
    skipped = [s for s in skipped + left_out if s.name.removesuffix(".weight") not in in_full]
    return InjectionReport(config, layers, skipped, before, model_parts(model))


def freeze_base(model: torch.nn.Module) -> None:
    """Leave the adapters' parameters trainable, by identity, and nothing else."""
    trainable = {id(p) for p in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


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
