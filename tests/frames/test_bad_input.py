"""Bad input: a clear message before any training, and nothing overwritten."""

from __future__ import annotations

import logging
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

from mace_lora import cli


@pytest.fixture
def files(tmp_path, small_data) -> dict[str, list]:
    """Frames by part, to be spoilt and written by `message`."""
    return {part: ase.io.read(path, index=":") for part, path in small_data.items()}


@pytest.fixture
def message(tmp_path, foundation, files, monkeypatch, capsys):
    """Run the command in this process and return the error it ends with."""

    def get(*flags: str) -> str:
        for part, frames in files.items():
            ase.io.write(tmp_path / f"{part}.xyz", frames, format="extxyz")
        (tmp_path / "run.model").write_text("the result of another day")
        monkeypatch.chdir(tmp_path)
        default = torch.get_default_dtype()
        arguments = [
            "--name=run",
            f"--foundation_model={foundation}",
            *(f"--{part}_file={part}.xyz" for part in files),
            "--lora=True",
            "--max_num_epochs=1",
            "--batch_size=5",
        ]
        handlers = logging.root.handlers[:]
        try:
            with pytest.raises(SystemExit) as stop:
                cli.main([*arguments, *flags])
        finally:
            torch.set_default_dtype(default)
            logging.root.handlers[:] = handlers
        assert (tmp_path / "run.model").read_text() == "the result of another day"
        assert not (tmp_path / "run_adapter").exists()
        assert not list(tmp_path.glob("checkpoints/*"))
        text = str(stop.value.code)
        assert text.startswith("error: ")
        return text

    return get


def test_missing_foundation_model(message):
    text = message("--foundation_model=medium_of")
    assert "no such file" in text
    assert "Did you mean 'medium_off'?" in text


def test_no_foundation_model(small_data):
    with pytest.raises(SystemExit, match="name one with --foundation_model"):
        cli.main(["--name=run", f"--train_file={small_data['train']}", "--lora=True"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text", "can't be read as a model (no file of torch.save)"),
        ("state dict", "a checkpoint or a state dict"),
        ("linear", "not a MACE model: a Linear"),
        ("compiled", "give the .model file"),
    ],
)
def test_foundation_model_that_is_none(message, tmp_path, content, expected):
    path = tmp_path / "foreign.model"
    if content == "text":
        path.write_text("Dear diary, this is no model.")
    elif content == "compiled":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    else:
        linear = torch.nn.Linear(2, 2)
        torch.save(linear.state_dict() if content == "state dict" else linear, path)
    text = message(f"--foundation_model={path}")
    assert expected in text
    assert str(path) in text


def test_models_that_mace_torch_does_not_fine_tune(message, tmp_path, build):
    """It fails with a KeyError for the first; the second it starts from random numbers."""
    torch.save(build("plain_mace"), tmp_path / "plain.model")
    text = message("--foundation_model=plain.model")
    assert "--foundation_model=plain.model: a MACE, from which mace-torch can't start" in text
    text = message("--model=AtomicDipolesMACE")
    assert "--model=AtomicDipolesMACE: mace-torch starts such a model from random numbers" in text


def test_target_that_matches_nothing(message):
    text = message("--lora_targets", "linear", "redaouts")
    assert "'redaouts' matches 0 of" in text
    assert "layers are named like" in text


def test_missing_file(message):
    text = message("--train_file=nowhere.xyz")
    assert "--train_file=nowhere.xyz" in text


@pytest.mark.parametrize(
    ("flag", "key", "kind"),
    [("--energy_key", "dft_energy", "energy"), ("--forces_key", "dft_forces", "forces")],
)
def test_missing_key(message, flag, key, kind):
    text = message(f"{flag}={key}")
    assert "train.xyz" in text
    assert f"no {kind} under the key '{key}'" in text
    assert f"REF_{kind}" in text
    assert flag in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["energy", "forces"])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_labels_that_are_not_finite(message, files, part, what, value):
    frame = files[part][3]
    if what == "energy":
        frame.info["REF_energy"] = value
    else:
        frame.arrays["REF_forces"][2, 1] = value
    text = message()
    assert f"{part}.xyz, frame 3: {what}" in text
    assert "NaN or infinite" in text


