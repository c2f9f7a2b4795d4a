"""One flipped bit in any file of a model: it is found or mended, and never a wrong number."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hub import COMMIT
from safetensors.torch import load_file, save_file
from support import save_tiny_model

from negcore.errors import ModelError
from negcore.measure.loading import load_model
from negcore.model import checksums as module
from negcore.model import gguf_cache, language_model
from negcore.model.checksums import checksum
from negcore.model.embedded import EmbeddedModel
from negcore.model.gguf_cache import embedded_files
from negcore.model.language_model import describe_model, read_model
from negcore.model.model_files import check_snapshot
from tasks.measure.worker import ModelWorker

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, in a process that has read nothing yet."""
    monkeypatch.setenv("NEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_known", {})
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    return save_tiny_model("llama", tmp_path / "model")


@pytest.fixture
def sharded(model):
    """The model with its weights in two files, one in a folder below it."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    (model / "more").mkdir()
    files = {name: ("first.safetensors", "more/second.safetensors")[n % 2] for n, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        part = {name: tensors[name] for name in files if files[name] == file}
        save_file(part, model / file, metadata={"format": "pt"})
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return model


def flip(file: Path, place: int = -9) -> None:
    """Flip one bit in place; the size stays, and the time of writing is set back."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_flipped_bit_in_a_directory_makes_another_revision(model, name):
    before = describe_model(str(model)).revision
    flip(model / name, (model / name).read_bytes().rfind(b"the") if name == "tokenizer.json" else -9)
    try:
        assert describe_model(str(model)).revision != before
    except ModelError:
        assert name == "tokenizer.json"


@pytest.mark.parametrize("name", ["first.safetensors", "more/second.safetensors"])
def test_every_file_that_an_index_names_is_of_the_revision(sharded, name):
    before = describe_model(str(sharded)).revision
    flip(sharded / name)
    assert describe_model(str(sharded)).revision != before


