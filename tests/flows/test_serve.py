"""What `neg serve` refuses, and what it would register; with a server it is tested in test_scheduled.py."""

import asyncio
import re

import pytest
import yaml
from prefect.exceptions import MissingFlowError
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.serve import deployments, described, serve_runs
from negcore.errors import RunError
from tasks.config.linearity_run import LinearityRun
from tasks.config.run_file import write_run_file

EARLIER_HOMES = dict.fromkeys(["pipeline", "extract", "probe", "mceval8k"], "flows.pipeline") | {
    name: f"flows.{name}" for name in ("linearity", "skills", "campaign")
}


@pytest.fixture
def run_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({"kind": "pipeline", "model": ["m"], "dataset": ["mini/fact"], "out": str(tmp_path / "run")})
    )
    return file


def test_a_run_file_is_deployed_with_its_schedule_and_no_limit_that_needs_the_server(run_file, tmp_path):
    (deployment,) = deployments([run_file], "pipeline", cron="0 2 * * *")
    assert (deployment.name, deployment.tags) == ("run", ["neg", "pipeline"])
    assert [one.schedule.cron for one in deployment.schedules] == ["0 2 * * *"]
    assert deployment.concurrency_limit is None
    assert deployment.parameters["run"]["out"] == str(tmp_path / "run")
    assert deployment.entrypoint == "flows.prefect_flows.pipeline"


def test_without_a_flow_every_run_file_is_served_as_its_kind(run_file, tmp_path):
    other = write_run_file(LinearityRun(model=("m",), out=tmp_path / "other"))
    assert [one.flow_name for one in deployments([run_file, other])] == ["pipeline", "linearity"]
    (extraction,) = deployments([run_file], "extract")
    assert extraction.entrypoint == "flows.prefect_flows.extract"


@pytest.mark.parametrize(("name", "module"), EARLIER_HOMES.items())
def test_deployments_of_earlier_versions_find_the_same_flows(name, module):
    flow = load_flow_from_entrypoint(f"flows.prefect_flows.{name}")
    assert flow.name == name
    assert load_flow_from_entrypoint(f"{module}.{name}") is flow


def test_what_is_served_is_told_with_its_directory_and_the_next_run(run_file, tmp_path):
    (yearly,) = deployments([run_file], cron="30 2 1 1 *")
    assert re.fullmatch(
        rf"serving pipeline/run in {tmp_path / 'run'}: next run \d{{4}}-01-01 02:30 UTC", asyncio.run(described(yearly))
    )
    (asked,) = deployments([run_file])
    assert asyncio.run(described(asked)).endswith(
        ": on request: in the Prefect UI, or with prefect deployment run 'pipeline/run'"
    )


def test_a_flow_of_no_run_kind_is_an_error():
    with pytest.raises(MissingFlowError, match="'prob' not found"):
        load_flow_from_entrypoint("flows.prefect_flows.prob")


def test_serving_needs_a_standing_server():
    message = "PREFECT_API_URL is not set.*prefect server start --host 127.0.0.1"
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(RunError, match=message):
        serve_runs([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cron": "at night"}, "the schedule is 'at night', but must be five fields"),
        ({"flow_name": "linearity"}, "holds a pipeline run: use neg pipeline"),
        ({"flow_name": "linearty"}, "flow is 'linearty', but must be one of pipeline, extract, probe, mceval8k"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_registered(run_file, options, message):
    with pytest.raises(RunError, match=message):
        deployments([run_file], **{"flow_name": "pipeline"} | options)


def test_two_run_files_cannot_be_served_under_one_name(run_file):
    with pytest.raises(RunError, match="several run files would be served as 'run'"):
        deployments([run_file, run_file], "pipeline")