@pytest.mark.parametrize("part", ["train", "test"])
def test_unknown_element(message, files, part):
    files[part][2].symbols[0] = "S"
    text = message()
    assert f"{part}.xyz, frame 2 holds S (16)" in text
    assert "H (1), C (6), N (7), O (8)" in text


def test_empty_file(message, files):
    files["train"] = []
    assert "train.xyz" in message()


def test_truncated_file(message, files, tmp_path, monkeypatch):
    original = ase.io.write

    def truncated(path, frames, **keywords):
        original(path, frames, **keywords)
        if Path(path).name == "train.xyz":
            Path(path).write_text(Path(path).read_text()[:1500])

    monkeypatch.setattr(ase.io, "write", truncated)
    assert "train.xyz can't be read" in message()


def test_lone_frame(message, files):
    files["train"] = files["train"][:1]
    files.pop("valid")
    text = message("--valid_fraction=0.5", "--batch_size=1")
    assert "the training set holds 1 frame" in text
    assert "--valid_file" in text


def test_valid_fraction_out_of_range(message, files):
    files.pop("valid")
    assert "--valid_fraction=1.5" in message("--valid_fraction=1.5")


def test_validation_set_of_no_frames(message, files):
    files["valid"] = []
    assert "valid.xyz" in message()


def _one_spot(frame):
    frame.positions[4] = frame.positions[2]
    return frame


def _stress_without_cell(frame):
    frame.info["REF_stress"] = np.full(6, 0.1)
    frame.pbc, frame.cell = False, None
    return frame


def _periodic_without_cell(frame):
    frame.pbc, frame.cell = True, None
    return frame


def _label(key, shape):
    def change(frame):
        frame.info[key] = np.zeros(shape)
        return frame

    return change


def _cell_of_nan(frame):
    frame.cell = np.diag([9.0, 9.0, np.nan])
    return frame


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_one_spot, "train.xyz, frame 3 has atoms 2 and 4 on one spot"),
        (_stress_without_cell, "train.xyz, frame 3: stress (key 'REF_stress') but no cell"),
        (_periodic_without_cell, "train.xyz, frame 3 is periodic"),
        (_cell_of_nan, "train.xyz, frame 3 has a cell that is not finite"),
        (_label("REF_energy", 2), "train.xyz, frame 3: energy (key 'REF_energy') of shape (2,)"),
        (_label("REF_stress", 4), "train.xyz, frame 3: stress (key 'REF_stress') of shape (4,)"),
    ],
)
def test_frames_that_cannot_be_right(message, files, change, expected):
    files["train"][3] = change(files["train"][3])
    assert expected in message()


def test_forces_of_a_wrong_shape(message, files):
    frame = files["train"][3]
    frame.arrays["REF_forces"] = frame.arrays["REF_forces"][:, :2].copy()
    assert "train.xyz, frame 3: forces (key 'REF_forces') of shape (9, 2)" in message()


def test_stress_loss_without_stress(message):
    text = message("--loss=stress")
    assert "train.xyz has no stress under the key 'REF_stress'" in text
    assert "--stress_key" in text


def test_packages_that_are_not_installed(message, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("openequivariance", "schedulefree") else found(name),
    )
    assert "--enable_oeq=True needs the package openequivariance" in message("--enable_oeq=True")
    text = message("--optimizer=schedulefree")
    assert "--optimizer=schedulefree needs" in text
    assert "pip install schedulefree" in text


def test_several_processes_without_a_launcher(message, monkeypatch):
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert "start it with srun, or with torchrun" in message("--distributed")
    text = message("--distributed", "--launcher=torchrun")
    assert "torchrun --nproc_per_node=2 -m mace_lora train" in text


def test_batch_larger_than_the_training_set(message):
    text = message("--batch_size=11")
    assert "--batch_size=11" in text
    assert "10" in text


def test_contradictions_with_upstreams_flags(message):
    assert "--freeze=7" in message("--freeze=7")


