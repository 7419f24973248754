"""`mace_lora doctor`: what it sees, and what it says of problems."""

import json
import subprocess
import sys

import pytest

from mace_lora import cli
from mace_lora.commands import doctor


@pytest.fixture
def call(capsys):
    """Run it: its exit code, and what it prints."""

    def get(*flags: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main_tools(["doctor", *flags])
        return stop.value.code, capsys.readouterr().out

    return get


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Put a `mace_run_train` on an otherwise empty PATH, which imports `main` from the module."""

    def put(module: str) -> str:
        path = tmp_path / "mace_run_train"
        path.write_text(f"#!/usr/bin/python\nfrom {module} import main\nmain()\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return str(path)

    return put


def test_it_sees_what_is_installed(call):
    found = json.loads(call("--json")[1])
    assert found["versions"]["mace-torch"].startswith("0.3.")
    assert found["versions"]["mace-lora"]
    assert found["cuda"].split(":")[0] in ("yes", "no")


def test_upstreams_command_on_the_path_is_a_problem(call, command):
    path = command("mace.cli.run_train")
    code, text = call()
    assert code == 1
    assert path in text
    assert "mace-torch's own command" in text
    assert "mace_lora train" in text


def test_no_command_on_the_path(call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = call()
    assert code == 1
    assert "there is no mace_run_train on the PATH" in text


def test_our_command_is_no_problem(call, command):
    command("mace_lora.cli")
    code, text = call()
    assert "(mace-lora's)" in text
    assert code == ("Problems:" in text)


def test_a_missing_package_is_named(call, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("mace-lora", "no-such-package-here"))
    code, text = call()
    assert code == 1
    assert "no-such-package-here is not installed" in text


def test_it_speaks_where_torch_is_broken():
    code = "import sys; sys.modules['torch'] = None; from mace_lora.cli import main_tools; "
    code += "main_tools(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch can't be imported" in done.stdout
