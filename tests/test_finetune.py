"""`finetune` and `train` in Python are the command: the same numbers, no trace in the process."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import signal
from html import escape
from pathlib import Path

import ase.io
import jedi
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.running import here, results, signal_after
from torch.nn.utils import parametrize

from mace_lora import (
    AdapterConfig,
    LoraOptions,
    MaceLoraError,
    Result,
    finetune,
    inject,
    load_adapter,
    load_foundation,
    train,
)
from mace_lora.adapters.registry import METHODS, options_of
from mace_lora.errors import ConfigError, DataError
from mace_lora.training.arguments import build_parser

OPTIONS = {
    "max_num_epochs": 2,
    "batch_size": 5,
    "valid_batch_size": 5,
    "lr": 0.01,
    "seed": 1,
    "defaults": "mace-torch",
    "ema": True,
    "plot": False,
}
FACTORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def command(tmp_path_factory, small_data, foundation) -> Path:
    """The folder of a run by the command, with these options and the method `lora`."""
    folder = tmp_path_factory.mktemp("command")
    words = [f"--{name}={value}" for name, value in OPTIONS.items()]
    files = [f"--{part}_file={path}" for part, path in small_data.items()]
    method = ["--adapter=lora", "--lora_rank=3", "--lora_preset=balanced"]
    base = f"--foundation_model={foundation}"
    assert here(folder, "--name=run", base, *files, *method, *words) == ""
    return folder


@pytest.fixture
def sets(small_data) -> dict[str, list[ase.Atoms]]:
    return {part: ase.io.read(path, ":") for part, path in small_data.items()}


def adapter_of(folder: Path) -> bytes:
    return (folder / FACTORS).read_bytes()


def state() -> list[object]:
    """What a program may rely on after a call."""
    root = logging.getLogger()
    numbers = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    log = root.level, root.handlers[:], root.filters[:]
    others = Path.cwd(), torch.get_default_dtype(), dict(os.environ)
    return [*numbers, *log, *others, signal.getsignal(signal.SIGINT)]


def test_it_is_the_command(tmp_path, monkeypatch, sets, foundation, command, capsys):
    """Frames in memory, base by path; in a temporary folder that goes with the result."""
    monkeypatch.chdir(tmp_path)
    base = Path(foundation)
    before = state()
    result = finetune(
        os.path.relpath(base),
        sets["train"],
        valid=sets["valid"],
        test=sets["test"],
        method="lora",
        rank=3,
        **OPTIONS,
    )
    assert state() == before
    assert list(tmp_path.iterdir()) == []
    assert adapter_of(result.adapter) == adapter_of(command / "run_adapter")
    assert capsys.readouterr().out.count("Training complete") == 1
    _is_complete(result, base, sets["test"])
    saved = result.save(tmp_path / "kept")
    folder = result.folder
    del result
    gc.collect()
    assert not folder.exists()
    assert adapter_of(saved / "finetuned_adapter") == adapter_of(command / "run_adapter")
    assert (saved / "finetuned.model").exists()


def _is_complete(result: Result, base: Path, test: list[ase.Atoms]) -> None:
    assert [row["epochs"] for row in result.history] == [0, 1, 2]
    errors = {(row["set"], row["quantity"]): row for row in result.errors}
    kinds = ("training", "validation", "test")
    assert list(errors) == [(kind, q) for kind in kinds for q in ("energy", "forces")]
    force = errors["validation", "forces"]
    assert force["before"] == pytest.approx(1e3 * result.history[0]["rmse_f"], rel=1e-4)
    found = 1e3 * min(row["rmse_f"] for row in result.history)
    assert force["after"] == pytest.approx(found, rel=1e-4)
    atoms = [frame.copy() for frame in test]
    for frame in atoms:
        frame.calc = result.calculator()
    wrong = [a.get_forces() - b.arrays["REF_forces"] for a, b in zip(atoms, test, strict=True)]
    rmse = 1e3 * np.sqrt(np.square(wrong).mean())
    assert errors["test", "forces"]["after"] == pytest.approx(rmse, rel=1e-4)
    adapted = load_adapter(base, result.adapter)
    assert isinstance(adapted, torch.nn.Module)
    assert result.report().read_text().startswith("<!")
    shown = result._repr_html_()
    assert "forces" in shown
    assert "base64" in shown
    assert all(escape(sentence) in shown for sentence in result.verdict)


def in_calculators(frames: list[ase.Atoms]) -> list[ase.Atoms]:
    for atoms in frames:
        energy, forces = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return frames


def test_goes_on_and_is_answered(tmp_path, small_data, foundation, command, capsys):
    """After Ctrl-C from the checkpoint, after the end without training; not with other frames.

    The base is a model here, labels are in calculators, options of the method in one object.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # maybe in the background
    folder, base = tmp_path / "run", load_foundation(foundation)
    options = AdapterConfig.create("lora", "balanced", rank=3).options
    frames = in_calculators(ase.io.read(small_data["train"], ":"))
    sets = {"valid": small_data["valid"], "test": Path(small_data["test"])}

    def again(n: int = 10, **more: object) -> Result:
        own = {"name": "run", "method": options, "folder": folder, **OPTIONS, **more}
        return finetune(base, iter(frames[:n]), **sets, **own)

    try:
        with signal_after(signal.SIGINT, folder, 3), pytest.raises(KeyboardInterrupt):
            again()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"call finetune again with folder='{folder}'" in capsys.readouterr().out
    assert not (folder / "run.model").exists()
    assert adapter_of(again().adapter) == adapter_of(command / "run_adapter")
    lines = results(folder)
    assert adapter_of(again().adapter) == adapter_of(command / "run_adapter")
    assert results(folder) == lines
    assert capsys.readouterr().out.count("Continuing from") == 2
    assert not any(parametrize.is_parametrized(module) for module in base.modules())
    with pytest.raises(ConfigError, match="holds a run on other frames"):
        again(9)
    with pytest.raises(MaceLoraError, match=r"rank=3 there, rank=2 here") as refused:
        again(method=LoraOptions(rank=2, alpha=6.0, targets=("all",)))
    assert "--" not in str(refused.value)


