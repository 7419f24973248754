"""The data sets of the published tables: originals, conversion, splits, downloads."""

from __future__ import annotations

import functools
import http.server
import json
import sys
import tarfile
import threading
from pathlib import Path

import ase.calculators.singlepoint
import ase.io
import ase.units
import numpy as np
import pytest
from ase import Atoms
from helpers.frames import DATA

from mace_lora.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from reproduction import datasets, download

ETHANOL = datasets.System("rmd17", "ethanol")
KCAL = ase.units.kcal / ase.units.mol


def acac(n: int, seed: int, shift: float = 0.0) -> list[Atoms]:
    """Frames of C5H8O2 with labels as BOTNet-datasets calls them."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = Atoms("C5H8O2", positions=rng.normal(size=(15, 3)))
        calculator = ase.calculators.singlepoint.SinglePointCalculator(
            atoms, energy=-9391.0 + shift, forces=rng.normal(size=(15, 3))
        )
        atoms.calc = calculator
        frames.append(atoms)
    return frames


def write_acac(folder: Path, train: list[Atoms], test: list[Atoms]) -> Path:
    (folder / "acac").mkdir(parents=True)
    ase.io.write(folder / "acac" / "train_300K.xyz", train)
    ase.io.write(folder / "acac" / "test_MD_300K.xyz", test)
    return folder


def labels(frames: list[Atoms]) -> np.ndarray:
    return np.array([f.info["REF_energy"] for f in frames])


def test_the_original_rmd17_is_converted_from_kcal(tmp_path):
    """Original file and ready splits give the same frames, energies and forces."""
    frames = ase.io.read(DATA / "ethanol_train.xyz", index=":")
    frames += ase.io.read(DATA / "ethanol_valid.xyz", index=":")
    (tmp_path / "rmd17" / "npz_data").mkdir(parents=True)
    (tmp_path / "rmd17" / "splits").mkdir()
    np.savez(
        tmp_path / "rmd17" / "npz_data" / "rmd17_ethanol.npz",
        nuclear_charges=frames[0].numbers,
        coords=np.array([f.positions for f in frames]),
        energies=labels(frames) / KCAL,
        forces=np.array([f.arrays["REF_forces"] for f in frames]) / KCAL,
    )
    np.savetxt(tmp_path / "rmd17" / "splits" / "index_train_01.csv", np.arange(80), fmt="%d")
    np.savetxt(tmp_path / "rmd17" / "splits" / "index_test_01.csv", np.arange(80, 100), fmt="%d")
    sets = datasets.load(ETHANOL, tmp_path)
    assert [len(x) for x in (sets.train, sets.valid, sets.tests["MD"])] == [30, 50, 20]
    for found, expected in ((sets.train, frames[:30]), (sets.tests["MD"], frames[80:])):
        assert np.allclose(labels(found), labels(expected), rtol=0, atol=1e-9)
        assert np.allclose(found[3].arrays["REF_forces"], expected[3].arrays["REF_forces"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.calc.results.update(energy=-9391.0 / KCAL), "frame 2.*looks like kcal/mol"),
        (lambda a: a.calc.results.update(energy=-9391.0 / 27.2114), "frame 2.*like Hartree"),
        (lambda a: a.calc.results.update(energy=np.nan), "frame 2.*not finite"),
        (lambda a: a.symbols.__setitem__(0, "N"), "frame 2 is NC4H8O2, expected C5H8O2"),
        (lambda a: a.calc.results.pop("energy"), "frame 2 has no energy"),
    ],
    ids=["kcal", "Hartree", "NaN", "other molecule", "no energy"],
)
def test_a_bad_frame_is_named(tmp_path, change, message):
    test = acac(5, seed=1)
    change(test[2])
    write_acac(tmp_path, acac(60, seed=0), test)
    with pytest.raises(DataError, match=message):
        datasets.load(datasets.System("acac", "acac"), tmp_path)


def test_forces_in_other_units_are_refused(tmp_path):
    test = acac(5, seed=1)
    for atoms in test:
        atoms.calc.results["forces"] /= KCAL
    write_acac(tmp_path, acac(60, seed=0), test)
    with pytest.raises(DataError, match=r"300K: forces of .* can't be in eV/A"):
        datasets.load(datasets.System("acac", "acac"), tmp_path)


def test_split_and_test_frames(tmp_path):
    """The split is the same every time; what is trained on is never tested on; notes say it all."""
    train, test = acac(60, seed=0), acac(5, seed=1)
    write_acac(tmp_path, train, [*test, *train[7:9]])
    system = datasets.System("acac", "acac")
    folder = datasets.prepare(system, tmp_path, tmp_path / "out")
    again = datasets.prepare(system, tmp_path, tmp_path / "again")
    files = sorted(p.name for p in folder.iterdir())
    assert files == ["data.json", "test_300K.xyz", "train.xyz", "valid.xyz"]
    for name in files[1:]:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    parts = {n: ase.io.read(folder / n, index=":") for n in files[1:]}
    assert [len(p) for p in parts.values()] == [5, 10, 50]
    positions = {n: {f.positions.tobytes() for f in p} for n, p in parts.items()}
    assert not positions["train.xyz"] & positions["valid.xyz"]
    assert not positions["train.xyz"] & positions["test_300K.xyz"]
    notes = json.loads((folder / "data.json").read_text())["notes"]
    assert notes == [
        "test set 600K (test_MD_600K.xyz) is not there",
        "2 of 7 frames of 300K are trained or validated on: left out",
    ]


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match=r"holds no rMD17 ethanol: expected rmd17/npz_data"):
        datasets.load(ETHANOL, tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'aspirin'"):
        datasets.select("rmd17", ["aspirine"])


@pytest.fixture
def server(tmp_path):
    """An HTTP server of the files in tmp_path/served."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", tmp_path / "served"
        httpd.shutdown()


def test_originals_are_downloaded_once(tmp_path, server, monkeypatch):
    url, served = server
    (served / "dataset_acac").mkdir()
    for file in ("train_300K.xyz", "test_MD_300K.xyz", "test_MD_600K.xyz"):
        ase.io.write(served / "dataset_acac" / file, acac(60, seed=len(file)))
    monkeypatch.setattr(download, "BOTNET_FILES", url)
    folder = download.originals("acac", tmp_path / "here")
    for file in (served / "dataset_acac").iterdir():
        assert (folder / "dataset_acac" / file.name).read_bytes() == file.read_bytes()
        file.unlink()
    download.originals("acac", tmp_path / "here")  # nothing is asked for again
    assert datasets.load(datasets.System("acac", "acac"), folder).notes == []


def test_the_archive_of_rmd17_is_unpacked(tmp_path, server, monkeypatch):
    url, served = server
    inside = tmp_path / "rmd17" / "npz_data"
    inside.mkdir(parents=True)
    (inside / "rmd17_ethanol.npz").write_bytes(b"content")
    with tarfile.open(served / "archive", "w:bz2") as archive:
        archive.add(tmp_path / "rmd17", "rmd17")
    monkeypatch.setattr(download, "RMD17_ARCHIVE", f"{url}/archive")
    folder = download.originals("rmd17", tmp_path / "here")
    assert (folder / "rmd17" / "npz_data" / "rmd17_ethanol.npz").read_bytes() == b"content"


def test_a_failed_download_leaves_nothing_and_says_what_to_do(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "BOTNET_FILES", server[0])
    with pytest.raises(DataError, match=r"BOTNet-datasets by hand.* --data_dir"):
        download.originals("acac", tmp_path / "here")
    assert not list((tmp_path / "here" / "dataset_acac").iterdir())
