"""Servers that say nothing, or nonsense: told in one line, and soon."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from negcore.errors import NegError, RunError
from negcore.store import buckets
from negcore.store.files import find, is_dir, location, read_bytes

LONGEST_S = 60
HEAD = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n{}"
LISTING = '<?xml version="1.0"?><ListBucketResult><Name>b</Name><Contents><Key>x/a.json</Key><Size>{}</Size>'
ANSWERS = {
    "a page": HEAD.format("text/html", 30, "<html><body>Welcome</body></html>"[:30]),
    "nothing": "",
    "no HTTP": "220 mail.example.org ESMTP\r\n",
    "another form": HEAD.format("application/xml", 12, "<a><b></a></b>"[:12]),
    "another listing": HEAD.format("application/xml", 5, "<a/>\n"),
    "a cut listing": HEAD.format("application/xml", 5000, LISTING.format(5)),
    "an unknown number": HEAD.format("application/xml", len(LISTING.format("many")), LISTING.format("many")),
    "a failure": "HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\nContent-Length: 5\r\n\r\noops\n",
    "another failure": "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
}


@contextlib.contextmanager
def serving(answer: str | None) -> Iterator[str]:
    """Serve the same answer to everyone, on a free port; None takes connections and says nothing."""
    listening = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                taken.append(connection)
                if answer is not None:
                    threading.Thread(target=tell, args=(connection,), daemon=True).start()

    def tell(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            request = connection.recv(65536).partition(b" ")[0]
            said = answer.encode()
            connection.sendall(said.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if request == b"HEAD" and said else said)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()
        for connection in taken:
            connection.close()


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A function that makes a server the endpoint of all buckets, and returns a path in one."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

    monkeypatch.setitem(buckets.PATIENCE, "retries", {"max_attempts": 0})

    def at(url: str):
        from s3fs import S3FileSystem

        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        S3FileSystem.clear_instance_cache()
        monkeypatch.setattr(S3FileSystem, "retries", 1)
        return location("s3://b/x")

    return at


def test_a_silent_endpoint_is_told(endpoint, monkeypatch):
    assert buckets._ANSWER_S < LONGEST_S
    monkeypatch.setattr(buckets, "_ANSWER_S", 0.5)
    with serving(None) as url:
        began = time.monotonic()
        with pytest.raises(RunError, match=f"^{url} does not answer within 0.5 s: check the AWS .*endpoint") as error:
            is_dir(endpoint(url))
        assert time.monotonic() - began < 10
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ask", [is_dir, lambda path: find(path, "*.json"), read_bytes])
@pytest.mark.parametrize("kind", ANSWERS)
def test_a_malformed_answer_is_one_line_or_no_such_object(endpoint, kind, ask):
    with serving(ANSWERS[kind]) as url:
        path = endpoint(url)
        try:
            ask(path)
        except NegError as error:
            assert "\n" not in str(error) and "s3://b/x" in str(error)
            assert len(str(error)) < 600
        except FileNotFoundError:
            pass


def test_a_silent_prefect_server_is_told(monkeypatch, tmp_path):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks import server

    assert 2 * server._ANSWER_S <= LONGEST_S
    monkeypatch.setattr(server, "_ANSWER_S", 0.5)
    with serving(None) as url, temporary_settings({PREFECT_API_URL: f"{url}/api"}):
        began = time.monotonic()
        told = pytest.raises(RunError, match="nothing healthy answers|does not answer")
        with told as error, server.prefect_api(tmp_path) as api:
            api.wait_ready()
        assert time.monotonic() - began < 20
    assert "\n" not in str(error.value)


def test_a_silent_hub_is_told(monkeypatch):
    import huggingface_hub.constants

    from negcore import hub

    assert hub._ANSWER_S < LONGEST_S
    monkeypatch.setattr(hub, "_ANSWER_S", 0.5)
    with serving(None) as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        began = time.monotonic()
        with pytest.raises(NegError, match="cannot be reached|is not in the cache") as error:
            hub.commit_of("nobody/nothing")
        assert time.monotonic() - began < 20
    assert "\n" not in str(error.value)
