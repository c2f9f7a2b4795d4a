"""A published folder: whole, checked, the same every time, readable with other tools, without any prompt's text."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from support import save_tiny_model, write_questions
from typer.testing import CliRunner

from flows.cli.app import app
from flows.linearity import run_linearity
from flows.pipeline import run_pipeline
from flows.show.dataset_card import dataset_card
from negcore import open_negs
from negcore.errors import RunError
from tasks.config.dataset_runs import SkillRun
from tasks.config.linearity_run import LinearityRun
from tasks.config.reading import read_run_file
from tasks.publish import read_publication, write_folder
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return Path(write_questions(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def pipeline(model, questions):
    def make(out, **changes):
        values = {"model": [model], "dataset": [str(questions)], "backend": "local", "shard_rows": 8}
        run = read_run_file(SkillRun, None, values | {"out": out} | changes)
        assert run_pipeline(run, PlainSteps()).problems == []
        return run.directory

    return make


@pytest.fixture(scope="module")
def made(pipeline, tmp_path_factory):
    """A finished run: never changed."""
    return pipeline(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def published(run, target, licence="cc-by-4.0"):
    publication = read_publication(run)
    write_folder(publication, target, dataset_card(publication, licence))
    return target


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """A published folder: never changed."""
    return published(made, tmp_path_factory.mktemp("published") / "folder")


def neg(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def front(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


# What is in it


def test_shards_receipts_tables_probes_and_checks_are_there_and_nothing_else(made, folder):
    of_run, of_folder = contents(made), contents(folder)
    own = {"README.md", "manifest.json"}
    assert all(of_folder[place] == of_run[place] for place in of_folder.keys() - own)
    left_out = of_run.keys() - of_folder.keys()
    hidden = {place for place in left_out if "/." in place}
    left_out = {place.split("/")[0] for place in left_out - hidden}
    assert left_out <= {"run.yaml", "plan.json", "report.html", "claim.json", "figures"}
    assert {"accuracy.arrow", *own} <= of_folder.keys()
    assert {place.split("/")[0] for place in of_folder if "/" in place} == {"negs", "probes", "checks"}


def test_no_file_holds_a_prompts_text(questions, folder):
    prompts = [json.loads(line)["prompt"] for line in questions.read_text().splitlines()]
    assert len(prompts) > 10
    for place, content in contents(folder).items():
        assert not [prompt for prompt in prompts if prompt.encode() in content], place
        assert str(questions.parent).encode() not in content, place


def test_twice_gives_the_same_bytes(made, folder, tmp_path):
    assert contents(published(made, tmp_path / "again")) == contents(folder)


def test_numbers_are_read_back_and_the_folder_verifies(made, folder):
    for split in ("train", "valid", "test"):
        here, there = (open_negs(path).select(split=split) for path in (folder, made))
        np.testing.assert_array_equal(here.layer(1), there.layer(1))
        assert here.identity == there.identity
    checked = neg("verify", folder)
    assert checked.exit_code == 0 and checked.output.count("whole") == 3


@pytest.mark.parametrize("victim", ["negs/**/part-00001.arrow", "accuracy.arrow", "probes/**/*.*"])
def test_a_copy_that_was_damaged_on_its_way_does_not_verify(folder, tmp_path, victim):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = next(path for path in copy.glob(victim) if path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert neg("verify", copy).exit_code == 1


def test_a_copy_without_a_whole_split_does_not_verify(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(next(copy.glob("negs/*/*/split=test")))
    assert neg("verify", copy).exit_code == 1


def test_a_changed_card_is_fine_and_notes_of_the_hubs_client_are_no_shards(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("mine")
    place = next(copy.glob("negs/*/*/split=test")).relative_to(copy)
    (copy / ".cache" / "huggingface" / place).mkdir(parents=True)
    (copy / ".cache" / "huggingface" / place / "part-00000.arrow.metadata").write_text("")
    checked = neg("verify", copy)
    assert checked.exit_code == 0 and ".cache" not in checked.output


# The card


def test_the_card_says_what_a_reader_needs(made, folder, model):
    card = (folder / "README.md").read_text()
    identity = open_negs(made).select(split="test").identity
    for said in (identity.model_revision, identity.dataset_fingerprint, "float32", "torch", "seed: 0", "2412.18053"):
        assert said in card, said
    assert "| neg\\_LL | " in card and "probability per activation" in card
    assert "train: 20, valid: 20, test: 20" in card
    assert front(folder)["pretty_name"] == "Neuron empirical gradients of tiny-llama on local/questions"
    assert front(folder)["license"] == "cc-by-4.0" and front(folder)["size_categories"] == ["n<1K"]


def test_every_file_of_shards_is_in_one_split_of_one_configuration(folder):
    (config,) = front(folder)["configs"]
    assert config["default"] is True
    assert [one["split"] for one in config["data_files"]] == ["train", "valid", "test"]
    found = [path for one in config["data_files"] for path in folder.glob(one["path"])]
    assert sorted(found) == sorted(folder.glob("negs/**/*.arrow"))


def test_without_a_licence_the_card_says_so(made, tmp_path):
    card = (published(made, tmp_path / "folder", licence=None) / "README.md").read_text()
    assert front(tmp_path / "folder")["license"] == "unknown"
    assert "**No licence was chosen yet**" in card


def test_names_in_the_card_stay_text(pipeline, model, questions, tmp_path):
    hostile = tmp_path / "a|b `rm` <script>: [x](y) - {z}.jsonl"
    shutil.copy(questions, hostile)
    folder = published(pipeline(tmp_path / "run", dataset=[str(hostile)]), tmp_path / "folder")
    (config,) = front(folder)["configs"]
    assert re.fullmatch(r"[\w.-]+", config["config_name"])
    assert all(list(folder.glob(one["path"])) for one in config["data_files"])
    body = (folder / "README.md").read_text().split("---\n", 2)[2]
    table = next(
        line for line in body.splitlines() if line.startswith(f"| {config['config_name'].replace('_', chr(92) + '_')}")
    )
    assert "<script>" not in table.replace("\\<", "") and len(re.findall(r"(?<!\\)\|", table)) == 10
    assert open_negs(folder).select(split="test").n_rows == 20


# Other kinds of runs, and other tools


def schemas(folder, config):
    paths = [path for one in config["data_files"] for path in folder.glob(one["path"])]
    return {str(pa.ipc.open_file(pa.memory_map(str(path))).schema.remove_metadata()) for path in paths}


@pytest.mark.parametrize("storage", ["bfloat16", "codes", "stats"])
def test_every_storage_level_can_be_published(pipeline, tmp_path, storage):
    folder = published(pipeline(tmp_path / "run", storage=storage, probe=["magn"]), tmp_path / "folder")
    configs = front(folder)["configs"]
    assert len(configs) == (2 if storage == "stats" else 1)
    assert all(len(schemas(folder, config)) == 1 for config in configs)
    splits = {one["split"] for config in configs for one in config["data_files"]}
    assert all(re.fullmatch(r"\w+", split) for split in splits) and len(splits) == 3
    assert neg("verify", folder).exit_code == 0


def test_a_run_with_several_measurements_can_be_published(model, tmp_path):
    rows = [
        {"uuid": f"F{n}", "prompt": f"The answer {'or no ' * n}is {word}", "tpl": word, "answer": "ABCD"[n % 4]}
        for n in range(6)
        for word in ("one", "two")
    ]
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join(map(json.dumps, rows)))
    values = {"model": [model], "facts": str(facts), "backend": "local", "prompts": 4, "neurons": 6}
    run = read_run_file(LinearityRun, None, values | {"out": tmp_path / "run"})
    assert run_linearity(run, PlainSteps()).problems == []
    folder = published(run.directory, tmp_path / "folder")
    kinds = {config["config_name"].split("-")[0] for config in front(folder)["configs"]}
    assert {"sweeps", "estimates"} <= kinds
    assert all(len(schemas(folder, config)) == 1 for config in front(folder)["configs"])
    assert neg("verify", folder).exit_code == 0


def test_the_library_of_the_hub_reads_it(folder, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    read = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in read.items()} == {"train": 20, "valid": 20, "test": 20}


# What is refused


def no_manifest(run):
    (run / "manifest.json").unlink()


def no_shard(run):
    next(run.glob("negs/**/part-00001.arrow")).unlink()


def flipped(run):
    file = next(run.glob("negs/**/part-00001.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_table(run):
    (run / "accuracy.arrow").write_bytes(b"")


def emptied(run):
    shutil.rmtree(run)
    run.mkdir()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_manifest, "is no finished run"),
        (emptied, "is no finished run"),
        (no_shard, "is damaged \\(.*missing, though its receipt is there"),
        (flipped, "is damaged \\(.*checksum"),
        (other_table, "is damaged \\(accuracy.arrow: changed since"),
    ],
)
def test_unfinished_and_damaged_runs_are_refused_in_one_line(run, tmp_path, change, says):
    change(run)
    with pytest.raises(RunError, match=says) as refused:
        published(run, tmp_path / "folder")
    assert "\n" not in str(refused.value) and not (tmp_path / "folder").exists()


def test_a_run_that_changes_while_it_is_copied_leaves_nothing(run, tmp_path):
    publication = read_publication(run)
    flipped(run)
    with pytest.raises(RunError, match="changed while it was copied"):
        write_folder(publication, tmp_path / "folder", "")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_holds_something_is_left_alone(made, tmp_path):
    (tmp_path / "folder").mkdir()
    published(made, tmp_path / "folder")  # an empty one is fine
    before = contents(tmp_path / "folder")
    with pytest.raises(RunError, match="is there already"):
        published(made, tmp_path / "folder")
    assert contents(tmp_path / "folder") == before


def test_a_disk_without_room_is_told_before_anything_is_copied(made, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.publish.free_bytes", lambda folder: 1000)
    with pytest.raises(RunError, match="do not fit into"):
        published(made, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