def test_train_is_the_command_as_a_function(tmp_path, small_data, foundation, command, capsys):
    files = {f"{part}_file": path for part, path in small_data.items()}
    own = {"name": "run", "work_dir": tmp_path, "foundation_model": foundation}
    flags = {**own, **files, "adapter": "lora", "lora_rank": 3, "lora_preset": "balanced"}
    before = state()
    result = train({**flags, **OPTIONS})
    assert state() == before
    assert result.adapter == tmp_path / "run_adapter"
    assert adapter_of(result.adapter) == adapter_of(command / "run_adapter")
    assert capsys.readouterr().out.count("Training complete") == 1


def test_train_raises_and_does_not_exit(capsys):
    assert train(["--help"]) is None
    assert "--lora_rank" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="Did you mean '--lora_rank'"):
        train(["--name=a", "--lora_rnak=2"])
    with pytest.raises(ConfigError, match="Did you mean 'lora_rank'"):
        train({"name": "a", "lora_rnak": 2})
    with pytest.raises(ConfigError, match="list of words or by name"):
        train("--name=a")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rnak": 3}, "no option 'rnak'. Did you mean 'rank'"),
        ({"rank": 3}, "rank is an option of lora, .* give method='lora'"),
        ({"train_file": "a.xyz"}, "train_file is called frames here"),
        ({"log_dir": "a"}, "log_dir has no place here"),
        ({"method": "lora", "preset": "balancd"}, "Did you mean 'balanced'"),
        ({"method": "lroa"}, "Did you mean 'lora'"),
        ({"method": "lora", "rank": 0}, "^rank=0: a whole number"),
        ({"method": LoraOptions(), "preset": "balanced"}, "give one of them"),
        ({"lr": -1}, "^lr=-1.*: a finite number above 0"),
        ({"lr": "fast"}, "^lr: invalid float value: 'fast'"),
        ({"amsgrad": False}, "amsgrad=False: mace-torch has no flag"),
        ({"valid": "none.xyz"}, "^valid=.*none.xyz: there is no such file"),
        ({"base": "medium_of"}, "^base=medium_of: .* Did you mean 'medium_off'"),
        ({"base": 3}, "found int"),
        ({"frames": 3}, "frames: ase.Atoms or a path is needed, found int"),
        ({"frames": ["a.xyz"]}, r"frames\[0\]: an ase.Atoms is needed, found str"),
        ({"frames": [ase.Atoms("He")]}, "frames"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_wrong_arguments_are_named(sets, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"base": "mini", "frames": sets["train"], **options}
    before = state()
    with pytest.raises(MaceLoraError, match=words) as raised:
        finetune(arguments.pop("base"), arguments.pop("frames"), **arguments)
    assert "--" not in str(raised.value)
    assert "/mace_lora_" not in str(raised.value)
    assert state() == before
    assert list(tmp_path.iterdir()) == []


def test_a_base_with_adapters_is_refused(base, sets):
    inject(base, AdapterConfig.create("lora"))
    with pytest.raises(ConfigError, match="base carries adapters"):
        finetune(base, sets["train"])


def test_labels_are_needed(sets):
    for atoms in sets["train"]:
        del atoms.info["REF_energy"]
    with pytest.raises(DataError, match=r"^frames has no energy"):
        finetune("mini", sets["train"], batch_size=2, defaults="mace-torch")


def test_no_option_of_a_method_is_a_flag():
    """So that `rank=` and `lr=` can stand side by side; those of `mmea` mean nothing else here."""
    flags = {action.dest for action in build_parser()._actions}
    both = {m: {field.name for field in options_of(m).fields()} & flags for m in METHODS}
    assert both.pop("mmea") == {"gate", "std", "lora_rank", "lora_alpha"}
    assert both.pop("full") == {"freeze"}  # the flag of that name is refused with adapters
    assert not any(both.values())


def test_options_as_an_object():
    config = AdapterConfig.of(LoraOptions(rank=8, targets=("linear",)))
    assert config == AdapterConfig.create("lora", rank=8, targets=("linear",))
    for method in METHODS:
        assert AdapterConfig.of(options_of(method)()).method == method


def test_editors_see_arguments():
    """By jedi, which reads the package and runs nothing."""
    for call, known in (
        ("finetune(", {"base", "frames", "valid", "method", "max_num_epochs", "folder"}),
        ("batches(", {"frames", "model", "batch_size", "shuffle"}),
        ("LoraOptions(", {"rank", "alpha", "targets", "dropout"}),
    ):
        script = jedi.Script(f"import mace_lora\nmace_lora.{call}")
        (signature,) = script.get_signatures(2, len(f"mace_lora.{call}"))
        assert known <= {parameter.name for parameter in signature.params}


def test_typed():
    import mace_lora

    assert (Path(mace_lora.__file__).parent / "py.typed").exists()


@pytest.fixture(autouse=True)
def _no_temporary_folders(tmp_path_factory, monkeypatch):
    """Whatever a run leaves in the folder for temporary files is seen, and goes."""
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(place))
    yield
    gc.collect()
    left = list(place.glob("mace_lora_*"))
    for folder in left:
        shutil.rmtree(folder)
    assert left == []
