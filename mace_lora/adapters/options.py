"""The options of every method: each field is a flag, a keyword and a key of `adapter_config.json`.

They stand apart from the methods' mathematics because this file needs no torch: the command line
is read, and its mistakes are answered, before the seconds that importing torch takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from mace_lora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

_BIASES = ("none", "adapted", "all")
INITS: dict[str, str] = {
    "normal": "A normal, unit variance in each layer's own normalisation",
    "small": "A normal with std 1e-3 everywhere (what mace-torch documents)",
    "upstream": "std 1 in equivariant layers, 1e-3 in dense ones (what mace-torch 0.3.16 does)",
    "kaiming": "A uniform with bound sqrt(1 / fan-in) (what PEFT does)",
    "orthogonal": "A with orthogonal columns of the length that 'normal' gives them on average",
}
GATES = ("exp", "res")
MMEA_INITS = ("auto", "zero", "normal", "uniform")
# The standard deviation that the published code documents for init=normal
MMEA_STD = 0.001


def option(default: Any, help: str, **flag: Any) -> Any:
    """A dataclass field that is also a flag `--<method>_<name>` and a key of `adapter_config.json`.

    `flag` goes to `add_argument` (choices, nargs, type, metavar).
    """
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True)
class AdapterOptions:
    """Options that all methods have. A method derives its own from this.

    `presets`: options under a name, for those who don't want to choose.
    """

    presets: ClassVar[dict[str, dict[str, object]]] = {}

    targets: tuple[str, ...] = option(
        ("default",),
        "which layers to adapt: presets (default, all, linear, dense, radial, skip, contraction) "
        "and regular expressions over layer names, space-separated; any match counts",
        nargs="+",
        type=str,
    )
    exclude: tuple[str, ...] = option(
        (), "targets to leave alone after all, given in the same way", nargs="+", type=str
    )
    modules_to_save: tuple[str, ...] = option(
        (),
        "what is trained in full and saved with the adapter: regular expressions over the names of "
        "weights, such as readouts, scale_shift.shift or atomic_energies",
        nargs="+",
        type=str,
    )
    bias: str = option(
        "none",
        "biases to train in full: none, those of the adapted layers, or all of the model",
        choices=_BIASES,
    )

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "modules_to_save"):
            self._check_texts(name)
        if not self.targets:
            raise ConfigError("targets=(): one or more non-empty strings are needed")
        if self.bias not in _BIASES:
            raise ConfigError(f"bias={self.bias}: {did_you_mean(str(self.bias), _BIASES)}")
        self.check()

    def _check_texts(self, name: str) -> None:
        """Make the option a tuple of non-empty texts, or raise ConfigError.

        A dictionary stands for its `key=value`, as PEFT takes patterns.
        """
        value = getattr(self, name)
        if isinstance(value, Mapping):
            value = [f"{key}={number}" for key, number in value.items()]
        if not isinstance(value, Iterable):
            raise ConfigError(f"{name}={value!r}: one or more non-empty strings are needed")
        texts = (value,) if isinstance(value, str) else tuple(value)
        object.__setattr__(self, name, texts)
        if not all(isinstance(t, str) and t for t in texts):
            raise ConfigError(f"{name}={texts!r}: one or more non-empty strings are needed")

    def for_layer(self, name: str) -> Self:
        """The options of one layer, where patterns make them differ."""
        return self

    def layer_patterns(self) -> tuple[str, ...]:
        """Regular expressions that must each match an adapted layer."""
        return ()

    def frozen_parts(self) -> tuple[str, ...]:
        """Parts of the model in which nothing is adapted."""
        return ()

    def check(self) -> None:
        """Raises ConfigError, as `<option>=<value>: <reason>`, where a value makes no sense."""

    def to_json(self) -> dict[str, object]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def fields(cls) -> tuple[Field[Any], ...]:
        return fields(cls)


@dataclass(frozen=True)
class LowRankOptions(AdapterOptions):
    """Rank, alpha and initialisation."""

    rank: int = option(4, "rank of the update; capped at what a layer can use")
    alpha: float = option(1.0, "the update is scaled by alpha / rank")
    init: str = option(
        "normal",
        "how A starts (B is zero): " + "; ".join(f"{k}: {v}" for k, v in INITS.items()),
        choices=tuple(INITS),
    )
    rslora: bool = option(
        False, "scale by alpha / sqrt(rank), so that higher ranks learn as fast (rsLoRA)"
    )
    rank_pattern: tuple[str, ...] = option(
        (),
        "other ranks for some layers, as PATTERN=RANK with a regular expression over layer names; "
        "the first that matches counts",
        nargs="+",
        type=str,
    )
    alpha_pattern: tuple[str, ...] = option(
        (), "other alphas for some layers, as PATTERN=ALPHA", nargs="+", type=str
    )
    dropout: float = option(
        0.0,
        "probability that a step leaves an input copy of an irrep out of the update: whole copies, "
        "never components, the same for all atoms of a batch",
    )
    lr_ratio: float = option(1.0, "learning rate of B, as a multiple of that of A (LoRA+)")

    lowest_rank: ClassVar[int] = 1

    def check(self) -> None:
        check_rank("rank", self.rank, self.lowest_rank)
        check_alpha("alpha", self.alpha)
        for name in ("rank_pattern", "alpha_pattern"):
            self._check_texts(name)
            for text in getattr(self, name):
                self._pattern(name, text)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: a number from 0 to below 1 is needed")
        if not _is_number(self.lr_ratio) or not self.lr_ratio > 0:
            raise ConfigError(f"lr_ratio={self.lr_ratio}: a finite number above 0 is needed")
        if self.init not in INITS:
            raise ConfigError(f"init={self.init}: {did_you_mean(str(self.init), INITS)}")

    def _pattern(self, name: str, text: str) -> tuple[str, float]:
        """`PATTERN=VALUE` as both, checked."""
        pattern, _, value = text.rpartition("=")
        try:
            re.compile(pattern)
            number: float = int(value) if name == "rank_pattern" else float(value)
        except (re.error, ValueError) as error:
            raise ConfigError(f"{name}={text}: PATTERN=NUMBER is needed ({error})") from None
        if not pattern:
            raise ConfigError(f"{name}={text}: PATTERN=NUMBER is needed")
        if name == "rank_pattern":
            check_rank(f"{name}={pattern}", number, self.lowest_rank)
        else:
            check_alpha(f"{name}={pattern}", number)
        return pattern, number

    def for_layer(self, name: str) -> Self:
        values: dict[str, Any] = {"rank_pattern": (), "alpha_pattern": ()}
        for option_, key in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
            pairs = (self._pattern(option_, text) for text in getattr(self, option_))
            found = [value for pattern, value in pairs if re.search(pattern, name)]
            if found:
                values[key] = found[0]
        return replace(self, **values)

    def layer_patterns(self) -> tuple[str, ...]:
        return tuple(
            self._pattern(name, text)[0]
            for name in ("rank_pattern", "alpha_pattern")
            for text in getattr(self, name)
        )

    @property
    def scaling(self) -> float:
        """What A B is multiplied by: alpha / rank, or alpha / sqrt(rank) with `rslora`."""
        if not self.rank:
            return 0.0
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def check_rank(name: str, value: object, lowest: int = 1) -> None:
    """Raises ConfigError unless `value` is a whole number of `lowest` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ConfigError(f"{name}={value}: a whole number of {lowest} or more is needed")


