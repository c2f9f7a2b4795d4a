"""Rows that make a job fail are found by halving and set aside, on any pool; everything else is done."""

import threading
from collections.abc import Sequence

import pytest
from faults import Row, RowsJob, RowsWorker, by_value

from tasks.pool.base import Outcome, PoolStatus, Resources, Stopped
from tasks.pool.isolate import map_isolating, without_text
from tasks.pool.opening import open_pool
from tasks.pool.ray_session import ray_session

N_ROWS = 8


def job(number: int, faults: dict[int, str] | None = None, n_rows: int = N_ROWS) -> RowsJob:
    """A job of some rows, a few with a fault in their prompt."""
    names = [f"{number}/{row}" for row in range(n_rows)]
    return RowsJob([Row(name, f"prompt {name} {(faults or {}).get(row, '')}") for row, name in enumerate(names)])


def isolate(jobs: Sequence[object], backend="local", resources=None, on_tick=None, stop=None, **recipe):
    resources = resources or Resources(workers=2, cpus=0.5)
    with open_pool(backend, RowsWorker, recipe, resources, label="rows") as pool:
        outcomes = map_isolating(pool, jobs, stop=stop or threading.Event(), on_tick=on_tick or (lambda status: None))
        return {outcome.job: outcome for outcome in map(hashable, outcomes)}


def hashable(outcome: Outcome) -> Outcome:
    """The outcome with its job's place (the number in its ids) for the job."""
    first = outcome.job.examples[0].id
    return Outcome(int(first.split("/")[0]), outcome.result, outcome.exception, outcome.attempts)


def ids(number: int, *without: int) -> list[str]:
    return [f"{number}/{row}" for row in range(N_ROWS) if row not in without]


def test_only_the_row_at_fault_is_missing(tmp_path):
    outcomes = isolate([job(0), job(1, {5: "!fail"}), job(2)])
    assert {number: outcome.result for number, outcome in outcomes.items()} == {0: ids(0), 1: ids(1, 5), 2: ids(2)}


def test_a_job_is_halved_down_to_the_row_and_done_again_as_one(tmp_path):
    ledger = tmp_path / "ledger"
    isolate([job(0, {5: "!fail"})], ledger=str(ledger), resources=Resources(max_attempts=2))
    whole = " ".join(ids(0))
    assert ledger.read_text().splitlines() == [
        *[f"{whole} !"] * 2,
        "0/0 0/1 0/2 0/3", "0/4 0/5 0/6 0/7",
        "0/4 0/5", "0/6 0/7",
        "0/4", "0/5", "0/5",
        f"{' '.join(ids(0, 5))} !",
    ]  # fmt: skip


@pytest.mark.parametrize("poison", [(0,), (7,), (0, 7), (2, 3), (0, 1, 2, 4, 5, 6, 7)])
def test_several_rows_of_a_job_are_found(poison):
    outcomes = isolate([job(0, dict.fromkeys(poison, "!fail"))])
    assert outcomes[0].result == ids(0, *poison)


def test_rows_of_several_jobs_are_found_together():
    outcomes = isolate([job(0, {1: "!fail"}), job(1, {6: "!fail"}), job(2)])
    assert [outcomes[number].result for number in range(3)] == [ids(0, 1), ids(1, 6), ids(2)]


def test_a_job_of_which_nothing_is_left_is_done_without_rows_once_others_work():
    outcomes = isolate([job(0), job(1, dict.fromkeys(range(N_ROWS), "!fail"))])
    assert outcomes[1].result == []


def test_nothing_is_set_aside_where_nothing_works(tmp_path):
    ledger = tmp_path / "ledger"
    everything = dict.fromkeys(range(N_ROWS), "!fail")
    outcomes = isolate([job(0, everything), job(1, everything)], ledger=str(ledger))
    assert [outcome.error for outcome in outcomes.values()] == ["RuntimeError: a deliberate fault"] * 2
    searched = {line.split("/")[0] for line in ledger.read_text().splitlines() if not line.endswith("!")}
    assert searched == {"0"}


@pytest.mark.parametrize(
    ("fault", "error", "attempts"),
    [("!refuse", "PromptError: a deliberate refusal", 1), ("!disk", "OSError: [Errno 28] No space left on device", 3)],
)
def test_the_users_error_and_the_disks_are_no_rows_fault(tmp_path, fault, error, attempts):
    ledger = tmp_path / "ledger"
    outcomes = isolate([job(0), job(1, {3: fault})], ledger=str(ledger))
    assert outcomes[1].error == error
    assert len(ledger.read_text().splitlines()) == 1 + attempts


def test_a_job_that_only_fails_as_a_whole_is_handed_back():
    outcomes = isolate([job(0)], most=N_ROWS // 2)
    assert outcomes[0].error == "RuntimeError: a deliberate fault"


def test_a_job_that_cannot_be_divided_is_handed_back_with_its_error():
    class Whole:
        """Has rows, but no halves."""

        examples = job(0, {1: "!fail"}).examples
        set_aside = ()
        is_trial = False

    outcomes = isolate([Whole()])
    assert outcomes[0].error == "RuntimeError: a deliberate fault"


def test_a_stop_ends_the_search():
    stop = threading.Event()

    def stop_when_searching(status: PoolStatus) -> None:
        if "looking for the rows" in status.note:
            stop.set()

    with pytest.raises(Stopped):
        isolate([job(0, {1: "!fail"})], stop=stop, on_tick=stop_when_searching)


def test_the_reason_says_the_error_and_never_quotes_the_prompt():
    class Quoting(RowsWorker):
        def run(self, job):
            for row in job.examples:
                if row.prompt == "a secret" and row.id not in {one.id for one in job.set_aside}:
                    raise KeyError("cannot read 'a secret'")
            return super().run(job) if job.is_trial else job.set_aside

    rows = [Row("0/0", "harmless"), Row("0/1", "a secret")]
    with open_pool("local", Quoting, {}, Resources(), label="rows") as pool:
        (outcome,) = map_isolating(pool, [RowsJob(rows)], stop=threading.Event(), on_tick=lambda status: None)
    assert [(row.id, row.cause, row.reason) for row in outcome.result] == [("0/1", "failure", "KeyError")]


def test_the_beginning_of_a_line_is_a_quotation_too():
    rows = [Row("0/0", "harmless"), Row("0/1", "A long secret that nobody is to read.\n\n Nor this one, ever, at all.")]
    assert without_text("KeyError: 'A long secret that nobody'...", rows) == "KeyError"
    assert without_text("KeyError: at Nor this one, ever, at all.", rows) == "KeyError"
    assert without_text("KeyError: at row 0/1", rows) == "KeyError: at row 0/1"


# What only actors survive


@pytest.fixture(scope="module")
def session():
    with ray_session():
        by_value()
        yield


def test_a_row_that_kills_its_worker_costs_itself_alone_however_few_may_be_replaced(session):
    resources = Resources(workers=2, cpus=0.5, max_replacements=1)
    outcomes = isolate([job(0), job(1, {5: "!die"})], "ray", resources)
    assert [outcomes[number].result for number in range(2)] == [ids(0), ids(1, 5)]


def test_a_row_that_hangs_is_found_by_the_deadline(session):
    resources = Resources(workers=2, cpus=0.5, max_attempts=1, job_timeout_s=3.0)
    outcomes = isolate([job(0), job(1, {0: "!hang"}, n_rows=2)], "ray", resources)
    assert [outcomes[number].result for number in range(2)] == [ids(0), ["1/1"]]
