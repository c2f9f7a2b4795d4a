"""Campaigns of tiny models, some of them broken: run files, outcomes, comparison, resumed, and as a command."""

import json
import shutil
from fractions import Fraction
from math import nan
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from support import neg, save_tiny_model

from flows.campaign import count_campaign_steps, plan_campaign, run_campaign
from flows.show.campaign_tables import campaign_tables
from flows.show.text import share
from negcore.errors import RunError
from tasks.campaign import Comparison, OutcomeRow, by_depth, gains
from tasks.config.campaign_run import CampaignRun
from tasks.config.dataset_runs import EvaluationRun
from tasks.config.linearity_run import LinearityRun
from tasks.config.reading import read_run_file, recorded_run
from tasks.config.run_file import write_run_file
from tasks.measure.worker import ModelWorker
from tasks.plan import plan
from tasks.pool.base import Stopped
from tasks.results import Average
from tasks.rundir.claim import CLAIM_FILE
from tasks.steps import PlainSteps, handing_over

DATASETS = ["mini/fact", "mini/nli"]
STAGES = {
    "mceval8k": {"dataset": DATASETS, "limit": 12, "shots": [0], "probe": ["polar", "magn"], "max_neurons": 8},
    "linearity": {
        "prompts": 2,
        "neurons": 6,
        "range": [1, 2],
        "points": 2,
        "estimator": ["neurgrad"],
        "largest_set": 2,
        "draws": 1,
        "bootstrap": 20,
    },
}
SKILLS = {
    "dataset": ["mini/fact"],
    "limit": 12,
    "variant": ["shots"],
    "probe": ["magn"],
    "top": [4, 8, 12],
    "shift": [0.5],
    "draws": 1,
    "tree_neurons": 8,
}
TABLES = ("outcomes", "accuracy", "gains", "linearity", "profiles", "neg_profiles")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models that are whole, one that lacks a weight, and one of a family that nobody knows."""
    folder = tmp_path_factory.mktemp("models")
    families = {"llama": "tiny-llama", "gpt_neox": "tiny-neox", "qwen2": "torn", "mistral": "unknown"}
    paths = [save_tiny_model(family, folder / name, n_positions=4096) for family, name in families.items()]
    weights, config = paths[2] / "model.safetensors", paths[3] / "config.json"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "unheard-of"}))
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def whole_models(models):
    return models[:2]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The stages' fields, with facts that the tiny tokenizer has a token for."""
    file = tmp_path_factory.mktemp("data") / "facts.jsonl"
    words = ("capital", "best", "worst", "times")
    rows = [
        {"uuid": f"R-{i}", "prompt": f"It was the {word}: ", "tpl": f"P{i}-0", "answer": "ABCD"[i]}
        for i, word in enumerate(words)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return STAGES | {"linearity": STAGES["linearity"] | {"facts": str(file)}}


def campaign(models, out, **values):
    return read_run_file(CampaignRun, None, {"model": models, "out": out, "backend": "local", **STAGES, **values})


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Figures and forests take seconds, and these tests are about something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.show.report.save_figures", lambda figures, folder: [])
        patch.setattr("tasks.skills.forest_grid", lambda *args, **kwargs: [])
        yield


@pytest.fixture(scope="module")
def run(models, stages, tmp_path_factory):
    return campaign(models, tmp_path_factory.mktemp("campaign") / "run", **stages)


@pytest.fixture(scope="module")
def results(run):
    return run_campaign(run, PlainSteps())


def read(path):
    return pa.ipc.open_file(path).read_all().to_pylist()


def table(run, name):
    return read(run.directory / "campaign" / f"{name}.arrow")


def files(run):
    """Every published shard, receipt and table, and its bytes."""
    found = [*run.directory.rglob("negs/**/part-*"), *run.directory.rglob("*.arrow")]
    return {path.relative_to(run.directory): path.read_bytes() for path in found if "_seconds" not in path.parts}


def printed(tables):
    console = Console(width=100, record=True, force_terminal=False)
    for one in tables:
        console.print(one)
    return console.export_text()


# The run file


def test_the_problems_of_all_studies_are_listed_at_once():
    values = {"model": ["m"], "mceval8k": {"limit": 0, "seeds": 1}, "linearity": {"range": [-1]}}
    with pytest.raises(RunError) as error:
        read_run_file(CampaignRun, None, values)
    starts = ["mceval8k: limit is 0", "mceval8k: unknown field 'seeds'", "linearity: range.0 is -1"]
    for line, start in zip(str(error.value).splitlines(), starts, strict=True):
        assert line.startswith(f"command line: {start}")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"mceval8k": {"limits": 3}}, r"mceval8k: unknown field 'limits' of a mceval8k run; did you mean 'limit'\?"),
        ({"mceval8k": {"limit": 0}}, "mceval8k: limit is 0: "),
        ({"linearity": {"seed": 3}}, "linearity: 'seed' holds for the whole campaign"),
        ({"linearity": {"model": ["m"]}}, "linearity: 'model' holds for the whole campaign"),
        ({"skills": {"top": [4]}, "stage": ["mceval8k"]}, "skills: 'dataset' is missing"),
        ({"stage": ["skills"]}, "skills: 'dataset' is missing"),
        ({"stage": ["pipeline"]}, "stage.0 is 'pipeline': choose from mceval8k, linearity, skills"),
        ({"stage": [{"linearity": {}}]}, r"stage.0 is \{'linearity': \{\}\}: choose from"),
        ({"linearity": 3}, "linearity is 3"),
        ({"prompts": 3}, "unknown field 'prompts' of a campaign run; known are "),
        ({"linearty": {}}, r"unknown field 'linearty' of a campaign run; did you mean 'linearity'\?"),
    ],
)
def test_a_bad_field_is_refused_with_its_stage(tmp_path, values, says):
    file = tmp_path / "campaign.yaml"
    file.write_text(yaml.safe_dump({"kind": "campaign", "model": ["m"], **values}))
    with pytest.raises(RunError, match=f"campaign.yaml: {says}") as error:
        read_run_file(CampaignRun, file, {})
    assert "\n" not in str(error.value)