def test_cuda_without_a_device(message):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "--device=cuda" in message("--device=cuda")


def test_folder_that_cannot_be_written_to(message, tmp_path):
    (tmp_path / "taken").write_text("a file, no folder")
    assert "--model_dir=taken" in message("--model_dir=taken")


def test_unsupported_mace_torch(message, monkeypatch):
    import mace.cli.run_train as script

    monkeypatch.delattr(script, "inject_LoRAs")
    text = message()
    assert "mace.cli.run_train.inject_LoRAs does not exist" in text
    assert "0.3.16" in text


def test_more_processes_than_gpus(message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    text = message("--device=cuda")
    assert "2 processes on this machine, and 1 GPU" in text
    assert "torchrun --nproc_per_node=1" in text


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--lr=-0.1", "--lr=-0.1: a finite number above 0"),
        ("--lr=nan", "--lr=nan: a finite number above 0"),
        ("--batch_size=0", "--batch_size=0: 1 or more"),
        ("--valid_batch_size=-1", "--valid_batch_size=-1: 1 or more"),
        ("--max_num_epochs=0", "--max_num_epochs=0: 1 or more"),
        ("--patience=0", "--patience=0: 1 or more"),
        ("--eval_interval=0", "--eval_interval=0: 1 or more"),
        ("--seed=-1", "--seed=-1: 0 or more"),
        ("--weight_decay=-1", "--weight_decay=-1.0: a finite number, 0 or more"),
        ("--ema_decay=2", "--ema_decay=2.0: a number from 0 to 1"),
        ("--clip_grad=0", "--clip_grad=0.0: a number above 0, or None"),
        ("--name=a/b", "--name=a/b: files are called by it"),
        ("--loss=dipole", "--loss=dipole is for models of dipoles alone"),
        ("--heads={'A': ", "--heads={'A': : a table of tables is needed"),
        ("--heads=['A']", "--heads=['A']: a table of tables is needed"),
        ("--adapter=", "unknown adapter ''"),
    ],
)
def test_values_with_which_nothing_can_be_trained(message, flag, expected):
    """mace-torch divides by zero, or trains nothing and says it is done."""
    assert expected in message(flag, "--lora=False" if flag == "--adapter=" else "--lora=True")


def test_targets_that_are_all_excluded(message):
    text = message("--lora_targets", "linear", "--lora_exclude", "linear")
    assert "exclude=linear leaves nothing to train" in text


@pytest.mark.parametrize(
    ("E0s", "expected"),
    [
        ("avrage", "can't be used"),
        ("nowhere.json", "No such file"),
        ("{'H': -13.6, 'C': -1027.0, 'O': -2041.0}", "by atomic number"),
        ("{1: -13.6, 6: -1027.0}", "gives no energy for O (8)"),
        ("{1: 1e999, 6: -1027.0, 8: -2041.0}", "the energy of H (1) is not finite"),
    ],
)
def test_e0s_that_are_none(message, E0s, expected):
    text = message(f"--E0s={E0s}")
    assert f"--E0s={E0s}" in text
    assert expected in text


def test_isolated_atoms_of_some_elements(message, files):
    atom = ase.Atoms("H", positions=[[0, 0, 0]])
    atom.info |= {"config_type": "IsolatedAtom", "REF_energy": -13.6}
    atom.arrays["REF_forces"] = np.zeros((1, 3))
    files["train"].append(atom)
    text = message()
    assert "isolated atoms" in text
    assert "6" in text


def test_a_head_that_the_foundation_model_lacks(message, tmp_path, build):
    torch.save(build("two_heads_biased_readout"), tmp_path / "two.model")
    text = message("--foundation_model=two.model", "--foundation_head=head3")
    assert "--foundation_head=head3: the model has no such head" in text
    assert "head0, head1" in text


def test_interactions_that_mace_torch_can_not_copy(message, tmp_path, build):
    torch.save(build("attention"), tmp_path / "attention.model")
    text = message("--foundation_model=attention.model")
    assert "--foundation_model=attention.model: mace-torch can't start a fine-tuning" in text
    assert "no attribute 'skip_tp'" in text
