"""Two processes on a CPU through torchrun: the frames, losses and files of one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.running import LATEST, here, process, results, said, wait_for_lines

pytestmark = pytest.mark.slow

# The command, with a look at what goes from process to process during training, and at who writes
SPY = """
import json, os, sys, torch
from mace_lora.training.epochs import processes
sent, wrote, rank = [], [], os.environ["RANK"]
original = processes.parallel
def parallel(model, device_ids=None):
    ddp = original(model, device_ids)
    if any(not p.requires_grad for p in model.parameters()):  # not the final evaluation's
        def hook(group, bucket):
            sent.append(bucket.buffer().numel())
            work = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return work.then(lambda f: f.value()[0].div_(2))
        ddp.register_comm_hook(None, hook)
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sent.append(-numbers)
    return ddp
processes.parallel = parallel
def audit(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR):
            wrote.append(os.path.abspath(arguments[0]))
sys.addaudithook(audit)
from mace_lora.cli import main
try:
    main(sys.argv[2:])
finally:
    with open(f"spy-{rank}.json", "w") as file:
        json.dump({"sent": sent, "wrote": wrote}, file)
"""


# The first process waits after its second step until a signal has come
WAITING = """
import os, time
from mace_lora.training.epochs.loop import Loop
take_step, taken = Loop.take_step, []
def waiting(self, **keywords):
    result = take_step(self, **keywords)
    taken.append(1)
    end = time.monotonic() + 120
    while len(taken) == 2 and os.environ["RANK"] == "0" and not self.stop:
        assert time.monotonic() < end
        time.sleep(0.01)
    return result
