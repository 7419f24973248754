"""Batches by size: as many frames as have a number of atoms or edges in all."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mace_lora.frames.checks import sources
from mace_lora.training.options import RunOptions
from mace_lora.upstream.predicting import in_parts
from mace_lora.upstream.types import Dataset, Graph


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

    def cut(self, order: Iterable[int], sizes: Sequence[int]) -> list[list[int]]:
        """Frames, by number, in batches: each is filled up in this order."""
        parts = in_parts(order, sizes.__getitem__, self.most, self.frames)
        return [part for part in parts if part]

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


def parts(graphs: Sequence[Graph], batch_size: int, limit: Limit | None) -> list[list[Graph]]:
    """Frames in batches, in their order."""
    if limit is None:
        return [list(graphs[i : i + batch_size]) for i in range(0, len(graphs), batch_size)]
    return [p for p in in_parts(graphs, limit.size, limit.most, limit.frames) if p]
