"""The commands info, merge, unmerge and extract, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ase
import ase.io
import pytest
import torch
from helpers.adapter_folders import make_adapter
from helpers.running import tool_fails as failure
from helpers.running import tool_prints as run

from mace_lora import AdapterConfig, cli, extract, inject, load_adapter, merge
from mace_lora.adapters.registry import METHODS
from mace_lora.commands import COMMANDS
from mace_lora.errors import ConfigError, FoundationModelError
from mace_lora.testing import outputs, randomise_, worst


def load(path: Path) -> torch.nn.Module:
    return torch.load(path, weights_only=False)


# ---------------------------------------------------------------------------- help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys, command):
    text = run(capsys, command, "--help")
    assert text.startswith(f"usage: mace_lora {command}")
    assert f"mace_lora {command} " in text.split("examples:")[1]
    assert "exit codes: 0 done; 1 refused" in text


def test_the_list_of_commands(capsys):
    cli.main_tools(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in [*COMMANDS, "train"])


def test_exit_codes(base_file, tmp_path):
    """In a process of its own, as scripts see them."""

    def code(*flags: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "mace_lora", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        return done.returncode, done.stderr

    assert code("info", str(base_file))[0] == 0
    status, message = code("info", "nothing.model")
    assert status == 1
    assert message.startswith("error: nothing.model: there is no such file")
    assert code("merge")[0] == 2
    status, message = code("mrege")
    assert status == 2
    assert "Did you mean 'merge'?" in message


@pytest.mark.parametrize("flags", [("--help",), ("info", "mini", "--json")])
def test_a_reader_who_has_seen_enough(flags):
    """`mace_lora ... | head -1`: no traceback."""
    command = [sys.executable, "-u", "-m", "mace_lora", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        message = process.stderr.read().decode()
        process.wait()
    assert process.returncode == 0
    assert message == ""


def test_a_full_disk_and_a_poor_terminal():
    def code(place: str, encoding: str) -> tuple[int, str]:
        with open(place, "wb") as out:
            done = subprocess.run(
                [sys.executable, "-m", "mace_lora", "info", "mini"],
                stdout=out,
                stderr=subprocess.PIPE,
                check=False,
                env={**os.environ, "PYTHONIOENCODING": encoding},
            )
        return done.returncode, done.stderr.decode()

    status, message = code("/dev/full", "utf-8")
    assert status == 1
    assert message.startswith("error: the result can't be printed")
    assert code(os.devnull, "ascii") == (0, "")


# ---------------------------------------------------------------------------- info


def test_info_of_a_model(capsys, base, base_file):
    data = json.loads(run(capsys, "info", base_file, "--json"))
    assert data["what"] == "model"
    assert data["parameters"] == sum(p.numel() for p in base.parameters())
    assert data["atomic_numbers"] == [1, 6, 7, 8]
    assert data["atomic_energies"] == [[-13.6, -1027.0, -1485.0, -2041.0]]
    in_layers = sum(part["parameters"] for part in data["layers"].values())
    assert in_layers + data["other_parameters"] == data["parameters"]
    text = run(capsys, "info", base_file)
    for words in (
        "ScaleShiftMACE",
        "elements: H C N O",
        "cutoff: 4 Å",
        "4x0e+4x1o",
        "C -1027.0000",
    ):
        assert words in text


@pytest.mark.parametrize("method", METHODS)
def test_info_of_an_adapter(capsys, base, base_file, tmp_path, method):
    folder = make_adapter(base, tmp_path / "a", method, modules_to_save=("scale_shift.shift",))
    unknown = json.loads(run(capsys, "info", folder, "--json"))
    assert "--base" in unknown["sizes"]
    data = json.loads(run(capsys, "info", folder, "--base", base_file, "--json"))
    model = load_adapter(base, folder)
    from mace_lora.model.merging import changes

    sizes = {c.name: float(c.update.norm() / c.original.norm()) for c in changes(model)}
    found = {n: e["relative_update"] for n, e in data["layers"].items() if "relative_update" in e}
    assert found == pytest.approx(sizes)
    assert set(unknown["layers"]) == set(data["layers"])
    from mace_lora import adapter_parameters

    trained = sum(p.numel() for p in adapter_parameters(model).values())
    assert data["parameters"] == sum(e["parameters"] for e in data["layers"].values()) == trained
    text = run(capsys, "info", folder, "--base", base_file)
    assert f"an adapter of method {method}" in text
    assert "█" in text


def test_info_of_a_checkpoint(capsys, tmp_path):
    """Read without running anything that is in it."""
    content = {"model": {"w": torch.zeros(2, 3)}, "optimizer": {"state": {0: torch.zeros(5)}}}
    torch.save({**content, "epoch": 7}, tmp_path / "c.pt")
    data = json.loads(run(capsys, "info", tmp_path / "c.pt", "--json"))
    assert data["what"] == "checkpoint"
    assert data["numbers"] == {"epoch": 7}
    assert data["parts"]["model"] == {"tensors": 1, "values": 6}
    assert data["parts"]["optimizer"] == {"tensors": 1, "values": 5}


def test_info_of_nothing(tmp_path):
    assert "no such file" in failure("info", tmp_path / "nothing.model")
    assert "an adapter directory?" in failure("info", tmp_path)
    (tmp_path / "text.model").write_text("hello")
    assert "can't be read as a model" in failure("info", tmp_path / "text.model")


# ---------------------------------------------------------------------------- merge, unmerge


@pytest.mark.parametrize("method", METHODS)
def test_merge_and_unmerge(capsys, base, base_file, frames, tmp_path, method):
    """The merged file predicts what base and adapter do; unmerged, it is the base to the bit."""
    folder = make_adapter(base, tmp_path / "a", method, std=0.1)
    out = tmp_path / "merged.model"
    flags = ["--base", base_file, "--adapter", folder, "--output", out]
    data = json.loads(run(capsys, "merge", *flags, "--json"))
    assert data["largest_relative_difference"] < 1e-10
    merged = load(out)
    assert worst(outputs(load_adapter(base, folder), frames), outputs(merged, frames)) <= 1e-10
    assert worst(outputs(base, frames), outputs(merged, frames)) > 1e-6
    again = ["--model", out, "--adapter", folder, "--output", tmp_path / "start.model"]
    if data["gates_kept"]:
        assert method == "mmea"
        assert "carries adapters" in failure("unmerge", *again)
        return
    assert "mace_lora" not in {type(m).__module__.split(".")[0] for m in merged.modules()}
    data = json.loads(run(capsys, "unmerge", *again, "--json"))
    assert data["fingerprint_matches"]
    start = load(tmp_path / "start.model")
    for one, other in zip(start.parameters(), base.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-13)


def test_merge_with_another_strength(capsys, base, base_file, tmp_path):
    folder = make_adapter(base, tmp_path / "a")
    out = tmp_path / "m.model"
    flags = ["--base", base_file, "--adapter", folder, "--output", out]
    run(capsys, "merge", *flags, "--alpha", "-0.5")
    full = merge(load_adapter(base, folder))
    parts = (load(out).parameters(), base.parameters(), full.parameters())
    for w, a, b in zip(*parts, strict=True):
        assert torch.allclose(w, a - 0.5 * (b - a), atol=1e-14)
    assert "--alpha=nan" in failure("merge", *flags, "--alpha", "nan")
    gates = make_adapter(base, tmp_path / "g", "mmea")
    flags[3] = gates
    assert "depend on the input" in failure("merge", *flags, "--alpha", "0.5")


def test_a_failed_merge_leaves_the_old_file(base, base_file, tmp_path):
    folder = make_adapter(base, tmp_path / "a")
    out = tmp_path / "m.model"
    out.write_text("precious")
    with torch.no_grad():
        next(base.parameters()).add_(1.0)
    torch.save(base, base_file)
    text = failure("merge", "--base", base_file, "--adapter", folder, "--output", out)
    assert "belongs to another base model" in text
    assert out.read_text() == "precious"
    assert "there is no folder" in failure(
        "merge", "--base", base_file, "--adapter", folder, "--output", tmp_path / "no" / "m.model"
    )


def test_unmerging_what_was_never_merged_is_told(capsys, base, base_file, tmp_path):
    folder = make_adapter(base, tmp_path / "a")
    flags = ["--model", base_file, "--adapter", folder, "--output", tmp_path / "s.model"]
    assert "or the adapter was not merged into this model" in run(capsys, "unmerge", *flags)


# ---------------------------------------------------------------------------- extract


def finetuned(base: torch.nn.Module, **options) -> torch.nn.Module:
    """`base` after a change of all its weights, of known rank."""
    from copy import deepcopy

    model = deepcopy(base)
    inject(model, AdapterConfig.create("lora", targets=("all",), **options))
    randomise_(model, std=0.1)
    return merge(model)


def test_extraction_finds_an_update_of_low_rank(base, frames, tmp_path):
    """Exactly, if the rank is enough, E0s included; and comes nearer with each rank below."""
    changed = finetuned(base, rank=3)
    changed.atomic_energies_fn.atomic_energies += 0.5
    errors = []
    for rank in (1, 2, 3):
        found = extract(base, changed, AdapterConfig.create("lora", rank=rank, targets=("all",)))
        errors.append(sum(layer.error**2 for layer in found.layers))
        found.save(tmp_path / str(rank))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-20
    loaded = load_adapter(base, tmp_path / "3")
    assert worst(outputs(loaded, frames), outputs(changed, frames)) < 1e-10


@pytest.mark.parametrize("method", ["lora", "elora"])
def test_extraction_is_the_best_of_its_rank(base, method):
    """The error left is that of Eckart and Young: the singular values that were cut off."""
    from mace_lora.model.layers import find_sites

    changed = finetuned(base, rank=3)
    options = {"rank": 1, "targets": ("interactions.1.skip_tp",)}
    found = extract(base, changed, AdapterConfig.create(method, **options))
    (layer,) = [x for x in found.layers if x.name == "interactions.1.skip_tp"]
    sites = [
        next(s for s in find_sites(m)[0] if s.name == "interactions.1.skip_tp")
        for m in (base, changed)
    ]
    layout = sites[0].layout
    update = (sites[1].weight - sites[0].weight).detach()
    cut = 0.0
    for matrix in layout.split(update):  # here each irrep has one path
        assert len(layout.blocks) == len(layout.groups)
        cut += float((torch.linalg.svdvals(matrix)[1:] ** 2).sum())
    assert layer.error == pytest.approx(cut**0.5 / float(update.norm()), rel=1e-9)


def test_extract_command(capsys, base, base_file, frames, tmp_path):
    torch.save(finetuned(base, rank=2), tmp_path / "ft.model")
    ase.io.write(tmp_path / "data.xyz", frames)
    flags = ["--base", base_file, "--finetuned", tmp_path / "ft.model", "--rank", "2"]
    flags += ["--output", tmp_path / "out", "--data", tmp_path / "data.xyz"]
    data = json.loads(run(capsys, "extract", *flags, "--json"))
    errors = data["errors"]
    assert errors["adapter"] == pytest.approx(errors["fine-tuned"], rel=1e-9)
    assert errors["adapter"] != pytest.approx(errors["base"], rel=1e-9)
    text = run(capsys, "extract", *flags)
    assert "left out" in text
    assert "forces (meV/Å)" in text
    loaded = load_adapter(str(base_file), tmp_path / "out")
    assert worst(outputs(loaded, frames), outputs(load(tmp_path / "ft.model"), frames)) < 1e-10


def test_extraction_from_what_is_no_fine_tuning(base, build):
    with pytest.raises(FoundationModelError, match="no fine-tuning of the base"):
        extract(base, build("high_order"))
    with pytest.raises(ConfigError, match="use lora or elora"):
        extract(base, finetuned(base, rank=1), AdapterConfig.create("dora"))


def test_an_adapter_takes_the_place_of_nothing_else(base, base_file, frames, tmp_path):
    """A folder of something else, or a file, is refused; notes beside an adapter stay."""
    torch.save(finetuned(base, rank=2), tmp_path / "ft.model")
    flags = ["--base", base_file, "--finetuned", tmp_path / "ft.model", "--output"]
    (tmp_path / "data").mkdir()
    ase.io.write(tmp_path / "data" / "precious.xyz", frames)
    assert "precious.xyz" in failure("extract", *flags, tmp_path / "data")
    assert (tmp_path / "data" / "precious.xyz").exists()
    assert "is a file" in failure("extract", *flags, tmp_path / "ft.model")
    folder = make_adapter(base, tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    assert (make_adapter(base, folder, seed=1) / "notes.txt").read_text() == "mine"
