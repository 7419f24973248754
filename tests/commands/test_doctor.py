"""`mace_lora doctor`: what it sees, and what it says of problems."""

import json
import subprocess
import sys

from mace_lora.commands import doctor


def test_it_sees_what_is_installed(capsys):
    doctor.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["mace-torch"].startswith("0.3.")
    assert found["versions"]["mace-lora"]
    assert found["cuda"].split(":")[0] in ("yes", "no")


def test_upstreams_command_on_the_path_is_a_problem(tmp_path, monkeypatch, capsys):
    command = tmp_path / "mace_run_train"
    command.write_text("#!/usr/bin/python\nfrom mace.cli.run_train import main\nmain()\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert str(command) in text
    assert "mace-torch's own command" in text
    assert "mace_lora train" in text


def test_no_command_on_the_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.main([]) == 1
    assert "there is no mace_run_train on the PATH" in capsys.readouterr().out


def test_our_command_is_no_problem(tmp_path, monkeypatch, capsys):
    command = tmp_path / "mace_run_train"
    command.write_text("#!/usr/bin/python\nfrom mace_lora.cli import main\nmain()\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    doctor.main([])
    assert "(mace-lora's)" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PACKAGES", ("mace-lora", "no-such-package-here"))
    assert doctor.main([]) == 1
    assert "no-such-package-here is not installed" in capsys.readouterr().out


def test_it_speaks_where_torch_is_broken():
    code = "import sys; sys.modules['torch'] = None; from mace_lora.cli import main_tools; "
    code += "main_tools(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch can't be imported" in done.stdout
