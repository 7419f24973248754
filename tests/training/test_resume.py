"""Interrupted and continued runs end as uninterrupted ones do, bit for bit, or say why not."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import zoo
from helpers.running import (
    LATEST,
    here,
    process,
    results,
    same_weights,
    settled,
    short_run,
    signal_after,
    wait_for_lines,
)

from mace_lora import load_adapter
from mace_lora.testing import outputs, worst
from mace_lora.training import run as training_run
from mace_lora.training.epochs.signals import StopRequest
from mace_lora.training.record import Trained
from mace_lora.upstream import names as upstream

PREVIOUS = "checkpoints/run_run-1_previous.pt"


@pytest.fixture(scope="module")
def flags(small_data, foundation) -> list[str]:
    """Five steps per epoch, EMA, a plateau schedule that acts, stage two from epoch 4 on."""
    schedule = ["--scheduler_patience=0", "--ema", "--swa", "--start_swa=4"]
    more = ["--batch_size=2", "--valid_batch_size=5", "--forces_weight=100", *schedule]
    return short_run(small_data, foundation, *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags) -> Path:
    """Six epochs without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert here(folder, *flags, "--max_num_epochs=6") == ""
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory, flags) -> Path:
    """Three epochs, ended well."""
    folder = tmp_path_factory.mktemp("short")
    assert here(folder, *flags, "--max_num_epochs=3") == ""
    return folder


def assert_ended_like(folder: Path, whole: Path) -> None:
    assert results(folder) == results(whole)
    for name in ("run.model", "run_stagetwo.model"):
        assert same_weights(folder / name, whole / name)


def test_an_uninterrupted_run_is_as_with_mace_torchs_own_loop(tmp_path, flags, whole, monkeypatch):
    """The same losses at every step and validation, and the same model."""
    ours = training_run.substitutes

    def without_our_loop(run, stop):
        def train(**keywords):
            valid_sets = {h: v.dataset for h, v in keywords["valid_loaders"].items()}
            run.trained = Trained(len(keywords["train_loader"].dataset), {}, valid_sets)
            upstream.original("train")(**keywords)

        found = {**ours(run, stop), "train": train}
        del found["checkpoints"]
        return found

    monkeypatch.setattr(training_run, "substitutes", without_our_loop)
    assert here(tmp_path, *flags, "--max_num_epochs=6") == ""
    assert list(tmp_path.glob("checkpoints/*_epoch-*.pt"))  # mace-torch's, so its loop has run
    assert results(tmp_path) == results(whole)
    assert same_weights(tmp_path / "run.model", whole / "run.model")


def test_signals_of_batch_systems(tmp_path, flags, whole, caplog):
    """SIGTERM and SIGUSR1 end a run between two steps, with an exit code to requeue on."""
    flags = [*flags, "--max_num_epochs=6", "--restart_latest"]
    for number, lines in ((signal.SIGTERM, 4), (signal.SIGUSR1, 20)):
        with signal_after(number, tmp_path, lines):
            assert here(tmp_path, *flags) == "75"
        assert not (tmp_path / "run.model").exists()
    assert "SIGTERM: stopped at epoch 0, step" in caplog.text
    assert "SIGUSR1: stopped at epoch" in caplog.text
    assert here(tmp_path, *flags) == ""
    assert caplog.text.count("Continuing from") == 2
    assert_ended_like(tmp_path, whole)