def test_every_stage_of_every_model_is_a_run_of_its_own(tmp_path):
    file = tmp_path / "campaign.yaml"
    file.write_text("kind: campaign\nmodel: [a, org/b, a]\nseed: 3\ndtype: float64\nmceval8k: {limit: 7}\nlinearity:\n")
    run = read_run_file(CampaignRun, file, {"out": str(tmp_path)})
    steps = [(step.run.model, step.study, step.run.directory) for step in run.steps]
    assert steps == [
        ((model,), stage, tmp_path / folder / stage)
        for model, folder in (("a", "a"), ("org/b", "b"))
        for stage in ("mceval8k", "linearity")
    ]
    assert run.steps[0].run == EvaluationRun(
        model=("a",), seed=3, dtype="float64", limit=7, out=tmp_path / "a" / "mceval8k", workers=run.workers
    )
    assert run.steps[3].run == LinearityRun(
        model=("org/b",), seed=3, dtype="float64", out=tmp_path / "b" / "linearity", workers=run.workers
    )


def test_models_of_one_name_are_told_apart_whatever_comes_behind_them(tmp_path):
    models = ["x/m", "y/m", "m", "..", "campaign", "/", "x/m@v2"]
    folders = campaign(models, tmp_path).folders
    assert folders["x/m"] == "m"
    assert folders["x/m@v2"] == "m@v2"
    assert len(set(folders.values())) == len(models)
    assert not {"", "..", "campaign"} & set(folders.values())
    assert campaign(models[:2], tmp_path).folders == {model: folders[model] for model in models[:2]}


def test_a_campaign_is_named_after_what_decides_its_numbers():
    run = campaign(["a", "b"], None)
    other_shards = STAGES["linearity"] | {"shard_prompts": 1}
    fewer = STAGES["linearity"] | {"prompts": 1}
    assert run.directory == Path("runs").absolute() / run.name
    assert run.name == campaign(["a", "b"], "elsewhere", workers=7, linearity=other_shards).name
    assert len({run.name, campaign(["a"], None).name, campaign(["a", "b"], None, linearity=fewer).name}) == 3


