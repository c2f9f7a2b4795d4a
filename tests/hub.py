"""A small server that speaks the Hugging Face hub's protocol on loopback, for the real client.

It serves folders as repositories: `models/ORGANISATION/NAME` and `datasets/ORGANISATION/NAME`, all at one commit. A
folder `NAME@REVISION` beside one is another revision of it, at a commit of its own. Its faults are those of the real
hub: gated repositories, missing ones, too many requests, connections that are cut. What is uploaded
becomes files of its folders.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

COMMIT = "c" * 40

_REQUEST = re.compile(
    r"/(?:(api)/)?(?:(models|datasets)/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?"
)


@dataclass
class Hub:
    """Folders behind the server, the faults to show and the requests that were made."""

    root: Path
    gated: set[str] = field(default_factory=set)
    """Repositories that ask for a token, such as `models/org/name`."""
    cut: dict[str, int] = field(default_factory=dict)
    """Files, such as `models/org/name/model.safetensors`, whose connection is cut in the middle that many times."""
    busy: dict[str, int] = field(default_factory=dict)
    """Repositories that answer "too many requests" that many times."""
    failing: dict[str, int] = field(default_factory=dict)
    """Repositories that answer "service unavailable" that many times."""
    unknown_token: set[str] = field(default_factory=set)
    """Repositories for which the token that is sent is not known."""
    read_only: set[str] = field(default_factory=set)
    """Repositories that nobody may write to."""
    requests: list[str] = field(default_factory=list)
    """Method, path and range of every request, in order."""
    endpoint: str = ""


def commit_id(revision: str) -> str:
    """The commit of a revision that has a folder of its own."""
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Serve the repositories in a folder on a free loopback port."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    commit = COMMIT

    def __init__(self, hub: Hub, *args) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """Take what is uploaded: a new repository, the question how to send files, and a commit."""
        self.hub.requests.append(f"{self.command} {self.path}")
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        if self.path == "/api/repos/create":
            about = json.loads(sent)
            name = f"{about['organization']}/{about['name']}" if about.get("organization") else about["name"]
            if self._may_write(f"datasets/{name}"):
                (self.hub.root / "datasets" / name).mkdir(parents=True, exist_ok=True)
                self._json({"url": f"{self.hub.endpoint}/datasets/{name}", "name": name})
            return
        kind, organisation, name, verb, _ = self.path.removeprefix("/api/").split("/")
        repository = f"{kind}/{organisation}/{name}"
        if not self._may_write(repository):
            return
        if verb == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(sent)["files"]]
            self._json({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
            return
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                target = self.hub.root / repository / line["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
        self._json(
            {"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

    def _may_write(self, repository: str) -> bool:
        if repository in self.hub.read_only or "Authorization" not in self.headers:
            self._error(403, "", "you may not write here")
            return False
        return True

    def _answer(self) -> None:
        self.hub.requests.append(" ".join([self.command, self.path, self.headers.get("Range", "")]).strip())
        match = _REQUEST.fullmatch(unquote(self.path.split("?")[0]))
        if match is None:
            self._error(404, "", "no such page")
            return
        api, kind, name, verb, revision, path = match.groups()
        repository = f"{kind or 'models'}/{name}"
        folder = self.hub.root / repository
        if self.hub.busy.get(repository, 0) > 0:
            self.hub.busy[repository] -= 1
            self._error(429, "", "We had to rate limit you", {"Retry-After": "0"})
            return
        if self.hub.failing.get(repository, 0) > 0:
            self.hub.failing[repository] -= 1
            self._error(503, "", "Service unavailable")
            return
        if repository in self.hub.unknown_token:
            self._error(401, "", "Invalid credentials in Authorization header")
            return
        if not folder.is_dir():
            # The hub does not tell strangers whether a repository exists.
            self._error(401, "RepoNotFound", "Repository not found")
            return
        if repository in self.hub.gated and (not api or verb == "tree"):
            self._error(401, "GatedRepo", f"Access to {repository} is restricted. You must be authenticated")
            return
        states = {"main": (COMMIT, folder), COMMIT: (COMMIT, folder)}
        for other in folder.parent.glob(f"{folder.name}@*"):
            state = commit_id(other.name.partition("@")[2]), other
            states |= {state[0]: state, other.name.partition("@")[2]: state}
        if (revision or "main") not in states:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        self.commit, folder = states[revision or "main"]
        if not api:
            self._file(repository, folder, path or "")
            return
        self._json(_tree(folder) if verb == "tree" else _info(name, folder, self.commit))

    def _file(self, repository: str, folder: Path, path: str) -> None:
        file = folder / path
        if not file.is_file():
            self._error(404, "EntryNotFound", "Entry not found")
            return
        content = file.read_bytes()
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(wanted[1])
            content = content[start : int(wanted[2]) + 1 if wanted[2] else None]
        self.send_response(206 if wanted else 200)
        self._headers(len(content))
        self.send_header("ETag", f'"{_git_id(file)}"')
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{file.stat().st_size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        place = f"{repository}/{path}"
        if self.hub.cut.get(place, 0) > 0:
            self.hub.cut[place] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(content)

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self._headers(len(content))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        content = json.dumps({"error": message}).encode()
        self.send_response(status)
        self._headers(len(content))
        for name, value in {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _headers(self, n_bytes: int) -> None:
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(n_bytes))


def _info(name: str, folder: Path, commit: str) -> dict[str, object]:
    files = [{"rfilename": entry["path"]} for entry in _tree(folder)]
    return {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": files}


def _tree(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": file.relative_to(folder).as_posix(),
            "size": file.stat().st_size,
            "oid": _git_id(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]


def _git_id(file: Path) -> str:
    """The name that git has for a file, and the hub for one that is not large."""
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
