"""Tags of flow runs: what kind of run it is and what it is about."""

from flows.tags import run_tags
from tasks.config.dataset_runs import SkillRun
from tasks.steps import PrefectSteps


def test_a_run_is_tagged_with_its_kind_models_and_data():
    run = SkillRun(model=("smollm2-135m", "/models/my model"), dataset=("mini/fact", "/data/own.jsonl"))
    assert run_tags(run) == [
        "pipeline",
        "model: smollm2-135m",
        "model: my model",
        "data: mini/fact",
        "data: own.jsonl",
    ]


def test_a_whole_benchmark_does_not_fill_the_page_with_tags():
    run = SkillRun(model="a/b", dataset=tuple(f"mini/{i}" for i in range(7)))
    assert run_tags(run) == ["pipeline", "model: a/b"]


def test_keys_of_artifacts_tell_run_directories_apart(tmp_path):
    places = [tmp_path / "a" / "run.1", tmp_path / "b" / "run.1", tmp_path / "b" / "run-1", tmp_path / ("n" * 300)]
    keys = [PrefectSteps(place)._key("Accuracy of org/model") for place in places]
    assert len(set(keys)) == 4
    assert all(key.endswith("-accuracy-of-org-model") and len(key) < 100 for key in keys)
    assert keys[0].startswith("run-1-")
    assert PrefectSteps(places[0])._key("Accuracy of org/model") == keys[0]
