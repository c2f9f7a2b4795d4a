"""`infra/slurm.sh` under real Slurm daemons: Debian's packages, started for these tests with two nodes of their own."""

from pathlib import Path

import pytest
from fault_bench import N_SHARDS, Bench, rows_lost
from fault_slurm import QUEUED_AGAIN, TWO_NODES, SlurmRun
from slurm_cluster import slurm_cluster, why_no_slurm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm()))]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"), seed=0)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def test_a_job_out_of_time_is_queued_again_and_goes_on_from_its_finished_shards(bench, slurm):
    run = SlurmRun(bench, slurm, "time", *TWO_NODES)
    run.start()
    assert run.wait_for(N_SHARDS // 4), run.printed
    run.use_up_time()
    assert QUEUED_AGAIN in run.printed
    assert "stopped; finished shards are kept" in run.printed
    run.start_again()
    assert run.end() == 0, run.printed
    assert len(run.seen) >= N_SHARDS // 4
    assert f"{len(run.seen)} shards reused" in run.printed
    assert rows_lost(bench.reference, run.directory) == 0
    assert run.driver.fields()["Restarts"] == "1"
    assert leftovers(run) == []


def test_a_job_that_may_not_be_queued_again_ends_with_the_runs_exit_code(bench, slurm):
    variables = {"NEG_REQUEUES": "0", "HF_HUB_CACHE": str(bench.home / "hub")}
    run = SlurmRun(bench, slurm, "bounded", "--account=science", **variables)
    run.start()
    assert run.wait_for(N_SHARDS // 4)
    (worker, *_) = run.workers()
    seen = worker.environ()
    assert {name: seen[name] for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")} == {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": variables["HF_HUB_CACHE"],
    }
    worker.suspend()
    slurm.command("scancel", "--batch", "--signal=USR1", run.driver.number)  # what Slurm sends before the end
    assert run.end() == 130, run.printed
    assert "queued again 0 times: submit it again to go on" in run.printed
    assert run.driver.fields()["Account"] == "science"
    assert leftovers(run) == []


def leftovers(run: SlurmRun) -> list[Path]:
    """Tokens, and directories of Ray, that a job has left behind."""
    return [*(run.home / ".neg").iterdir(), *run.ray_directories()]
