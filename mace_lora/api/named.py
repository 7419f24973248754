"""Several adapters of one model in memory, by name, as in PEFT: add, choose, weigh, delete."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import torch

from mace_lora.config import AdapterConfig
from mace_lora.errors import ArtefactError, ConfigError, MaceLoraError, did_you_mean
from mace_lora.model import artefact
from mace_lora.model.description import Description, describe, restore_constants
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.identity import is_same
from mace_lora.model.injection import (
    adapter_parameters,
    adapters,
    check_model,
    config_of,
    disable_adapter,
    inject,
)
from mace_lora.model.merging import changes, check_mergeable, unload

DEFAULT = "default"  # the name of an adapter that was given none
UNNAMED = ""  # that of one from a directory, which is kept until there is another
_KEPT = "_mace_lora_adapters"
# By name of a weight, how much it changes
Updates = dict[str, torch.Tensor]


@dataclass
class _Stored:
    """An adapter that isn't attached now: factors, and E0s, scale and shift with it."""

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    constants: Description


@dataclass
class _Named:
    """What a model knows of its adapters.

    Attributes:
        stored: by name; those of the attached one are as they were when it was attached.
        active: weights by name.
    """

    stored: dict[str, _Stored] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)


def add_adapter(model: torch.nn.Module, name: str, source: AdapterConfig | str | Path) -> None:
    """Give `model` another adapter; `set_adapter(model, name)` attaches it.

    Args:
        model: with adapters or without; the one that it carries is called `default`, if it came
            from `inject` or `load_adapter`.
        name: a new one.
        source: a directory, of an adapter of the same start, or a configuration, for fresh factors.

    Raises:
        ConfigError: the name is taken.
        ArtefactError: the directory is broken, or its run started from another model.
    """
    named = _of(model)
    if name in named.stored:
        raise ConfigError(f"there is an adapter {name!r} already; delete_adapter(model, {name!r})")
    _keep(model, named)
    if isinstance(source, AdapterConfig):
        active = dict(named.active)
        constants = _constants(model)
        unload(model)
        inject(model, source)
        named.stored[name] = _taken(model, source, constants)
        _attach(model, named, active)
        return
    content = fitting(model, source)
    named.stored[name] = _Stored(content.config, dict(content.tensors), content.model)


def active_adapters(model: torch.nn.Module) -> dict[str, float]:
    """The attached adapters with their weights; empty where the model is the base."""
    return {name: weight for name, weight in _of(model).active.items() if name != UNNAMED}


def delete_adapter(model: torch.nn.Module, name: str) -> None:
    """Forget an adapter; if it was attached, the model is left as the base.

    Raises:
        ConfigError: there is none of that name.
    """
    named = _of(model)
    _known(named, [name])
    if name in named.active:
        unload(model)
        named.active = {}
    named.stored.pop(name, None)


def choose(model: torch.nn.Module, weights: Mapping[str, float]) -> None:
    """Attach the adapters of these names, each with a weight, in the place of what is attached.

    One of weight 1 is attached as it is, to be trained, say. Several, or other weights, become one
    update of all weights, W + sum_i w_i (W_i - W), to predict with; E0s, scale and shift become the
    mean weighted by w_i where the adapters differ in them.

    Raises:
        ConfigError: no such adapter, or weights that aren't numbers or make no mean.
        NotMergeable: one of several depends on the input.
    """
    named = _of(model)
    _known(named, weights)
    check_weights(weights)
    _switch(model, named, weights)


def choose_directory(model: torch.nn.Module, folder: str | Path) -> None:
    """Attach an adapter from a directory, in the place of what is attached.

    Raises:
        ArtefactError: the directory is broken, or its run started from another model.
    """
    content = fitting(model, folder)
    new = _Stored(content.config, dict(content.tensors), content.model)
    _switch(model, _of(model), {UNNAMED: 1.0}, {UNNAMED: new})


def names(model: torch.nn.Module) -> list[str]:
    """Of all adapters that `model` has in memory."""
    return [name for name in _of(model).stored if name != UNNAMED]


def fitting(model: torch.nn.Module, folder: str | Path) -> artefact.Artefact:
    """What a directory holds, if its run started from `model` as it is without adapters.

    Raises:
        ArtefactError: it didn't, or the directory is broken.
    """
    content = artefact.read(folder)
    if not is_same(model, content.model) or not same_places(describe(model), content.model):
        found, asked = fingerprint(model), content.model["fingerprint"]
        raise ArtefactError(
            f"{folder} does not fit this model: it started from a model of elements "
            f"{content.model['atomic_numbers']}, heads {content.model['heads']}, fingerprint "
            f"{asked[:12]}, and this one has {describe(model)['atomic_numbers']}, "
            f"{describe(model)['heads']}, {found[:12]}; "
            "load it with load_adapter(base, folder)"
        )
    return content


def same_places(one: Description, other: Description) -> bool:
    """Whether elements and heads are the same."""
    return all(one[key] == other[key] for key in ("atomic_numbers", "heads"))


