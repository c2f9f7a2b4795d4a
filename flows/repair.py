"""Compute again what is damaged in a run directory: the run that made it, started once more, does just that."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from flows import linearity, skills
from flows.flow_run import run_session
from flows.pipeline import Results, extract_planned
from flows.show.report import RunResults
from flows.stages import Stages
from negcore.errors import RunError
from negcore.store.files import n_bytes
from tasks.config.run_file import RUN_FILE, LinearityRun, RunFile, SkillRun, SkillsRun
from tasks.plan import plan
from tasks.plan_linearity import plan_linearity
from tasks.rundir.layout import recorded_run
from tasks.rundir.verify import Verified
from tasks.skills import plan_skills


class Mending(NamedTuple):
    """How a run computes what is missing from its directory."""

    n_parts: int
    """What its progress is counted in."""
    work: Callable[..., RunResults]
    """Takes the run and its `Stages`."""


def mending_runs(verified: Sequence[Verified]) -> list[RunFile]:
    """The runs that compute again what is damaged, each in its own directory, wherever that is by now.

    Raises
    ------
    RunError
        If a directory has no run file, or one that fits no kind of run.
    """
    return [_run_of(root) for root in dict.fromkeys(one.folder.root for one in verified if one.recompute)]


def drivers_places(verified: Sequence[Verified]) -> list[Path]:
    """Run directories whose driver may be writing where something is wrong: of an evaluation, those above too."""
    roots = dict.fromkeys(one.folder.root for one in verified if one.faults)
    places = dict.fromkeys(place for root in roots for place in (*reversed(root.parents), root))
    return [place for place in places if place in roots or n_bytes(place / RUN_FILE) is not None]


def mending(run: RunFile) -> Mending:
    """How this run mends its directory.

    Raises
    ------
    NegError
        If the run cannot start: its models or datasets are gone.
    """
    match run:
        case SkillRun():  # of an evaluation too, and then some of its datasets may be unusable
            return Mending(sum(model.n_shards for model in plan(run, tolerant=True)), _extract)
        case LinearityRun():
            return Mending(sum(study.n_shards for study in plan_linearity(run)), linearity.run_linearity)
        case SkillsRun():
            return Mending(skills.n_parts(run, plan_skills(run)), skills.run_skills)
    raise RunError(f"{str(run.directory)!r}: its {RUN_FILE} is of a run that makes no shards in its own directory")


def _extract(run: SkillRun, stages: Stages) -> Results:
    results = Results(run.directory)
    with run_session(run):
        planned = [(run, plan(run, tolerant=True))]
        extract_planned(planned, stages, results, when_extracted=lambda run, dataset: None)
    return results


def _run_of(root: Path) -> RunFile:
    if n_bytes(root / RUN_FILE) is None:
        raise RunError(
            f"{str(root)!r} has no {RUN_FILE}, so what is damaged there cannot be computed again: run the command that "
            f"made it once more, with --out {root}"
        )
    return recorded_run(root, {"out": root})
