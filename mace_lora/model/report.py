"""What an injection did, as data and as text for the log."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from prettytable import PrettyTable

from mace_lora.adapters.layout import Skipped
from mace_lora.config import AdapterConfig


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted weight: its size, the adapter's, and anything worth knowing about it."""

    name: str
    kind: str
    numel: int
    trainable: int
    notes: str = ""


@dataclass(frozen=True)
class InjectionReport:
    """What was adapted, what was not and why, and the parameter counts; `print` it for a summary.

    Attributes:
        config: the method and its options.
        layers: the adapted weights.
        skipped: those that were not adapted, with the reason.
        trainable_before: number of trainable parameters before the injection.
        parts: per part of the model its parameters, the trained ones, and its adapted layers.
    """

    config: AdapterConfig
    layers: list[AdaptedLayer]
    skipped: list[Skipped]
    trainable_before: int
    parts: dict[str, tuple[int, int, int]]

    @property
    def trainable(self) -> int:
        """Number of trainable parameters after the injection: the adapters'."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def base(self) -> int:
        """Number of parameters of the base model, all frozen."""
        return sum(total for total, _, _ in self.parts.values()) - self.trainable

    def counts(self) -> str:
        """`Trainable parameters: 30,612 before, 2,948 after ... (9.6 %)`."""
        percent = 100 * self.trainable / self.base
        return (
            f"Trainable parameters: {self.trainable_before:,} before, {self.trainable:,} after "
            f"injecting {self.config.method} into {len(self.layers)} layers "
            f"({percent:.1f} % of the base model's {self.base:,}, which are frozen)"
        )

    def table(self) -> str:
        """Total and trainable parameters and the adapted layers, per part of the model."""
        table = PrettyTable(["part of the model", "total", "trainable", "adapted layers"])
        table.align = "r"
        table.align["part of the model"] = "l"
        for part, row in self.parts.items():
            table.add_row([part, *(f"{n:,}" for n in row)])
        sums = [sum(column) for column in zip(*self.parts.values(), strict=True)]
        table.add_divider()
        table.add_row(["all", *(f"{n:,}" for n in sums)])
        return table.get_string()

    def capped(self) -> list[str]:
        """A line per layer that can't use the full rank."""
        return [f"{layer.name}: {layer.notes}" for layer in self.layers if layer.notes]

    def not_adapted(self) -> list[str]:
        """A line per reason with the parameters it holds for."""
        by_reason: dict[str, list[Skipped]] = {}
        for skipped in self.skipped:
            by_reason.setdefault(skipped.reason, []).append(skipped)
        lines = []
        for reason, group in by_reason.items():
            names = ", ".join(s.name for s in group)
            lines.append(f"{reason} ({sum(s.numel for s in group):,} parameters): {names}")
        return lines

    def summary(self) -> str:
        """Counts, kinds of layers and the table: some twenty lines."""
        kinds = Counter(layer.kind for layer in self.layers)
        adapted = "Adapted: " + ", ".join(f"{n} {k}" for k, n in kinds.items())
        return "\n".join([self.counts(), adapted, self.table()])

    def details(self) -> str:
        """Layers that can't use the full rank, and parameters that were not adapted."""
        lines = []
        if self.capped():
            lines.append("Rank capped at what the layer can use:")
            lines += [f"  {line}" for line in self.capped()]
        if self.skipped:
            lines.append("Not adapted, and frozen:")
            lines += [f"  {line}" for line in self.not_adapted()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.summary(), self.details()]))
