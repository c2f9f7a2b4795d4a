"""Slurm on this machine: its real daemons, with a configuration, a key and ports of their own.

Two `slurmd` stand for two nodes. They need root, because a `slurmd` starts jobs as the user who submitted them.
"""

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

NODES = ("n1", "n2")
_START_S = 60.0
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def why_no_slurm() -> str | None:
    """Return why Slurm cannot be started here; None if it can."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: make cluster-tools"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


class Slurm(NamedTuple):
    """A cluster that is up."""

    environment: dict[str, str]
    """Variables that its commands need."""

    def command(self, *words: str | Path) -> str:
        """Return what a command of Slurm prints."""
        return subprocess.run(
            list(map(str, words)), env=os.environ | self.environment, check=True, capture_output=True, text=True
        ).stdout

    def jobs(self) -> list[str]:
        """Return the numbers of the jobs that wait or run."""
        return self.command("squeue", "--noheader", "--format=%i").split()


@contextmanager
def slurm_cluster(home: Path) -> Iterator[Slurm]:
    """Start Slurm with two nodes and two partitions; on leaving, end its jobs and daemons."""
    configuration = _configure(home)
    slurm = Slurm({"SLURM_CONF": str(configuration)})
    daemons = [
        _munged(home),
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-c", "-N", node] for node in NODES),
    ]
    with ExitStack() as stack:
        for number, command in enumerate(daemons):
            log = stack.enter_context((home / f"{number}-{command[0]}.log").open("wb"))
            environment = os.environ | slurm.environment
            daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(_end, daemon)
        _await_nodes(slurm, home)
        stack.callback(_end_jobs, slurm)
        yield slurm


def _configure(home: Path) -> Path:
    """Write Slurm's configuration and munge's key."""
    controller, *nodes = _free_ports(1 + len(NODES))
    host = socket.gethostname().partition(".")[0]
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        f"FirstJobId={random.randrange(1, 10_000)}",  # Ray's port follows from it
        f"AuthInfo=socket={home}/munge.socket",
        f"SlurmctldPidFile={home}/slurmctld.pid",
        f"SlurmdPidFile={home}/slurmd.%n.pid",
        f"StateSaveLocation={home}/state",
        f"SlurmdSpoolDir={home}/spool.%n",
        "MailProg=/bin/true",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",  # however many cores there are
        "SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0",
        "KillWait=20",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
            for node, port in zip(NODES, nodes, strict=True)
        ),
        f"PartitionName=first Nodes={NODES[0]} Default=YES State=UP",
        f"PartitionName=both Nodes={','.join(NODES)} State=UP",
    ]
    (home / "state").mkdir()
    (home / "munge.key").write_bytes(os.urandom(128))
    (home / "munge.key").chmod(0o400)
    configuration = home / "slurm.conf"
    configuration.write_text("\n".join(lines) + "\n")
    return configuration


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def _munged(home: Path) -> list[str]:
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={home}/munge.{suffix}" for option, suffix in files.items()]
    return ["munged", "--foreground", "--force", *options]


def _await_nodes(slurm: Slurm, home: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%t"],
            env=os.environ | slurm.environment,
            capture_output=True,
            text=True,
        )
        if answer.stdout.split() and set(answer.stdout.split()) == {"idle"}:
            return
        logs = "\n".join(log.read_text() for log in sorted(home.glob("*.log")))
        assert time.monotonic() < deadline, answer.stderr + logs
        time.sleep(0.2)


def _end_jobs(slurm: Slurm) -> None:
    deadline = time.monotonic() + _START_S
    slurm.command("scancel", "--user=root")
    while slurm.jobs() and time.monotonic() < deadline:
        time.sleep(0.2)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
