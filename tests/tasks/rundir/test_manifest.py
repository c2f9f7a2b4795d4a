"""A finished run is one thing: its manifest, written last, ties tables, probes and report to the shards."""

import json
import shutil

import pytest
from support import save_tiny_model, write_questions
from typer.testing import CliRunner

from flows.cli.app import _exit_code, app
from flows.pipeline import run_extract, run_pipeline, run_probe
from negcore.errors import RunError
from negcore.store import publish
from negcore.store.identity import canonical_json, content_digest
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.rundir.manifest import (
    MANIFEST_FILE,
    check_results,
    manifest_faults,
    mixed_versions,
    read_manifest,
    shards_of,
)
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def run_in(tmp_path_factory):
    model = save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")
    questions = write_questions(tmp_path_factory.mktemp("data"))

    def make(out, **changes):
        values = {"model": [str(model)], "dataset": [questions], "backend": "local", "shard_rows": 8}
        return read_run_file(SkillRun, None, values | {"out": out} | changes)

    return make


@pytest.fixture(scope="module")
def made(run_in, tmp_path_factory):
    """A finished run: never changed."""
    run = run_in(tmp_path_factory.mktemp("made") / "run")
    assert run_pipeline(run, PlainSteps()).problems == []
    return run.directory


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def faults(directory):
    return manifest_faults(directory, shards_of(directory))


