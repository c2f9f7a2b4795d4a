"""A run that goes on from finished shards finds what is damaged or in a wrong place, says so, and computes it again."""

import shutil

import pyarrow as pa
import pytest
from support import save_tiny_model, write_questions

from flows.pipeline import run_pipeline, run_probe
from flows.show.report import counted_now
from negcore.store import integrity
from negcore.store.publish import publish_shard
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.plan import plan
from tasks.steps import PlainSteps

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Makes the run of a model in a directory."""
    questions = write_questions(tmp_path_factory.mktemp("data"))
    models = {family: save_tiny_model(family, tmp_path_factory.mktemp("models") / family) for family in FAMILIES}

    def make(out, family="llama"):
        values = {"model": [str(models[family])], "dataset": [questions], "backend": "local", "shard_rows": 8}
        return read_run_file(SkillRun, None, values | {"out": out})

    return make


FAMILIES = ("llama", "mistral")


def made_by(run):
    assert run_pipeline(run, PlainSteps()).problems == []
    return run.directory


@pytest.fixture(scope="module")
def made(run_of, tmp_path_factory):
    """A finished run: never changed."""
    return made_by(run_of(tmp_path_factory.mktemp("made") / "run"))


@pytest.fixture(scope="module")
def other(run_of, tmp_path_factory):
    """The run of another model, of the same shape, on the same rows: never changed."""
    return made_by(run_of(tmp_path_factory.mktemp("made") / "run", "mistral"))


@pytest.fixture
def copy(made, tmp_path):
    """The same run, as another process finds it."""
    integrity.forget_checks()
    return shutil.copytree(made, tmp_path / "run")


def contents(directory):
    files = [*directory.glob("negs/**/part-*"), directory / "accuracy.arrow"]
    return {path.relative_to(directory): path.read_bytes() for path in files}


def shards(directory, split="train"):
    return sorted(directory.glob(f"negs/*/*/split={split}/part-*.arrow"))


def swap(one, other):
    for path, content in ((one, other.read_bytes()), (other, one.read_bytes())):
        path.write_bytes(content)


def flip_a_bit(directory, other):
    path = shards(directory)[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def flip_a_bit_of_a_receipt(directory, other):
    path = next(directory.glob("negs/*/*/split=train/_receipts/part-00001.json"))
    path.write_text(path.read_text().replace('"n_rows":8', '"n_rows":9'))


def swap_two_shards(directory, other):
    swap(*shards(directory)[:2])


def swap_two_splits(directory, other):
    for one, another in zip(shards(directory), shards(directory, "test"), strict=True):
        swap(one, another)


def bring_shards_of_another_model(directory, other):
    for split in SPLITS:
        for mine, theirs in zip(shards(directory, split), shards(other, split), strict=True):
            shutil.copy(theirs, mine)


DAMAGES = {
    flip_a_bit: (1, "shard 1: its checksum is not the one in its receipt: computed again"),
    flip_a_bit_of_a_receipt: (1, "shard 1: its receipt is damaged: computed again"),
    swap_two_shards: (2, "shard 0: its checksum is not the one in its receipt: computed again"),
    swap_two_splits: (6, "test: shard 2: "),
    bring_shards_of_another_model: (9, "valid: shard 1: "),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_same_command_finds_and_mends_what_is_damaged_and_says_so(run_of, made, copy, other, damage):
    damage(copy, other)
    assert contents(copy) != contents(made)
    n_damaged, line = DAMAGES[damage]
    again = run_pipeline(run_of(copy), PlainSteps())
    assert again.problems == []
    said = f"{9 - n_damaged} shards reused; {n_damaged} damaged shard{'s' * (n_damaged > 1)} computed again"
    assert counted_now(again.extracted).endswith(said)
    mended = [warning for warning in again.warnings if warning.endswith(": computed again")]
    assert len(mended) == n_damaged
    assert any(line in warning for warning in mended)
    assert line in again.report.read_text()
    assert contents(copy) == contents(made)
    assert counted_now(run_pipeline(run_of(copy), PlainSteps()).extracted).endswith("9 shards reused")


def test_probes_refuse_what_is_damaged_by_name(run_of, copy, other):
    flip_a_bit(copy, other)
    (problem,) = run_probe(run_of(copy), PlainSteps()).problems
    assert "part-00001.arrow' is damaged (its checksum is not the one in its receipt)" in problem


@pytest.mark.parametrize("setting", [{"shots": 1}, {"site": "act"}, {"dtype": "float64"}])
def test_probes_refuse_negs_of_other_settings_than_the_run_file_names(run_of, made, setting):
    run = run_of(made).model_copy(update=setting)
    (problem,) = run_probe(run, PlainSteps()).problems
    assert "are another run's" in problem
    assert next(iter(setting)) in problem


def test_probes_refuse_a_right_answer_that_is_not_the_datasets(run_of, copy):
    """The shard is forged together with its receipt: every checksum fits."""
    run = run_of(copy)
    (test,) = [one for one in plan(run)[0].datasets[0].splits if one.place.part == "test"]
    batch = integrity.mapped_batch(shards(copy, "test")[1])
    gold = (batch.column("gold").to_numpy() + 1) % 3
    forged = batch.set_column(batch.schema.get_field_index("gold"), batch.schema.field("gold"), pa.array(gold))
    about = test.measurement.about(test.n_options)
    publish_shard(copy, test.place, 1, 3, identity=test.identity, batch=forged, about=about)
    (problem,) = run_probe(run, PlainSteps()).problems
    assert "right answer" in problem
    again = run_pipeline(run, PlainSteps())
    assert [warning for warning in again.warnings if "gold of its row" in warning]
    assert run_probe(run, PlainSteps()).problems == again.problems == []