def test_a_written_run_file_reads_back_the_same(tmp_path):
    run = campaign(["a", "b"], tmp_path, skills=SKILLS)
    assert read_run_file(CampaignRun, write_run_file(run), {}) == run


# Rows


def test_ten_layers_are_the_ten_depths():
    assert by_depth({layer: layer for layer in range(10)}, 10) == list(range(10))


def test_a_layer_that_is_two_depths_long_counts_in_both():
    assert by_depth({layer: layer for layer in range(5)}, 5) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_layer_that_lies_in_two_depths_counts_by_its_share():
    # Of 15 layers, the first tenth has the first one and half of the second.
    assert by_depth({0: 3.0, 1: 6.0}, 15)[:3] == [4, 6, None]


@pytest.mark.parametrize("n_layers", [1, 3, 12, 30, 61])
def test_means_by_depth_are_those_of_points_along_the_model(n_layers):
    values = {layer: layer**2 for layer in range(n_layers) if layer % 4 != 2}
    expected = []
    for depth in range(10):
        points = [Fraction(2 * (depth * n_layers + i) + 1, 20 * n_layers) for i in range(n_layers)]
        met = [values[layer] for point in points if (layer := int(point * n_layers)) in values]
        expected.append(pytest.approx(sum(met) / len(met)) if met else None)
    assert by_depth(values, n_layers) == expected


def mean(model, genre, probe, accuracy, shots=0):
    return Average(model, shots, genre, probe, accuracy, 0.0, 1.0, 2, 0.5, 0.25, False)


def test_the_best_probe_over_all_genres_stands_beside_lm_prob_in_each():
    accuracy = [
        *(mean("m", "fact", probe, value) for probe, value in (("lm", 0.5), ("polar", 0.9), ("magn", 0.4))),
        *(mean("m", "", probe, value) for probe, value in (("lm", 0.5), ("polar", 0.6), ("magn", 0.75))),
        mean("other", "", "lm", 0.5),
        mean("other", "", "polar", 0.25),
    ]
    found = [(row.model, row.genre, row.probe, row.accuracy, row.lm, row.gain) for row in gains(accuracy)]
    assert found == [
        ("m", "fact", "magn", 0.4, 0.5, pytest.approx(-0.1)),
        ("m", "", "magn", 0.75, 0.5, 0.25),
        ("other", "", "polar", 0.25, 0.5, -0.25),
    ]


def test_datasets_of_one_genre_have_no_column_of_all_genres():
    means = [mean("m", genre, probe, 0.5) for genre in ("fact", "") for probe in ("lm", "polar")]
    text = printed(campaign_tables(Comparison([OutcomeRow("m", "m", "mceval8k", "whole", 0, "")], means)))
    assert ".500" in text and "genres" not in text


# A whole campaign


def test_models_that_fail_are_named_with_the_reason_and_the_others_go_on(run, results):
    outcomes = {(row["name"], row["stage"]): row for row in table(run, "outcomes")}
    assert {key: row["outcome"] for key, row in outcomes.items()} == {
        (name, stage): "failed" if name in ("torn", "unknown") else "whole"
        for name in ("tiny-llama", "tiny-neox", "torn", "unknown")
        for stage in ("mceval8k", "linearity")
    }
    for stage in ("mceval8k", "linearity"):
        assert "could not be loaded" in outcomes["torn", stage]["reason"]
        assert "unheard-of" in outcomes["unknown", stage]["reason"]
    assert {problem.split(":")[0] for problem in results.problems} == {
        f"{name}, {stage}" for name in ("torn", "unknown") for stage in ("mceval8k", "linearity")
    }
    assert all("\n" not in problem for problem in results.problems)
    assert len(results.problems) == sum(row["n_problems"] for row in outcomes.values())


