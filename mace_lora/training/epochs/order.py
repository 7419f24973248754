"""The order in which frames are trained on: known, repeatable, shared among processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mace_lora.upstream.types import Dataset, Loader


class FrameOrder(torch.utils.data.Sampler[int]):
    """The random order of a data loader, written down as it is drawn.

    With several processes each takes its part of every global batch, so that the run sees the same
    frames at the same step as one process with a batch size as many times as large (mace-torch's
    DistributedSampler draws another order), and leaves out what makes no whole global batch.
    The same numbers are drawn from the loader's generator as for one process; `batch_size` is that
    of one process.
    """

    def __init__(
        self,
        frames: Dataset,
        generator: torch.Generator,
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._sampler = torch.utils.data.RandomSampler(frames, generator=generator)
        self._generator = generator
        self._batch_size = batch_size
        self._rank, self._processes = rank, processes
        self._state = generator.get_state()
        self._skip = 0
        self._mine: list[int] = []

    @classmethod
    def of(cls, loader: Loader, rank: int, processes: int) -> FrameOrder:
        """Make `loader` draw its frames in a known order; the order of one process is unchanged."""
        batches = loader.batch_sampler
        if isinstance(batches.sampler, cls):
            return batches.sampler
        order = cls(loader.dataset, loader.generator, loader.batch_size, rank, processes)
        batches.sampler = order
        return order

    @property
    def state(self) -> torch.Tensor:
        """Of the generator, before the order of this epoch was drawn."""
        return self._state

    def restore(self, state: torch.Tensor) -> None:
        """The next epoch will have the order that it has had from this state."""
        self._generator.set_state(state)

    def begin(self, skip: int) -> None:
        """An epoch begins; the first `skip` batches were done before."""
        self._state = self._generator.get_state()
        self._skip = skip

    def now(self) -> torch.Tensor:
        """Of the generator, now."""
        return self._generator.get_state()

    def batch(self, step: int) -> list[int]:
        """Indices of this process's frames in batch `step` of this epoch."""
        return self._mine[step * self._batch_size : (step + 1) * self._batch_size]

    def __len__(self) -> int:
        if self._processes == 1:
            return len(self._sampler)
        return len(self._sampler) // (self._batch_size * self._processes) * self._batch_size

    def __iter__(self) -> Iterator[int]:
        whole = list(self._sampler)
        if self._processes > 1:
            size, share = self._batch_size * self._processes, self._batch_size
            whole = [
                i
                for start in range(0, len(whole) - size + 1, size)
                for i in whole[start + self._rank * share : start + (self._rank + 1) * share]
            ]
        self._mine = whole
        return iter(whole[self._skip * self._batch_size :])


class ShareOfBatches(torch.utils.data.Sampler[int]):
    """Every n-th batch of a data set in its order: this process's part, nothing twice or left out.

    With fewer batches than processes each process takes all of them.
    """

    def __init__(self, frames: int, batch_size: int, rank: int, processes: int) -> None:
        starts = range(0, frames, batch_size)
        if len(starts) >= processes:
            starts = starts[rank::processes]
        self._indices = [i for s in starts for i in range(s, min(s + batch_size, frames))]

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)