def neg(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def with_other_versions(directory, **versions):
    """Rewrite the receipt of a shard as one that other packages made."""
    path = next(directory.rglob("split=train/_receipts/part-00001.json"))
    record = json.loads(path.read_bytes())
    del record["seal"]
    record["versions"] |= versions
    path.write_text(canonical_json(record | {"seal": content_digest(record)}) + "\n")


def test_a_finished_run_names_versions_plan_shards_and_results(made):
    manifest = read_manifest(made)
    assert set(manifest.versions) >= {"neg-at-scale", "torch", "transformers", "numpy", "pyarrow", "python"}
    assert manifest.plan_xxh3 == publish.checksum(made / "plan.json")
    assert [(one.n_shards, one.n_rows) for one in manifest.shards.values()] == [(3, 20)] * 3
    assert all(one.versions["torch"] == {manifest.versions["torch"]: 3} for one in manifest.shards.values())
    names = {place.split("/")[0] for place in manifest.files}
    known = ("accuracy", "averages", "beyond_lm", "comparisons", "neurons", "predictions", "splits")
    tables = {f"{name}.arrow" for name in known}
    assert names == {"run.yaml", "plan.json", "report.html", "probes", "checks", "figures"} | tables
    assert faults(made) == []
    newest = max(made.rglob("*"), key=lambda path: path.stat().st_mtime_ns if path.is_file() else 0)
    assert newest.name == MANIFEST_FILE
    assert "finished: its manifest ties tables" in neg("status", made).output


@pytest.mark.parametrize("name", ["accuracy.arrow", "report.html", "magn.safetensors"])
def test_a_changed_or_missing_result_is_named(copy, name):
    path = next(copy.rglob(name))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (fault,) = faults(copy)
    assert fault.endswith(f"{name}: changed since the run was finished; run the same command again")
    path.unlink()
    assert faults(copy)[0].endswith(f"{name}: missing; run the same command again")
    checked = neg("verify", copy)
    assert checked.exit_code == 1
    assert f"{name}: missing" in checked.stderr


@pytest.mark.parametrize("gone", ["split=test/part-00002.arrow", "split=test", "accuracy.arrow", "plan.json"])
def test_the_status_of_a_finished_run_that_lacks_something_does_not_call_it_finished(copy, gone):
    path = next(copy.rglob(gone))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = neg("status", copy).output
    assert "finished: its manifest ties" not in said
    assert f"no longer as it finished: {'negs/' if 'split' in gone else gone}" in said
    assert "the same command goes on from here" in said


def test_a_link_to_nothing_is_missing_and_stays_out_of_the_manifest(run_in, copy):
    shutil.rmtree(copy / "checks")
    (copy / "checks").symlink_to(copy / "nowhere")
    assert "no longer as it finished: checks/" in neg("status", copy).output
    run_extract(run_in(copy), PlainSteps())
    assert faults(copy) == []


@pytest.mark.parametrize("name", ["plan.json", "run.yaml", "negs"])
def test_a_directory_or_a_file_in_the_place_of_the_other_is_named(run_in, copy, name):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.touch() if name == "negs" else path.mkdir()
    if name == "negs":
        assert "no longer as it finished: negs/" in neg("status", copy).output
        assert neg("verify", copy).exit_code == 1
    else:
        with pytest.raises(RunError, match=f"{name}' is a directory; a file is needed"):
            run_extract(run_in(copy), PlainSteps())


def test_a_file_that_cannot_be_used_is_one_line(copy, monkeypatch, capsys):
    (copy / MANIFEST_FILE).unlink()
    (copy / MANIFEST_FILE).symlink_to(MANIFEST_FILE)
    monkeypatch.setattr("sys.argv", ["neg", "verify", str(copy)])
    assert _exit_code() == 2
    assert "manifest.json' cannot be used: " in " ".join(capsys.readouterr().err.split())


def test_other_shards_than_the_tables_were_made_of_are_named(copy):
    with_other_versions(copy, torch="1.0")
    (fault,) = faults(copy)
    assert "split=train: not the shards that tables, probes and report were made of" in fault
    with pytest.raises(RunError, match="the shards beside it are no longer those that it was made of"):
        check_results(copy, [copy / "accuracy.arrow"])


def test_a_table_that_is_gone_and_one_that_a_run_never_has_are_told_apart(copy):
    (copy / "accuracy.arrow").unlink()
    with pytest.raises(RunError, match=r"accuracy.arrow' cannot be trusted \(it is gone\)"):
        check_results(copy, [copy / "accuracy.arrow"])
    with pytest.raises(RunError, match="has no table causal.arrow: its kind of run has none"):
        check_results(copy, [copy / "causal.arrow"])


def test_a_comparison_refuses_a_table_that_is_not_the_runs_and_warns_of_one_that_nothing_tells_of(made, copy):
    (copy / "accuracy.arrow").write_bytes((made / "accuracy.arrow").read_bytes() + b" ")
    assert "it is not what the run finished with" in str(neg("compare", made, copy).exception)
    (copy / MANIFEST_FILE).unlink()
    shutil.copy(made / "accuracy.arrow", copy)
    compared = neg("compare", made, copy)
    assert compared.exit_code == 0
    assert f"has no {MANIFEST_FILE}" in " ".join(compared.stderr.split())


def test_a_run_that_is_stopped_or_lacks_something_has_no_manifest(run_in, copy, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flows.pipeline.extract_planned", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(run_in(copy), PlainSteps())
    assert read_manifest(copy) is None
    next(copy.rglob("split=test/part-00000.arrow")).unlink()
    assert run_probe(run_in(copy), PlainSteps()).problems
    assert read_manifest(copy) is None
    assert run_pipeline(run_in(copy), PlainSteps()).problems == []
    assert faults(copy) == []


def test_an_extraction_keeps_the_tables_of_the_same_shards_and_drops_those_of_others(run_in, copy):
    run_extract(run_in(copy), PlainSteps())
    assert "accuracy.arrow" in read_manifest(copy).files
    with_other_versions(copy, torch="1.0")  # its shard says otherwise: it is computed again
    (copy / MANIFEST_FILE).unlink()
    run_extract(run_in(copy), PlainSteps())
    assert faults(copy) == []
    assert "accuracy.arrow" not in read_manifest(copy).files
    run_probe(run_in(copy), PlainSteps())
    assert "accuracy.arrow" in read_manifest(copy).files


def test_several_versions_of_torch_in_one_directory_are_said_and_not_refused(run_in, made, copy):
    assert mixed_versions(shards_of(made).values()) == []
    with_other_versions(copy, torch="1.0", numpy="1.0")
    (line,) = mixed_versions(shards_of(copy).values())
    assert line.startswith("shards were made by several versions of torch (1.0: 1, ")
    assert "several versions of torch" in neg("verify", copy).stderr


def test_a_damaged_manifest_is_told_and_replaced(run_in, copy):
    path = copy / MANIFEST_FILE
    path.write_text(path.read_text().replace('"n_rows":20', '"n_rows":21'))
    with pytest.raises(RunError, match=r"manifest.json' is damaged"):
        read_manifest(copy)
    assert "manifest.json' is damaged" in neg("verify", copy).stderr
    said = " ".join(neg("status", copy).output.split())
    assert "no longer as it finished: '" in said
    assert "manifest.json' is damaged" in said
    run_extract(run_in(copy), PlainSteps())
    assert faults(copy) == []
