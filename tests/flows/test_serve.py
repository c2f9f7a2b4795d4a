"""What `neg serve` refuses, and what it would register; with a server it is tested in test_scheduled.py."""

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.serve import deployments, serve_runs
from negcore.errors import RunError


@pytest.fixture
def run_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": ["m"], "dataset": ["mini/fact"], "out": str(tmp_path / "run")}))
    return file


def test_a_run_file_is_deployed_with_its_schedule_one_run_at_a_time(run_file, tmp_path):
    (deployment,) = deployments([run_file], "pipeline", cron="0 2 * * *")
    assert (deployment.name, deployment.tags) == ("run", ["neg", "pipeline"])
    assert [one.schedule.cron for one in deployment.schedules] == ["0 2 * * *"]
    assert (deployment.concurrency_limit, deployment.concurrency_options.collision_strategy) == (1, "CANCEL_NEW")
    assert deployment.parameters["run"]["out"] == str(tmp_path / "run")


def test_serving_needs_a_standing_server():
    message = "PREFECT_API_URL is not set.*prefect server start --host 127.0.0.1"
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(RunError, match=message):
        serve_runs([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cron": "at night"}, "the schedule is 'at night', but must be five fields"),
        ({"flow_name": "linearity"}, "unknown field"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_registered(run_file, options, message):
    with pytest.raises(RunError, match=message):
        deployments([run_file], **{"flow_name": "pipeline"} | options)


def test_two_run_files_cannot_be_served_under_one_name(run_file):
    with pytest.raises(RunError, match="several run files would be served as 'run'"):
        deployments([run_file, run_file], "pipeline")
