"""The checks of the hub, Prefect and Ray against servers on this machine: real ones, dead ones, silent ones."""

import os
import socket
import time
from pathlib import Path

import pytest
from clusters import ray_cluster
from hub import serving as serving_hub
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_API_URL,
    PREFECT_CLOUD_API_URL,
    temporary_settings,
)
from prefect_servers import PrefectServer
from test_silent_servers import ANSWERS, serving

from tasks.doctor import servers


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in os.environ:
        if name.lower().endswith("_proxy") or name.startswith(("RAY_", "HF_")):
            monkeypatch.delenv(name)


def dead_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def told(check):
    """Make a check; return its judgement, and all it says in one line."""
    began = time.monotonic()
    (finding,) = check()
    assert time.monotonic() - began < 30
    assert "\n" not in finding.found + finding.advice
    return finding.judgement, f"{finding.found}; {finding.advice}"


def bad(check):
    judgement, said = told(check)
    assert judgement == "bad", said
    return said


# Prefect


def of_prefect(url=None, password=None, key=None):
    settings = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: password, PREFECT_API_KEY: key}
    with temporary_settings({name: value for name, value in settings.items() if value is not None}):
        return told(servers.check_prefect)


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory):
    with PrefectServer(tmp_path_factory.mktemp("prefect")) as server:
        yield server


def test_without_an_address_every_run_starts_a_private_server():
    assert of_prefect() == ("good", "no server is configured: every run starts a private one, and ends it; ")


@pytest.mark.slow
def test_a_server_that_takes_the_password_is_good(prefect_server):
    judgement, said = of_prefect(prefect_server.url, prefect_server.auth)
    assert judgement == "good" and said.startswith(f"{prefect_server.url} answers, 3.")
    assert "without a password" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("secret", "says"),
    [
        ({}, "asks for a password, and none is set here; set PREFECT_API_AUTH_STRING (user:password)"),
        ({"password": "test:wrong"}, "does not take the password or key that is set here; set PREFECT_API_AUTH_STRING"),
        ({"key": "pnu_wrong"}, "does not take the password or key that is set here; set PREFECT_API_KEY"),
    ],
    ids=["absent", "wrong password", "wrong key"],
)
def test_a_wrong_password_and_none_are_told_apart(prefect_server, secret, says):
    judgement, said = of_prefect(prefect_server.url, **secret)
    assert judgement == "bad" and says in said
    assert not set(secret.values()) & set(said.split())


@pytest.mark.slow
def test_an_address_without_its_end_is_told(prefect_server):
    judgement, said = of_prefect(prefect_server.url.removesuffix("/api"), prefect_server.auth)
    assert judgement == "bad" and said.endswith("no Prefect API is there; the address ends in /api")


@pytest.mark.slow
def test_another_version_of_the_server_is_worth_a_look(prefect_server, monkeypatch):
    monkeypatch.setattr(servers, "version", lambda package: "3.0.0")
    judgement, said = of_prefect(prefect_server.url, prefect_server.auth)
    assert judgement == "look" and "and here is 3.0.0; use one version of both" in said


@pytest.mark.parametrize(("status", "judgement"), [("200 OK", "good"), ("401 Unauthorized", "bad")])
def test_prefect_cloud_is_asked_in_its_own_way(status, judgement):
    answer = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 1\r\n\r\n3"
    with serving(answer) as url, temporary_settings({PREFECT_CLOUD_API_URL: url}):
        told = of_prefect(f"{url}/accounts/a/workspaces/w", key="pnu_key")
    assert told[0] == judgement and "pnu_key" not in told[1]


def test_an_address_without_a_server_is_told():
    url = f"http://127.0.0.1:{dead_port()}/api"
    judgement, said = of_prefect(url)
    assert judgement == "bad" and said.startswith(f"{url} cannot be reached (") and "unset PREFECT_API_URL" in said


def test_a_silent_server_is_told_soon(monkeypatch):
    monkeypatch.setattr(servers, "ANSWER_S", 0.3)
    with serving(None) as url:
        judgement, said = of_prefect(f"{url}/api")
    assert judgement == "bad" and "takes the connection, but says nothing within 0.3 s" in said


@pytest.mark.parametrize("kind", ANSWERS)
def test_another_kind_of_server_is_told(kind):
    with serving(ANSWERS[kind]) as url:
        judgement, said = of_prefect(f"{url}/api")
    assert judgement == "bad", said


