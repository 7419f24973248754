"""Choose the layers, attach the adapters, freeze everything else, and report all three."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mace_lora.adapters.base import Adapter, AnyAdapter, plain_name
from mace_lora.adapters.full_update import FullUpdate
from mace_lora.adapters.registry import get_method
from mace_lora.config import AdapterConfig
from mace_lora.errors import ConfigError
from mace_lora.model.report import AdaptedLayer, InjectionReport
from mace_lora.model.selection import Choice, choose, part_of


def check_model(model: object) -> None:
    """Raises ConfigError unless `model` is a torch module, such as a name or a path of one."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"a model is needed, found {model!r}: load one with load_foundation or load_adapter"
        )


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, AnyAdapter]]:
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
    (rows, rank) for a factor lora_A and (rank, columns) for lora_B. Empty where there are none.

    Raises:
        ConfigError: `model` is no torch module.
    """
    return {
        f"{name}.{factor}": parameter
        for name, adapter in adapters(model)
        for factor, parameter in adapter.named_parameters()
    }


def config_of(model: torch.nn.Module) -> AdapterConfig | None:
    """What the adapters of `model` were injected with; None where it carries none."""
    configs = (adapter.config for _, adapter in adapters(model))
    return next((config for config in configs if isinstance(config, AdapterConfig)), None)


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
    _check_arguments(model, config)
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    choice = choose(model, config)
    layers = _attach(model, config, choice)
    trained = {id(p) for p in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return InjectionReport(config, layers, choice.skipped, before, _parts(model))


def _check_arguments(model: torch.nn.Module, config: object) -> None:
    if any(True for _ in adapters(model)):
        raise ConfigError("the model carries adapters already; merge them before injecting others")
    if not isinstance(config, AdapterConfig):
        raise ConfigError(
            f"an AdapterConfig is needed, found {config!r}: make one with "
            'AdapterConfig.create("lora", rank=8)'
        )


def _attach(model: torch.nn.Module, config: AdapterConfig, choice: Choice) -> list[AdaptedLayer]:
    """Make an adapter for every chosen weight and attach it."""
    method, options = get_method(config.method), config.options
    made = [(site, method.make(site, options.for_layer(site.name))) for site in choice.adapted]
    made += [(site, FullUpdate(site.layout, options)) for site in choice.in_full]
    layers = []
    for site, adapter in made:
        size = site.weight.numel()
        adapter.config = config
        adapter.attach(site, model)
        trainable = sum(p.numel() for p in adapter.parameters())
        layers.append(AdaptedLayer(site.name, site.layout.kind, size, trainable, adapter.notes()))
    return layers


def _parts(model: torch.nn.Module) -> dict[str, tuple[int, int, int]]:
    """Per part of the model (interactions.0, readouts.1, ...): total, trainable, adapted layers.

    Totals count the base parameters and the adapters' together.
    """
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        counts = parts.setdefault(part_of(name), [0, 0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    for name, _ in adapters(model):
        parts[part_of(name)][2] += 1
    return {part: (total, trainable, n) for part, (total, trainable, n) in parts.items()}
