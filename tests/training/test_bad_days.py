"""Full disks and diverging runs: what exists stays as it is, and the message says what was lost."""

from __future__ import annotations

import errno
import functools
import importlib
import logging
import shutil
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from helpers.running import LATEST, here, results, same_weights

from mace_lora.training.epochs.divergence import EXPLODED


class FullDisk:
    """Writes of torch and safetensors fail from a moment on, as on a disk without space."""

    def __init__(self, monkeypatch, condition) -> None:
        self.condition = condition
        for module, name in (
            ("torch", "save"),
            ("torch.jit", "save"),
            ("mace_lora.model.artefact", "save_file"),
        ):
            self._spoil(monkeypatch, f"{module}.{name}")

    def _spoil(self, monkeypatch, name: str) -> None:
        module, _, attribute = name.rpartition(".")
        original = getattr(importlib.import_module(module), attribute)

        @functools.wraps(original)
        def write(obj, path, *rest, **keywords):
            if not self.condition(str(path)):
                return original(obj, path, *rest, **keywords)
            Path(path).write_bytes(b"half")  # as much as there was room for
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(name, write)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.suffix not in (".log", ".txt", ".png")
    }


def test_disk_full_while_training(tmp_path, flags, done, monkeypatch):
    """The third epoch's checkpoint can't be written: the second's is whole, and continued from."""
    folder = shutil.copytree(done, tmp_path / "run")
    before = contents(folder)
    more = [*flags, "--max_num_epochs=3", "--restart_latest"]
    with monkeypatch.context() as patch:
        FullDisk(patch, lambda path: "_next.pt" in path or "best_adapter" in path)
        error = here(folder, *more)
    assert "can't be written: [Errno 28] No space left on device" in error
    assert f"Training up to epoch 2, step 0 is safe in {LATEST}" in error
    assert "--restart_latest" in error
    assert contents(folder) == before
    assert here(folder, *more) == ""
    straight = tmp_path / "straight"
    assert here(straight, *flags, "--max_num_epochs=3") == ""
    assert same_weights(folder / "run.model", straight / "run.model")


@pytest.mark.parametrize("what", ["run.model", "run_adapter", "run_compiled.model"])
def test_disk_full_while_saving(tmp_path, flags, done, monkeypatch, what):
    """Training is over and safe; the older result of that name is not touched."""
    folder = shutil.copytree(done, tmp_path / "run")
    before = (folder / what).read_bytes() if (folder / what).is_file() else None
    more = [*flags, "--max_num_epochs=3", "--restart_latest"]
    with monkeypatch.context() as patch:
        FullDisk(patch, lambda path: f"/.{what}" in f"/{path}")
        error = here(folder, *more)
    assert f"{what} can't be written: [Errno 28] No space left on device" in error
    assert "training up to the last checkpoint is safe" in error
    if before is not None:
        assert (folder / what).read_bytes() == before
    assert not list(folder.glob(".*"))
    lines = len(results(folder))
    assert here(folder, *more) == ""
    assert len(results(folder)) == lines  # nothing was trained again


def test_a_file_size_limit_is_explained(tmp_path, flags):
    """A real limit of the system, which stops torch in the middle of a file."""
    resource = pytest.importorskip("resource")
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    raising, logging.raiseExceptions = logging.raiseExceptions, False
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        error = here(tmp_path, *flags, "--max_num_epochs=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
        logging.raiseExceptions = raising
    assert "can't be written" in error
    assert "inline_container" not in error  # torch's own words
    assert "No checkpoint of this run had been written before" in error
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def test_divergence_keeps_the_best_epoch(tmp_path, flags, done, caplog):
    """Stopped at the step, with its frames and a learning rate; then the best becomes a model."""
    folder = shutil.copytree(done, tmp_path / "run")
    (folder / "run.model").unlink()
    error = here(
        folder,
        *flags,
        "--max_num_epochs=30",
        "--restart_latest",
        "--lr=1e6",
        "--clip_grad=None",
        "--default_dtype=float64",
    )
    assert "at epoch 2, step" in error
    assert "training has diverged at --lr=1e+06" in error
    assert "try --lr=100000" in error
    assert "--restart_latest --max_num_epochs=2" in error
    assert "on frames [" in error
    assert "train.xyz, frames " in error
    assert not (folder / "run.model").exists()
    assert here(folder, *flags, "--restart_latest", "--max_num_epochs=2") == ""
    assert same_weights(folder / "run.model", done / "run.model")


def test_an_exploding_loss_is_divergence_too(tmp_path, flags, small_data):
    """Finite all the time: a step far too large in double precision."""
    error = here(
        tmp_path,
        *flags,
        "--max_num_epochs=30",
        "--lr=30",
        "--clip_grad=None",
        "--forces_weight=1e6",
    )
    assert "training has diverged at --lr=30" in error
    assert "the training loss is" in error or "the validation loss" in error
    assert EXPLODED > 1e3


@pytest.mark.parametrize(("alpha", "learns"), [("1", True), ("1e-200", False)])
def test_a_run_that_learnt_nothing_says_so(tmp_path, flags, caplog, alpha, learns):
    assert here(tmp_path / "run", *flags, "--max_num_epochs=1", f"--lora_alpha={alpha}") == ""
    assert ("The validation loss never fell" in caplog.text) is not learns


def test_one_frame_and_an_atom_alone(tmp_path, flags, small_data, caplog):
    """What can be trained on is trained on; what nothing can be learnt from is said."""
    frames = ase.io.read(small_data["train"], index=":2")
    alone = frames[1][[0]]
    alone.info["REF_energy"] = -1000.0
    ase.io.write(tmp_path / "train.xyz", [frames[0], alone], format="extxyz")
    more = ["--train_file=train.xyz", "--batch_size=1", "--max_num_epochs=1"]
    assert here(tmp_path, *flags, *more) == ""
    assert "train.xyz, frame 1 is an atom alone" in caplog.text
    state = torch.load(tmp_path / "run.model", weights_only=False).state_dict()
    assert all(np.isfinite(v.numpy()).all() for v in state.values())
    ase.io.write(tmp_path / "train.xyz", frames[:1], format="extxyz")
    assert here(tmp_path, *flags, *more, "--overwrite=True") == ""
