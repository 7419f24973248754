"""Batches by atoms or edges: what they hold, that runs with them continue, and what is refused."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule
from helpers.running import here, results, same_weights, short_run, signal_after

from mace_lora.errors import ConfigError
from mace_lora.training.epochs.order import FrameOrder
from mace_lora.training.epochs.sizes import Limit
from mace_lora.training.options import RunOptions

NAMES = ("H2O", "CH4", "CH3OH", "C2H6", "C3H8", "trans-butane")


@pytest.fixture(scope="module")
def flags(tmp_path_factory, foundation) -> list[str]:
    """Twelve molecules of 3 to 14 atoms, EMA, a schedule that follows the steps."""
    folder, rng = tmp_path_factory.mktemp("sizes"), np.random.default_rng(0)
    files = {}
    for part, n in (("train", 12), ("valid", 6), ("test", 6)):
        frames = []
        for i in range(n):
            atoms = molecule(NAMES[i % len(NAMES)])
            atoms.rattle(0.05, rng=rng)
            atoms.info["REF_energy"] = -3.0 * len(atoms) + rng.normal()
            atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
            frames.append(atoms)
        files[part] = str(folder / f"{part}.xyz")
        ase.io.write(files[part], frames)
    found = short_run(files, foundation, "--ema", "--schedule=cosine", "--check=False")
    return [flag for flag in found if "batch_size" not in flag]


def sizes_of(frames: list[int], limit: int, seed: int, processes: int = 1) -> list[list[int]]:
    """An epoch's batches of frames of these numbers of atoms, each batch as numbers of atoms."""

    class Frame:
        def __init__(self, n: int) -> None:
            self.positions = torch.zeros(n, 3)

    data = [Frame(n) for n in frames]
    found = []
    for rank in range(processes):
        generator = torch.Generator().manual_seed(seed)
        order = FrameOrder(data, generator, 1, rank, processes, Limit("atoms", limit))
        coming = len(order)
        order.begin(skip=0)
        found.append([[frames[i] for i in batch] for batch in order])
        assert coming == len(order) == len(found[-1])
    return [batch for step in zip(*found, strict=True) for batch in step]


def test_batches_are_filled_up_to_the_limit():
    """All frames once, none beyond the limit but alone, and no two neighbours fit into one."""
    frames = [3, 9, 30, 5, 14, 8, 3, 3, 11, 6] * 3
    epochs = [sizes_of(frames, 20, seed) for seed in range(5)]
    for batches in epochs:
        assert sorted(itertools.chain(*batches)) == sorted(frames)
        assert all(sum(batch) <= 20 or batch == [30] for batch in batches)
        assert all(sum(a) + b[0] > 20 for a, b in itertools.pairwise(batches))
    assert len({tuple(map(tuple, batches)) for batches in epochs}) == 5
    one, two = epochs[0], sizes_of(frames, 20, 0, processes=2)
    assert two == one[: len(one) // 2 * 2]


@pytest.mark.parametrize("drop_last", [True, False])
def test_without_a_limit_the_order_is_torchs(drop_last):
    """The same batches as of a loader that is left alone, epoch by epoch."""

    def loader() -> torch.utils.data.DataLoader:
        generator = torch.Generator().manual_seed(3)
        settings = {"batch_size": 4, "shuffle": True, "collate_fn": list}
        return torch.utils.data.DataLoader(
            range(23), generator=generator, drop_last=drop_last, **settings
        )

    plain, ours = loader(), loader()
    order = FrameOrder.of(ours, 0, 1)
    for _ in range(3):
        order.begin(skip=0)
        assert list(ours) == list(plain)
        assert len(ours) == len(plain)


@pytest.mark.parametrize("flag", ["--batch_atoms=20", "--batch_edges=90"])
def test_a_run_goes_on_bit_for_bit(tmp_path, flags, flag, caplog):
    """Stopped in the first and in a later epoch, whose numbers of batches differ."""
    flags = [*flags, flag, "--max_num_epochs=5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert here(whole, *flags) == ""
    text = caplog.text
    assert f"{flag}: " in text
    for lines in (3, 17):
        with signal_after(signal.SIGTERM, parts, lines):
            assert here(parts, *flags, "--restart_latest") == "75"
    assert here(parts, *flags, "--restart_latest") == ""
    assert results(parts) == results(whole)
    assert same_weights(parts / "run.model", whole / "run.model")
    per_epoch = [
        sum(line["mode"] == "opt" and line["epoch"] == n for line in results(whole))
        for n in range(5)
    ]
    assert min(per_epoch) >= 5  # 98 atoms in batches of 20
    assert here(parts, *[f for f in flags if f != flag], "--batch_size=2", "--restart_latest") != ""


def test_validation_is_that_of_whole_batches(tmp_path, flags):
    """Errors don't depend on how frames are batched."""
    for name, more in (("atoms", "--batch_atoms=20"), ("frames", "--batch_size=3")):
        assert here(tmp_path / name, *flags, more, "--max_num_epochs=1", "--lr=1e-12") == ""
    by_atoms, by_frames = (
        next(line for line in results(tmp_path / name) if line["mode"] == "eval")
        for name in ("atoms", "frames")
    )
    assert by_atoms["rmse_f"] == pytest.approx(by_frames["rmse_f"], rel=1e-6)
    assert by_atoms["rmse_e_per_atom"] == pytest.approx(by_frames["rmse_e_per_atom"], rel=1e-6)


def test_a_frame_beyond_the_limit_is_named(tmp_path, flags, caplog):
    assert here(tmp_path, *flags, "--batch_atoms=12", "--max_num_epochs=1") == ""
    assert "--batch_atoms=12: 2 training frames have more" in caplog.text
    assert "train.xyz, frames 5, 11" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_atoms": -5}, "--batch_atoms=-5: how many atoms a batch may have"),
        ({"batch_edges": -1}, "--batch_edges=-1: how many edges"),
        ({"batch_atoms": 5, "batch_edges": 9}, "--batch_atoms=5 and --batch_edges=9: give one"),
    ],
)
def test_nonsense_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        RunOptions(**options)


def test_without_an_adapter_it_is_refused(tmp_path: Path, flags):
    plain = [f for f in flags if not f.startswith(("--lora", "--schedule", "--check"))]
    assert "--batch_atoms needs an adapter" in here(tmp_path, *plain, "--batch_atoms=20")
