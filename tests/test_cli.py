"""Flags: upstream's names and defaults, ours beside them, contradictions named."""

import re

import pytest
from mace.tools import build_default_arg_parser

import mace_lora
from mace_lora import cli
from mace_lora.errors import ConfigError, MaceLoraError
from mace_lora.training.arguments import check_files

BASE = ["--name=x", "--train_file=t.xyz", "--foundation_model=mini"]


def adapter(*flags: str):
    return cli.parse([*BASE, *flags])[1]


def test_without_an_adapter_flag_the_arguments_are_upstreams():
    ours, config, _ = cli.parse(BASE)
    theirs = build_default_arg_parser().parse_args(BASE)
    assert config is None
    assert vars(ours) == vars(theirs)


def test_every_upstream_flag_is_there_with_its_default():
    ours, theirs = cli.build_parser(), build_default_arg_parser()
    for flag in vars(theirs.parse_args(["--name=x"])):
        found = ours.get_default(flag)
        assert getattr(found, "value", found) == theirs.get_default(flag), flag


def test_lora_means_the_adapter_lora_with_upstreams_defaults():
    config = adapter("--lora=True")
    assert config == adapter("--adapter=lora") == adapter("--lora=True", "--adapter=lora")
    assert (config.method, config.options.rank, config.options.alpha) == ("lora", 4, 1.0)


def test_options():
    config = adapter("--lora=True", "--lora_rank=8", "--lora_alpha=16", "--lora_init=kaiming")
    assert (config.options.rank, config.options.alpha) == (8, 16.0)
    assert config.options.init == "kaiming"
    targets = adapter("--lora=True", "--lora_targets", "linear", "radial").options.targets
    assert targets == ("linear", "radial")


def test_upstream_sees_none_of_our_flags():
    args, _, _ = cli.parse([*BASE, "--adapter=lora", "--lora_rank=8"])
    assert set(vars(args)) == set(vars(build_default_arg_parser().parse_args(BASE)))
    assert args.lora_rank == 8


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--adapter=lroa"], ["unknown adapter 'lroa'", "Did you mean 'lora'?"]),
        (["--lora=False", "--adapter=lora"], ["--lora=False", "--adapter=lora"]),
        (["--lora_init=small"], ["--lora_init", "no adapter is chosen", "--adapter=lora"]),
        (["--lora=True", "--lora_rank=0"], ["--lora_rank=0", "1 or more"]),
        (["--lora=True", "--lora_rank=-3"], ["--lora_rank=-3", "1 or more"]),
        (["--lora=True", "--lora_alpha=0"], ["--lora_alpha=0.0", "other than 0"]),
        (["--lora=True", "--lora_alpha=nan"], ["--lora_alpha=nan", "finite"]),
        (["--adapter=elora", "--lora_rank=8"], ["--lora_rank", "--adapter=elora"]),
        (["--lora=True", "--adapter=elora"], ["--lora=True", "--adapter=elora"]),
        (["--lora_rank=8"], ["--lora_rank belongs to --adapter=lora, but no adapter is chosen"]),
        (["--lora_alpha=8"], ["--lora_alpha", "give --adapter=lora"]),
        (["--overwrite=True"], ["--overwrite needs an adapter"]),
        (["--adapter=loar"], ["Did you mean 'lora'?"]),
    ],
)
def test_contradictions_and_nonsense(flags, parts):
    with pytest.raises(ConfigError) as error:
        adapter(*flags)
    for part in parts:
        assert part in str(error.value)


def test_our_flags_in_a_config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: x\ntrain_file: t.xyz\nfoundation_model: mini\nlora: true\nlora_rank: 2\n"
        "lora_targets: [linear, 'readouts.*']\n"
    )
    args, config, _ = cli.parse(["--config", str(path)])
    assert args.name == "x"
    assert config.options.rank == 2
    assert config.options.targets == ("linear", "readouts.*")
    overridden = cli.parse(["--config", str(path), "--lora_rank=3"])[1]
    assert overridden.options.rank == 3


def test_help_has_ours_first_then_what_a_fine_tuning_needs(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    ours, _, rest = text.partition("what a fine-tuning needs (mace-torch):")
    needed, _, others = rest.partition("all other flags (mace-torch):")

    def flags(part: str) -> list[str]:
        return re.findall(r"^  (?:-h, )?(--\w+)", part, flags=re.M)

    assert ours.partition("adapters (mace-lora):")[2]
    assert flags(ours)[:4] == ["--adapter", "--lora", "--lora_rank", "--lora_alpha"]
    assert flags(needed)[:3] == ["--name", "--foundation_model", "--foundation_head"]
    assert 20 <= len(flags(needed)) <= 30
    shown = flags(ours) + flags(needed) + flags(others)
    theirs = flags(build_default_arg_parser().format_help())
    assert len(shown) == len(set(shown))
    assert set(flags(needed) + flags(others)) - {"--version"} < set(theirs) < set(shown)


def test_version(capsys):
    for command in (
        lambda: cli.main(["--version"]),
        lambda: cli.main_tools(["train", "--version"]),
    ):
        with pytest.raises(SystemExit, match="0"):
            command()
        assert capsys.readouterr().out == f"mace-lora {mace_lora.__version__}\n"
    cli.main_tools(["--version"])
    assert capsys.readouterr().out == f"mace-lora {mace_lora.__version__}\n"


def test_an_unknown_key_in_a_config_file(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nlora: true\nlora_rnak: 2\n")
    with pytest.raises(SystemExit, match="2"):
        cli.parse(["--config", str(path)])
    assert "Did you mean '--lora_rank'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--defaults=mace-torc", "mace-torch"),
        ("--schedule=cosin", "cosine"),
        ("--loss=weightd", "weighted"),  # mace-torch's
        ("--lora_rnak=2", "--lora_rank"),
    ],
)
def test_mistyped_flags_and_values(capsys, flag, meant):
    with pytest.raises(SystemExit, match="2"):
        adapter("--adapter=full", flag)
    assert f"Did you mean {meant!r}?" in capsys.readouterr().err


def test_a_mistyped_file(tmp_path):
    (tmp_path / "train.xyz").touch()
    with pytest.raises(ConfigError, match=r"there is no such file. Did you mean 'train.xyz'\?"):
        check_files(cli.parse(["--name=x", f"--train_file={tmp_path}/trian.xyz"])[0])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--foundation_model=no.model"], "--foundation_model=no.model: there is no such file"),
        (["--train_file=no.xyz"], "--train_file=no.xyz: there is no such file"),
        (["--train_file=no_lmdb:neither_lmdb"], "there is no such file"),
        (["--statistics_file=no.json"], "--statistics_file=no.json: there is no such file"),
        (["--heads={'a': {'train_file': 'no.xyz'}}"], "--heads, a: train_file=no.xyz"),
    ],
)
def test_missing_files(flags, said):
    with pytest.raises(MaceLoraError) as error:
        check_files(cli.parse(["--name=x", *flags])[0])
    assert said in str(error.value)


def test_tools(capsys):
    cli.main_tools(["--help"])
    assert "doctor" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main_tools(["trian"])
    assert "unknown command 'trian'; known" in capsys.readouterr().err


def test_the_message_of_a_usage_error_is_not_buried(capsys):
    """argparse prints its usage above every message, which for two hundred flags hides it."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["--name=x", "--lora_preset=balancd"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 5
    assert "'balanced'" in lines[-1]
