import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import psutil
import pyarrow as pa
import pytest
from support import NEG, REPOSITORY, save_tiny_model

from flows.cli.app import main
from tasks.rundir.tables import write_arrow


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


@pytest.mark.slow
def test_a_lost_terminal_ends_a_run_with_nothing_left_behind(model, tmp_path):
    run = start(model, tmp_path)
    run.send_signal(signal.SIGHUP)
    assert run.wait(120) == 130
    assert not list((tmp_path / "t").iterdir())


@pytest.mark.slow
def test_a_run_that_ignores_a_lost_terminal_goes_on(model, tmp_path):
    run = start(model, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    run.send_signal(signal.SIGHUP)
    assert run.wait(300) == 0


PLANNED = ("--dataset", "mini/nli", "--orchestrator", "none")
PHASES = {
    "a model is looked for": ("models", "nobody/nothing"),
    "a plan is made": ("plan", "--model", "nobody/nothing", *PLANNED[:2]),
    "a run is planned": ("pipeline", "--model", "nobody/nothing", *PLANNED),
    "a server is looked for": ("serve", "RUN"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_lost_terminal_ends_a_command_like_ctrl_c_while(tmp_path, phase):
    file = tmp_path / "run.yaml"
    file.write_text(f"kind: pipeline\nmodel: [m]\ndataset: [mini/nli]\nout: {tmp_path / 'run'}\n")
    (tmp_path / "t").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "HF_"))}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub"), "PREFECT_API_URL": f"{url}/api"}
        environment |= {"TMPDIR": str(tmp_path / "t"), "PYTHONPATH": str(REPOSITORY)}
        arguments = [str(file) if one == "RUN" else one for one in PHASES[phase]]
        command = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments], env=environment, stderr=subprocess.PIPE, cwd=tmp_path
        )
        silent.settimeout(120)
        connection, _ = silent.accept()  # it waits for an answer now
        time.sleep(0.5)
        command.send_signal(signal.SIGHUP)
        _, said = command.communicate(timeout=60)
        connection.close()
    assert command.returncode == 130, said
    assert b"Traceback" not in said
    assert not list((tmp_path / "t").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_query_that_computes_for_hours_is_stopped_at_once(tmp_path, number):
    write_arrow(tmp_path / "accuracy.arrow", pa.table({"n": [1]}))
    sql = "select count(*) from range(10000000000) a, range(100000) b where a.range + b.range = 7"
    as_in_a_terminal = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs tests side by side ignores it
    command = subprocess.Popen(
        [NEG, "sql", tmp_path, sql], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=as_in_a_terminal
    )
    deadline = time.monotonic() + 300
    while sum(psutil.Process(command.pid).cpu_times()[:2]) < 6:  # what it takes to start is behind it
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    command.send_signal(number)
    assert command.communicate(timeout=30) == (b"", b"stopped\n")
    assert command.returncode == 130


def test_ctrl_c_ends_every_command_with_a_line_and_no_traceback(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("negcore.datasets.list_datasets", interrupted)
    monkeypatch.setattr(sys, "argv", ["neg", "datasets"])
    monkeypatch.setattr("flows.cli.app.signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped\n"
