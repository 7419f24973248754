"""The commands `mace_run_train` and `mace_lora`: upstream's flags and ours, in one parser."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from mace_lora.adapters.registry import METHODS, get_method
from mace_lora.commands import COMMANDS
from mace_lora.commands import run as run_command
from mace_lora.config import AdapterConfig, RunOptions
from mace_lora.errors import ConfigError, MaceLoraError, did_you_mean
from mace_lora.printing import printable, say

_GROUP = "adapters (mace-lora)"
_ABOUT = (
    "Parameter-efficient fine-tuning of a foundation model: adapters are attached, the model's own "
    "weights frozen, and everything is merged into a plain MACE model at the end. "
    "--foundation_model=mini is a small model for H, C, N, O inside this package."
)


_SHORT = (
    "mace_run_train --name NAME --train_file FILE --foundation_model MODEL --lora=True [flags]\n"
    "       (--help lists all flags)"
)


class _Default:
    """A default value that can be told apart from the same value given by the user."""

    def __init__(self, value: Any) -> None:
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
    """Upstream's parser, plus `--adapter` and a flag per option of every method."""
    from mace_lora.training.run import build_parser as upstream_parser

    parser = upstream_parser()
    parser.usage = _SHORT  # argparse's own is a screen and a half, above every message
    group = parser.add_argument_group(_GROUP, _ABOUT)
    group.add_argument(
        "--adapter",
        metavar="NAME",
        help=f"adapter method: {', '.join(METHODS)}; --lora=True means --adapter=lora",
        default=_Default(None),
    )
    for name in METHODS:
        for field in get_method(name).Options.fields():
            flag = f"{name}_{field.name}"
            if parser.get_default(flag) is None:  # upstream has --lora_rank and --lora_alpha
                keywords = dict(field.metadata)
                kind = type(field.default)
                keywords.setdefault("type", _boolean if kind is bool else kind)
                group.add_argument(f"--{flag}", **keywords)
            parser.set_defaults(**{flag: _Default(field.default)})
        presets = get_method(name).presets
        if presets:
            group.add_argument(
                f"--{name}_preset",
                choices=list(presets),
                default=_Default(None),
                help="options chosen for you, where no flag says otherwise: "
                + "; ".join(f"{k}: {_words(v)}" for k, v in presets.items()),
            )
    for field in fields(RunOptions):
        keywords = {"type": type(field.default), **field.metadata}
        group.add_argument(f"--{field.name}", default=_Default(field.default), **keywords)
    parser.set_defaults(lora=_Default(parser.get_default("lora")))
    return parser


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}={' '.join(v) if isinstance(v, tuple) else v}" for k, v in values.items())


def parse(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, AdapterConfig | None, RunOptions]:
    """Flags and `--config` file to upstream's arguments, the adapter or None, and our run options.

    Raises:
        ConfigError: unknown or contradictory flags, or a value that makes no sense.
    """
    args = build_parser().parse_args(argv)
    given: dict[str, Any] = {}
    for name, value in vars(args).items():
        if isinstance(value, _Default):
            setattr(args, name, value.value)
        else:
            given[name] = value
    options = RunOptions(**{f.name: getattr(args, f.name) for f in fields(RunOptions)})
    config = _adapter(args, given, options.adapter_start)
    if config is None:
        for field in fields(RunOptions):
            if field.name in given:
                raise ConfigError(f"--{field.name} needs an adapter: give --lora=True or --adapter")
    rank, alpha = args.lora_rank, args.lora_alpha
    for name in _our_flags():  # upstream logs and stores its arguments: leave it only its own
        delattr(args, name)
    args.lora_rank, args.lora_alpha = rank, alpha
    return args, config, options


def _our_flags() -> list[str]:
    flags = [f"{m}_{f.name}" for m in METHODS for f in get_method(m).Options.fields()]
    flags += [f"{m}_preset" for m in METHODS if get_method(m).presets]
    return ["adapter", *(f.name for f in fields(RunOptions)), *flags]


def _method_of(folder: str) -> AdapterConfig:
    """Method and options of an adapter directory."""
    from mace_lora.model import artefact  # needs torch, and the doctor speaks where torch is broken

    return artefact.read(folder).config


def _adapter(
    args: argparse.Namespace, given: dict[str, Any], start: str | None
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
    begun = _method_of(start) if start else None
    if begun and method is None:
        method = begun.method
    if method is not None:
        get_method(method)  # an unknown name first
    _refuse_options_of_others(method, given)
    if method is None:
        return None
    names = [f.name for f in get_method(method).Options.fields()]
    options = {n: given[f"{method}_{n}"] for n in names if f"{method}_{n}" in given}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    preset = getattr(args, f"{method}_preset", None)
    if begun is None:
        return AdapterConfig.create(method, preset, **options)
    if preset:
        raise ConfigError(f"--{method}_preset contradicts --adapter_start: give one of them")
    return begun.continued(method, options, f"--adapter_start={start}")


def _refuse_options_of_others(method: str | None, given: dict[str, Any]) -> None:
    for other in METHODS:
        names = [field.name for field in get_method(other).Options.fields()]
        for name in [*names, "preset"]:
            flag = f"{other}_{name}"
            if flag in given and other != method:
                # upstream accepts --lora_rank without --lora, and so do we
                if method is None and flag in ("lora_rank", "lora_alpha"):
                    continue
                chosen = f"--adapter={method}" if method else "no adapter is chosen"
                raise ConfigError(
                    f"--{flag} belongs to --adapter={other}, but {chosen}: "
                    f"leave it out, or give --adapter={other}"
                )


def _quiet() -> None:
    """Keep warnings off the screen that every run gives and that nobody can act on."""
    for message in (
        "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",  # set by mace-torch itself
        "The TorchScript type system doesn't support instance-level",  # e3nn
        "'torch.load' received a zip file that looks like a TorchScript archive",
        "'pin_memory' argument is set as true",  # mace-torch's default, harmless without a GPU
    ):
        warnings.filterwarnings("ignore", message=message)


def main(argv: Sequence[str] | None = None) -> None:
    """`mace_run_train`: upstream's command, with adapters."""
    _quiet()
    printable()
    from mace_lora.training.run import run

    try:
        args, config, options = parse(argv)
        run(args, config, options)
    except MaceLoraError as error:
        sys.exit(f"error: {error}")


def _usage() -> str:
    commands = {
        "train": "fine-tune or train: the same program as mace_run_train",
        **COMMANDS,
        "doctor": "what is installed, what works, what doesn't, in plain words",
    }
    lines = [f"  {name:<9}{what}" for name, what in commands.items()]
    listed = "\n".join(lines)
    return (
        f"usage: mace_lora COMMAND ...\n\ncommands:\n{listed}\n\n"
        "mace_lora COMMAND --help says more, with examples"
    )


def main_tools(argv: Sequence[str] | None = None) -> None:
    """`mace_lora COMMAND`, also `python -m mace_lora COMMAND`."""
    printable()
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv else "--help"
    if command in ("-h", "--help"):
        say(_usage())
    elif command == "train":
        main(argv)
    elif command == "doctor":
        _quiet()
        from mace_lora.commands.doctor import main as doctor

        sys.exit(doctor(argv))
    elif command in COMMANDS:
        _quiet()
        try:
            sys.exit(run_command(command, argv))
        except MaceLoraError as error:
            sys.exit(f"error: {error}")
    else:
        known = did_you_mean(command, ["train", *COMMANDS, "doctor"])
        print(f"error: unknown command {command!r}; {known}", file=sys.stderr)
        sys.exit(2)
