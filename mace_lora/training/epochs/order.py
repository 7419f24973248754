"""The order in which frames are trained on: known, repeatable, cut to batches, shared among
processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mace_lora.training.epochs.sizes import Limit, cut
from mace_lora.upstream.types import Dataset, Loader

BatchSampler = torch.utils.data.Sampler[list[int]]


class FrameOrder(BatchSampler):
    """The batches of a data loader in their random order, written down as it is drawn.

    With several processes each takes every n-th batch, so that the run sees the same frames at the
    same step as one process with a batch size as many times as large (mace-torch's
    DistributedSampler draws another order), and leaves out what makes no batch for each. The same
    numbers are drawn from the loader's generator as for one process.

    Args:
        frames: a data set.
        generator: draws the order.
        batch_size: frames of a batch of one process.
        limit: cuts batches by size instead, whose number then differs from epoch to epoch.
        drop_last: leave out a last batch that isn't full; by size none is full.
    """

    def __init__(
        self,
        frames: Dataset,
        generator: torch.Generator,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
        limit: Limit | None = None,
        drop_last: bool = True,
    ) -> None:
        self._sampler = torch.utils.data.RandomSampler(frames, generator=generator)
        self._generator = generator
        self._batch_size = batch_size
        self._rank, self._processes = rank, processes
        self._limit, self._sizes = limit, [] if limit is None else limit.sizes(frames)
        self._drop_last = drop_last or processes > 1
        self._state = generator.get_state()
        self._skip = 0
        self._mine: list[list[int]] | None = None  # batches of this epoch

    @classmethod
    def of(
        cls, loader: Loader, rank: int, processes: int, limit: Limit | None = None
    ) -> FrameOrder:
        """Make `loader` draw its frames in a known order; the order of one process is unchanged."""
        batches = loader.batch_sampler
        if isinstance(batches, cls):
            return batches
        settings = (loader.dataset, loader.generator, loader.batch_size, rank, processes, limit)
        order = cls(*settings, drop_last=batches.drop_last)
        use(loader, order)
        return order

    @property
    def state(self) -> torch.Tensor:
        """Of the generator, before the order of this epoch was drawn."""
        return self._state

    def restore(self, state: torch.Tensor) -> None:
        """The next epoch will have the order that it has had from this state."""
        self._generator.set_state(state)
        self._mine = None

    def begin(self, skip: int) -> None:
        """An epoch begins; the first `skip` batches were done before."""
        self._state = self._generator.get_state()
        self._skip = skip
        # by size the number of batches follows from the order; else torch draws a number first
        self._mine = None if self._limit is None else self._drawn()

    def now(self) -> torch.Tensor:
        """Of the generator, now."""
        return self._generator.get_state()

    def batch(self, step: int) -> list[int]:
        """Indices of this process's frames in batch `step` of this epoch."""
        return [] if self._mine is None else self._mine[step]

    def __len__(self) -> int:
        if self._limit is None:
            frames, size = len(self._sampler), self._batch_size * self._processes
            return frames // size if self._drop_last else -(-frames // size)
        return len(self.coming()) if self._mine is None else len(self._mine)

    def coming(self) -> list[list[int]]:
        """This process's batches of the epoch to come, which will be drawn once more."""
        state = self._generator.get_state()
        found = self._drawn()
        self._generator.set_state(state)
        return found

    def __iter__(self) -> Iterator[list[int]]:
        if self._mine is None or self._limit is None:
            self._mine = self._drawn()
        # a generator, as torch's samplers: the loader has drawn its own number before it starts
        yield from self._mine[self._skip :]

    def _drawn(self) -> list[list[int]]:
        """This process's batches in a new order."""
        whole, n = list(self._sampler), self._processes
        batches = cut(whole, self._sizes.__getitem__, self._batch_size, self._limit)
        short = self._limit is None and batches and len(batches[-1]) < self._batch_size
        if short and self._drop_last:
            batches.pop()
        return batches[self._rank : len(batches) // n * n : n]


class ShareOfBatches(BatchSampler):
    """Every n-th batch of a data set in its order: this process's part, nothing twice or left out.

    With fewer batches than processes each process takes all of them.
    """

    def __init__(self, batches: Sequence[list[int]], rank: int = 0, processes: int = 1) -> None:
        self._mine = batches[rank::processes] if len(batches) >= processes else batches

    @classmethod
    def of(
        cls, loader: Loader, rank: int = 0, processes: int = 1, limit: Limit | None = None
    ) -> None:
        """Make `loader` give this process's part, all frames in their order."""
        if limit is None and processes == 1:
            return
        frames = range(len(loader.dataset))
        found = [] if limit is None else limit.sizes(loader.dataset)
        batches = cut(frames, found.__getitem__, loader.batch_size, limit)
        use(loader, cls(batches, rank, processes))

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._mine)


def use(loader: Loader, batches: BatchSampler) -> None:
    """Have `loader` take its batches from there: torch lets no one assign them later."""
    vars(loader)["batch_sampler"] = batches
