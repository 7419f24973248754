"""The SLURM scripts under a real SLURM of one node: array, signal, requeue, resume."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import ase.io
import pytest
from helpers import slurm_cluster
from helpers.frames import DATA
from helpers.running import tool_prints

import mace_lora

ROOT = Path(__file__).parents[2]
PACKAGED = Path(mace_lora.__file__).parent / "data" / "slurm"
ETHANOL = 3  # place in the list of molecules of array.sbatch


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def submit(cluster, tmp_path):
    """`submit(script, arguments)`: as a user does from the repository, but without a GPU."""

    def sbatch(options: list[str], script: str, *arguments: str, folder: Path | None = None) -> str:
        return cluster.run(
            *("sbatch", "--parsable", "--gres=none", "--cpus-per-task=1"),
            f"--output={tmp_path}/%x_%j.log",
            *options,
            script,
            *arguments,
            cwd=folder or ROOT,
            DEVICE="cpu",
            OMP_NUM_THREADS="1",
            VIRTUAL_ENV=os.environ.get("VIRTUAL_ENV", sys.prefix),
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        )

    return sbatch


def wait_for(folder: Path, pattern: str, seconds: float = 300) -> Path:
    end = time.monotonic() + seconds
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < end, f"no {pattern} in {folder}"
        time.sleep(0.2)
    return found[0]


@pytest.mark.slow
def test_a_task_of_the_array_is_requeued_and_goes_on(cluster, submit, tmp_path):
    """What SLURM does before the time limit, done by hand: SIGUSR1 to the batch script."""
    originals = tmp_path / "originals" / "rmd17" / "revised_ethanol"
    originals.mkdir(parents=True)
    for part in ("train", "valid", "test"):
        frames = ase.io.read(DATA / f"ethanol_{part}.xyz", index=":6")
        ase.io.write(originals / f"{part}.xyz", frames)
    out = tmp_path / "out"
    job = submit(
        [f"--array={ETHANOL}"],
        "scripts/slurm/array.sbatch",
        *("--adapter=lora", "--foundation_model=mini", f"--data_dir={tmp_path}/originals"),
        *(f"--out={out}", "--train_frames=5", "--max_num_epochs=40", "--swa=False"),
    )
    task = f"{job}_{ETHANOL}"
    wait_for(out, "runs/*/*/*/checkpoints/*.pt")
    cluster.run("scancel", "--batch", "--signal=USR1", task)
    found = cluster.wait(task, "COMPLETED", "FAILED", "TIMEOUT")
    (log,) = (path.read_text() for path in tmp_path.glob("rmd17_*.log"))
    assert found["JobState"] == "COMPLETED", log
    assert found["Restarts"] == "1"
    assert "goes to the queue again" in log
    (result,) = (json.loads(p.read_text()) for p in out.glob("runs/*/*/*/result.json"))
    assert result["resumed"]
    assert "ethanol" in (out / "table.md").read_text()


@pytest.mark.slow
def test_only_the_task_that_was_stopped_is_requeued(cluster, submit, tmp_path):
    """One task of an array has the array's own number: by that, all tasks would be requeued."""
    script = tmp_path / "job.sh"
    script.write_text(f"""#!/bin/bash
        . {PACKAGED}/requeue.sh
        run_or_requeue bash -c 'trap "exit 75" USR1; touch {tmp_path}/$SLURM_ARRAY_TASK_ID
            while [ -z "$SLURM_RESTART_COUNT" ]; do sleep 0.1; done'
    """)
    job = submit(["--array=0-1", "--requeue"], str(script))
    for task in "01":
        wait_for(tmp_path, task)
    numbers = {task: cluster.state(f"{job}_{task}")["JobId"] for task in "01"}
    (stopped,) = (task for task, number in numbers.items() if number == job)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_{stopped}")
    found = cluster.wait(f"{job}_{stopped}", "COMPLETED", "FAILED")
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    other = cluster.state(f"{job}_{1 - int(stopped)}")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    cluster.run("scancel", job)


@pytest.mark.slow
def test_a_failure_is_no_reason_to_requeue(cluster, submit, tmp_path, capsys):
    """From a folder that is not the repository, by the script that comes with the package."""
    script = tool_prints(capsys, "slurm").strip() + "/one_gpu.sbatch"
    flags = ("--name=x", "--train_file=none.xyz", "--lora=True")
    job = submit([], script, *flags, folder=tmp_path)
    found = cluster.wait(job, "COMPLETED", "FAILED")
    assert found["JobState"] == "FAILED"
    assert found["Restarts"] == "0"
    (log,) = (path.read_text() for path in tmp_path.glob("mace_lora_*.log"))
    assert "none.xyz" in log
