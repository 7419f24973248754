"""Several processes: who they are, how they talk, and which frames are whose.

mace-torch 0.3.16 knows nccl only, so that `--distributed` fails on CPUs, and finds the processes by
a flag whose default (`--launcher=slurm`) is wrong under torchrun. Only gradients of trainable
parameters, which are the adapters', are communicated: DistributedDataParallel leaves frozen ones
alone.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

from mace_lora.errors import ConfigError
from mace_lora.training.epochs.order import ShareOfBatches
from mace_lora.training.epochs.sizes import Limit
from mace_lora.upstream import names as upstream
from mace_lora.upstream.types import Loader


def set_launcher(args: argparse.Namespace) -> None:
    """Set `--distributed` and `--launcher` to what the environment says.

    Raises:
        ConfigError: a combination that can't work.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        args.launcher = "torchrun"
        args.distributed = True
    if not args.distributed:
        return
    if args.launcher == "torchrun" and "RANK" not in os.environ:
        raise ConfigError(
            "--distributed --launcher=torchrun: start the command with torchrun, for example "
            "torchrun --nproc_per_node=2 -m mace_lora train ..."
        )
    if args.launcher == "slurm" and "SLURM_PROCID" not in os.environ:
        raise ConfigError(
            "--distributed takes --launcher=slurm by default, but this is not a SLURM task: start "
            "it with srun, or with torchrun"
        )
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if args.device == "cuda" and 0 < gpus < local:
        raise ConfigError(
            f"--device=cuda: {local} processes on this machine, and {gpus} GPU"
            f"{'s' * (gpus > 1)}: each process takes one of its own, and talks to the others "
            f"through nccl; torchrun --nproc_per_node={gpus}, or --device=cpu, which takes gloo"
        )
    if args.lbfgs:
        raise ConfigError(
            "--lbfgs with several processes: mace-torch sums the loss over them and averages the "
            "gradients, so that the line search can't work; use one process"
        )


def launched() -> bool:
    """Whether torchrun or SLURM has started this process, beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ or (dist.is_available() and dist.is_initialized())


# What the processes talk through. It must not go before the process does: gloo's thread asks Python
# for the lock to free what the last barrier was, and with that lock held, as where mace-torch's
# script frees its variables, the group waits for its thread: a process hung after "Done"
_kept: list[dist.ProcessGroup] = []


def init(args: argparse.Namespace) -> tuple[int, int, int]:
    """mace-torch's `init_distributed`, for CPUs too: rank, rank on this machine, processes."""
    if args.distributed and args.device == "cpu" and args.launcher != "none":
        if args.launcher == "slurm":  # sets RANK and the others from SLURM's variables
            upstream.original("slurm")()
        if not dist.is_initialized():
            dist.init_process_group(backend="gloo", init_method="env://")
        if dist.group.WORLD is not None:
            _kept.append(dist.group.WORLD)
    ranks: tuple[int, int, int] = upstream.original("init_distributed")(args)
    return ranks


def parallel(model: torch.nn.Module, device_ids: list[int] | None = None) -> torch.nn.Module:
    """DistributedDataParallel, for CPUs too.

    Buffers are the same everywhere and stay so; mace-torch sends them around before each forward,
    and hangs where one process validates one batch more than another.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    made: torch.nn.Module = upstream.original("ddp")(
        model, device_ids=None if on_cpu else device_ids, broadcast_buffers=False
    )
    return made


def count(distributed: bool) -> int:
    """How many processes train together."""
    return rank_and_count(distributed)[1]


def rank_and_count(distributed: bool) -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def in_any(asked: bool, device: torch.device, distributed: bool) -> bool:
    """Whether `asked` holds in any process; all must call this at the same step."""
    if not distributed:
        return asked
    flag = torch.tensor(float(asked), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def of_the_first(value: torch.Tensor, device: torch.device, distributed: bool) -> torch.Tensor:
    """What the first process has, in all of them."""
    if not distributed:
        return value
    shared = value.to(device)
    dist.broadcast(shared, src=0)
    return shared.to(value.device)


def wait_for_all(distributed: bool) -> None:
    """Returns when every process has come here."""
    if distributed:
        dist.barrier()


def share_frames(loader: Loader, rank: int, distributed: bool, limit: Limit | None = None) -> None:
    """Give each process its part of a validation set, in batches by size where there is a `limit`.

    Whole batches of the order that one process would have, so that the loss is the same;
    mace-torch's sampler leaves out the frames that don't divide evenly.
    """
    ShareOfBatches.of(loader, rank, count(distributed), limit)


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