def test_the_comparison_holds_the_numbers_of_the_single_runs(run, results, whole_models):
    for model in whole_models:
        single = run.directory / run.folders[model]
        averages = read(single / "mceval8k" / "averages.arrow")
        assert [row for row in table(run, "accuracy") if row["model"] == model] == averages != []
        ranges, agreement, sizes = (
            [row for row in read(single / "linearity" / "linearity" / f"{name}.arrow") if row.get("range", 2) == 2]
            for name in ("ranges", "agreement", "sizes")
        )
        (row,) = [row for row in table(run, "linearity") if row["model"] == model]
        assert (row["range"], row["n_prompts"], row["n_neurons"]) == (2, 2, 6)
        assert row["linear_share"] == ranges[0]["linear_share"]
        assert row["positive_share"] == ranges[0]["positive_share"]
        assert row["pearson"] == agreement[0]["pearson"]
        assert (agreement[0]["estimator"], agreement[0]["layer"], ranges[0]["layer"]) == ("neurgrad", None, None)
        for measure, of_layers in (("linear_share", ranges), ("median_size", sizes)):
            name = {"median_size": "q50"}.get(measure, measure)
            by_layer = {row["layer"]: row[name] for row in of_layers[1:]}
            rows = [row for row in table(run, "profiles") if (row["model"], row["measure"]) == (model, measure)]
            assert [row["value"] for row in rows] == by_depth(by_layer, 3)
            assert [row["high"] for row in rows] == [depth / 10 for depth in range(1, 11)]


def test_the_same_campaign_again_computes_nothing_and_writes_the_same_bytes(run, results):
    before = files(run)
    again = run_campaign(run, PlainSteps())
    assert sum(part.n_computed for part in again.extracted) == 0
    assert sum(part.n_reused for part in again.extracted) == sum(part.n_computed for part in results.extracted) > 0
    assert again.problems == results.problems
    assert files(run) == before


def test_a_copied_campaign_is_finished_where_it_is_and_the_original_is_left_alone(run, results, tmp_path):
    copy = shutil.copytree(run.directory, tmp_path / "copy")
    for study in ("mceval8k", "linearity"):
        next((copy / "tiny-llama" / study).rglob("part-*.json")).unlink()
    before = everything(run.directory)
    there = recorded_run(copy)
    again = run_campaign(there, PlainSteps())
    assert sum(part.n_computed for part in again.extracted) == 2
    timed = Path("tiny-llama/linearity/linearity/costs.arrow")
    assert {**files(there), timed: b""} == {**files(run), timed: b""}
    assert everything(run.directory) == before
    for file in (copy / "run.yaml", copy / "tiny-llama" / "linearity" / "run.yaml"):
        assert yaml.safe_load(file.read_text())["out"] == str(file.parent)


