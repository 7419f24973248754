"""The flags of `mace_run_train`: mace-torch's and ours, in one parser. Knows no torch."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import mace_lora
from mace_lora import parsing
from mace_lora.adapters.options import LowRankOptions
from mace_lora.adapters.registry import METHODS, options_of
from mace_lora.config import AdapterConfig
from mace_lora.errors import ConfigError
from mace_lora.parsing import ExistingAdapter, ExistingFile
from mace_lora.training import recipes
from mace_lora.training.options import RunOptions
from mace_lora.training.recipes import Choice
from mace_lora.upstream import known

_ABOUT = (
    "Parameter-efficient fine-tuning of a foundation model: adapters are attached, the model's own "
    "weights frozen, and everything is merged into a plain MACE model at the end. "
    "--foundation_model=mini is a small model for H, C, N, O inside this package."
)
_USAGE = (
    "mace_run_train --name NAME --train_file FILE --foundation_model MODEL --lora=True [flags]\n"
    "       (--help lists all flags)"
)
# Of mace-torch's two hundred flags, in the order in which one thinks of them
_NEEDED = (
    *("name", "foundation_model", "foundation_head"),
    *("train_file", "valid_file", "valid_fraction", "test_file"),
    *("E0s", "energy_key", "forces_key", "stress_key"),
    *("loss", "energy_weight", "forces_weight", "stress_weight"),
    *("max_num_epochs", "batch_size", "lr", "patience", "ema", "ema_decay"),
    *("device", "default_dtype", "seed", "work_dir", "restart_latest"),
)
_FILES = ("train_file", "valid_file", "test_file", "test_dir", "statistics_file")
_REPLAY_FILES = ("pt_train_file", "pt_valid_file")
# Values of --pt_train_file that name a data set, which mace-torch downloads
_REPLAY_SETS = ("mp", "omat", "matpes_pbe", "matpes_r2scan")


class _Default:
    """A default value that can be told apart from the same value given by the user."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __str__(self) -> str:  # what --help shows
        value = self.value
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"True or False expected, got {text!r}")


def build_parser() -> argparse.ArgumentParser:
    """mace-torch's parser, plus `--adapter` and a flag per option of every method."""
    parser = known.build_parser()
    parser.prog, parser.usage = "mace_run_train", _USAGE  # argparse's own is a screen and a half
    version = f"mace-lora {mace_lora.__version__}"
    parser.add_argument("--version", action="version", version=version)
    ours = parser.add_argument_group("adapters (mace-lora)", _ABOUT)
    ours.add_argument(
        "--adapter",
        metavar="NAME",
        help=f"adapter method: {', '.join(METHODS)}; --lora=True means --adapter=lora",
        default=_Default(None),
    )
    parsing.move_flags(parser, ["lora", "lora_rank", "lora_alpha"], ours)
    # a switch of mace-torch's that suits, and so must be able to be switched off
    parsing.let_have_value(parser, "ema", _boolean)
    for name in METHODS:
        _add_method(parser, ours, name)
    for field in RunOptions.flags():
        keywords = {"type": type(field.default), **field.metadata}
        if keywords["type"] is bool:
            keywords |= {"type": _boolean, "nargs": "?", "const": True}
        ours.add_argument(f"--{field.name}", default=_Default(field.default), **keywords)
    # whose defaults are not everybody's
    own = {field.name for field in RunOptions.flags()}
    for name in ("lora", *recipes.FLAGS):
        if name not in own:
            parser.set_defaults(**{name: _Default(parser.get_default(name))})
    needed = parser.add_argument_group("what a fine-tuning needs (mace-torch)")
    parsing.move_flags(parser, _NEEDED, needed)
    parsing.order_groups(parser, [ours, needed], rest="all other flags (mace-torch)")
    return parser


def _add_method(
    parser: argparse.ArgumentParser, group: argparse._ArgumentGroup, method: str
) -> None:
    options = options_of(method)
    for field in options.fields():
        flag = f"{method}_{field.name}"
        if parser.get_default(flag) is None:  # mace-torch has --lora_rank and --lora_alpha
            keywords = dict(field.metadata)
            kind = type(field.default)
            keywords.setdefault("type", _boolean if kind is bool else kind)
            group.add_argument(f"--{flag}", **keywords)
        parser.set_defaults(**{flag: _Default(field.default)})
    if options.presets:
        group.add_argument(
            f"--{method}_preset",
            choices=list(options.presets),
            default=_Default(None),
            help="options chosen for you, where no flag says otherwise: "
            + "; ".join(f"{k}: {_words(v)}" for k, v in options.presets.items()),
        )


def _words(values: Mapping[str, object]) -> str:
    return ", ".join(f"{k}={' '.join(v) if isinstance(v, tuple) else v}" for k, v in values.items())


