"""Compute again what is damaged in a run directory: the run that made it, started once more, does just that."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flows.extraction import extract_planned, fitted_to
from flows.flow_run import run_session
from flows.pipeline import Results
from flows.show.report import RunResults
from negcore.errors import RunError
from negcore.store.files import n_bytes
from tasks.config.dataset_runs import SkillRun
from tasks.config.kinds import RUN_KINDS, count_shards, load
from tasks.config.reading import recorded_run
from tasks.config.run_file import RUN_FILE, RunFile
from tasks.plan import plan_usable
from tasks.rundir.manifest import begin, finish, shards_of
from tasks.rundir.verify import Verified
from tasks.steps import Steps, plan_ahead


class Repair(NamedTuple):
    """The way a run computes what is missing from its directory."""

    n_steps: int
    """Steps that the progress bar counts."""
    work: Callable[[Any, Steps], RunResults]


def runs_to_repair(verified: Sequence[Verified]) -> list[RunFile]:
    """Return the runs that compute again what is damaged, each in its own directory, wherever that is by now.

    Raises
    ------
    RunError
        If a directory has no run file, or one that fits no kind of run.
    """
    return [_run_of(root) for root in dict.fromkeys(one.folder.root for one in verified if one.recompute)]


def drivers_places(verified: Sequence[Verified]) -> list[Path]:
    """Return the run directories whose driver may be writing where something is wrong, and those above them."""
    roots = dict.fromkeys(one.folder.root for one in verified if one.faults)
    places = dict.fromkeys(place for root in roots for place in (*reversed(root.parents), root))
    return [place for place in places if place in roots or n_bytes(place / RUN_FILE) is not None]


def repair_of(run: RunFile) -> Repair:
    """Return how a run repairs its directory.

    Raises
    ------
    NegError
        If the run cannot start: its models or datasets are gone.
    """
    kind = RUN_KINDS[run.kind]
    repair: Repair = load(kind.repair)(run) if kind.repair else Repair(kind.n_steps(run), load(kind.work))
    return repair


def repair_extraction(run: SkillRun) -> Repair:
    """Return the extraction of a run on datasets, which may belong to an evaluation and lack unusable datasets."""
    return Repair(count_shards(run, plan_ahead(plan_usable, run)), _extract)


def refuse_repair(run: RunFile) -> Repair:
    """Refuse a run whose shards are made by the runs below it.

    Raises
    ------
    RunError
    """
    raise RunError(f"{str(run.directory)!r}: its {RUN_FILE} is of a run that makes no shards in its own directory")


def _extract(run: SkillRun, steps: Steps) -> Results:
    results = Results(run.directory)
    before = begin(run.directory)
    with run_session(run):
        models = steps.planned(plan_usable, run)
        run = fitted_to(run, [(run, models)], steps, results)
        extract_planned([(run, models)], steps, results, when_extracted=lambda run, dataset: None)
    if before.manifest and not results.problems:  # a run that was not finished is not so now
        finish(run.directory, before, shards_of(run.directory))
    return results


def _run_of(root: Path) -> RunFile:
    if n_bytes(root / RUN_FILE) is None:
        raise RunError(
            f"{str(root)!r} has no {RUN_FILE}, so what is damaged there cannot be computed again: run the command that "
            f"made it once more, with --out {root}"
        )
    return recorded_run(root, {"out": root})