def check_alpha(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a finite number other than 0."""
    if not _is_number(value) or value == 0:
        raise ConfigError(
            f"{name}={value}: a finite number other than 0 is needed, "
            "since the update is scaled by alpha / rank"
        )


@dataclass(frozen=True)
class LoraOptions(LowRankOptions):
    """Options of `--adapter=lora`; rank and alpha are mace-torch's own flags."""

    # Chosen on aspirin, acetylacetone and ethanol from `mini`, see this folder's README
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "small-data": {"rank": 4, "alpha": 4.0, "targets": ("default",)},
        "balanced": {"rank": 6, "alpha": 6.0, "targets": ("all",)},
        "max-accuracy": {"rank": 16, "alpha": 8.0, "targets": ("all",)},
    }


@dataclass(frozen=True)
class EloraOptions(LowRankOptions):
    """Options of `--adapter=elora`; the published code has rank and alpha fixed at 16."""

    rank: int = option(16, "rank of each path's update; capped at what the path can use")
    alpha: float = option(16.0, "the update is scaled by alpha / rank")
    cap: bool = option(True, "cap the rank at what a path can use (the published code: False)")
    simplify: bool = option(True, "neighbouring inputs of one irrep make one path")


@dataclass(frozen=True)
class DoraOptions(LowRankOptions):
    """Options of `--adapter=dora`."""

    rank: int = option(4, "rank of the direction's update; 0 trains the magnitudes alone")

    lowest_rank: ClassVar[int] = 0


