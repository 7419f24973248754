"""Download, check, convert and split the data of rMD17, 3BPA and acetylacetone.

    python scripts/fetch_data.py rmd17 aspirin ethanol
    python scripts/fetch_data.py all --data_dir=FOLDER      # from files that you have, no network
    python scripts/fetch_data.py spice2022       # a foundation model: --out/spice2022.model

Leaves --out/<data set>/<molecule>/ with train.xyz, valid.xyz, test_<name>.xyz (REF_energy in eV,
REF_forces in eV/A) and data.json, which says how many frames, from where, and what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from reproduction import datasets, download

from mace_lora import load_foundation
from mace_lora.errors import DataError, MaceLoraError
from mace_lora.files import whole_file

SPICE2022 = "spice2022"


def prepare(system: datasets.System, data_dir: Path | None, out: Path) -> Path:
    """The folder with the files of `system`, made from `data_dir` or from a download."""
    if data_dir is None and not (out / system.dataset / system.name / "data.json").exists():
        data_dir = download.originals(system.dataset, out / "original")
    return datasets.prepare(system, data_dir or out, out)


def prepare_spice2022(data_dir: Path | None, out: Path) -> Path:
    """A model of MACE's authors of 2022 as one of the installed mace-torch.

    Args:
        data_dir: holds the original MACE_SPICE.model; None to download it.
        out: where spice2022.model is written, unless it is there.

    Raises:
        DataError: the original is not in `data_dir`, or can't be downloaded.
    """
    made = out / f"{SPICE2022}.model"
    if made.exists():
        return made
    out.mkdir(parents=True, exist_ok=True)
    original = (data_dir or out) / download.SPICE2022_FILE
    if data_dir is None:
        download.download(download.SPICE2022, original, download.SPICE2022_PAGE)
    elif not original.exists():
        raise DataError(
            f"{data_dir} holds no {download.SPICE2022_FILE}; get it from {download.SPICE2022_PAGE}"
        )
    with whole_file(made) as temporary:
        torch.save(load_foundation(original), temporary)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dataset", choices=[*datasets.SYSTEMS, "all", SPICE2022])
    parser.add_argument("molecules", nargs="*", help="of rmd17; all of them if none is named")
    parser.add_argument("--data_dir", type=Path, help="folder of files that you have")
    parser.add_argument("--out", type=Path, default=Path("data"))
    args = parser.parse_args()
    try:
        if args.dataset == SPICE2022:
            print(prepare_spice2022(args.data_dir, args.out))
            return
        for system in datasets.select(args.dataset, args.molecules):
            folder = prepare(system, args.data_dir, args.out)
            description = json.loads((folder / "data.json").read_text())
            counts = ", ".join(f"{n} {name}" for name, n in description["frames"].items())
            print(f"{folder}: {counts}")
            for note in description["notes"]:
                print(f"  note: {note}")
    except MaceLoraError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
