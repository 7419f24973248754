"""Runs of the real command on real DFT frames: the files it leaves, and what is in them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from helpers import zoo
from helpers.frames import DATA, TESTS
from helpers.running import run_command
from mace.calculators import MACECalculator

from mace_lora import load_adapter, merge
from mace_lora.testing import outputs, worst

FRAMES = DATA / "ethanol_test.xyz"


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def load(path: Path) -> torch.nn.Module:
    return torch.load(path, weights_only=False)


def log_file(folder: Path) -> str:
    """All that mace-torch and we have said, of which the terminal shows a part."""
    return (folder / "logs/run_run-1.log").read_text()


def initial_and_last(log: str) -> tuple[float, float]:
    """Validation force MAE (meV/A) before training and after the last epoch."""
    errors = [float(x) for x in re.findall(r"MAE_F= *([\d.]+) meV", log)]
    return errors[0], errors[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_data, foundation):
    """One run with LoRA in float64; several tests look at it."""
    folder = tmp_path_factory.mktemp("run")
    done = run_command(
        "--name=run",
        f"--foundation_model={foundation}",
        *(f"--{part}_file={small_data[part]}" for part in ("train", "valid", "test")),
        "--lora=True",
        "--lora_targets=all",
        "--max_num_epochs=3",
        "--batch_size=5",
        "--lr=0.02",
        "--forces_weight=100",
        "--error_table=PerAtomMAE",
        "--seed=1",
        cwd=folder,
    )
    return folder, done.stdout


def test_exactly_these_files_are_left(run):
    folder, _ = run
    assert files(folder) == {
        "run.model",
        "run_compiled.model",
        "run_adapter/adapter_model.safetensors",
        "run_adapter/adapter_config.json",
        "run_adapter/README.md",
        "run_learning_curve.png",
        "run_parity.png",
        "run_report.html",
        "run.yaml",
        "results/run_run-1_train.txt",
        "logs/run_run-1.log",
        "logs/run_run-1_debug.log",
        "checkpoints/run_run-1.model",
        "checkpoints/run_run-1_latest.pt",
        "checkpoints/run_run-1_previous.pt",
        "checkpoints/run_run-1_best_adapter/adapter_model.safetensors",
        "checkpoints/run_run-1_best_adapter/adapter_config.json",
        "checkpoints/run_run-1_best_adapter/README.md",
    }


def test_the_error_falls(run):
    before, after = initial_and_last(run[1])
    assert after < before


def test_the_log_says_what_happened(run):
    folder, log = run
    assert re.search(r"Trainable parameters: [\d,]+ before, [\d,]+ after injecting lora", log)
    assert "| part of the model" in log
    assert "init=" in log
    assert "rank=4" in log
    merged = re.search(r"Merged; largest difference on 5 validation frames: energy (\S+)", log)
    assert float(merged[1]) < 1e-7
    trainable = re.search(r"Trainable parameters: [\d,]+ before, ([\d,]+) after", log)[1]
    assert f"Model with LoRA has {trainable.replace(',', '')} trainable parameters" in log_file(
        folder
    )


def test_the_card_of_the_adapter(run):
    folder, log = run
    text = (folder / "run_adapter/README.md").read_text()
    after = re.search(r"\| test.xyz .* ([\d.]+) \|", log)[1]
    for words in ("train: `train.xyz`", "`lr=0.02`", "`seed=1`", f"→ {after} |"):
        assert words in text
    assert str(folder) not in text


def test_the_page_for_people(run, foundation, small_data):
    """Well-formed, complete in one file, with the numbers of the log and of the model."""
    folder, log = run
    text = (folder / "run_report.html").read_text()
    page = Reader()
    page.feed(text)
    assert page.open == []
    assert len(page.pictures) == 2
    for source, name in zip(page.pictures, ("learning_curve", "parity"), strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (folder / f"run_{name}.png").read_bytes()
    trainable = re.search(r"Trainable parameters: [\d,]+ before, ([\d,]+) after", log)[1]
    assert f"{trainable} after injecting lora" in text
    row = re.search(r"\| validation +\| +5 \| (.*) \|", log)[1]
    pairs = [(b, a) for b, a in re.findall(r"([\d.]+) -> ([\d.]+)", row)]
    assert len(pairs) == 2
    for before, after in pairs:
        assert f"<td class=number>{before} → {after}</td>" in text
    labels = ase.io.read(small_data["valid"], index=":")
    truth = np.concatenate([a.arrays["REF_forces"] for a in labels])
    for path, shown in zip((foundation, folder / "run.model"), pairs[1], strict=True):
        error = outputs(load(path), labels)["forces"].numpy() - truth
        assert float(shown) == pytest.approx(1e3 * np.sqrt((error**2).mean()), abs=0.06)
    for words in ("(10 frames)", "H, C, O", "run_adapter", "run_report.html", "foundation_model"):
        assert words in text
    assert f"mace-torch {metadata.version('mace-torch')}" in text


class Reader(HTMLParser):
    """Tags that are still open, and the sources of the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_info_says_where_the_checkpoint_stands(run, foundation):
    done = subprocess.run(
        [sys.executable, "-m", "mace_lora", "info", "checkpoints/run_run-1_latest.pt"],
        cwd=run[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of a run with lora" in done.stdout
    assert f"on {foundation}" in done.stdout
    assert "at epoch 3, step 0" in done.stdout


def test_the_adapter_holds_the_factors_alone(run, foundation):
    folder, _ = run
    config = json.loads((folder / "run_adapter/adapter_config.json").read_text())
    assert config["method"] == "lora"
    assert config["options"]["rank"] == 4
    assert config["base"]["name"] == foundation
    assert config["model"]["atomic_numbers"] == [1, 6, 8]
    assert set(config["versions"]) == {"mace-lora", "mace-torch", "torch", "e3nn"}


def test_base_and_adapter_give_exactly_the_merged_model(run, foundation, frames):
    folder, _ = run
    model = load_adapter(foundation, folder / "run_adapter")
    merged = load(folder / "run.model")
    assert worst(outputs(model, frames), outputs(merged, frames)) <= 1e-10
    assert worst(outputs(merge(model), frames), outputs(merged, frames)) <= 1e-12


def test_the_merged_model_needs_mace_torch_alone(run):
    """Loaded in a process where importing mace_lora fails: plain, compiled, and as a calculator."""
    folder, _ = run
    code = f"""
import sys; sys.modules["mace_lora"] = None
import warnings; warnings.filterwarnings("ignore")
import ase.io, torch
from mace.calculators import MACECalculator
atoms = ase.io.read({str(FRAMES)!r}, index=0)
atoms.calc = MACECalculator("run.model", device="cpu", default_dtype="float64")
model = torch.load("run.model", weights_only=False)
compiled = torch.jit.load("run_compiled.model")
names = sorted({{type(m).__module__.split(".")[0] for m in model.modules()}})
assert "mace_lora" not in names, names
assert all(p.requires_grad for p in model.parameters())
print("energy", repr(float(atoms.get_potential_energy())), atoms.get_forces().ravel().tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    energy, forces = done.stdout.split("energy ")[1].split(" ", 1)
    atoms = ase.io.read(FRAMES, index=0)
    atoms.calc = MACECalculator(str(folder / "run.model"), device="cpu", default_dtype="float64")
    assert float(energy) == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    assert np.allclose(json.loads(forces), atoms.get_forces().ravel(), atol=1e-10)


def test_upstreams_converter_takes_the_merged_model(run, frames):
    from mace.cli.convert_cueq_e3nn import run as back
    from mace.cli.convert_e3nn_cueq import run as to_cueq

    merged = load(run[0] / "run.model")
    again = back(to_cueq(merged, device="cpu"), device="cpu")
    assert worst(outputs(merged, frames), outputs(again, frames)) < 1e-8


def test_float32_ema_stage_two(tmp_path, train_flags, foundation):
    run_command(
        *train_flags,
        f"--foundation_model={foundation}",
        "--lora=True",
        "--ema",
        "--swa",
        "--start_swa=2",
        "--default_dtype=float32",
        cwd=tmp_path,
    )
    left = files(tmp_path)
    for name in ("run", "run_stagetwo"):
        assert {f"{name}.model", f"{name}_compiled.model"} <= left
        merged = load(tmp_path / f"{name}.model")
        assert next(merged.parameters()).dtype == torch.float32
        adapted = load_adapter(foundation, tmp_path / f"{name}_adapter")
        frames = ase.io.read(FRAMES, index=":3")
        assert worst(outputs(merge(adapted), frames), outputs(merged, frames)) <= 1e-5
    one = outputs(load(tmp_path / "run.model"), frames)
    two = outputs(load(tmp_path / "run_stagetwo.model"), frames)
    assert worst(one, two) > 0


@pytest.mark.parametrize("choice", ["average", "estimated", "foundation"])
def test_e0s(tmp_path, train_flags, foundation, choice):
    """Also float64 training from a float32 foundation model, where upstream fails for estimated."""
    done = run_command(
        *train_flags,
        f"--foundation_model={foundation}",
        "--lora=True",
        f"--E0s={choice}",
        "--max_num_epochs=1",
        cwd=tmp_path,
    )
    warned = "use --E0s=estimated" in done.stdout
    assert warned == (choice != "estimated")
    line = r"Atomic Energies used \(z: eV\) for head Default: {(.*?)}"
    used = re.search(line, log_file(tmp_path))[1]
    used = [float(pair.split(":")[1]) for pair in used.split(",")]
    saved = load(tmp_path / "run.model").atomic_energies_fn.atomic_energies.reshape(-1).tolist()
    assert saved == pytest.approx(used, rel=1e-12)


def test_e0s_are_kept_when_the_elements_are_the_foundations(tmp_path, train_flags, foundation):
    """Upstream overwrites them by the foundation's: uracil has all four elements."""
    flags = [f for f in train_flags if "_file=" not in f]
    data = TESTS / "data" / "uracil.xyz"
    done = run_command(
        *flags,
        f"--train_file={data}",
        "--valid_fraction=0.3",
        f"--foundation_model={foundation}",
        "--lora=True",
        "--max_num_epochs=1",
        cwd=tmp_path,
    )
    assert "restored those that were asked for" in log_file(tmp_path)
    assert "use --E0s=estimated" not in done.stdout
    merged = load(tmp_path / "run.model")
    known = load(Path(foundation)).atomic_energies_fn.atomic_energies
    assert not torch.allclose(merged.atomic_energies_fn.atomic_energies, known.double())
    frames = ase.io.read(data, index=":2")
    adapted = load_adapter(foundation, tmp_path / "run_adapter")
    assert worst(outputs(adapted, frames), outputs(merged, frames)) <= 1e-10


def test_a_foundation_model_by_name_goes_through_upstreams_loader(
    tmp_path, train_flags, foundation, monkeypatch, frames
):
    """`medium_off` from mace-torch's download cache, where a model of ours lies in its place."""
    cache = tmp_path / "cache" / "mace"
    cache.mkdir(parents=True)
    shutil.copy(foundation, cache / "MACE-OFF23_medium.model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [*train_flags, "--foundation_model=medium_off", "--lora=True", "--max_num_epochs=1"]
    done = run_command(*flags, cwd=tmp_path)
    assert "mace-off-2023 medium" in done.stdout
    merged = load(tmp_path / "run.model")
    adapted = load_adapter("medium_off", tmp_path / "run_adapter")
    assert worst(outputs(adapted, frames), outputs(merged, frames)) <= 1e-10

    sulphur = ase.io.read(FRAMES, index=":10")
    sulphur[4].symbols[0] = "S"
    ase.io.write(tmp_path / "sulphur.xyz", sulphur, format="extxyz")
    failed = run_command(*flags, "--train_file=sulphur.xyz", cwd=tmp_path, check=False)
    assert failed.returncode != 0
    assert "sulphur.xyz, frame 4 holds S (16)" in failed.stderr


def test_one_head_of_a_foundation_model_with_several(tmp_path, train_flags, frames):
    torch.save(zoo.build("two_heads_biased_readout"), tmp_path / "heads.model")
    flags = [*train_flags, "--foundation_model=heads.model", "--foundation_head=head1"]
    run_command(*flags, "--lora=True", "--max_num_epochs=1", cwd=tmp_path)
    merged = load(tmp_path / "run.model")
    assert merged.heads == ["Default"]
    adapted = load_adapter(str(tmp_path / "heads.model"), tmp_path / "run_adapter")
    assert worst(outputs(adapted, frames), outputs(merged, frames)) <= 1e-10


def test_without_an_adapter_the_command_is_upstreams(tmp_path, train_flags, foundation):
    """The same weights, bit for bit, as the script of mace-torch gives."""
    flags = [*train_flags, f"--foundation_model={foundation}", "--E0s=foundation"]
    flags += ["--default_dtype=float32", "--max_num_epochs=1"]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir(), theirs.mkdir()
    run_command(*flags, cwd=ours)
    code = "import sys; from mace.cli.run_train import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=theirs,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert files(ours) == files(theirs)
    one, other = (load(f / "run.model").state_dict() for f in (ours, theirs))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_restart_with_another_rank_is_refused(tmp_path, train_flags, foundation):
    """Upstream says "Loading checkpoint" and then starts from the beginning."""
    flags = [*train_flags, f"--foundation_model={foundation}", "--lora=True", "--max_num_epochs=1"]
    run_command(*flags, cwd=tmp_path)
    before = files(tmp_path)
    failed = run_command(*flags, "--lora_rank=2", "--restart_latest", cwd=tmp_path, check=False)
    assert failed.returncode == 1
    assert "--lora_rank=4 there, --lora_rank=2 here" in failed.stderr
    assert files(tmp_path) == before
    again = run_command(*flags, "--max_num_epochs=2", "--restart_latest", cwd=tmp_path)
    assert "Epoch 1" in again.stdout


def test_an_older_and_longer_run_of_the_same_name_is_not_the_result(
    tmp_path, train_flags, foundation
):
    flags = [*train_flags, f"--foundation_model={foundation}", "--lora=True"]
    run_command(*flags, "--max_num_epochs=3", cwd=tmp_path)
    done = run_command(*flags, "--max_num_epochs=1", "--overwrite=True", cwd=tmp_path)
    assert "Loaded Stage one model from epoch 0" in done.stdout


def test_lbfgs_moves_only_the_adapters(tmp_path, train_flags, foundation, frames):
    run_command(
        *train_flags,
        f"--foundation_model={foundation}",
        "--lora=True",
        "--lbfgs",
        "--max_num_epochs=1",
        cwd=tmp_path,
    )
    merged = load(tmp_path / "run.model")
    adapted = load_adapter(foundation, tmp_path / "run_adapter")
    assert worst(outputs(adapted, frames), outputs(merged, frames)) <= 1e-10
