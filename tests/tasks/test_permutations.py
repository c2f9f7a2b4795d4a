"""Runs that ask every row in several orders of its options."""

import pytest
from support import save_tiny_model

from negcore.datasets import load_dataset
from negcore.errors import RunError
from negcore.orders import split_id
from negcore.texts import plain
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.reading import read_run_file
from tasks.measure.examples import unreadable
from tasks.plan import plan, read_dataset
from tasks.prompt_warnings import prompt_warnings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("made") / "tiny-llama", n_positions=4096)


@pytest.fixture
def run_of(model, tmp_path):
    def make(**fields):
        given = {"model": [str(model)], "dataset": ["mini/fact"], "backend": "local", "limit": 4, "eval_limit": 3}
        return read_run_file(SkillRun, None, given | {"out": str(tmp_path / "run")} | fields)

    return make


def planned(run):
    (of_model,) = plan(run)
    return of_model, of_model.datasets[0]


def test_a_plan_counts_rows_times_orders(run_of):
    model, dataset = planned(run_of(permutations="all", shard_rows=16))
    assert [len(split.examples) for split in dataset.splits] == [96, 72, 72]
    assert model.n_shards == 6 + 5 + 5
    assert dataset.name.endswith("mini/fact all orders")


def test_only_another_number_of_orders_is_part_of_a_runs_name_file_and_identity(run_of):
    plain_run, one, two = run_of(), run_of(permutations=1), run_of(permutations="2")
    assert two.permutations == 2 and "permutations" not in plain_run.science and two.science["permutations"] == 2
    identities = [planned(run)[1].splits[0].identity for run in (plain_run, one, two)]
    assert identities[0].digest == identities[1].digest != identities[2].digest
    assert "permutations" not in identities[0].prompt and identities[2].prompt["permutations"] == 2


@pytest.mark.parametrize("wrong", [0, -1, "some", True, 1.5])
def test_other_numbers_of_orders_are_refused_by_the_run_file(run_of, wrong):
    with pytest.raises(RunError, match="permutations"):
        run_of(permutations=wrong)


def test_an_evaluation_asks_every_setting_in_as_many_orders():
    run = EvaluationRun(model=["m"], permutations="all")
    assert [one.permutations for one in run.settings] == ["all", "all"]


def test_a_row_of_which_one_order_cannot_be_read_is_left_out_whole(run_of, monkeypatch):
    card = planned(run_of())[0].card
    settings = run_of(permutations=3, unreadable="skip").prompts("mini/fact")
    whole = load_dataset("mini/fact", card.tokenizer, settings=settings).splits["test"]

    def with_one_more(card, examples, *answers):
        return unreadable(card, examples, *answers) | {one.id: "it is odd" for one in examples if one.id == whole[1].id}

    monkeypatch.setattr("tasks.plan.unreadable", with_one_more)
    dataset, _ = read_dataset(card, "mini/fact", settings)
    assert [one.id for one in dataset.splits["test"]] == [one.id for one in whole[3:]]
    assert dataset.split_report.n_used["test"] == 2
    assert [change.n_rows for change in dataset.split_report.dropped if change.reason == "it is odd"] == [1]


def test_options_that_speak_of_others_are_counted_and_told(run_of, monkeypatch):
    monkeypatch.setattr("tasks.prompt_warnings.refers_to_options", lambda text: text == "Asia")
    card = planned(run_of())[0].card
    dataset, _ = read_dataset(card, "mini/fact", run_of(permutations=2).prompts("mini/fact"))
    n_rows = len({split_id(one.id).row for rows in dataset.splits.values() for one in rows if "Asia" in one.options})
    (told,) = (plain(line) for line in prompt_warnings(card, dataset) if "speak of other" in line)
    assert f"such as 'Asia', stand in {n_rows} of the rows" in told
    given, _ = read_dataset(card, "mini/fact", run_of().prompts("mini/fact"))
    assert not any("speak of" in line for line in prompt_warnings(card, given))