@pytest.fixture
def _ctrl_c_is_heard(monkeypatch):
    """Not so where the tests run in the background of a shell; and of which program."""
    monkeypatch.setattr("sys.argv", ["mace_run_train"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_is_heard")
@pytest.mark.parametrize("lines", [10, 26, 32])  # in epochs 1, 4 and 5; stage two begins with 4
def test_ctrl_c_says_how_to_go_on(tmp_path, flags, whole, caplog, capfd, lines):
    """Both commands that it names are run: the best epoch as a model, and on to the end."""
    flags = [*flags, "--max_num_epochs=6"]
    with signal_after(signal.SIGINT, tmp_path, lines):
        assert here(tmp_path, *flags) == "130"
    assert "once more ends at once" in capfd.readouterr().err
    assert "Ctrl-C: stopped at epoch" in caplog.text
    assert not (tmp_path / "run.model").exists()
    commands = [line.strip() for line in caplog.text.splitlines() if "  mace_run_train" in line]
    on, best = (shlex.split(line)[1:] for line in commands)
    assert on == [*settled(flags), "--restart_latest"]
    stopped = len(results(tmp_path))
    assert here(tmp_path, *best) == ""
    assert len(results(tmp_path)) == stopped  # nothing was trained
    stage = "_stagetwo" if lines == 32 else ""
    adapter = tmp_path / f"checkpoints/run_run-1{stage}_best_adapter/adapter_model.safetensors"
    saved = tmp_path / f"run{stage}_adapter/adapter_model.safetensors"
    assert saved.read_bytes() == adapter.read_bytes()
    assert (tmp_path / f"run{stage}.model").exists()
    assert here(tmp_path, *on) == ""
    assert_ended_like(tmp_path, whole)


@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_ctrl_c_before_an_epoch_is_done(tmp_path, flags, caplog):
    with signal_after(signal.SIGINT, tmp_path, 2):
        assert here(tmp_path, *flags, "--max_num_epochs=6") == "130"
    assert "Ctrl-C: stopped at epoch 0" in caplog.text
    assert "No epoch is done yet" in caplog.text


@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_ctrl_c_once_more_ends_at_once():
    stop = StopRequest()
    with stop.receiving(), stop.waiting():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert stop
        with pytest.raises(SystemExit) as left:  # noqa: PT012
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert left.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest().receiving():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigkill_at_any_moment(tmp_path, flags, whole):
    """The moment differs from run to run; what was half written then is cleared away."""
    flags = [*flags, "--max_num_epochs=6", "--restart_latest"]
    running = process(tmp_path, *flags)
    wait_for_lines(running, tmp_path, random.randint(8, 25))
    running.kill()
    assert running.wait() == -9
    (tmp_path / "checkpoints/.run_run-1_next.pt.half").write_text("half")
    assert here(tmp_path, *flags) == ""
    assert_ended_like(tmp_path, whole)
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert left == {p.name for p in (whole / "checkpoints").iterdir()}


def test_sigkill_inside_an_epoch_that_was_saved_in_between(tmp_path, flags, whole):
    """A checkpoint after every step here; the run goes on from the middle of its epoch."""
    flags = [*flags, "--max_num_epochs=6", "--restart_latest"]
    running = process(tmp_path, *flags, "--checkpoint_seconds=0")
    wait_for_lines(running, tmp_path, random.randint(8, 12))
    at = {"steps": 0}
    while at["steps"] == 0:  # not just after an epoch
        running.send_signal(signal.SIGCONT)
        time.sleep(0.01)
        running.send_signal(signal.SIGSTOP)
        assert running.poll() is None
        if (tmp_path / LATEST).exists():  # else it was being replaced
            at = torch.load(tmp_path / LATEST, weights_only=True)["progress"]
    running.kill()
    running.wait()
    assert here(tmp_path, *flags) == ""
    assert f"at epoch {at['epoch']}, step {at['steps']}" in "".join(
        p.read_text() for p in tmp_path.glob("logs/*.log")
    )
    assert_ended_like(tmp_path, whole)


def test_a_finished_run_with_more_epochs(tmp_path, flags, short, whole):
    folder = shutil.copytree(short, tmp_path / "run")
    assert here(folder, *flags, "--max_num_epochs=6", "--restart_latest") == ""
    assert_ended_like(folder, whole)


def test_a_checkpoint_from_before_factors_were_called_lora_a(tmp_path, flags, short, whole):
    folder = shutil.copytree(short, tmp_path / "run")
    state = torch.load(folder / LATEST, weights_only=True)
    state["format"] = 1
    for holder in (state, *state["best"].values()):
        assert any("lora_A" in name for name in holder["adapter"])
        holder["adapter"] = {k.replace(".lora_", "."): v for k, v in holder["adapter"].items()}
    torch.save(state, folder / LATEST)
    assert here(folder, *flags, "--max_num_epochs=6", "--restart_latest") == ""
    assert_ended_like(folder, whole)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, flags, short, whole, caplog):
    folder = shutil.copytree(short, tmp_path / "run")
    (folder / LATEST).write_bytes((folder / LATEST).read_bytes()[:-1000])
    assert here(folder, *flags, "--max_num_epochs=6", "--restart_latest") == ""
    assert f"falling back to {PREVIOUS}" in caplog.text
    assert_ended_like(folder, whole)


def test_no_checkpoint_that_can_be_read(tmp_path, flags, short):
    folder = shutil.copytree(short, tmp_path / "run")
    for name in (LATEST, PREVIOUS):
        (folder / name).write_text("no checkpoint")
    before = (folder / "run.model").read_bytes()
    error = here(folder, *flags, "--max_num_epochs=6", "--restart_latest")
    assert "run_latest.pt" not in error
    assert LATEST in error
    assert PREVIOUS in error
    assert "nothing to continue from" in error
    assert (folder / "run.model").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "there", "here_"),
    [
        (["--lora_rank=2"], "--lora_rank=4 there", "--lora_rank=2 here"),
        (["--lora_targets", "linear"], "--lora_targets=['default'] there", "['linear'] here"),
        (["--lora=False", "--adapter=dora"], "--adapter=lora there", "--adapter=dora here"),
        (["--foundation_model=other.model"], "base.model (fingerprint", "other.model (fing"),
        (["--optimizer=adamw"], "--optimizer=adam there", "--optimizer=adamw here"),
        (["--batch_size=5"], "2 there", "frames per step (batch_size times processes)=5 here"),
        (["--start_swa=2"], "epoch 3 in stage one there", "--start_swa=2 here"),
        (["--E0s=average"], "E0s [[", "] here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, flags, short, more, there, here_):
    """Both sides are named, nothing is loaded, nothing changes."""
    folder = shutil.copytree(short, tmp_path / "run")
    if "other.model" in more[0]:
        torch.manual_seed(5)
        other = zoo.build("foundation")
        with torch.no_grad():
            next(other.parameters()).mul_(1.01)
        torch.save(other, folder / "other.model")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "log" not in str(p)}
    error = here(folder, *flags, "--max_num_epochs=6", "--restart_latest", *more)
    assert f"{LATEST} was written by another run" in error
    assert there in error
    assert here_ in error
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "log" not in str(p)}
    assert after == before