# Ray


@pytest.fixture(scope="module")
def head():
    """A Ray head that asks for a token, as a pair of its address and its token's file."""
    with ray_cluster(0) as cluster:
        yield cluster.address, Path(os.environ["RAY_AUTH_TOKEN_PATH"])


def test_without_an_address_every_run_starts_a_private_ray():
    assert told(servers.check_ray)[0] == "good"


@pytest.mark.slow
def test_a_head_that_takes_the_token_is_good(head, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", head[0])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head[1]))
    judgement, said = told(servers.check_ray)
    assert judgement == "good" and "Ray 2." in said and head[1].read_text() not in said


@pytest.mark.slow
def test_missing_and_wrong_tokens_are_told_apart(head, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", head[0])
    assert "asks for a token, and RAY_AUTH_MODE is not 'token' here" in bad(servers.check_ray)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "but there is no token here" in bad(servers.check_ray)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    said = bad(servers.check_ray)
    assert "does not take the token that is set here" in said and "f" * 64 not in said


@pytest.mark.slow
def test_another_version_of_ray_is_told(head, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", head[0])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head[1]))
    monkeypatch.setattr(servers, "version", lambda package: "2.1.0")
    assert "and here is 2.1.0; install the same version on both" in bad(servers.check_ray)


def test_a_head_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{dead_port()}")
    assert "no Ray cluster answers" in bad(servers.check_ray)


def test_an_address_of_another_form_is_told(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert "it must be host:port, 'auto' or 'local'" in bad(servers.check_ray)


def test_no_cluster_of_this_machine_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "no cluster was started on this machine" in bad(servers.check_ray)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{dead_port()}\n")
    assert "no Ray cluster answers" in bad(servers.check_ray)


@pytest.mark.parametrize("answer", [None, ANSWERS["a page"], ANSWERS["no HTTP"]], ids=["silent", "a page", "no HTTP"])
def test_something_else_at_the_address_of_the_head_is_told(answer, monkeypatch):
    monkeypatch.setattr(servers, "ANSWER_S", 0.5)
    with serving(answer) as url:
        monkeypatch.setenv("RAY_ADDRESS", url.removeprefix("http://"))
        assert "takes connections, but " in bad(servers.check_ray)


# The hub


@pytest.fixture
def at(monkeypatch):
    """A function that makes an address the hub's, with or without a token."""
    import huggingface_hub
    from huggingface_hub import constants

    def make(url, token=None, offline=False):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        return told(servers.check_hub)

    return make


def test_offline_nothing_is_asked(at):
    judgement, said = at("http://127.0.0.1:1", offline=True)
    assert judgement == "good" and "HF_HUB_OFFLINE is set" in said


def test_a_hub_that_answers_is_good(at, tmp_path):
    with serving_hub(tmp_path) as hub:
        assert at(hub.endpoint) == ("good", f"{hub.endpoint} answers; ")


UNAUTHORIZED = "HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"


def test_a_token_that_the_hub_does_not_know_is_told(at):
    with serving(UNAUTHORIZED) as url:
        assert at(url)[0] == "good"
        judgement, said = at(url, token="hf_wrong")
    assert judgement == "bad" and "does not know your token; hf auth login" in said and "hf_wrong" not in said


def test_without_a_hub_one_can_work_with_what_is_here(at):
    judgement, said = at(f"http://127.0.0.1:{dead_port()}")
    assert judgement == "look" and "only models that are here can be used" in said


def test_a_silent_hub_is_told_soon(at, monkeypatch):
    monkeypatch.setattr(servers, "ANSWER_S", 0.3)
    with serving(None) as url:
        judgement, said = at(url)
    assert judgement == "look" and "says nothing within 0.3 s" in said


def test_a_dead_proxy_is_named_without_its_password(at, monkeypatch):
    port = dead_port()
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
    judgement, said = at("http://hub.example")
    assert judgement == "look" and f"(through the proxy 127.0.0.1:{port})" in said and "secret" not in said


def test_a_proxy_that_wants_a_password_is_told(at, monkeypatch):
    with serving("HTTP/1.1 407 Proxy Authentication Required\r\nConnection: close\r\nContent-Length: 0\r\n\r\n") as url:
        monkeypatch.setenv("http_proxy", url)
        judgement, said = at("http://hub.example")
    assert judgement == "look" and "answers 407" in said
