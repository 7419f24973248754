"""A real SLURM of one node, for as long as a test needs it: Debian's slurm-wlm and munge."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str:
    """Why no cluster can be started here, or nothing."""
    absent = [p for p in PROGRAMS if shutil.which(p, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "not root"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _configuration(folder: Path, cpus: int) -> str:
    host = socket.gethostname()
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a job that is put in the queue again waits as long as its old credential lives: 120 s by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


class Cluster:
    """What a user has of a cluster: `sbatch`, `scontrol` and the like, with its configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """`scontrol show job` of a job, or of one task of an array (`12_3`)."""
        text = self.run("scontrol", "show", "job", "-o", job).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Until the job is in one of `states`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.state(job)
            if found["JobState"] in states:
                return found
            time.sleep(0.5)
        raise AssertionError(f"job {job} is {found}, not {states}")


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 2) -> Iterator[Cluster]:
    """munged, slurmctld and slurmd of their own in `folder`, ended at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slurm.conf").write_text(_configuration(folder, cpus))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    for name in ("state", "spool"):
        (folder / name).mkdir(exist_ok=True)
    made = Cluster(folder)
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
    files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    commands = [
        ["munged", "-F", "--force", *(f"--{k}={folder / v}" for k, v in files.items())],
        ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-D", "-f", str(folder / "slurm.conf")],
    ]
    with contextlib.ExitStack() as stack:
        for command in commands:
            path = shutil.which(command[0], path=_PATH)
            log = stack.enter_context(open(folder / f"{command[0]}.out", "wb"))
            process = subprocess.Popen(
                [path, *command[1:]], stdout=log, stderr=log, env=made.environment
            )
            stack.callback(_end, process)
            time.sleep(1)
            if process.poll() is not None:
                raise AssertionError(f"{command[0]}: {(folder / f'{command[0]}.out').read_text()}")
        end = time.monotonic() + 30
        while "idle" not in made.run("sinfo", "-h", "-o", "%T"):
            if time.monotonic() > end:
                raise AssertionError((folder / "slurmctld.log").read_text()[-2000:])
            time.sleep(0.5)
        try:
            yield made
        finally:
            made.run("scancel", "--partition=test")
            time.sleep(2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
