"""The real hub client against a server on loopback: models, datasets and facts, online, offline and cut off."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from hub import COMMIT, serving
from support import REPOSITORY, save_tiny_model

# Loads everything it is told to, one line of JSON each; the client reads its environment only when it is imported.
CHILD = """
import hashlib, json, logging, sys
from support import tiny_tokenizer
from negcore.datasets import PromptSettings, load_dataset, load_facts
from negcore.errors import NegError
from negcore.hub import commit_of, file_of
from negcore.measure.loading import load_model
from negcore.model.language_model import describe_model

logging.basicConfig(format="%(name)s: %(message)s")
LOADERS = {
    "card": lambda name: describe_model(name).revision,
    "model": lambda name: [load_model(name).revision, load_model(name).card.ref],
    "dataset": lambda name: load_dataset(name, tiny_tokenizer(), settings=PromptSettings()).fingerprint,
    "facts": lambda name: load_facts(name, tiny_tokenizer()).fingerprint,
    "sha1": lambda name: hashlib.sha1(file_of(name, "large", commit_of(name), kind="model").read_bytes()).hexdigest(),
}
for what, name in json.loads(sys.argv[1]):
    try:
        print(json.dumps(LOADERS[what](name)))
    except NegError as error:
        print(json.dumps({type(error).__name__: str(error)}))
