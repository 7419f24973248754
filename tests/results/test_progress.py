"""The progress bar on a terminal, silence elsewhere, and the learning curve."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from mace_lora.results.progress import History

CODE = """
import logging, sys
from mace_lora.results.progress import ProgressBar
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
with ProgressBar(20, 10) as bar:
    for i in range(20):
        bar.step(0.5)
        bar.validated({"rmse_f": 0.0425, "rmse_e_per_atom": 0.001})
        logging.info(f"line {i}")
        logging.debug("hidden")
logging.info("done")
"""


def on_a_terminal() -> str:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=terminal, stderr=terminal)
    os.close(terminal)
    text = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    assert process.wait() == 0
    return text.decode()


def test_on_a_terminal_there_is_a_bar_and_every_log_line():
    text = on_a_terminal()
    assert "20/20" in text
    assert "epoch 1" in text
    assert "F meV/A=42.5" in text
    for i in range(20):
        assert text.count(f"line {i}\r\n") == 1
    assert "done" in text
    assert "hidden" not in text


def test_elsewhere_there_are_log_lines_alone():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*(f"line {i}" for i in range(20)), "done"]
    assert done.stderr == ""


def history() -> History:
    history = History()
    rows = [(None, 9.0, 0.020), (0, 2.0, 0.010), (1, 1.0, 0.004), (2, 1.5, 0.002)]
    for epoch, loss, energy in rows:
        metrics = {"loss": loss, "rmse_f": loss / 10, "rmse_e_per_atom": energy, "mode": "eval"}
        history.add(epoch, "Default", metrics)
    return history


def test_summary_is_of_the_epoch_with_the_lowest_loss():
    text = history().summary()
    assert text == "Default: energy RMSE 20.0 -> 4.0 meV per atom, force RMSE 900.0 -> 100.0 meV/Å"


def test_learning_curve_is_a_picture(tmp_path):
    from matplotlib.image import imread

    history().plot(tmp_path / "curve.png", "title")
    picture = imread(tmp_path / "curve.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 600
    assert 0.01 < (picture[..., :3].min(axis=2) < 0.9).mean() < 0.5  # something is drawn on white
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]
