import os
import signal
import subprocess
import sys
import time

import pytest
from support import REPOSITORY, save_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama", n_positions=4096)


def start(model, tmp_path, **options):
    """Start a run on a Ray of its own, and wait until its first shard is written."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    command = [sys.executable, "-m", "flows.cli", "pipeline", "--model", str(model), "--dataset", "mini/nli"]
    command += ["--shard-rows", "1", "--orchestrator", "none", "--workers", "1", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True, **options)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run").rglob("_receipts/*.json")) and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return run


def test_a_lost_terminal_ends_a_run_with_nothing_left_behind(model, tmp_path):
    run = start(model, tmp_path)
    run.send_signal(signal.SIGHUP)
    assert run.wait(120) == 130
    assert not list((tmp_path / "t").iterdir())


def test_a_run_that_ignores_a_lost_terminal_goes_on(model, tmp_path):
    run = start(model, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    run.send_signal(signal.SIGHUP)
    assert run.wait(300) == 0