# ------------------------------------------------------------------ sums


_CONSTANTS = ("atomic_energies", "scale", "shift")


def check_weights(weights: object) -> None:
    """Raises ConfigError unless there are adapters, each with a finite number."""
    if not weights or not isinstance(weights, Mapping):
        raise ConfigError(
            "nothing to combine: give adapters with their weights, such as "
            '{"a_adapter": 0.5, "b_adapter": 0.5}'
        )
    for adapter, weight in weights.items():
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ConfigError(f"the weight of {adapter} must be a finite number, found {weight!r}")


def updates(model: torch.nn.Module) -> Updates:
    """What the adapters of `model` change, by name of a weight.

    Raises:
        NotMergeable: an adapter depends on the input.
    """
    check_mergeable(model)
    return {change.name: change.update.detach() for change in changes(model)}


def weighted_sum(every: Sequence[Updates], weights: Sequence[float]) -> Updates:
    """Of the updates of several adapters, some of which may leave a weight alone."""
    sums: Updates = {}
    for own, weight in zip(every, weights, strict=True):
        for name, update in own.items():
            part = weight * update
            sums[name] = sums[name] + part if name in sums else part
    return sums


def mean_constants(descriptions: list[tuple[float, Description]]) -> Description:
    """E0s, scale and shift: what all agree on, or the mean by the given weights.

    Raises:
        ConfigError: they differ, and the weights sum to zero.
    """
    mean: Description = {}
    total = sum(weight for weight, _ in descriptions)
    for key in _CONSTANTS:
        values = [d[key] for _, d in descriptions]
        if all(v == values[0] for v in values):
            mean[key] = values[0]
        elif total == 0:
            raise ConfigError(
                f"the runs of these adapters differ in {key}, of which a mean with weights that "
                "sum to zero makes no sense"
            )
        else:
            stacked = torch.tensor(values, dtype=torch.float64)
            shares = torch.tensor([w for w, _ in descriptions], dtype=torch.float64) / total
            mean[key] = torch.tensordot(shares, stacked, dims=1).tolist()
    return mean


# ------------------------------------------------------------------ what a model keeps


def _of(model: torch.nn.Module) -> _Named:
    """What `model` keeps; nothing is active any more where adapters were removed or merged."""
    check_model(model)
    named = model.__dict__.setdefault(_KEPT, _Named())
    assert isinstance(named, _Named)
    attached = config_of(model) is not None
    if attached and not named.active:
        named.active = {DEFAULT: 1.0}
    elif not attached:
        named.active = {}
    return named


def _known(named: _Named, asked: Iterable[str]) -> None:
    known = [n for n in dict.fromkeys([*named.stored, *named.active]) if n != UNNAMED]
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"no adapter {name!r}: {did_you_mean(name, known)}"
                if known
                else f"no adapter {name!r}: the model has none"
            )


def _keep(model: torch.nn.Module, named: _Named) -> None:
    config = config_of(model)
    if config is not None and list(named.active.values()) == [1.0]:
        (name,) = named.active
        named.stored[name] = _taken(model, config, _constants(model))


def _taken(model: torch.nn.Module, config: AdapterConfig, constants: Description) -> _Stored:
    factors = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    return _Stored(config, factors, constants)


def _constants(model: torch.nn.Module) -> Description:
    with disable_adapter(model):  # E0s, scale and shift may be adapted
        return describe(model)


def _switch(
    model: torch.nn.Module,
    named: _Named,
    weights: Mapping[str, float],
    new: Mapping[str, _Stored] | None = None,
) -> None:
    """Attach others, of those stored and the `new` ones; after an error all is as it was.

    What the attached one has learnt is stored.
    """
    _keep(model, named)
    active, stored = dict(named.active), dict(named.stored)
    named.stored.update(new or {})
    try:
        _attach(model, named, weights)
    except MaceLoraError:
        named.stored = stored
        _attach(model, named, active)
        raise


def _attach(model: torch.nn.Module, named: _Named, weights: Mapping[str, float]) -> None:
    if list(weights.values()) in ([], [1.0]):
        unload(model)
        for name in weights:
            _attach_one(model, named.stored[name])
    else:
        every = []
        for name in weights:
            unload(model)
            _attach_one(model, named.stored[name])
            every.append(updates(model))
        sums = weighted_sum(every, list(weights.values()))
        unload(model)
        inject(model, AdapterConfig.create("full", targets=("all",)))
        for name, adapter in adapters(model):
            if name in sums:
                adapter.fit(sums[name])
        constants = [(w, named.stored[name].constants) for name, w in weights.items()]
        restore_constants(model, {**constants[0][1], **mean_constants(constants)})
    named.active = dict(weights)


def _attach_one(model: torch.nn.Module, stored: _Stored) -> None:
    restore_constants(model, stored.constants)
    inject(model, stored.config)
    artefact.load_factors(model, stored.tensors, stored.constants)
