"""A data set that lies on the device: batches are gathered there, padded, from a list of frames.

Collating a batch in Python and copying it takes as long as a captured step of a small molecule.
Here the frames lie one after the other in memory, and everything that depends on which of them are
chosen happens in operations of fixed sizes, so that it can be recorded too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mace_lora.backends.base import CannotServe
from mace_lora.backends.padding import PER_ATOM, PER_EDGE, Data, Padded, Shape
from mace_lora.backends.recording import Called, Recording, Replayed


class Resident:
    """Frames on a device.

    Args:
        frames: each a mapping as mace-torch's `AtomicData.to_dict` gives it.
        shapes: that hold every batch.
        r_max: the cutoff, in Å.
        device: where they lie.
        recorder: records how a batch is gathered.

    Raises:
        CannotServe: the frames don't have the same keys.
    """

    def __init__(
        self,
        frames: Sequence[Mapping[str, Any]],
        shapes: Sequence[Shape],
        r_max: float,
        device: torch.device,
        recorder: Replayed | Called,
    ) -> None:
        self._shapes, self._recorder = shapes, recorder
        first = {k: v for k, v in frames[0].items() if isinstance(v, Tensor)}
        self.sizes = [(f["edge_index"].shape[1], f["positions"].shape[0], 1) for f in frames]
        fake = _fake(first, r_max)
        self._stored: Data = {}
        for key in first:
            parts = [f.get(key) for f in frames]
            if not all(isinstance(p, Tensor) for p in parts):
                raise CannotServe(f"not every frame has {key}")
            self._stored[key] = _join(key, [*parts, fake[key]]).to(device)
        self._edges = _Ragged([s[0] for s in self.sizes], device)
        self._atoms = _Ragged([s[1] for s in self.sizes], device)
        self._gathered: dict[Shape, tuple[Tensor, Recording, list[str]]] = {}

    @staticmethod
    def bytes_of(frame: Mapping[str, Any]) -> int:
        """What a frame takes."""
        tensors = (v for v in frame.values() if isinstance(v, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    def batch(self, indices: Sequence[int]) -> ResidentBatch:
        """The frames with these numbers, in this order.

        Raises:
            CannotServe: no shape holds them.
        """
        edges, atoms, structures = (sum(self.sizes[i][k] for i in indices) for k in range(3))
        real = (edges, atoms, structures)
        for shape in self._shapes:
            if shape.holds(real):
                return ResidentBatch(self._padded(indices, shape, real))
        raise CannotServe(f"no shape holds {structures} frames with {edges} edges")

    @torch.no_grad()
    def _padded(self, indices: Sequence[int], shape: Shape, real: tuple[int, int, int]) -> Padded:
        none = len(self.sizes)  # the fake frame's number
        numbers = [*indices, *[none] * (shape.structures - len(indices))]
        if shape not in self._gathered:
            chosen = torch.tensor(numbers, device=self._atoms.counts.device)
            keys = list(self.gather(chosen, shape))
            self._recorder.warm_up(lambda: list(self.gather(chosen, shape).values()))
            recorded = self._recorder.record(lambda: list(self.gather(chosen, shape).values()))
            self._gathered[shape] = chosen, recorded, keys
        chosen, recorded, keys = self._gathered[shape]
        chosen.copy_(torch.tensor(numbers))
        found = dict(zip(keys, recorded(), strict=True))
        return Padded(found, shape, real, stays=True)

    def gather(self, chosen: Tensor, shape: Shape) -> Data:
        """A batch of exactly the sizes of `shape`, in operations of fixed sizes.

        Args:
            chosen: (structures,) numbers of frames; the number after the last one is the fake frame
                that fills up.
        """
        atoms, of_atom, is_atom, starts = self._atoms.rows(chosen, shape.atoms)
        edges, of_edge, is_edge, _ = self._edges.rows(chosen, shape.edges)
        found: Data = {}
        for key, stored in self._stored.items():
            if key == "edge_index":
                ends = stored.index_select(1, edges) + starts[of_edge]
                found[key] = torch.where(is_edge, ends, shape.atoms - 1)
            elif key in PER_EDGE:
                found[key] = stored.index_select(0, edges)
            elif key in PER_ATOM:
                found[key] = stored.index_select(0, atoms)
            else:
                rows = stored.index_select(0, chosen)
                found[key] = rows.flatten(0, 1) if rows.dim() > 1 else rows
        found["batch"] = torch.where(is_atom, of_atom, shape.structures - 1)
        found["ptr"] = torch.cat([starts, starts.new_full((1,), shape.atoms)])
        return found


class _Ragged:
    """Rows of several lengths, one after the other, and one fake row after them."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts = torch.tensor([*counts, 0], device=device)
        self.starts = self.counts.cumsum(0) - self.counts
        self.fake = sum(counts)

    def rows(self, chosen: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows of the chosen parts, filled up with the fake one.

        Returns:
            For each of `size` places the row that is there, the number of its part among the chosen
            and whether it is a real one; and for each part the place of its first row.
        """
        counts = self.counts[chosen]
        ends = counts.cumsum(0)
        places = torch.arange(size, device=chosen.device)
        part = torch.searchsorted(ends, places, right=True).clamp(max=chosen.shape[0] - 1)
        real = places < ends[-1]
        rows = self.starts[chosen][part] + places - (ends - counts)[part]
        return torch.where(real, rows, self.fake), part, real, ends - counts


class ResidentBatch:
    """What mace-torch's code sees of a batch: its real part, by attribute and by key."""

    def __init__(self, padded: Padded) -> None:
        self.padded = padded
        self._real = padded.unpadded()
        self.num_graphs = padded.real[2]

    def to(self, *_: Any, **__: Any) -> ResidentBatch:
        """It is there already."""
        return self

    def to_dict(self) -> Data:
        return dict(self._real)

    def __getitem__(self, key: str) -> Tensor | None:
        return self._real.get(key)

    def __getattr__(self, key: str) -> Tensor:
        try:
            return self.__dict__["_real"][key]
        except KeyError:
            raise AttributeError(key) from None


class ResidentBatches:
    """Batches of a resident data set in the order of a data loader.

    Args:
        resident: the data set of the loader.
        loader: torch's.
    """

    def __init__(self, resident: Resident, loader: Any) -> None:
        self._resident, self._loader = resident, loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        # torch's own loader draws a seed for its workers before the order
        torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        for indices in self._loader.batch_sampler:
            try:
                yield self._resident.batch(indices)
            except CannotServe:  # larger than all batches that the shapes were planned on
                frames = [self._loader.dataset[i] for i in indices]
                yield self._loader.collate_fn(frames)


def _join(key: str, parts: list[Tensor]) -> Tensor:
    try:
        if key in PER_EDGE or key in PER_ATOM:
            return torch.cat(parts, dim=1 if key == "edge_index" else 0)
        return torch.stack(parts)
    except RuntimeError as error:
        raise CannotServe(f"{key} differs in shape between frames: {error}") from error


def _fake(first: Data, r_max: float) -> Data:
    """The frame that fills up: one atom, one edge longer than the cutoff, no weight in a loss."""
    fake = {}
    for key, value in first.items():
        if key == "edge_index":
            fake[key] = value.new_zeros(2, 1)
        elif key in PER_EDGE or key in PER_ATOM:
            fake[key] = value.new_zeros(1, *value.shape[1:])
        else:
            fake[key] = torch.zeros_like(value)
    fake["node_attrs"][:, 0] = 1
    fake["shifts"][:, 0] = 2 * r_max
    fake["unit_shifts"][:, 0] = 1
    fake["cell"] = 2 * r_max * torch.eye(3, dtype=first["cell"].dtype)
    return fake
