"""Whether the largest batch fits into memory, tried before the first epoch and not late in a run.

A process that asks for too much is ended by Linux without a word. So a small batch goes first: what
it takes tells about how much the largest will, and where that isn't there an error says what is.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mace_lora.errors import ConfigError
from mace_lora.training.epochs.computing import Computing
from mace_lora.training.epochs.sizes import Limit
from mace_lora.upstream import library
from mace_lora.upstream.types import TrainArguments

# Part of the available memory that a suggested value takes
ROOM = 0.8
# GB that a small batch must take for its estimate to mean anything
LEAST = 0.05


class Memory:
    """GB of a device, by its own account; on a CPU by Linux's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def known(self) -> bool:
        """Whether there is an account."""
        return self._device.type == "cuda" or Path("/proc/self/clear_refs").exists()

    def available(self) -> float:
        """That could be taken now, with what this process has kept for later."""
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            kept = torch.cuda.memory_reserved(self._device)
            return (free + kept - torch.cuda.memory_allocated(self._device)) / 1e9
        found = [_kilobytes("/proc/meminfo", "MemAvailable") / 1e6]
        group = Path("/sys/fs/cgroup")  # of a container or of a job
        try:
            most = float((group / "memory.max").read_text())
            found.append((most - float((group / "memory.current").read_text())) / 1e9)
        except (OSError, ValueError):  # no limit
            pass
        return min(found)

    def taken_by(self, function: Callable[[], None]) -> float:
        """The most that is taken while `function` runs, beyond what is there before."""
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            function()
            return (torch.cuda.max_memory_allocated(self._device) - before) / 1e9
        with contextlib.suppress(AttributeError):  # of glibc alone
            ctypes.CDLL(None).malloc_trim(0)  # what earlier steps left would be taken unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
        before = _kilobytes("/proc/self/status", "VmRSS")
        function()
        return max(0, _kilobytes("/proc/self/status", "VmHWM") - before) / 1e6


def _kilobytes(path: str, key: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def probe(
    limit: Limit,
    batches: Sequence[list[int]],
    sizes: Sequence[int],
    step: Callable[[list[int]], None],
    memory: Memory,
) -> None:
    """Try the smallest and the largest batch, and log what the largest takes.

    Args:
        limit: of batches by size.
        batches: frames of each, by number.
        sizes: of the frames.
        step: forward and backward of a batch, after which nothing is kept.
        memory: of the device.

    Raises:
        ConfigError: the largest batch doesn't fit, or by the small one's measure would not.
    """

    def size(batch: list[int]) -> int:
        return sum(sizes[i] for i in batch)

    small = min(batches, key=size)
    large = max(batches, key=size)
    if not memory.known():
        step(large)
        return
    step(small)  # what is made once, and kept, is no part of a batch
    taken, available = memory.taken_by(lambda: step(small)), memory.available()
    needed = taken * size(large) / size(small)
    if taken > LEAST and needed > available:
        raise too_large(limit, size(large), needed, available, max(sizes))
    try:
        needed = memory.taken_by(lambda: step(large))
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        raise too_large(limit, size(large), max(needed, available), available, max(sizes)) from None
    logging.info(
        f"{limit.flag}: the largest batch, {size(large)} {limit.unit}, fits: it takes "
        f"{max(needed, 0.01):.2f} GB of {available:.1f} GB"
    )


def probe_of_run(
    limit: Limit,
    batches: Sequence[list[int]],
    given: TrainArguments,
    computing: Computing,
    loss_fn: torch.nn.Module,
) -> None:
    """The probe with what mace-torch's script hands to its `train`; raises as `probe`."""
    frames = given.train_loader.dataset

    def step(batch: list[int]) -> None:
        made = library.batch([frames[i] for i in batch]).to(given.device)
        with computing.active(given.model):
            output = given.model(
                made.to_dict(),
                training=True,
                compute_force=given.output_args["forces"],
                compute_virials=given.output_args["virials"],
                compute_stress=given.output_args["stress"],
            )
            loss_fn(pred=output, ref=made).backward()
        given.model.zero_grad(set_to_none=True)

    probe(limit, batches, limit.sizes(frames), step, Memory(given.device))


def _is_about_memory(error: Exception) -> bool:
    told = "allocate memory" in str(error)  # of torch on a CPU
    return told or isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))


def too_large(
    limit: Limit, size: int, needed: float, available: float, largest_frame: int
) -> ConfigError:
    """The error for a batch of this `size`.

    Args:
        limit: of batches by size.
        size: atoms or edges of the batch.
        needed: GB.
        available: GB.
        largest_frame: atoms or edges of the largest frame.
    """
    fits = int(ROOM * size * available / needed)
    text = (
        f"{limit.flag}: the largest batch, {size} {limit.unit}, needs about {needed:.1f} GB, and "
        f"{available:.1f} GB are available: "
    )
    if fits >= largest_frame:
        return ConfigError(f"{text}give --batch_{limit.unit}={fits}")
    return ConfigError(
        f"{text}about {fits} {limit.unit} would fit, and the largest frame has {largest_frame}; "
        "--default_dtype=float32 takes half, or leave out the large frames"
    )
