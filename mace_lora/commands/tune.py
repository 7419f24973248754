"""Which method, rank and learning rate suit your frames, and whether more frames would help.

Short runs: all candidates for 200 steps, the best third for 600, and the winner on a quarter and on
half of the training frames. What was trained stays in the folder, and the same command goes on
after an interruption. Protection is left out of the short runs, and is in the long one.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from mace_lora.errors import ConfigError
from mace_lora.parsing import ExistingFile
from mace_lora.printing import Data, say
from mace_lora.upstream.known import ExistingModel

if TYPE_CHECKING:
    from mace_lora.tuning.search import Tried

EXAMPLES = """\
  mace_lora tune --foundation_model mini --train_file train.xyz --output tuned
  mace_lora tune --config my.yaml --output tuned
"""
LEAST_FRAMES = 10
_GIVEN = ("foundation_model", "train_file", "valid_file")
_KEYS = ("energy_key", "forces_key", "stress_key")
_IN_THE_WAY = ("name", "adapter", "lora", "lr", "max_num_epochs", "test_file", "work_dir", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--foundation_model", type=ExistingModel, help="what is fine-tuned")
    parser.add_argument("--train_file", type=ExistingFile, help="labelled frames, extended xyz")
    parser.add_argument(
        "--valid_file", type=ExistingFile, help="frames to judge by; else a tenth of the others"
    )
    for key in _KEYS:
        parser.add_argument(f"--{key}", help=f"name of {key.removesuffix('_key')} in the files")
    parser.add_argument(
        "--config", type=ExistingFile, help="a file of flags for mace_run_train, for all runs"
    )
    parser.add_argument("--output", required=True, help="a folder for runs, page and winner")


def run(options: argparse.Namespace) -> Data:
    settings = _settings(options)
    train, valid = str(settings.pop("train_file")), settings.pop("valid_file", None)
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output={folder}: a folder is needed")
    from mace_lora.tuning import page, search, trials

    frames, n_atoms, files, validation = _split(folder, train, valid)
    short = {k: v for k, v in settings.items() if k not in _IN_THE_WAY}
    short |= {"valid_file": str(validation.resolve()), "protect": settings.get("protect", False)}
    shown = None if options.json else lambda tried: say(_line(tried))
    at_once = trials.at_once(str(settings.get("device", "cpu")))
    runs = search.Search(folder / "runs", short, files, n_atoms, shown or (lambda _: None), at_once)
    tried = runs.halve(search.candidates())
    by_frames = runs.by_frames(tried[-1].candidate)
    said = would_more_help(by_frames)
    best = {**settings, **tried[-1].candidate.flags, "name": settings.get("name", "tuned")}
    best |= {"train_file": train} | ({"valid_file": valid} if valid else {})
    config = _write(folder / "best.yaml", best)
    page.write(folder / "tune.html", tried, by_frames, said, config)
    return {
        "frames": frames,
        "winner": tried[-1].candidate.name,
        "flags": dict(tried[-1].candidate.flags),
        "tried": [_data(t) for t in tried],
        "by_frames": [_data(t) for t in by_frames],
        "more_frames": said,
        "config": str(folder / "best.yaml"),
        "page": str(folder / "tune.html"),
    }


def _settings(options: argparse.Namespace) -> Data:
    """Flags of all runs, files by their whole paths."""
    import yaml

    found: Data = {}
    if options.config:
        found = yaml.safe_load(Path(options.config).read_text()) or {}
    given = {name: getattr(options, name) for name in (*_GIVEN, *_KEYS)}
    found |= {name: str(value) for name, value in given.items() if value is not None}
    for name in ("foundation_model", "train_file"):
        if name not in found:
            raise ConfigError(f"--{name} is needed, here or in the file of --config")
    for name in ("train_file", "valid_file", "foundation_model"):
        if name in found and Path(str(found[name])).exists():
            found[name] = str(Path(str(found[name])).resolve())
    return found


def _split(folder: Path, train: str, valid: str | None) -> tuple[int, int, dict[int, Path], Path]:
    """Frames to train on, their atoms, files of parts of them, and the file to judge by."""
    import ase.io
    import numpy as np

    from mace_lora.frames.reading import read_atoms
    from mace_lora.tuning.search import PARTS

    frames = read_atoms(train)
    order = [frames[i] for i in np.random.default_rng(0).permutation(len(frames))]
    n_valid = 0 if valid else max(1, len(order) // 10)
    judged, order = order[:n_valid], order[n_valid:]
    if len(order) < LEAST_FRAMES:
        raise ConfigError(
            f"--train_file={train}: {len(order)} frames to train on; {LEAST_FRAMES} are needed to "
            "tell settings apart"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part in (*PARTS, 1):
        n = max(1, math.floor(part * len(order)))
        files[n] = folder / f"train_{n}.xyz"
        ase.io.write(files[n], order[:n], format="extxyz")
    if valid:
        return len(order), sum(map(len, order)), files, Path(valid)
    ase.io.write(folder / "valid.xyz", judged, format="extxyz")
    return len(order), sum(map(len, order)), files, folder / "valid.xyz"


def would_more_help(by_frames: list[Tried]) -> str:
    """In a sentence: what twice the frames have brought, and may bring again."""
    half, whole = by_frames[-2], by_frames[-1]
    gain = 1 - whole.outcome.score / half.outcome.score
    what = f"from {half.frames} to {whole.frames} frames the errors fell by {gain:.0%}"
    if gain > 0.1:
        return f"{what}: more frames would help"
    if gain > 0.03:
        return f"{what}: more frames would help a little"
    return f"{what}: more frames of this kind would hardly help"


def _write(path: Path, settings: Data) -> str:
    import yaml

    from mace_lora.files import whole_file

    text: str = yaml.safe_dump(settings, sort_keys=False)
    with whole_file(path) as new:
        new.write_text(text)
    return text


def _data(tried: Tried) -> Data:
    score = tried.outcome.score
    return {
        "settings": tried.candidate.name,
        "steps": tried.steps,
        "frames": tried.frames,
        "errors": {q: e for q, e in tried.outcome.after.items() if math.isfinite(e)},
        "left": score if math.isfinite(score) else None,
    }


def _line(tried: Tried) -> str:
    errors = ", ".join(f"{error:.2f}" for error in tried.outcome.after.values())
    where = f"{tried.steps} steps, {tried.frames} frames"
    return (
        f"{tried.candidate.name}, {where}: {errors} ({tried.outcome.score:.3f} of the errors left)"
    )


def text(data: Data) -> str:
    return "\n".join(
        [
            f"best: {data['winner']}",
            data["more_frames"],
            f"to train with it: mace_run_train --config={data['config']}",
            f"all of this: {data['page']}",
        ]
    )
