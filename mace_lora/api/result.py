"""What a fine-tuning leaves: model, adapter, errors, files."""

from __future__ import annotations

import shutil
from base64 import b64encode
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mace_lora.errors import ConfigError
from mace_lora.files import whole_file, whole_folder
from mace_lora.results.evaluation import UNITS
from mace_lora.training.files.saving import files_left
from mace_lora.training.record import Run

if TYPE_CHECKING:
    from mace_lora.api.calculator import MaceLoraCalculator

Row = dict[str, object]


@dataclass(frozen=True)
class Result:
    """What a fine-tuning leaves.

    Attributes:
        model: the merged model, a plain MACE model (but for the gates of `mmea`).
        adapter: the folder of the adapter alone, for `load_adapter` and `MaceLoraCalculator`.
        folder: of the run, with all its files. A temporary one goes when this object does.
        history: validation errors as `pandas.DataFrame` takes them, a row per validation and head:
            `epochs` that were trained by then (0: the foundation model), `head`, and the errors as
            mace-torch calls them, in eV and Å.
        errors: RMSE, a row per set, head and quantity: `set` (training, validation or test, of each
            at most 500 frames), `head`, `quantity`, `unit`, `before` training and `after`.
        verdict: what to think of the run, a sentence each.
        files: what each file to take away is, by its path.
        temporary: whether the folder goes with this object.
    """

    model: torch.nn.Module = field(repr=False)
    adapter: Path
    folder: Path
    history: list[Row] = field(repr=False)
    errors: list[Row] = field(repr=False)
    verdict: list[str]
    files: dict[str, str] = field(repr=False)
    temporary: bool = field(default=False, repr=False)
    _settings: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, run: Run, temporary: bool = False) -> Result:
        """The result of a run that has come to its end."""
        args = run.asked.args
        folder = Path(args.model_dir).absolute()
        files = {str(Path(file).absolute()): what for file, what in files_left(run).items()}
        adapters = [Path(file) for file in files if file.endswith("_adapter")]
        return cls(
            model=run.saved.model,
            adapter=adapters[-1],  # of stage two, where there is one
            folder=folder,
            history=_history(run),
            errors=_errors(run),
            verdict=list(run.judged),
            files=files,
            temporary=temporary,
            _settings={"device": str(args.device), "default_dtype": args.default_dtype},
        )

    def calculator(self, **keywords: object) -> MaceLoraCalculator:
        """An ASE calculator with the merged model, on the device and in the precision of the run.

        Args:
            keywords: for `MaceLoraCalculator`: device, default_dtype, head, ...
        """
        from mace_lora.api.calculator import MaceLoraCalculator

        return MaceLoraCalculator(self.model, **{**self._settings, **keywords})  # type: ignore[arg-type]

    def report(self) -> Path:
        """The page of the run, HTML in one file: data, settings, curves, errors, how to go on.

        Raises:
            ConfigError: it is not there: it could not be written (the log says why), or was moved.
        """
        return self._file("_report.html", "the page of the run")

    def save(self, folder: str | Path) -> Path:
        """Copy what is to be taken away: models, adapter, page, pictures, settings.

        Args:
            folder: made if need be; files of the same names are replaced.

        Returns:
            The folder.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        for source in map(Path, self.files):
            target = folder / source.name
            if target.resolve() == source.resolve():
                continue
            if self.temporary and source.suffix == ".yaml":
                continue  # it names files of frames that go with the temporary folder
            if source.is_dir():
                with whole_folder(target) as new:
                    shutil.copytree(source, new, dirs_exist_ok=True)
            else:
                with whole_file(target) as new:
                    shutil.copyfile(source, new)
        return folder

    def _file(self, ending: str, called: str) -> Path:
        for file in self.files:
            if file.endswith(ending) and Path(file).exists():
                return Path(file)
        raise ConfigError(f"{called} is not in {self.folder}")

    def _repr_html_(self) -> str:
        """For notebooks: the verdict, the errors and the learning curve."""
        head = ["set", "head", "quantity", "unit", "before", "after"]
        rows = [[_cell(row[name]) for name in head] for row in self.errors]
        lines = [_line("th", head), *(_line("td", row) for row in rows)]
        points = "".join(f"<li>{escape(text)}</li>" for text in self.verdict)
        kept = "; it goes with this object: save(folder) keeps it" if self.temporary else ""
        return (
            f"<div><ul>{points}</ul><table>{''.join(lines)}</table>{self._curve()}"
            f"<p><code>{escape(str(self.folder))}</code>{kept}</p></div>"
        )

    def _curve(self) -> str:
        try:
            picture = self._file("_learning_curve.png", "the learning curve").read_bytes()
        except ConfigError:
            return ""
        data = b64encode(picture).decode()
        return f'<img alt="errors by epoch" src="data:image/png;base64,{data}">'


def _history(run: Run) -> list[Row]:
    return [
        {
            "epochs": 0 if epoch is None else epoch + 1,
            "head": head,
            **{name: error for name, error in errors.items() if name not in ("epoch", "time")},
        }
        for epoch, head, errors in run.trained.history.rows
    ]


def _errors(run: Run) -> list[Row]:
    rows = []
    for part in run.compared:
        before, after = part.rows[0]
        rows += [
            _row(part.kind, part.head, q, UNITS[q], before.rmse[q], after.rmse[q])
            for q in UNITS
            if q in after.rmse
        ]
    return rows


def _row(name: str, head: str, quantity: str, unit: str, before: float, after: float) -> Row:
    return {
        "set": name,
        "head": head,
        "quantity": quantity,
        "unit": unit,
        "before": before,
        "after": after,
    }


def _line(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value or "")
