"""Ways of training that meet adapters: other kernels, replay of old data, weight decay."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import ase.io
import pytest
import torch
from helpers import zoo
from helpers.running import LATEST, here, results, short_run

from mace_lora import load_adapter
from mace_lora.testing import outputs, worst
from mace_lora.upstream.precision import default_dtype


@pytest.fixture(scope="module")
def flags(small_data, foundation) -> list[str]:
    return short_run(small_data, foundation, "--max_num_epochs=2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, flags) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    assert here(folder, *flags) == ""
    return folder


def load(path: Path) -> torch.nn.Module:
    return torch.load(path, weights_only=False)


ADAPTERS = {
    "lora": ["--lora=True", "--lora_targets", "all"],
    "elora": ["--adapter=elora"],
    "dora": ["--adapter=dora", "--dora_targets", "all"],
    "mmea": ["--adapter=mmea"],
}


@pytest.mark.parametrize(
    ("method", "flag"),
    [
        ("lora", "--enable_cueq=True"),
        ("elora", "--enable_cueq=True"),
        ("dora", "--only_cueq=True"),
        ("mmea", "--enable_cueq=True"),
    ],
)
def test_cuequivariance_gives_the_same_model(
    tmp_path, flags, frames, foundation, method, flag, caplog
):
    """mace-torch loses the adapters with the first flag, and ignores the second."""
    pytest.importorskip("cuequivariance_torch")
    flags = [f for f in flags if "lora" not in f] + ADAPTERS[method]
    straight, cueq = tmp_path / "straight", tmp_path / "cueq"
    assert here(straight, *flags) == ""
    if method == "elora":  # and continued
        assert here(cueq, *flags, flag, "--max_num_epochs=1") == ""
    assert here(cueq, *flags, flag, "--restart_latest") == ""
    assert "Converting the model (to_cueq) before the adapters are attached" in caplog.text
    merged = load(cueq / "run.model")
    assert not any("cueq" in type(m).__module__ for m in merged.modules())
    assert worst(outputs(merged, frames), outputs(load(straight / "run.model"), frames)) < 1e-8
    losses = [[line["loss"] for line in results(f)] for f in (cueq, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    # the same parameters on both sides, contractions among them, and an adapter for e3nn's model
    one, other = (torch.load(f / LATEST, weights_only=True)["adapter"] for f in (cueq, straight))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    moved = [k for k, v in one.items() if "contractions" in k and v.abs().max() > 1e-6]
    assert {"0", "1"} <= {name.split(".")[1] for name in moved}
    adapted = load_adapter(foundation, cueq / "run_adapter")
    # e3nn's Clebsch-Gordan coefficients come from the float32 file, cuequivariance's don't
    assert worst(outputs(adapted, frames), outputs(merged, frames)) <= 1e-8


def test_a_model_that_cannot_be_converted(tmp_path, flags):
    """mace-torch knows correlation 2 and 3."""
    pytest.importorskip("cuequivariance_torch")
    kind, arguments = zoo.ZOO["foundation"]
    with default_dtype(torch.float64):
        torch.save(kind(**{**zoo._COMMON, **arguments, "correlation": 1}), tmp_path / "one.model")
    error = here(tmp_path, *flags, "--foundation_model=one.model", "--enable_cueq=True")
    assert "--enable_cueq=True: mace-torch can't convert this model" in error


@pytest.mark.parametrize("labels", ["labels of the old data", "pseudolabels"])
def test_replay_with_two_heads(tmp_path, flags, small_data, foundation, frames, labels):
    """Old data keep a head of their own; the adapter, loaded again, gives the model of both."""
    replay = ase.io.read(small_data["valid"], index=":")
    if labels == "pseudolabels":
        for frame in replay:
            del frame.info["REF_energy"], frame.arrays["REF_forces"]
    ase.io.write(tmp_path / "replay.xyz", replay, format="extxyz")
    more = ["--multiheads_finetuning=True", "--pt_train_file=replay.xyz", "--E0s=estimated"]
    more += ["--force_mh_ft_lr=True"]
    if labels == "pseudolabels":
        more.append("--pseudolabel_replay=True")
    assert here(tmp_path, *flags, *more) == ""
    merged = load(tmp_path / "run.model")
    assert set(merged.heads) == {"pt_head", "Default"}
    adapted = load_adapter(foundation, tmp_path / "run_adapter")
    assert worst(outputs(adapted, frames), outputs(merged, frames)) <= 1e-10
    heads = {line["head"] for line in results(tmp_path) if line["mode"] == "eval"}
    assert heads == {"pt_head", "Default"}


def test_multihead_replay_says_which_learning_rate_it_takes(tmp_path, flags, small_data, caplog):
    more = ["--multiheads_finetuning=True", f"--pt_train_file={small_data['valid']}"]
    assert here(tmp_path, *flags, *more, "--max_num_epochs=1") == ""
    assert "changes what was asked for: --lr=0.0001 (was 0.01)" in caplog.text
    assert "--loss=universal (was weighted)" in caplog.text
    groups = torch.load(tmp_path / LATEST, weights_only=True)["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {1e-4}


def test_the_weight_of_replay_counts(tmp_path, flags, small_data, caplog):
    """mace-torch forgets --weight_pt_head where it is given the frames."""
    caplog.set_level("INFO")
    more = ["--multiheads_finetuning=True", f"--pt_train_file={small_data['train']}"]
    more += [f"--pt_valid_file={small_data['valid']}", "--max_num_epochs=1"]
    found = []
    for weight in (1.0, 0.25):
        caplog.clear()
        assert here(tmp_path / str(weight), *flags, *more, f"--weight_pt_head={weight}") == ""
        initial = re.findall(r"Initial: head: (\w+), loss=\s*([\d.]+)", caplog.text)
        found.append({head: float(loss) for head, loss in initial})
    full, quarter = found
    assert full["pt_head"] > 0.01
    assert quarter["pt_head"] == pytest.approx(0.25 * full["pt_head"], rel=1e-5)
    assert quarter["Default"] == full["Default"]


def test_replay_does_not_start_by_itself(tmp_path, flags, foundation, monkeypatch, caplog):
    """It is mace-torch's default for `small`: with 1e-4 for --lr, and a download of old data."""
    cache = tmp_path / "cache" / "mace"
    cache.mkdir(parents=True)
    shutil.copy(foundation, cache / "20231210mace128L0_energy_epoch249model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    assert here(tmp_path, *flags, "--foundation_model=small", "--max_num_epochs=1") == ""
    assert "No replay with small" in caplog.text
    groups = torch.load(tmp_path / LATEST, weights_only=True)["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {0.01}


def test_weight_decay_reaches_every_adapter_parameter_and_no_frozen_one(tmp_path, flags, plain):
    """With AdamW and nothing to learn, each parameter shrinks by the same factor."""
    more = ["--optimizer=adamw", "--weight_decay=10", "--lr=0.001", "--max_num_epochs=1"]
    none = ["--energy_weight=0", "--forces_weight=0"]
    states = []
    for folder, decay in (
        (tmp_path / "with", more),
        (tmp_path / "without", [*more, "--weight_decay=0"]),
    ):
        assert here(folder, *flags, *decay, *none, "--E0s=foundation") == ""
        states.append(torch.load(folder / LATEST, weights_only=True)["adapter"])
    changed = 0
    for name, start in states[1].items():
        assert torch.allclose(states[0][name], start * (1 - 0.001 * 10) ** 2, rtol=1e-12)
        changed += bool(start.abs().max() > 0)
    assert changed >= len(states[1]) / 2  # the factors A; B starts at zero
    one, other = (load(tmp_path / f / "run.model").state_dict() for f in ("with", "without"))
    assert all(torch.equal(one[k], other[k]) for k in one)  # B is zero, and the base frozen


def test_e0s_of_more_elements_than_the_run_has(small_data, foundation, tmp_path):
    """mace-torch keeps them all, and fails in the model where their number is another."""
    E0s = "--E0s={1: -13.6, 6: -1027.0, 7: -1485.0, 8: -2041.0}"
    assert here(tmp_path, *short_run(small_data, foundation, E0s, "--max_num_epochs=1")) == ""
    model = torch.load(tmp_path / "run.model", weights_only=False)
    assert model.atomic_energies_fn.atomic_energies.flatten().tolist() == [-13.6, -1027.0, -2041.0]