def parse(
    argv: Sequence[str] | None = None, raises: bool = False
) -> tuple[argparse.Namespace, AdapterConfig | None, RunOptions]:
    """Flags and `--config` file to upstream's arguments, the adapter or None, and our run options.

    Args:
        argv: the flags; None for those of this process.
        raises: a flag that can't be read is a ConfigError, too, and does not end the program.

    Raises:
        ConfigError: unknown or contradictory flags, or a value that makes no sense.
        ArtefactError: --adapter_start names no adapter.
    """
    argv = tuple(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parsing.parse(parser, argv, raises)
    given: dict[str, object] = {}
    for name, value in vars(args).items():
        if isinstance(value, _Default):
            setattr(args, name, value.value)
        else:
            given[name] = value
    config = _adapter(args, given, args.adapter_start)
    chosen = _suit(args, config, given) if config is not None else {}
    options = RunOptions(
        **{f.name: getattr(args, f.name) for f in RunOptions.flags()},
        chosen=chosen,
        given={k: v for k, v in given.items() if v != parser.get_default(k)},
        argv=argv,
    )
    if config is None:
        for field in RunOptions.flags():
            if field.name in given and field.name != "step":
                raise ConfigError(f"--{field.name} needs an adapter: give --lora=True or --adapter")
    elif "multiheads_finetuning" not in given:  # on by default, and by itself for some models
        args.multiheads_finetuning = args.pt_train_file is not None
    rank, alpha = args.lora_rank, args.lora_alpha
    ours = ["adapter", *(f.name for f in RunOptions.flags()), *chain(*map(_flags_of, METHODS))]
    for name in ours:  # upstream logs and stores its arguments: leave it only its own
        vars(args).pop(name, None)
    args.lora_rank, args.lora_alpha = rank, alpha
    return args, config, options


def _suit(
    args: argparse.Namespace, config: AdapterConfig, given: Mapping[str, object]
) -> dict[str, Choice]:
    """Set the flags that the user did not give to what suits a fine-tuning; those."""
    if args.defaults == recipes.MACE_TORCH:
        return {}
    options = config.options
    scaling = options.scaling if isinstance(options, LowRankOptions) and options.rank else 1.0
    chosen = recipes.before_data(given, scaling)
    vars(args).update({flag: choice.value for flag, choice in chosen.items()})
    return chosen


def _flags_of(method: str) -> list[str]:
    names = [field.name for field in options_of(method).fields()]
    return [f"{method}_{name}" for name in (*names, "preset")]


def _adapter(
    args: argparse.Namespace, given: dict[str, object], start: str | None
) -> AdapterConfig | None:
    method = args.adapter
    if args.lora and method not in (None, "lora"):
        raise ConfigError(
            f"--lora=True means --adapter=lora and contradicts --adapter={method}: give one of them"
        )
    if "lora" in given and not args.lora and method == "lora":
        raise ConfigError("--lora=False contradicts --adapter=lora: give one of them")
    if method is None and args.lora:
        method = "lora"
    begun = _read_adapter(start) if start else None
    if begun and method is None:
        method = begun.method
    if method is not None:
        options_of(method)  # an unknown name first
    _refuse_options_of_others(method, given)
    if method is None:
        return None
    names = [f.name for f in options_of(method).fields()]
    options = {n: given[f"{method}_{n}"] for n in names if f"{method}_{n}" in given}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    preset = getattr(args, f"{method}_preset", None)
    if begun is None:
        return AdapterConfig.create(method, preset, **options)
    if preset:
        raise ConfigError(f"--{method}_preset contradicts --adapter_start: give one of them")
    return begun.continued(method, options, f"--adapter_start={start}")


def _read_adapter(folder: str) -> AdapterConfig:
    """Method and options of an adapter directory."""
    ExistingAdapter(folder).check(f"--adapter_start={folder}")
    from mace_lora.model import artefact  # imports torch

    return artefact.read(folder).config


def _refuse_options_of_others(method: str | None, given: dict[str, object]) -> None:
    allowed = [] if method is None else _flags_of(method)
    chosen = f"--adapter={method}" if method else "no adapter is chosen"
    for other in METHODS:
        for flag in _flags_of(other):
            if flag in given and flag not in allowed:
                raise ConfigError(
                    f"--{flag} belongs to --adapter={other}, but {chosen}: "
                    f"leave it out, or give --adapter={other}"
                )


def check_files(args: argparse.Namespace) -> None:
    """Look for the foundation model and the files of frames that the flags name.

    Raises:
        FoundationModelError: there is no such model.
        ConfigError: a file is not there.
    """
    if args.foundation_model is not None:
        known.ExistingModel(args.foundation_model).check(
            f"--foundation_model={args.foundation_model}"
        )
    for called, path in files_named(args):
        # several LMDB files may stand in one text, as a.lmdb:b.lmdb
        several = "lmdb" in path and not Path(path).exists()
        for part in path.split(":") if several else [path]:
            ExistingFile(part).check(f"{called}={path}")


def files_named(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Each file or folder that the flags and --heads name, after what messages call its flag."""
    values = [(f"--{flag}", getattr(args, flag)) for flag in (*_FILES, *_REPLAY_FILES)]
    values += [
        (f"--heads, {name}: {flag}", head.get(flag))
        for name, head in _heads(args)
        for flag in _FILES
    ]
    for called, value in values:
        for path in [value] if isinstance(value, str) else value or []:
            if path not in _REPLAY_SETS:
                yield called, path


def _heads(args: argparse.Namespace) -> list[tuple[str, dict[str, str]]]:
    """The tables of --heads; none where it is no table of tables, which the run itself refuses."""
    try:
        table = ast.literal_eval(args.heads) if isinstance(args.heads, str) else args.heads or {}
        return [(name, head) for name, head in table.items() if isinstance(head, dict)]
    except (ValueError, TypeError, SyntaxError, AttributeError):
        return []
