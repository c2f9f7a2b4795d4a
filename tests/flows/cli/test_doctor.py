"""`neg doctor` as a user meets it: lines, JSON, the exit code, and how soon it answers."""

import json
import time

import pytest
from support import neg, save_tiny_model
from test_silent_servers import serving


def test_a_silent_prefect_and_a_dead_ray_are_bad_and_told_soon():
    began = time.monotonic()
    with serving(None) as url:
        told = neg("doctor", PREFECT_API_URL=f"{url}/api", RAY_ADDRESS="127.0.0.1:1")
    assert time.monotonic() - began < 120
    assert told.returncode == 1, told.stderr
    assert f"bad  Prefect: {url}/api takes the connection, but says nothing within 3 s" in told.stdout
    assert "bad  Ray: no Ray cluster answers at '127.0.0.1:1'" in told.stdout
    assert told.stdout.splitlines()[-1].endswith("2 bad")


@pytest.mark.slow
def test_a_model_is_examined_and_json_has_every_finding(tmp_path):
    model = save_tiny_model("llama", tmp_path / "tiny", n_positions=4096)
    told = neg("doctor", model, "--json", PREFECT_API_URL="http://[::1/api")
    findings = {one["what"]: one for one in json.loads(told.stdout)}
    assert {"packages", "device", "hub", "tokenizer", "BOS", "batch and padding"} <= findings.keys()
    assert findings["hub"]["found"].startswith("HF_HUB_OFFLINE is set")
    assert findings["float32 against float64"]["judgement"] == "good"
    assert findings["Prefect"]["judgement"] == "bad" and "cannot be read" in findings["Prefect"]["found"]
    assert told.returncode == 1


def test_a_model_that_is_not_there_is_a_finding():
    told = neg("doctor", "no/such/model")
    assert (told.returncode, told.stderr) == (1, "")
    assert "good  Prefect: " in told.stdout and "bad  model: model 'no/such/model': " in told.stdout