def test_a_new_learning_rate_is_followed_and_said(tmp_path, flags, short, caplog):
    folder = shutil.copytree(short, tmp_path / "run")
    rates = [
        [
            g["lr"]
            for g in torch.load(short / LATEST, weights_only=True)["optimizer"]["param_groups"]
        ]
    ]
    flags = [*flags, "--max_num_epochs=4", "--restart_latest", "--lr=0.001", "--weight_decay=0.25"]
    assert here(folder, *flags, "--scheduler_patience=0") == ""
    assert "--lr=0.01 there, --lr=0.001 here" in caplog.text
    groups = torch.load(folder / LATEST, weights_only=True)["optimizer"]["param_groups"]
    rates.append([g["lr"] for g in groups])
    # the plateau schedule may have lowered it in this epoch (lr_factor 0.8)
    assert all(new <= 0.1 * old * 1.001 for old, new in zip(*rates, strict=True))
    assert {g["weight_decay"] for g in groups} == {0.25}


def test_a_checkpoint_of_mace_torch_is_refused(tmp_path, flags):
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": {}}, tmp_path / "checkpoints/run_run-1_epoch-7.pt")
    error = here(tmp_path, *flags, "--max_num_epochs=1", "--restart_latest")
    assert "run_run-1_epoch-7.pt is a checkpoint of mace-torch" in error


def test_the_size_of_a_checkpoint_goes_with_the_adapter(short):
    state = torch.load(short / LATEST, weights_only=True)

    def numbers(value) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() if value.is_floating_point() else 0
        if isinstance(value, dict):
            return sum(map(numbers, value.values()))
        return sum(map(numbers, value)) if isinstance(value, (list, tuple)) else 0

    adapter = sum(t.numel() for t in state["adapter"].values())
    # the weights, three moments of AMSGrad and a counter for each, the average, the best
    assert numbers(state) <= 6 * adapter + 2 * len(state["adapter"])
    assert all(".original" not in name for name in state["adapter"])


def test_the_best_adapter_stands_by_itself(short, foundation, frames):
    """The best adapter on the base is the model that is saved at the end."""
    adapted = load_adapter(foundation, short / "checkpoints/run_run-1_best_adapter")
    merged = torch.load(short / "run.model", weights_only=False)
    assert worst(outputs(adapted, frames), outputs(merged, frames)) <= 1e-10


def test_the_same_seed_gives_the_same_result(tmp_path, flags, short):
    folder = tmp_path / "again"
    assert here(folder, *flags, "--max_num_epochs=3") == ""
    assert results(folder) == results(short)
    assert same_weights(folder / "run.model", short / "run.model")