@dataclass(frozen=True)
class FullOptions(AdapterOptions):
    """Options of `--adapter=full`: those that all methods have.

    Targets and exceptions choose among all parameters. `bias` adds nothing to the default, and
    `modules_to_save` E0s, scale and shift, which are no parameters.
    """

    freeze: tuple[str, ...] = option(
        (),
        "parts of the model that stay as they are, by their names and not by patterns, such as "
        "node_embedding interactions.0 products; a part without its number is all of its kind",
        nargs="+",
        type=str,
    )

    def check(self) -> None:
        self._check_texts("freeze")

    def frozen_parts(self) -> tuple[str, ...]:
        return self.freeze


@dataclass(frozen=True)
class MmeaOptions(AdapterOptions):
    """Options of `--adapter=mmea`.

    The published code takes rank, std and gate from the environment: MMEA_RANK, MMEA_STD, MMEA_PHI.
    """

    rank: int = option(16, "size of the hidden layer of the gates")
    std: float = option(0.0, f"standard deviation of S with init=normal; {MMEA_STD} if left out")
    init: str = option(
        "auto",
        "how S, the weight of the scalar shifts, starts: zero (a fresh adapter is the identity), "
        "normal, or uniform (torch's default, and the published code's); auto is zero, or normal "
        "where std is given",
        choices=MMEA_INITS,
    )
    gate: str = option("exp", "g(c) for l > 0: exp(c), bounded, or res, 1 + c", choices=GATES)
    lora_rank: int = option(16, "rank of the ELoRA updates of the other layers")
    lora_alpha: float = option(16.0, "these updates are scaled by alpha / rank")
    reference: bool = option(
        False, "as the published code: uniform start, unbounded gates, shifted 0o, uncapped ranks"
    )

    def check(self) -> None:
        check_rank("rank", self.rank)
        check_rank("lora_rank", self.lora_rank)
        check_alpha("lora_alpha", self.lora_alpha)
        for name, known in (("init", MMEA_INITS), ("gate", GATES)):
            if getattr(self, name) not in known:
                value = str(getattr(self, name))
                raise ConfigError(f"{name}={value}: {did_you_mean(value, known)}")
        if not _is_number(self.std) or self.std < 0:
            raise ConfigError(f"std={self.std}: a finite number of 0 or more is needed")
        if self.std and self.init in ("zero", "uniform"):
            raise ConfigError(
                f"std={self.std} contradicts --mmea_init={self.init}: give one of them"
            )

    @property
    def start(self) -> str:
        """How S starts: zero, normal or uniform."""
        if self.init != "auto":
            return self.init
        if self.std:
            return "normal"
        return "uniform" if self.reference else "zero"
