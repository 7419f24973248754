"""Batches by size: as many frames as have a number of atoms or edges in all."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mace_lora.frames.checks import sources
from mace_lora.training.options import RunOptions
from mace_lora.upstream.predicting import in_parts
from mace_lora.upstream.types import Dataset, Graph

T = TypeVar("T")


@dataclass(frozen=True)
class Limit:
    """The most that a batch may hold; a single frame may be larger, and is a batch of its own.

    Attributes:
        unit: "atoms" or "edges", what is counted.
        most: of them in a batch.
        frames: in a batch, at most.
    """

    unit: str
    most: int
    frames: float = math.inf

    @classmethod
    def of(cls, args: argparse.Namespace, options: RunOptions) -> Limit | None:
        """What --batch_atoms or --batch_edges asks for; None without one of them."""
        if options.by_size is None:
            return None
        return cls(*options.by_size, args.batch_size if "batch_size" in options.given else math.inf)

    @property
    def flag(self) -> str:
        return f"--batch_{self.unit}={self.most}"

    def size(self, graph: Graph) -> int:
        """Atoms or edges of one frame."""
        return len(graph.positions) if self.unit == "atoms" else graph.edge_index.shape[1]

    def sizes(self, frames: Dataset) -> list[int]:
        """Of all frames; those of HDF5 and LMDB are read for it."""
        return [self.size(frames[i]) for i in range(len(frames))]

    def tell(self, frames: Dataset, files: Sequence[str], batches: int) -> None:
        """Log how many batches an epoch has, and which frames are larger than the limit."""
        sizes = self.sizes(frames)
        logging.info(
            f"{self.flag}: {batches} batches in the first epoch, of {len(frames)} frames of "
            f"{min(sizes)} to {max(sizes)} {self.unit}"
        )
        larger = [i for i, size in enumerate(sizes) if size > self.most]
        if larger:
            named = sources(files, [frames[i] for i in larger[:3]])
            logging.warning(
                f"{self.flag}: {len(larger)} training frames have more and are batches of their "
                f"own, the largest of {max(sizes)} {self.unit}: {larger[:3]}"
                + (f" ({named})" if named else "")
            )


def cut(
    frames: Iterable[T], size: Callable[[T], int], batch_size: int, limit: Limit | None
) -> list[list[T]]:
    """Frames in batches: each is filled up in their order.

    Args:
        frames: or their numbers.
        size: of one, as `limit` counts it; asked only where there is a limit.
        batch_size: frames of a batch without a limit.
        limit: of batches by size.
    """
    if limit is None:
        parts = in_parts(frames, lambda _: 0, 0, batch_size)
    else:
        parts = in_parts(frames, size, limit.most, limit.frames)
    return [part for part in parts if part]


def cut_graphs(graphs: Sequence[Graph], batch_size: int, limit: Limit | None) -> list[list[Graph]]:
    """`cut`, of frames as graphs."""
    return cut(graphs, (lambda _: 0) if limit is None else limit.size, batch_size, limit)