def test_patience_ends_a_run_and_more_of_it_goes_on(tmp_path, flags, caplog):
    """mace-torch says "Stopping optimization" and trains on."""
    flags = [f for f in flags if "swa" not in f]
    flags += ["--lr=1e-30", "--max_num_epochs=5", "--batch_size=10", "--restart_latest"]
    assert here(tmp_path, *flags, "--patience=1") == ""
    assert "Stopping optimization after 1 epochs without improvement" in caplog.text
    assert (
        len([r for r in results(tmp_path) if r["mode"] == "eval"]) == 3
    )  # before, best, not better
    assert here(tmp_path, *flags, "--patience=9") == ""
    assert len([r for r in results(tmp_path) if r["mode"] == "eval"]) == 6


def test_all_epochs_are_kept_and_the_best_is_the_result(tmp_path, flags, foundation, frames):
    """mace-torch takes the newest then."""
    flags = [f for f in flags if "swa" not in f and f != "--ema"]
    flags += ["--lr=0.5", "--max_num_epochs=3", "--batch_size=10", "--save_all_checkpoints"]
    assert here(tmp_path, *flags) == ""
    losses = [r["loss"] for r in results(tmp_path) if r["mode"] == "eval"][1:]
    best = losses.index(min(losses))
    assert best != len(losses) - 1  # a learning rate at which the last epoch is not the best
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    differences = [
        worst(
            outputs(
                load_adapter(foundation, tmp_path / f"checkpoints/run_run-1_epoch-{e}_adapter"),
                frames,
            ),
            outputs(merged, frames),
        )
        for e in range(3)
    ]
    assert differences.index(min(differences)) == best
    assert differences[best] <= 1e-10


def test_a_signal_outside_training_leaves_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().receiving(), pytest.raises(SystemExit) as left:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert left.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def accumulating(flags):
    """Ten batches in an epoch, and a step of the optimiser after 4, 8 and 10 of them."""

    def of(method: str) -> list[str]:
        dropout = [] if method in ("mmea", "full") else [f"--{method}_dropout=0.2"]
        own = [f for f in flags if f != "--lora=True"] + [f"--adapter={method}", *dropout]
        steps = ["--batch_size=1", "--accumulate=4", "--warmup_steps=4", "--protect=True"]
        return [*own, *steps, "--max_num_epochs=2", "--restart_latest"]

    return of


@pytest.mark.parametrize(
    ("method", "lines"), [("lora", 3), ("elora", 15), ("mmea", 14), ("dora", 5), ("full", 9)]
)
def test_accumulated_gradients_dropout_warm_up_and_protection(
    tmp_path, accumulating, method, lines
):
    """Stopped inside an epoch, but never between batches whose gradients belong together."""
    flags = accumulating(method)
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert here(straight, *flags) == ""
    with signal_after(signal.SIGTERM, parts, lines):
        assert here(parts, *flags) == "75"
    at = torch.load(parts / LATEST, weights_only=True)["progress"]
    assert at["steps"] in (0, 4, 8, 10)
    assert here(parts, *flags) == ""
    assert results(parts) == results(straight)
    assert same_weights(straight / "run.model", parts / "run.model")


def test_sigkill_while_gradients_are_accumulated(tmp_path, accumulating):
    """Nothing of the batches since the last checkpoint is left, and they are done again."""
    flags = accumulating("elora")
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert here(straight, *flags) == ""
    running = process(parts, *flags)
    wait_for_lines(running, parts, 15)  # two validations, ten batches of epoch 0, some of epoch 1
    running.kill()
    assert running.wait() == -9
    assert here(parts, *flags) == ""
    assert results(parts) == results(straight)
    assert same_weights(straight / "run.model", parts / "run.model")


@pytest.mark.parametrize(
    "more", [["--lbfgs", "--default_dtype=float32"], ["--optimizer=schedulefree"]]
)
def test_other_optimisers(tmp_path, flags, more):
    """Interrupted at the end of an epoch; LBFGS ends in NaN in float32 if gradients are clipped."""
    if "schedulefree" in more[0]:
        pytest.importorskip("schedulefree")
    flags = [f for f in flags if "swa" not in f] + more
    flags += ["--batch_size=10"]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert here(straight, *flags, "--max_num_epochs=2") == ""
    assert here(parts, *flags, "--max_num_epochs=1") == ""
    assert here(parts, *flags, "--max_num_epochs=2", "--restart_latest") == ""
    assert results(parts) == results(straight)
    assert same_weights(straight / "run.model", parts / "run.model")
    losses = [line["loss"] for line in results(straight) if line["mode"] == "eval"]
    assert losses[-1] < losses[0]