@pytest.mark.parametrize("name", ["../outside.safetensors", "more/../../x.safetensors", "/x.safetensors", "x.bin"])
def test_an_index_that_names_files_elsewhere_is_refused(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["another"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names '.*'; allowed are files that end in .safetensors, in its directory"):
        describe_model(str(sharded))


def test_a_model_that_changed_since_it_was_described_is_not_loaded(model):
    card = describe_model(str(model))
    flip(model / WEIGHTS)
    with pytest.raises(ModelError, match="its files changed: they are xxh3:.* now, and were xxh3:"):
        load_model(card)


def test_a_model_that_changes_while_it_is_read_is_refused(model, monkeypatch):
    whole = language_model._weighted

    def slowly(card, **options):
        loaded = whole(card, **options)
        if "device_map" not in options:
            flip(model / WEIGHTS)
        return loaded

    monkeypatch.setattr(language_model, "_weighted", slowly)
    with pytest.raises(ModelError, match="its files changed"):
        load_model(str(model))


def test_a_loaded_model_does_not_change_with_its_files(model):
    lm = load_model(str(model))
    before = [weights.clone() for weights in lm.model.parameters()]
    content = (model / WEIGHTS).read_bytes()
    with (model / WEIGHTS).open("r+b") as stream:  # in place, as what is mapped would see
        stream.seek(len(content) // 2)
        stream.write(bytes(len(content) - len(content) // 2))
    assert all(map(torch.equal, before, lm.model.parameters()))


def test_a_worker_refuses_another_revision_than_was_planned(model):
    revision = describe_model(str(model)).revision
    options = {"dtype": "float32", "device": "cpu", "site": "paper", "threads": torch.get_num_threads()}
    ModelWorker(str(model), **options, revision=revision)
    flip(model / WEIGHTS)
    with pytest.raises(ModelError, match=f"here, but {revision} where the run was planned"):
        ModelWorker(str(model), **options, revision=revision)


# Checksums that are remembered


def aged(file, monkeypatch, *, kept):
    """A file that was written long ago, in a process that keeps checksums of files of any size."""
    monkeypatch.setattr(module, "_SETTLED_NS", 0)
    monkeypatch.setattr(module, "_KEPT_BYTES", dict.fromkeys(module._KEPT_BYTES, 0 if kept else 2**40))
    return file


def unread(monkeypatch):
    """Let reading a file's content fail."""
    monkeypatch.setattr(module, "_START", dict.fromkeys(module._START, lambda size: 1 / 0))


def test_a_checksum_of_a_large_file_is_read_once_on_this_machine(model, cache, monkeypatch):
    file = aged(model / WEIGHTS, monkeypatch, kept=True)
    found = checksum(file)
    module._known.clear()
    unread(monkeypatch)
    assert checksum(file) == found
    (note,) = (cache / "checksums").iterdir()
    assert note.stat().st_mode & 0o777 == 0o600
    flip(file)
    with pytest.raises(ZeroDivisionError):
        checksum(file)


def test_a_damaged_note_is_none(model, cache, monkeypatch):
    file = aged(model / WEIGHTS, monkeypatch, kept=True)
    found = checksum(file)
    (note,) = (cache / "checksums").iterdir()
    for damage in (b"", b"\xff", b"0" * 32 + b" " + b"0" * 32, note.read_bytes().replace(found[:1].encode(), b"g")):
        note.write_bytes(damage)
        module._known.clear()
        assert checksum(file) == found


def test_small_files_are_read_by_every_process(model, cache, monkeypatch):
    checksum(aged(model / WEIGHTS, monkeypatch, kept=False))
    assert not (cache / "checksums").exists()


@pytest.mark.parametrize(("method", "known"), [("sha256", hashlib.sha256(b"a" * 3_000_000).hexdigest()), ("git", None)])
def test_checksums_are_those_that_the_hub_names_files_by(tmp_path, method, known):
    (tmp_path / "file").write_bytes(b"a" * 3_000_000)
    git = hashlib.sha1(b"blob 3000000\0" + b"a" * 3_000_000).hexdigest()
    assert checksum(tmp_path / "file", method) == (known or git)


def test_every_byte_of_a_file_counts_however_large(tmp_path):
    file = tmp_path / "large"
    with file.open("wb") as stream:
        stream.truncate(2**30 + 2**24)  # sparse
    before = checksum(file)
    with file.open("r+b") as stream:
        stream.seek(2**29 + 12_345)
        stream.write(b"x")
    assert checksum(file) != before


# The caches


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A reference to a GGUF file of which a tiny model is made in place of a real one, and how often that was done."""
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    made = []

    def write(file, directory):
        made.append(file)
        save_tiny_model("llama", directory)

    monkeypatch.setattr(gguf_cache, "_write_safetensors", write)
    return str(tmp_path / "tiny.gguf"), made


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "checksums"])
def test_a_damaged_conversion_is_made_again(converted, name):
    ref, made = converted
    card = describe_model(ref)
    whole = (Path(card.source) / name).read_bytes()
    flip(Path(card.source) / name)
    assert describe_model(ref).revision == card.revision
    assert len(made) == 2 and (Path(card.source) / name).read_bytes() == whole


@pytest.mark.parametrize(
    "change", [lambda folder: (folder / WEIGHTS).unlink(), lambda folder: (folder / "checksums").unlink()]
)
def test_a_conversion_that_lacks_a_file_is_made_again(converted, change):
    ref, made = converted
    folder = Path(describe_model(ref).source)
    change(folder)
    load_model(ref)
    assert len(made) == 2 and [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_drafts_of_killed_processes_are_removed(converted, cache):
    (cache / "gguf" / "neg-dead").mkdir(parents=True)
    (cache / "gguf" / "neg-dead" / "in-use").touch()
    describe_model(converted[0])
    assert not (cache / "gguf" / "neg-dead").exists()


def test_a_packaged_model_with_a_flipped_bit_is_refused(tmp_path, monkeypatch):
    (tmp_path / "tinypackage").mkdir()
    (tmp_path / "tinypackage" / "__init__.py").touch()
    file = tmp_path / "tinypackage" / "tiny.gguf"
    file.write_bytes(b"GGUF" * 9)
    embedded = EmbeddedModel((("tinypackage", "tiny.gguf"),), "pip install tinypackage", (checksum(file),))
    monkeypatch.syspath_prepend(str(tmp_path))
    for place in (gguf_cache, language_model):
        monkeypatch.setattr(place, "EMBEDDED", {"tiny": embedded})
    assert embedded_files("tiny") == [file]
    flip(file)
    with pytest.raises(ModelError, match=r"is damaged or of another version; run: pip install tinypackage --force-re"):
        describe_model("tiny")


@pytest.fixture
def snapshot(model, tmp_path):
    """The model as the hub's client keeps it: links to files that are named after their content."""
    folder = tmp_path / "models--org--name" / "snapshots" / COMMIT
    blobs = folder.parents[1] / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        name = checksum(file, "sha256" if file.suffix == ".safetensors" else "git")
        shutil.copy(file, blobs / name)
        (folder / file.name).symlink_to(Path("../../blobs", name))
    return folder


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_a_file_of_the_hub_with_a_flipped_bit_is_named(snapshot, name):
    check_snapshot(snapshot, weights=True)
    blob = (snapshot / name).resolve()
    flip(blob)
    with pytest.raises(
        ModelError, match=f"{blob.name}' is damaged .its checksum is not its name.: delete it, to fetch"
    ):
        check_snapshot(snapshot, weights=True)


def test_a_snapshot_is_a_directory_like_any_other(snapshot, model):
    assert describe_model(str(snapshot)).revision == describe_model(str(model)).revision
    read_model(str(snapshot), dtype="float32", device="cpu", site="paper")