"""
MODELS = ("good", "gated", "busy", "full", "cut", "broken", "bare", "half", "shaky", "down", "token")
FACTS = "hf://datasets/org/facts/facts.jsonl"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for name in MODELS:
        save_tiny_model("llama", root / "models/org" / name)
    (root / "models/org/bare/config.json").unlink()
    # Larger than the pieces that the client writes, so that there is something to go on from.
    (root / "models/org/large").mkdir()
    (root / "models/org/large/large").write_bytes(bytes(range(256)) * 2**17)
    folder = root / "datasets/iszhaoxin/MCEval8K/classification/agnews"
    folder.mkdir(parents=True)
    for split, n_rows in (("train", 20), ("valid", 8), ("test", 8)):
        rows = [{"text": f"story {split} {number}", "label": number % 4} for number in range(n_rows)]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    facts = [{"uuid": f"u{n}", "prompt": f"Answer {n}:", "tpl": "t", "answer": "ABCDE"[n % 5]} for n in range(10)]
    (root / "datasets/org/facts").mkdir(parents=True)
    (root / "datasets/org/facts/facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


class Loaded(dict):
    """Results by (what, name), and what was printed besides."""

    notes = ""


def load(wanted, endpoint, cache, **environment):
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "NEG_"))}
    command = [sys.executable, "-c", CHILD, json.dumps(wanted)]
    done = subprocess.run(command, env=inherited | variables | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = Loaded(zip(wanted, map(json.loads, done.stdout.splitlines()), strict=True))
    loaded.notes = done.stderr
    return loaded


@pytest.fixture(scope="module")
def online(repositories, cache):
    wanted = [("model", f"org/{name}") for name in MODELS if name != "half"]
    wanted += [
        ("sha1", "org/large"),
        ("model", "org/good@nope"),
        ("model", f"org/good@{COMMIT}"),
        ("model", "org/missing"),
    ]
    wanted += [("card", "org/half"), ("dataset", "mceval8k/agnews"), ("dataset", "mceval8k/fever"), ("facts", FACTS)]
    wanted += [("facts", FACTS.replace("facts.jsonl", "none.jsonl")), ("facts", FACTS.replace("org/", "nobody/"))]
    with serving(repositories) as hub:
        hub.gated.add("models/org/gated")
        hub.busy |= {"models/org/busy": 2, "models/org/full": 10**6}
        hub.failing |= {"models/org/shaky": 2, "models/org/down": 10**6}
        hub.unknown_token.add("models/org/token")
        hub.cut |= {"models/org/cut/model.safetensors": 1, "models/org/broken/model.safetensors": 10**6}
        hub.cut["models/org/large/large"] = 2
        loaded = load(wanted, hub.endpoint, cache)
        loaded.requests, loaded.endpoint = list(hub.requests), hub.endpoint
    return loaded


@pytest.fixture(scope="module")
def offline(online, cache):
    wanted = [("model", "org/good"), ("model", "org/half"), ("model", "org/missing")]
    wanted += [("dataset", "mceval8k/agnews"), ("dataset", "mceval8k/fever"), ("facts", FACTS)]
    return load(wanted, online.endpoint, cache, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def cut_off(online, cache):
    """The server is gone; the cache is there."""
    wanted = [("model", "org/good"), ("model", "org/missing"), ("dataset", "mceval8k/agnews")]
    wanted += [("dataset", "mceval8k/fever"), ("facts", FACTS)]
    return load(wanted, online.endpoint, cache)


@pytest.mark.parametrize("ref", ["org/good", f"org/good@{COMMIT}"])
def test_a_model_is_recorded_under_the_commit_that_its_files_came_from(online, ref):
    assert online["model", ref] == [COMMIT, f"org/good@{COMMIT}"]


def test_every_file_is_asked_for_by_the_commit_not_by_the_branch(online):
    asked = [request for request in online.requests if "/resolve/" in request]
    assert asked and all(f"/resolve/{COMMIT}/" in request for request in asked)


@pytest.mark.parametrize("name", ["busy", "shaky"])
def test_a_hub_that_is_busy_or_fails_for_a_moment_is_waited_for(online, name):
    assert online["model", f"org/{name}"][0] == COMMIT


def test_a_download_that_is_cut_is_tried_again(online):
    assert online["model", "org/cut"][0] == COMMIT


def test_a_large_download_that_is_cut_goes_on_where_it_stopped(online):
    assert online["sha1", "org/large"] == hashlib.sha1(bytes(range(256)) * 2**17).hexdigest()
    assert any("/large" in request and "bytes=" in request for request in online.requests)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/gated", "model 'org/gated' is gated: ask for access at http.*/org/gated and log in with `hf auth login`"),
        ("org/missing", "there is no model 'org/missing' at http.*; if it is private, log in"),
        ("org/good@nope", "model 'org/good' has no revision 'nope'; its revisions are listed at http"),
        ("org/full", "refuses model 'org/full': too many requests; wait some minutes, or log in"),
        (
            "org/down",
            "cannot be reached .Server error '503 Service Unavailable'., and model 'org/down' is not in the cache",
        ),
        ("org/token", "http.* does not know your token: log in with `hf auth login`, or set HF_TOKEN, or do without"),
        ("org/broken", "model 'org/broken' could not be loaded: peer closed connection"),
        ("org/bare", "model 'org/bare' has no config.json"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line_with_the_reason(online, name, message):
    (found,) = online["model", name].values()
    assert "\n" not in found and re.search(message, found), found


def test_datasets_and_facts_come_from_the_hub(online, repositories):
    assert len(online["dataset", "mceval8k/agnews"]) == len(online["facts", FACTS]) == 32


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("dataset", "mceval8k/fever"), "no fact/fever/test.json in Hugging Face dataset"),
        (("facts", "hf://datasets/org/facts/none.jsonl"), "no such file; allowed: hf://datasets/ORGANISATION/DATASET"),
        (("facts", "hf://datasets/nobody/facts/facts.jsonl"), "there is no dataset 'nobody/facts' at http"),
    ],
)
def test_an_absent_dataset_or_file_is_named(online, wanted, message):
    assert message in online[wanted]["DatasetError"]


@pytest.mark.parametrize("wanted", [("model", "org/good"), ("dataset", "mceval8k/agnews"), ("facts", FACTS)])
def test_the_cache_serves_without_a_hub_and_says_so(online, offline, cut_off, wanted):
    assert online[wanted] == offline[wanted] == cut_off[wanted]
    assert (
        f"negcore.hub: HF_HUB_OFFLINE is set; model org/good is taken from the cache, commit {COMMIT}" in offline.notes
    )
    assert f"negcore.hub: {online.endpoint} cannot be reached" in cut_off.notes


def test_a_model_whose_weights_are_not_in_the_cache_is_refused_offline(online, offline):
    assert online["card", "org/half"] == COMMIT
    (message,) = offline["model", "org/half"].values()
    assert "model 'org/half' could not be loaded" in message and "so that only its cache was asked" in message


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (("model", "org/missing"), "model 'org/missing' is not in the cache"),
        (("dataset", "mceval8k/fever"), "'fact/fever/train.json' of dataset 'iszhaoxin/MCEval8K' is not in the cache"),
    ],
)
def test_what_is_not_in_the_cache_is_named_without_a_hub(online, offline, cut_off, wanted, what):
    for loaded, reason in ((offline, "HF_HUB_OFFLINE is set"), (cut_off, "cannot be reached (")):
        (message,) = loaded[wanted].values()
        assert reason in message and what in message and "\n" not in message, message


def test_a_cache_that_cannot_be_used_is_named(repositories, tmp_path):
    (tmp_path / "file").touch()
    with serving(repositories) as hub:
        loaded = load([("model", "org/good"), ("facts", FACTS)], hub.endpoint, tmp_path / "file")
    for found in loaded.values():
        (message,) = found.values()
        assert f"the cache {tmp_path / 'file' / 'hub'} cannot be used (" in message and "set HF_HOME" in message
