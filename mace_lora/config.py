"""What is adapted and how, as one value: from flags, to and from JSON. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mace_lora.adapters.registry import get_method
from mace_lora.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class AdapterConfig:
    """A method and its options.

    `AdapterConfig.create("lora", rank=8)` is the usual way to make one; `options` is an instance of
    the method's own dataclass, whose fields are the flags `--<method>_<field>` and the JSON keys.
    """

    method: str
    options: Any

    @classmethod
    def create(cls, method: str = "lora", **options: Any) -> AdapterConfig:
        """
        Raises:
            ConfigError: unknown method or option, or a value that makes no sense.
        """
        kind = get_method(method).Options
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

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "options": self.options.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> AdapterConfig:
        """The inverse of `to_json`; an unknown key is an error, since it would change energies."""
        if not isinstance(values.get("method"), str) or not isinstance(values.get("options"), dict):
            raise ConfigError(
                "an adapter configuration needs 'method' (text) and 'options' (table)"
            )
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in values["options"].items()}
        return cls.create(values["method"], **options)
