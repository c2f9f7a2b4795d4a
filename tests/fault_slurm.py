"""Runs that `infra/slurm.sh` carries out on real Slurm daemons: out of time, and queued again by hand."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from fault_bench import N_SHARDS, RAY, Bench, CannotTry, Outcome, Run
from slurm_cluster import Slurm, slurm_cluster, why_no_slurm

SCRIPT = Path(__file__).parents[1] / "infra" / "slurm.sh"
TWO_NODES = ("--nodes=2", "--partition=both")
QUEUED_AGAIN = "the job's time is up: it is queued again"
_LOOK_S = 0.3


def slurm_time_limit(bench: Bench) -> Outcome:
    """A job whose time is up in the middle of its run, then one that is queued again by hand."""
    with slurm_for(bench) as slurm:
        return _out_of_time(bench, slurm) + _queued_by_hand(bench, slurm)


def _out_of_time(bench: Bench, slurm: Slurm) -> Outcome:
    run = SlurmRun(bench, slurm, "slurm-time", *TWO_NODES)
    run.start()
    run.wait_for(N_SHARDS // 4)
    run.use_up_time()
    run.start_again()
    return run.outcome(1, ok=run.end() == 0 and f"{len(run.seen)} shards reused" in run.printed)


def _queued_by_hand(bench: Bench, slurm: Slurm) -> Outcome:
    run = SlurmRun(bench, slurm, "slurm-requeue")
    run.start()
    run.wait_for(N_SHARDS // 4)
    slurm.command("scontrol", "requeue", run.driver.number)
    run.start_again()
    run.look()
    return run.outcome(1, ok=run.end() == 0)


@contextmanager
def slurm_for(bench: Bench) -> Iterator[Slurm]:
    """Slurm's daemons beside a bench."""
    reason = why_no_slurm()
    if reason is not None:
        raise CannotTry(reason)
    home = bench.home / "slurm"
    home.mkdir()
    with slurm_cluster(home) as slurm:
        yield slurm


def _minutes(duration: str) -> int:
    """Return the whole minutes of hours:minutes:seconds."""
    hours, minutes, _ = duration.split(":")
    return 60 * int(hours) + int(minutes)


class Job:
    """A job of Slurm, looked after as a process is."""

    def __init__(self, slurm: Slurm, number: str) -> None:
        self.number, self._slurm = number, slurm
        self._code: int | None = None
        self._looked_at = 0.0

    def fields(self) -> dict[str, str]:
        """Return what Slurm knows of the job."""
        shown = self._slurm.command("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def poll(self) -> int | None:
        """Return the exit code; None while the job waits or runs."""
        if self._code is None and time.monotonic() - self._looked_at > _LOOK_S:
            fields = self.fields()
            if fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                self._code = int(fields["ExitCode"].partition(":")[0])
            self._looked_at = time.monotonic()
        return self._code

    def wait(self, timeout_s: float) -> int:
        """Return the exit code once the job is over."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {self.number} is not over after {timeout_s:g} s")
            time.sleep(_LOOK_S)
        assert self._code is not None
        return self._code


class SlurmRun(Run):
    """A run as a job of Slurm, with a home directory of its own."""

    driver: Job  # type: ignore[assignment]

    def __init__(self, bench: Bench, slurm: Slurm, name: str, *options: str, **environment: str) -> None:
        self.home, self._output, self._slurm = bench.home / f"{name}-home", bench.home / f"{name}.out", slurm
        self.home.mkdir()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"HOME": str(self.home), "PATH": path, **slurm.environment, **environment}
        super().__init__(bench, bench.home / name, *RAY, **own)
        submit = ["sbatch", "--parsable", f"--output={self._output}", "--nodes=1", "--cpus-per-task=1"]
        self._command = [*submit, *options, SCRIPT, *self._command[1:]]

    def start(self) -> None:
        submitted = subprocess.run(
            self._command, env=self._environment, cwd=self.home, check=True, capture_output=True, text=True
        )
        self.driver = Job(self._slurm, submitted.stdout.strip())

    @property
    def printed(self) -> str:
        """What the job has printed, in all of its starts."""
        return self._output.read_text() if self._output.exists() else ""

    @property
    def seen(self) -> dict[Path, tuple[int, ...]]:
        """The shards that were finished when the run was last looked at."""
        return self._seen

    def use_up_time(self) -> None:
        """Let the workers stand still, and little be left of the job's time, until it is queued again or has ended."""
        for worker in self.workers():
            worker.suspend()
        minutes = _minutes(self.driver.fields()["RunTime"]) + 2  # within the notice that slurm.sh asks for
        self._slurm.command("scontrol", "update", f"JobId={self.driver.number}", f"TimeLimit={minutes}")
        while QUEUED_AGAIN not in self.printed and self.driver.poll() is None:
            time.sleep(_LOOK_S)
        self.look()

    def workers(self) -> list[psutil.Process]:
        """Return the job's actors."""
        found = []
        for process in psutil.process_iter(["name", "environ"]):
            environment = process.info["environ"] or {}
            if process.info["name"].startswith("ray::_Host") and environment.get("HOME") == str(self.home):
                found.append(process)
        return found

    def ray_directories(self) -> list[Path]:
        """Return the directories of the job's Ray nodes that are still there."""
        return [place for name in re.findall(r"/tmp/ray-\w{6}", self.printed) if (place := Path(name)).exists()]

    def start_again(self) -> None:
        """Start the job soon that is queued again, for an hour; by itself, Slurm would do so after two minutes.

        Not at once: a node refuses a start in the second in which it ended the job ("Job credential revoked").
        """
        while self.driver.poll() is None:
            if self.driver.fields()["JobState"] == "PENDING":
                self._slurm.command(
                    "scontrol", "update", f"JobId={self.driver.number}", "StartTime=now+5", "TimeLimit=60"
                )
                return
            time.sleep(_LOOK_S)

    def bury(self) -> None:
        """Leave it to the end of the cluster, which ends its jobs."""
