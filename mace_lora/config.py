"""What is adapted and how, as one value: from flags, to and from JSON. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mace_lora.adapters.options import AdapterOptions
from mace_lora.adapters.registry import METHODS, options_of
from mace_lora.errors import ConfigError, did_you_mean

# Options that say how factors are trained, not what they mean
_FREE_TO_CHANGE = {"dropout", "lr_ratio", "init"}


@dataclass(frozen=True)
class AdapterConfig:
    """A method and its options.

    `AdapterConfig.create("lora", rank=8)` is the usual way to make one, and
    `AdapterConfig.of(LoraOptions(rank=8))` the one in which editors complete options and mypy knows
    them; `options` is an instance of the method's own dataclass, whose fields are the flags
    `--<method>_<field>` and the JSON keys.
    """

    method: str
    options: AdapterOptions

    @classmethod
    def create(
        cls, method: str = "lora", preset: str | None = None, **options: Any
    ) -> AdapterConfig:
        """
        Args:
            method: its name.
            preset: a name of the method's presets, for the options that are not given.
            options: by name.

        Raises:
            ConfigError: unknown method, preset or option, or a value that makes no sense.
        """
        kind, presets = options_of(method), options_of(method).presets
        if preset is not None:
            if preset not in presets:
                hint = did_you_mean(preset, presets) if presets else "it has none"
                raise ConfigError(f"adapter {method!r} has no preset {preset!r}; {hint}")
            options = {**presets[preset], **options}
        known = {f.name for f in kind.fields()}
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"adapter {method!r} has no option {name!r}; {did_you_mean(name, known)}"
                )
        try:
            return cls(method, kind(**options))
        except ConfigError as error:  # "rank=0: ..." of an option is "--lora_rank=0: ..." of a flag
            raise ConfigError(f"--{method}_{error}") from None

    @classmethod
    def of(cls, options: AdapterOptions) -> AdapterConfig:
        """The method whose options these are, such as `LoraOptions(rank=8)`.

        Raises:
            ConfigError: they are of no method.
        """
        for method in METHODS:
            if options_of(method) is type(options):
                return cls(method, options)
        raise ConfigError(f"{type(options).__name__} holds options of no method: {list(METHODS)}")

    def continued(self, method: str, options: dict[str, Any], where: str) -> AdapterConfig:
        """This configuration with other `options`, for a run that goes on from its factors.

        Raises:
            ConfigError: the method is another, or an option changes what the factors mean.
        """
        if method != self.method:
            raise ConfigError(f"{where} is of method {self.method!r}, not {method!r}")
        new = replace(self.options, **options)
        for name, value in self.options.to_json().items():
            wanted = new.to_json()[name]
            if wanted != value and name not in _FREE_TO_CHANGE:
                raise ConfigError(
                    f"--{method}_{name}={wanted} contradicts {where}, whose factors were trained "
                    f"with {name}={value}: leave it out"
                )
        return AdapterConfig(method, new)

    def to_json(self) -> dict[str, object]:
        return {"method": self.method, "options": self.options.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> AdapterConfig:
        """The inverse of `to_json`; an unknown key is an error, since it would change energies."""
        method, options = values.get("method"), values.get("options")
        if not isinstance(method, str) or not isinstance(options, dict):
            raise ConfigError(
                "an adapter configuration needs 'method' (text) and 'options' (table)"
            )
        as_given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in options.items()
        }
        return cls.create(method, **as_given)