def everything(directory):
    """Every file and directory below one, and the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_campaign_whose_directory_is_moved_meanwhile_is_not_whole_and_goes_on_there(
    whole_models, tmp_path, monkeypatch
):
    honest, begun = ModelWorker.run, []

    def moved(self, job):
        begun.append(job)
        if len(begun) == 3:
            (tmp_path / "run").rename(tmp_path / "moved")
        return honest(self, job)

    monkeypatch.setattr(ModelWorker, "run", moved)
    results = run_campaign(campaign(whole_models[:1], tmp_path / "run", stage=["mceval8k"]), PlainSteps())
    assert any(f"{tmp_path / 'run'} was moved or emptied while the run went on" in one for one in results.problems)
    assert not list((tmp_path / "run").rglob("manifest.json"))
    for left in (tmp_path / "moved").rglob(CLAIM_FILE):
        left.unlink()  # of this process, which lives
    again = run_campaign(recorded_run(tmp_path / "moved"), PlainSteps())
    assert again.problems == []
    assert sum(part.n_reused for part in again.extracted) == 2


def test_a_model_that_is_mended_is_all_that_is_computed(models, tmp_path):
    copies = [str(shutil.copytree(model, tmp_path / Path(model).name)) for model in models[1:3]]
    mended = campaign(copies, tmp_path / "run", stage=["mceval8k"])
    assert run_campaign(mended, PlainSteps()).problems
    save_tiny_model("qwen2", Path(copies[1]), n_positions=4096)
    again = run_campaign(mended, PlainSteps())
    assert again.problems == []
    assert {part.place.model for part in again.extracted if part.n_computed} == {copies[1]}
    assert {row.outcome for row in again.comparison.outcomes} == {"whole"}


def test_a_campaign_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(run, results, tmp_path, monkeypatch):
    honest, begun = ModelWorker.run, []

    def interrupted(self, job):
        begun.append(job)
        if len(begun) == 8:  # in the middle of the second model
            raise KeyboardInterrupt
        return honest(self, job)

    again = run.model_copy(update={"out": tmp_path / "run", "stage": ("mceval8k",)})
    monkeypatch.setattr(ModelWorker, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_campaign(again, PlainSteps())
    assert not (again.directory / "campaign").exists()
    monkeypatch.setattr(ModelWorker, "run", honest)
    resumed = run_campaign(again, PlainSteps())
    assert sum(part.n_reused for part in resumed.extracted) == 7
    for name in ("accuracy", "gains"):
        assert table(again, name) == table(run, name)


def test_a_request_to_stop_ends_the_campaign_and_not_only_its_part(run, results):
    stages = PlainSteps()
    stages.stop.set()
    with pytest.raises(Stopped):
        run_campaign(run, stages)


def test_an_error_that_stops_the_threads_of_its_part_stops_no_other(run, results, whole_models, monkeypatch):
    """Nothing is wrong with the model: the directory fails while its probes already wait."""

    def failing(root, parts):
        if "tiny-llama" in str(root):
            raise OSError("disk gone")

    monkeypatch.setattr("flows.extraction.write_plan_file", failing)
    partial = run_campaign(run.model_copy(update={"model": tuple(whole_models)}), PlainSteps())
    assert partial.problems == ["tiny-llama, mceval8k: OSError: disk gone"]
    assert [row.outcome for row in partial.comparison.outcomes] == ["failed", "whole", "whole", "whole"]


def test_rows_that_are_set_aside_are_named_by_model_and_stage(whole_models, tmp_path, monkeypatch):
    run = campaign(whole_models[:1], tmp_path / "run", stage=["mceval8k"])
    (model,) = plan(run.steps[0].run.settings[0], tolerant=True)
    poison, honest = model.datasets[0].splits[0].examples[3].id, ModelWorker._measure

    def failing(self, job, examples):
        if poison in [example.id for example in examples]:
            raise RuntimeError("poison row")
        return honest(self, job, examples)

    monkeypatch.setattr(ModelWorker, "_measure", failing)
    results = run_campaign(run, PlainSteps())
    assert results.problems == []
    (row,) = results.set_aside
    assert row.startswith(f"tiny-llama, mceval8k: {poison}: ")
    assert "poison row" in row


def n_steps_of(run):
    return count_campaign_steps(run, plan_campaign(run))


def test_progress_counts_what_can_be_planned(run, results):
    steps = {}

    class Watcher:
        def advance(self, progress):
            steps[progress.step] = progress.done

        def finish(self, step, error): ...

        def tell(self, line): ...

    with handing_over() as given:
        given.watcher = Watcher()
        run_campaign(run, PlainSteps())
    of_whole = {step: done for step, done in steps.items() if "torn" not in step}
    assert sum(of_whole.values()) == n_steps_of(run) > 0
    for unusable in run.model[2:]:  # torn, and not there: nothing of them can be planned
        assert n_steps_of(run.model_copy(update={"model": (unusable,)})) == 0


def test_skill_neurons_have_a_profile_that_adds_up(whole_models, tmp_path):
    run = campaign(whole_models[:1], tmp_path / "run", stage=["skills"], skills=SKILLS)
    results = run_campaign(run, PlainSteps())
    assert results.problems == []
    profiles = table(run, "profiles")
    assert {(row["measure"], row["probe"], row["top"]) for row in profiles} == {
        ("skill_share", "magn", top) for top in (4, 8, 12)
    }
    for top in (4, 8, 12):
        assert sum(row["value"] for row in profiles if row["top"] == top) == pytest.approx(1)
    text = printed(campaign_tables(results.comparison))
    assert "share of skill neurons (Magn)" in text
    assert "8 best" in text
    assert "4 best" not in text


# What is shown


def test_tables_fit_the_screen_and_have_every_model(results):
    text = printed(campaign_tables(results.comparison))
    assert max(map(len, text.splitlines())) <= 100
    for heading in ("Models and stages", "Mean accuracy", "Best probe", "Linearity within ±2", "Layer profiles"):
        assert heading in text
        section = text.split(heading, 1)[1]
        assert "tiny-llama" in section
        assert "tiny-neox" in section
    assert "unheard-of" in text


def test_floors_without_a_model_stand_once_and_those_of_models_for_each(results, whole_models):
    tables = campaign_tables(results.comparison)
    (table,) = [table for table in tables if table.key == "campaign-accuracy-zero-shot"]
    rows = [["".join(piece.text for piece in cell) for cell in row] for block in table.pieces for row in block]
    names = [results.comparison.names[model] for model in whole_models]
    labels = [row[0] for row in rows]
    assert labels[:2] == ["floors", "random\nmajority\noptions"]
    assert labels[2 : 2 * len(names) + 4] == ["calibrated LM-Prob", *names, "label mass", *names]
    for mean in results.comparison.accuracy:
        if (mean.shots, mean.genre, mean.probe, mean.model) == (0, "", "lm", whole_models[0]):
            shown = [rows[1], rows[3], rows[4 + len(names)]]
            assert [row[-1] for row in shown] == [
                "\n".join(map(share, (mean.random, mean.majority, mean.options_only))),
                share(mean.calibrated),
                share(mean.label_mass),
            ]
    for row in results.comparison.gains:
        assert None not in (row.options_only, row.calibrated, row.label_mass)


def test_averages_over_fewer_datasets_than_another_models_say_so(results):
    comparison = results.comparison
    assert "(1)" not in printed(campaign_tables(comparison))
    fewer = [
        Average(**row.__dict__ | {"n_datasets": 1}) if "llama" in row.model and not row.genre else row
        for row in comparison.accuracy
    ]
    assert "(1)" in printed(campaign_tables(type(comparison)(comparison.outcomes, fewer)))


def records(comparison):
    return {table.key.split("-")[1]: table.records() for table in campaign_tables(comparison)}


def test_artifacts_hold_names_and_numbers_only(results):
    shown = records(results.comparison)
    assert set(shown) == set(TABLES) - {"neg_profiles"}
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert "unheard-of" not in json.dumps(shown)
    assert {row["model"] for row in shown["outcomes"]} == {"tiny-llama", "tiny-neox", "torn", "unknown"}


def test_numbers_that_are_none_are_shown_as_such(results):
    (row, *_), outcomes = results.comparison.linearity, results.comparison.outcomes
    lost = type(row)(**row.__dict__ | {"positive_share": nan, "pearson": None})
    comparison = type(results.comparison)(outcomes, linearity=[lost])
    assert records(comparison)["linearity"][0]["NEG > 0"] is None
    assert "Linearity" in printed(campaign_tables(comparison))


def test_the_command_ends_in_the_comparison_and_exit_code_1(run, results, tmp_path):
    copy = shutil.copytree(run.directory, tmp_path / "run")
    ran = neg("campaign", copy, "--out", copy, "--stage", "mceval8k", "--orchestrator", "none")
    assert ran.returncode == 1, ran.stderr
    assert printed([next(table for table in campaign_tables(results.comparison) if "zero" in table.title)]) in (
        ran.stdout
    )
    assert f"written to {copy}" in ran.stdout
    missing = [problem for problem in results.problems if ", mceval8k: " in problem]
    warned = [warning for warning in results.warnings if ", mceval8k: " in warning]
    expected = [*(f"missing: {problem}" for problem in missing), *(f"warning: {warning}" for warning in warned)]
    assert ran.stderr.splitlines() == expected
    assert missing and warned


def test_the_help_shows_a_run_file():
    shown = neg("campaign", "--help")
    assert "neg campaign" in shown.stdout.split("Example", 1)[1]
    assert "mceval8k: {dataset:" in shown.stdout
    assert "--linearity" not in shown.stdout