Loop.take_step = waiting
from mace_lora.cli import main
import sys
main(sys.argv[2:])
"""


# What a run does with its group, again and again: the last barrier, then the end of all variables
ENDING = """
import argparse, os, torch
import torch.distributed as dist
from mace_lora.training.epochs import processes
rank, address, port = (os.environ[k] for k in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
store = dist.TCPStore(address, int(port), 2, False)
def end(i):
    own = dist.PrefixStore(str(i), store)
    dist.init_process_group("gloo", store=own, rank=int(rank), world_size=2)
    processes.init(argparse.Namespace(distributed=True, device="cpu", launcher="torchrun"))
    model = processes.parallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    processes.wait_for_all(True)
    dist.destroy_process_group()
for i in range(40):
    end(i)
"""


def launcher(*command: str) -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ("--nproc_per_node=2", "--master_addr=localhost", f"--master_port={port}")
    return ("-m", "torch.distributed.run", *options, *command)


@pytest.fixture(scope="module")
def flags(small_data, foundation) -> list[str]:
    """Nine training frames and five for validation, which two processes can't divide evenly."""
    return [
        "--name=run",
        f"--foundation_model={foundation}",
        f"--train_file={small_data['train']}",
        "--valid_fraction=0.3",
        f"--test_file={small_data['test']}",
        "--lora=True",
        "--valid_batch_size=1",
        "--lr=0.01",
        "--ema",
        "--seed=1",
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory, flags) -> Path:
    """One process with batches of four."""
    folder = tmp_path_factory.mktemp("one")
    assert here(folder, *flags, "--batch_size=4", "--max_num_epochs=3") == ""
    return folder


def evaluations(folder: Path) -> list[float]:
    return [line["loss"] for line in results(folder) if line["mode"] == "eval"]


def test_the_loss_curve_of_one_process_with_the_doubled_batch(tmp_path, flags, one):
    """And: only gradients of adapters are sent, and only the first process writes."""
    spy = tmp_path / "spy.py"
    spy.write_text(SPY)
    running = process(
        tmp_path, *flags, "--batch_size=2", "--max_num_epochs=3", launcher=launcher(str(spy))
    )
    assert running.wait() == 0, said(tmp_path)
    assert len(evaluations(tmp_path)) == 4
    assert evaluations(tmp_path) == pytest.approx(evaluations(one), rel=1e-10)
    a, b = (torch.load(f / "run.model", weights_only=False).state_dict() for f in (tmp_path, one))
    assert all(torch.allclose(a[k], b[k], rtol=1e-8, atol=1e-10) for k in a)

    first, second = (json.loads((tmp_path / f"spy-{rank}.json").read_text()) for rank in (0, 1))
    adapter, steps = -first["sent"][0], len(results(tmp_path)) - 4
    assert sum(first["sent"][1:]) == adapter * steps
    # mace-torch's logger opens the log in each process, and writes in the first alone
    files = {p for p in second["wrote"] if p.startswith(str(tmp_path)) and Path(p).is_file()}
    assert {str(Path(p).relative_to(tmp_path).parent) for p in files} <= {"logs", "."}
    assert {Path(p).name for p in files if "logs" not in p} == {"spy-1.json"}
    assert any(p.startswith(str(tmp_path / "checkpoints")) for p in first["wrote"])


@pytest.mark.parametrize("method", ["elora", "dora", "mmea"])
def test_other_methods(tmp_path, flags, method):
    """With protection, whose gradient every process computes for itself."""
    flags = [f for f in flags if "lora=" not in f] + [f"--adapter={method}", "--max_num_epochs=1"]
    flags.append("--protect=True")
    one, two = tmp_path / "one", tmp_path / "two"
    assert here(one, *flags, "--batch_size=4") == ""
    running = process(two, *flags, "--batch_size=2", launcher=launcher("-m", "mace_lora"))
    assert running.wait() == 0, said(two)
    assert evaluations(two) == pytest.approx(evaluations(one), rel=1e-10)
    a, b = (torch.load(f / LATEST, weights_only=True)["adapter"] for f in (one, two))
    assert max(v.abs().max().item() for k, v in a.items() if "lora_A" not in k) > 1e-3
    assert all(torch.allclose(a[k], b[k], rtol=1e-8, atol=1e-10) for k in a)


def test_stopped_by_torchrun_and_continued_by_one_process(tmp_path, flags, one):
    """Two processes with batches of two stop at a step; one with batches of four goes on."""
    more = [*flags, "--max_num_epochs=3", "--restart_latest"]
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    running = process(tmp_path, *more, "--batch_size=2", launcher=launcher(str(script)))
    wait_for_lines(running, tmp_path, 3)
    running.send_signal(signal.SIGTERM)
    running.wait()
    assert "SIGTERM: stopped at epoch" in said(tmp_path)
    assert not (tmp_path / "run.model").exists()
    assert here(tmp_path, *more, "--batch_size=4") == ""
    assert evaluations(tmp_path) == pytest.approx(evaluations(one), rel=1e-10)


def test_a_dying_process_ends_the_job(tmp_path, flags):
    running = process(
        tmp_path,
        *flags,
        "--batch_size=2",
        "--max_num_epochs=10000",
        launcher=launcher("-m", "mace_lora"),
    )
    wait_for_lines(running, tmp_path, 5)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    workers = [
        int(pid)
        for pid in children
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(workers[0], signal.SIGKILL)
    assert running.wait(timeout=120) != 0
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in children):
        assert time.monotonic() < end, "a process is left behind"
        time.sleep(0.1)
    state = torch.load(tmp_path / "checkpoints/run_run-1_latest.pt", weights_only=True)
    assert state["progress"]["epoch"] >= 1


def test_backends_in_two_processes(tmp_path, flags):
    """The losses of mace-torch's own operations; CUDA graphs can't serve a CPU, and say so."""
    more = [*flags, "--batch_size=2", "--max_num_epochs=2"]
    folders = {}
    for name in ("eager", "cudagraph"):
        folder = folders[name] = tmp_path / name
        running = process(folder, *more, f"--step={name}", launcher=launcher("-m", "mace_lora"))
        assert running.wait() == 0, said(folder)
    found = evaluations(folders["cudagraph"])
    assert found == pytest.approx(evaluations(folders["eager"]), rel=1e-9)
    given_up = "--step=cudagraph can't serve this run, which goes on in fused"
    assert given_up in said(folders["cudagraph"])
    assert given_up not in said(folders["eager"])


def test_processes_end(tmp_path):
    """Torch's own group waits for its thread for good, about once in five times."""
    (tmp_path / "ending.py").write_text(ENDING)
    command = [sys.executable, *launcher(str(tmp_path / "ending.py"))]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0
