"""Runs whose names and prompts are made to harm a page, and `neg view` that shows them."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support import NEG, neg, save_tiny_model, write_questions

EVIL = "<script>alert(1)</script>\"'&"
NAME = "<b>run & 'co'"
"""Name of a run directory: a name is text, too."""
_RUN = ("--probe", "magn", "--backend", "local", "--orchestrator", "none")


class Server(NamedTuple):
    """A running `neg view`."""

    process: subprocess.Popen[str]
    address: str
    token: str

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])


def hostile_runs(folder: Path) -> Path:
    """Make two finished runs below a folder, one with a hostile name, both with hostile prompts; return their place."""
    model = save_tiny_model("llama", folder / "tiny-llama", n_positions=1024)
    rows = [{"prompt": f"{i} {EVIL}\u202e Answer:", "labels": [" A", " B"], "answer": i % 2} for i in range(24)]
    (folder / "hostile.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("--dataset", write_questions(folder), "--dataset", folder / "hostile.jsonl")
    out = folder / "runs" / NAME
    assert neg("pipeline", "--model", model, *data, "--out", out, *_RUN).returncode == 0
    shutil.copytree(out, folder / "runs" / "copy")
    return folder / "runs"


@contextmanager
def serving(root: Path) -> Iterator[Server]:
    """Start `neg view` and wait for the address that it prints; it is ended behind the block."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        [NEG, "view", root], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        found = re.search(r"open (http://127\.0\.0\.1:\d+)/\?token=(\S+)", process.stdout.readline())
        assert found is not None
        yield Server(process, *found.groups())
    finally:
        process.kill()
        process.communicate()
