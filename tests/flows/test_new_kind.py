"""A new run kind is one module and one row of the table: command, run file, flow, deployment, repair, campaign."""

import inspect
import subprocess
import sys

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from flows.campaign import run_campaign
from flows.repair import repair_of
from flows.serve import deployments
from tasks.config.campaign_run import CampaignRun
from tasks.config.kinds import RUN_KINDS, RunKind
from tasks.config.reading import read_run_file, recorded_run
from tasks.config.run_file import write_run_file
from tasks.rundir.status import run_status
from tasks.steps import PlainSteps

MODULE = '''
from typing import Literal

from pydantic import Field

from tasks.config.run_file import RunFile, write_run_file


class LettersRun(RunFile):
    """Count a letter in the names of models.

    Example: `neg letters --model banana --letter a`
    """

    kind: Literal["letters"] = "letters"
    letter: str = Field("e", description="Letter that is counted.")


def plan(run):
    return run.model


def count_steps(run, models):
    return len(models)


def work(run, steps):
    from flows.show.report import RunResults
    from tasks.stages.task import step_task

    @step_task("letters")
    def count(step, model):
        """Count the letter in a name."""
        (run.directory / f"{model}.txt").write_text(str(model.count(run.letter)))
        step.report(1, 1)

    write_run_file(run)
    for model in steps.planned(plan, run):
        steps.run(count, model, model)
    return RunResults(run.directory)


def compare(model, run, results):
    from tasks.campaign import Compared, LinearityRow

    count = int((run.directory / f"{model}.txt").read_text())
    return Compared(linearity=[LinearityRow(model, "names", 2.0, count, 1, 1.0, 1.0, None, None, None)])
'''
ROW = {
    "run_file": "letters:LettersRun",
    "plan": "letters:plan",
    "count_steps": "letters:count_steps",
    "work": "letters:work",
    "compare": "letters:compare",
}
COMMAND = f"""
from tasks.config.kinds import RUN_KINDS, RunKind
RUN_KINDS["letters"] = RunKind(**{ROW!r})
from flows.cli.app import main
main()
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "letters.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(RUN_KINDS, "letters", RunKind(**ROW))
    yield
    sys.modules.pop("letters", None)


@pytest.fixture
def neg(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
        path = ":".join(filter(None, [str(tmp_path), *sys.path]))
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path, "COLUMNS": "100"})

    return run


@pytest.fixture
def run(tmp_path):
    return read_run_file(
        RUN_KINDS["letters"].run_class, None, {"model": "banana", "letter": "a", "out": tmp_path / "run"}
    )


def test_the_command_has_the_fields_as_options_and_the_docstring_as_help(neg):
    assert "Count a letter in the names of models." in neg("--help").stdout
    shown = neg("letters", "--help").stdout
    assert "Example: neg letters --model banana --letter a" in shown
    assert "--letter" in shown and "Letter that is counted. [default: e]" in shown


def test_the_command_carries_it_out_and_its_directory_repeats_it(neg, tmp_path):
    plain = ["--orchestrator", "none", "--backend", "local"]
    ran = neg("letters", "--model", "banana", "--letter", "a", "--out", tmp_path / "run", *plain)
    assert ran.returncode == 0, ran.stderr
    assert f"written to {tmp_path / 'run'}" in ran.stdout
    assert (tmp_path / "run" / "banana.txt").read_text() == "3"
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["kind"] == "letters"
    again = neg("letters", tmp_path / "run", "--letter", "n", "--orchestrator", "none")
    assert (again.returncode, (tmp_path / "run" / "banana.txt").read_text()) == (0, "2")
    refused = neg("linearity", tmp_path / "run")
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: {tmp_path / 'run'} holds a letters run: use neg letters\n",
    )
    assert neg("status", tmp_path / "run").returncode == 0


def test_its_flow_is_served_from_its_run_file(run):
    (deployment,) = deployments([write_run_file(run)])
    assert (deployment.flow_name, deployment.entrypoint) == ("letters", "flows.prefect_flows.letters")
    flow = load_flow_from_entrypoint(deployment.entrypoint)
    assert inspect.signature(flow.fn).parameters["run"].annotation is RUN_KINDS["letters"].run_class
    assert flow.validate_parameters(deployment.parameters)["run"] == run
    assert flow.description == "Count a letter in the names of models."


def test_its_directory_is_told_of_and_repaired_by_carrying_it_out_again(run):
    repair = repair_of(run)
    assert repair.n_steps == 1
    repair.work(run, PlainSteps())
    assert recorded_run(run.directory) == run
    assert run_status(run.directory).folders == ()


def test_it_is_a_study_of_campaigns(tmp_path):
    values = {"model": ["banana", "cherry"], "stage": "letters", "letters": {"letter": "r"}, "out": tmp_path / "all"}
    campaign = read_run_file(CampaignRun, None, values | {"backend": "local"})
    results = run_campaign(campaign, PlainSteps())
    assert results.problems == []
    assert {row.model: row.n_prompts for row in results.comparison.linearity} == {"banana": 0, "cherry": 2}
    assert recorded_run(tmp_path / "all") == campaign
    assert recorded_run(tmp_path / "all" / "cherry" / "letters").letter == "r"
