"""Probes of every kind over several datasets: from NEG shards to averages, tables and saved probes."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pyarrow as pa
import pytest
from rich.console import Console
from support import SHARED, neg, save_tiny_model

from flows.pipeline import run_mceval8k, run_pipeline, run_probe
from flows.show.accuracy_tables import PROBE_TITLES, accuracy_tables, comparison_table, confusion_tables, rows_table
from flows.show.text import share
from negcore.analysis.neurons import top_neurons
from negcore.errors import DatasetError, NegError, RunError
from negcore.probing.evaluation import Accuracy, accuracy, macro_average
from negcore.probing.saved_probes import load_probe
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.reading import read_run_file
from tasks.config.run_file import write_run_file
from tasks.neurons import NeuronRow
from tasks.plan import plan
from tasks.pool.base import Stopped
from tasks.probe import RECIPES, AccuracyRow, Confusion, Prober, probe_path
from tasks.rank import RankWorker, rank_pool
from tasks.results import averages
from tasks.rundir.tables import read_table, write_table
from tasks.steps import PlainSteps, Step

MCEVAL8K = SHARED / "mceval8k"
needs_mceval8k = pytest.mark.skipif(not MCEVAL8K.is_dir(), reason="MCEval8K is not beside the repository")
PLAIN = {"backend": "local", "shard_rows": 8, "workers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama", n_positions=4096))


def write_questions(file, n_options=3, groups=("",), n=60):
    rng = random.Random(n_options)
    words = "the best of times it was capital France Germany Paris Berlin one two three".split()  # noqa: SIM905
    lines = []
    for index in range(n):
        prompt = f"Question {index}: " + " ".join(rng.choices(words, k=rng.randint(2, 9))) + " Answer:"
        row = {"prompt": prompt, "labels": [" A", " B", " C"][:n_options], "answer": index % n_options}
        row |= {"group": groups[index // n_options % len(groups)], "split": ("train", "valid", "test")[index * 3 // n]}
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines))
    return str(file)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [write_questions(folder / "three.jsonl", 3, ("de", "en")), write_questions(folder / "two.jsonl", 2)]


@pytest.fixture(scope="module")
def run(model, questions, tmp_path_factory):
    values = {**PLAIN, "model": [model], "dataset": questions, "max_neurons": 64, "tree_neurons": 50, "confusion": True}
    values |= {"probe": list(RECIPES), "out": tmp_path_factory.mktemp("run")}
    return read_run_file(SkillRun, None, values)


@pytest.fixture(scope="module")
def results(run):
    results = run_pipeline(run, PlainSteps())
    assert results.problems == []
    return results


def read(path):
    return pa.ipc.open_file(path).read_all().to_pylist()


def printed(tables):
    console = Console(width=100, record=True, force_terminal=False)
    for table in tables:
        console.print(table)
    return console.export_text()


# A whole run


def test_every_probe_answers_every_dataset_and_each_of_its_groups(run, results):
    assert [(s.dataset, s.group, s.probe) for s in results.scores] == [
        (dataset, group, probe)
        for dataset, groups in (("local/three", ("", "de", "en")), ("local/two", ("",)))
        for probe in ("lm", *RECIPES)
        for group in groups
    ]
    assert {s.n_neurons for s in results.scores if s.probe == "tree"} == {50}
    assert {s.n_neurons for s in results.scores if s.probe == "lm"} == {None}


def test_every_accuracy_has_all_floors_and_the_label_mass_of_its_rows_beside_it(run, results):
    for score in results.scores:
        test = open_negs(run.directory).select(dataset=score.dataset, split="test")
        rows = [row for row, group in enumerate(test.groups) if score.group in ("", group)]
        mass = sum(float(prob) for row in rows for prob in test.probs_PO[row]) / len(rows)
        assert score.label_mass == pytest.approx(mass, rel=1e-12)
        assert 0 <= score.options_only <= 1 and 0 <= score.calibrated <= 1
        assert (score.random, score.n_test) == (1 / test.n_options, len(rows))
    assert len({(s.dataset, s.group, s.options_only, s.calibrated, s.label_mass) for s in results.scores}) == 4


def test_a_model_that_hardly_considers_the_options_is_warned_about_in_the_terminal_and_the_report(run, results):
    (warning,) = results.warnings
    for part in ("tiny-llama, zero-shot: less than half", "local/three 0.0", "local/two 0.0"):
        assert part in warning
    report = (run.directory / "report.html").read_text()
    assert "Warnings: 1" in report and "less than half of the model&#39;s probability" in report
    ran = neg("probe", run.directory, "--out", run.directory, "--orchestrator", "none")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines() == [f"warning: {warning}"]


def test_random_neurons_and_logistic_regression_have_the_number_of_the_probe_they_stand_beside(results):
    kept = {(s.dataset, s.probe): s.n_neurons for s in results.scores}
    for (dataset, probe), n_neurons in kept.items():
        base, _, baseline = probe.partition("-")
        if baseline in ("random", "logistic"):
            assert n_neurons == kept[dataset, base]


def test_groups_add_up_to_their_dataset(results):
    for probe in ("lm", *RECIPES):
        whole, *groups = (s for s in results.scores if (s.dataset, s.probe) == ("local/three", probe))
        assert sum((Accuracy(s.n_correct, s.n_test) for s in groups[1:]), Accuracy(*counts(groups[0]))) == Accuracy(
            *counts(whole)
        )


def counts(score):
    return score.n_correct, score.n_test


def test_confusion_counts_every_prompt_once_and_right_answers_on_the_diagonal(results):
    for score in (s for s in results.scores if not s.group):
        counts = [c for c in results.confusion if (c.dataset, c.probe) == (score.dataset, score.probe)]
        assert sum(c.n for c in counts) == score.n_test
        assert sum(c.n for c in counts if c.gold == c.predicted) == score.n_correct


def test_a_saved_probe_gives_the_accuracy_of_the_table(run, results):
    for score in (s for s in results.scores if not s.group and s.probe != "lm"):
        test = open_negs(run.directory).select(dataset=score.dataset, split="test")
        saved = load_probe(probe_path(run.directory, score.model, score.dataset, score.probe))
        assert accuracy(test.gold_P, saved.predict(test)) == Accuracy(*counts(score))
        assert (
            saved.origin.digest == open_negs(run.directory).select(dataset=score.dataset, split="train").identity.digest
        )


def test_the_tables_on_disk_hold_what_was_shown(run, results):
    directory = run.directory
    tables = {"accuracy": results.scores, "averages": results.averages, "splits": results.splits}
    for name, rows in (tables | {"comparisons": results.comparisons}).items():
        assert [tuple(row.values()) for row in read(directory / f"{name}.arrow")] == [
            tuple(vars(r).values()) for r in rows
        ]
    assert len(read(directory / "confusion.arrow")) == len(results.confusion) == 13 * (9 + 4)
    assert read(directory / "accuracy.arrow")[0].keys() == AccuracyRow.__dataclass_fields__.keys()


def test_every_answer_of_every_probe_is_a_row_of_a_table_that_adds_up_to_the_accuracies(run, results):
    rows = read(run.directory / "predictions.arrow")
    assert len(rows) == sum(s.n_test for s in results.scores if not s.group)
    for score in results.scores:
        own = [
            row
            for row in rows
            if (row["model"], row["shots"], row["dataset"], row["probe"])
            == (score.model, score.shots, score.dataset, score.probe)
            and score.group in ("", row["group"])
        ]
        assert (sum(row["right"] for row in own), len(own)) == counts(score)
        assert all(row["right"] == (row["gold"] == row["predicted"]) for row in own)


def test_the_answers_in_the_table_are_those_of_the_saved_probes_row_by_row(run, results):
    rows = read(run.directory / "predictions.arrow")
    for dataset in ("local/three", "local/two"):
        test = open_negs(run.directory).select(dataset=dataset, split="test")
        for probe in RECIPES:
            own = [row for row in rows if (row["dataset"], row["probe"]) == (dataset, probe)]
            saved = load_probe(probe_path(run.directory, test.place.model, dataset, probe))
            assert [row["id"] for row in own] == test.ids
            assert [row["group"] for row in own] == test.groups
            assert [row["gold"] for row in own] == test.gold_P.tolist()
            assert [row["predicted"] for row in own] == saved.predict(test).tolist()


def test_every_two_probes_are_compared_and_the_sentences_are_on_the_page(run, results):
    n_pairs = len(RECIPES) * (len(RECIPES) + 1) // 2
    assert [row.dataset for row in results.comparisons] == [
        dataset for dataset in ("local/three", "local/two", "") for _ in range(n_pairs)
    ]
    accuracies = {(s.dataset, s.probe): s.accuracy for s in results.scores if not s.group}
    for row in results.comparisons[: 2 * n_pairs]:
        difference = accuracies[row.dataset, row.first] - accuracies[row.dataset, row.second]
        assert row.difference == pytest.approx(difference)
    assert "told apart on these 20 rows" in (run.directory / "report.html").read_text()


def test_names_in_the_table_of_answers_are_stored_once(run, results):
    schema = pa.ipc.open_file(run.directory / "predictions.arrow").schema
    names = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    assert names == ["model", "dataset", "group", "probe", "id"]


def test_the_best_neurons_of_every_vote_probe_are_a_table(run, results):
    rows = read_table(run.directory / "neurons.arrow", NeuronRow)
    assert rows == results.neurons
    votes = {name: recipe.vote for name, recipe in RECIPES.items() if recipe.kind == "vote"}
    assert [(row.dataset, row.probe, row.place) for row in rows] == [
        (dataset, probe, place) for dataset in ("local/three", "local/two") for probe in votes for place in range(1, 21)
    ]
    for dataset, labels in (("local/three", [" A", " B", " C"]), ("local/two", [" A", " B"])):
        train = open_negs(run.directory).select(dataset=dataset, split="train")
        for probe, vote in votes.items():
            own = [row for row in rows if (row.dataset, row.probe) == (dataset, probe)]
            expected = top_neurons(train, *vote, seed=run.seed)
            assert [{**vars(one)} for one in expected] == [{k: vars(r)[k] for k in vars(expected[0])} for r in own]
            assert all((row.labels, row.group, row.shots) == (labels, "", 0) for row in own)
            assert all(0 <= row.agreement <= 1 and 1 <= row.place_low <= row.place_high <= 72 for row in own)


def test_probing_again_on_more_workers_gives_the_same(run, results):
    answers = (run.directory / "predictions.arrow").read_bytes()
    again = run_probe(run.model_copy(update={"workers": 1}), PlainSteps())
    assert (run.directory / "predictions.arrow").read_bytes() == answers
    assert (again.scores, again.neurons) == (results.scores, results.neurons)


def test_a_block_that_cannot_be_ranked_is_a_problem_of_its_dataset_alone(run, monkeypatch):
    honest = RankWorker.run

    def failing(self, job):
        if job.place.dataset == "local/two" and job.first_layer:
            raise OSError("disk gone")
        return honest(self, job)

    monkeypatch.setattr(RankWorker, "run", failing)
    results = run_probe(run.model_copy(update={"probe": ("magn",), "confusion": False}), PlainSteps())
    assert {s.dataset for s in results.scores} == {"local/three"}
    (problem,) = results.problems
    assert "local/two: layers 1..2 cannot be ranked: OSError: disk gone" in problem


def test_ray_actors_rank_as_the_local_worker_does(run, results, tmp_path):
    other = run.model_copy(update={"backend": "ray", "probe": ("magn", "act")})
    found = run_probe(other, PlainSteps())
    assert found.scores == [s for s in results.scores if s.probe in ("lm", "magn", "act")]
    assert found.neurons == [row for row in results.neurons if row.probe == "magn"]


def test_models_that_are_asked_the_same_text_share_it(run, tmp_path):
    other = str(save_tiny_model("gpt2", tmp_path / "other"))
    first, second = plan(run.model_copy(update={"model": (*run.model, other)}))
    for a, b in zip(first.datasets, second.datasets, strict=True):
        assert a.dataset is b.dataset
        assert a.splits[0].identity.digest != b.splits[0].identity.digest


def test_whoever_waits_for_a_turn_stops_when_the_run_does(run, results):
    step = Step()
    (planned,) = plan(run)
    with rank_pool(run) as pool:
        prober = Prober(pool)
        with prober._turn, ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(prober.probe, run, planned.datasets[0], step)
            step.stop.set()
        with pytest.raises(Stopped):
            waiting.result(timeout=10)


# Averages and tables


def score(dataset, genre, n_correct, n_test=10, probe="magn", group="", **changes):
    low, high = Accuracy(n_correct, n_test).interval
    fields = {"model": "m", "shots": 0, "n_neurons": 16384, "n_train": 6000, "majority": 0.5, "random": 0.25}
    fields |= {"overlapping": False, "accuracy": n_correct / n_test, "low": low, "high": high}
    fields |= {"n_correct": n_correct, "n_test": n_test, "genre": genre, "dataset": dataset, "group": group}
    return AccuracyRow(**fields | {"probe": probe} | changes)


def test_averages_by_pencil_count_datasets_the_same_and_groups_not_at_all():
    rows = [
        score("a", "fact", 2),
        score("a", "fact", 9, group="en"),
        score("b", "fact", 400, 1000, majority=0.7),
        score("c", "nli", 9, random=0.5, overlapping=True),
    ]
    found = {mean.genre: mean for mean in averages(rows)}
    assert {genre: mean.n_datasets for genre, mean in found.items()} == {"fact": 2, "": 3, "nli": 1}
    assert found["fact"].accuracy == pytest.approx((0.2 + 0.4) / 2)
    assert found[""].accuracy == pytest.approx((0.2 + 0.4 + 0.9) / 3)
    assert found["fact"].majority == pytest.approx(0.6)
    assert found[""].random == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert [found[genre].overlapping for genre in ("fact", "nli", "")] == [False, True, True]
    assert (found["nli"].low, found["nli"].high) == pytest.approx(Accuracy(9, 10).interval)


def test_averages_keep_models_shots_and_probes_apart():
    rows = [score("a", "fact", n, probe=probe, model=model, shots=shots) for n, (model, shots, probe) in enumerate(
        [("m", 0, "magn"), ("m", 0, "lm"), ("m", 1, "lm"), ("n", 0, "lm")]
    )]  # fmt: skip
    assert {(mean.model, mean.shots, mean.probe, mean.accuracy) for mean in averages(rows)} == {
        ("m", 0, "magn", 0.0),
        ("m", 0, "lm", 0.1),
        ("m", 1, "lm", 0.2),
        ("n", 0, "lm", 0.3),
    }


def test_the_interval_of_an_average_covers_the_true_mean_about_as_often_as_it_says():
    rng, true = random.Random(0), (0.3, 0.6, 0.95)
    covered = 0
    for _ in range(200):
        drawn = [Accuracy(sum(rng.random() < p for _ in range(60)), 60) for p in true]
        low, high = macro_average(drawn).interval
        covered += low <= sum(true) / 3 <= high
    assert 0.9 <= covered / 200 <= 0.99


def test_the_widest_table_fits_a_terminal_of_100_columns():
    probes = ["lm", "polar", "magn", "act", "tree", "magn-gxa", "magn-logistic"]
    rows = [
        score(f"mceval8k/{name}", genre, 1000, 1000, probe=probe, overlapping=True)
        for name, genre in [("amazon-review-multi", "multilingual"), ("xnli", "multilingual"), ("fever", "fact")]
        for probe in probes
    ]
    text = printed(accuracy_tables(rows, averages(rows), n_datasets=5))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "amazon-review-multi" in text
    assert "overlapping" in text
    assert "average of 3" in text
    assert "(2 missing)" in text
    assert text.count("Accuracy on test: m, zero-shot") == 2  # seven probes


def test_the_table_of_one_dataset_has_no_averages(results):
    one = [s for s in results.scores if s.dataset == "local/two"]
    text = printed(accuracy_tables(one, [], n_datasets=1))
    assert "average" not in text.lower()
    assert "local/two" in text


def test_languages_have_rows_of_their_own(results):
    lines = [line.strip() for line in printed(accuracy_tables(results.scores, results.averages, 2)).splitlines()]
    assert sum(line.startswith("de ") for line in lines) == sum(line.startswith("en ") for line in lines) == 3


def test_confusion_tables_show_every_dataset(results):
    text = printed(confusion_tables(results.confusion))
    assert text.count("answers by gold option") == 2
    counts = [
        Confusion("m", 0, "d", "lm", gold, predicted, 10 * gold + predicted) for gold in (0, 1) for predicted in (0, 1)
    ]
    assert [line.split() for line in printed(confusion_tables(counts)).splitlines() if line][-2:] == [
        ["LM-Prob", "0", "0", "1"],
        ["1", "10", "11"],
    ]


def test_artifacts_have_every_score(results):
    tables = list(accuracy_tables(results.scores, results.averages, results.n_datasets))
    records = [table.records() for table in tables]
    assert len({table.key for table in tables}) == len(tables)
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    titles = {probe: title.replace("\n", " ") for probe, title in PROBE_TITLES.items()}
    for score in results.scores:
        name = f"  {score.group}" if score.group else score.dataset
        shown = [
            row[titles[score.probe]]
            for own in records
            for row in own
            if titles[score.probe] in row and row["dataset"] == name
        ]
        assert any(cell.startswith(share(score.accuracy)) for cell in shown)


# MCEval8K


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    """Three datasets that work and one whose files are missing."""
    names = ["fever", "commonsenseqa", "mlama", "chunking"]
    root = tmp_path_factory.mktemp("benchmark")
    for folder in ("fact", "multilingual", "linguistic/ner"):
        (root / folder).parent.mkdir(exist_ok=True)
        (root / folder).symlink_to(MCEVAL8K / folder)
    values = {**PLAIN, "model": [model], "dataset": [f"mceval8k/{name}" for name in names], "mceval8k": root}
    values |= {"limit": 20, "max_neurons": 16, "tree_neurons": 32, "out": tmp_path_factory.mktemp("mceval8k")}
    return read_run_file(EvaluationRun, None, values)


@needs_mceval8k
def test_a_dataset_that_cannot_be_evaluated_is_named_and_the_others_go_on(small):
    results = run_mceval8k(small, PlainSteps())
    (problem,) = results.problems
    assert "no linguistic/chunking/test.json in folder" in problem
    done = {(s.shots, s.genre, s.dataset) for s in results.scores}
    names = {("fact", "mceval8k/fever"), ("fact", "mceval8k/commonsenseqa"), ("multilingual", "mceval8k/mlama")}
    assert done == {(shots, *name) for shots in (0, 1) for name in names}
    assert {s.group for s in results.scores if s.dataset == "mceval8k/mlama"} == {"", "de", "en", "es", "fr", "zh"}
    assert {(a.shots, a.genre, a.n_datasets) for a in results.averages} == {
        (shots, *rest) for shots in (0, 1) for rest in (("fact", 2), ("multilingual", 1), ("", 3))
    }
    fever = {a.split: a for a in results.splits if (a.dataset, a.shots) == ("mceval8k/fever", 1)}
    assert fever["valid"].n_released == 1000
    doubles = "dropped: asked before in the split"
    assert fever["valid"].changes == f"66 {doubles}; 934 dropped: also in test; 1000 drawn from train"
    contradictions = "1 dropped: same text with another answer in the split"
    shown = "1000 moved to valid; 2 shown as demonstrations"
    assert fever["train"].changes == f"546 {doubles}; {contradictions}; {shown}"
    assert fever["test"].changes == f"66 {doubles}"
    text = printed([rows_table(results.splits), *accuracy_tables(results.scores, results.averages, results.n_datasets)])
    assert text.count("average of 3") == 2
    assert "(1 missing)" in text
    assert sorted(path.name for path in small.directory.glob("shots-*")) == ["shots-0", "shots-1"]


@needs_mceval8k
def test_a_setting_of_the_evaluation_can_be_probed_alone(small):
    write_run_file(small.settings[1])
    one = read_run_file(SkillRun, small.directory / "shots-1", {})
    assert one == small.settings[1]
    assert one.shots == 1


@needs_mceval8k
def test_overlapping_splits_are_marked_under_released(small):
    (planned,) = plan(small.settings[0].model_copy(update={"split_policy": "released", "dataset": ("mceval8k/ner",)}))
    assert planned.datasets[0].dataset.split_report.is_overlapping


def test_where_no_dataset_can_be_used_the_first_reason_is_the_error(model, tmp_path):
    values = {**PLAIN, "model": [model], "mceval8k": tmp_path / "absent", "out": tmp_path}
    with pytest.raises(DatasetError, match="absent' is not a folder"):
        run_mceval8k(read_run_file(EvaluationRun, None, values), PlainSteps())


def test_by_default_all_22_datasets_are_evaluated_both_ways(model):
    run = read_run_file(EvaluationRun, None, {"model": [model]})
    assert len(run.dataset) == 22
    assert [setting.shots for setting in run.settings] == [0, 1]
    assert run.probe == ("polar", "magn", "act", "tree")


@needs_mceval8k
def test_the_command_shows_the_tables_and_exits_with_1_for_what_is_missing(small):
    ran = neg(
        "mceval8k", write_run_file(small), "--orchestrator", "none", "--shots", "0", "--probe", "magn", "--confusion"
    )
    assert ran.returncode == 1, ran.stderr
    assert "missing:" in ran.stderr and "chunking" in ran.stderr
    title = "Accuracy on test: tiny-llama, zero-shot"  # not its whole path
    assert title in " ".join(ran.stdout.split())
    assert "fever: answers by gold option" in ran.stdout
    assert "one-shot" not in ran.stdout
    assert max(map(len, ran.stdout.splitlines()[1:-1])) <= 100


# Wordings


OWN = {"instruction": "Judge.", "question": "Claim: {claim}", "option": "({letter}) {text}", "cue": "Verdict:"}


@needs_mceval8k
@pytest.mark.parametrize("by_dataset", [False, True])
def test_a_wording_of_the_run_file_makes_the_prompts(small, tmp_path, by_dataset):
    import yaml

    wording = {"mceval8k/fever": OWN, "mceval8k/mlama": "inline"} if by_dataset else OWN
    names = ["mceval8k/fever", "mceval8k/mlama", "mceval8k/commonsenseqa"] if by_dataset else ["mceval8k/fever"]
    file = tmp_path / "mine.yaml"
    values = {"model": list(small.model), "dataset": names, "limit": 4, "mceval8k": str(MCEVAL8K), "wording": wording}
    file.write_text(yaml.safe_dump(values))
    run = read_run_file(SkillRun, file, {"out": tmp_path / "run"})
    assert read_run_file(SkillRun, write_run_file(run), {}) == run
    (planned,) = plan(run)
    prompts = {d.dataset.name: d.dataset.splits["test"][0].prompt for d in planned.datasets}
    assert prompts["mceval8k/fever"].startswith("Judge.\n\nClaim: ")
    assert prompts["mceval8k/fever"].endswith("\n(A) False\n(B) True\nVerdict:")
    wordings = {d.dataset.name: d.splits[0].identity.prompt["wording"] for d in planned.datasets}
    assert wordings["mceval8k/fever"] == {**OWN, "separator": "\n"}
    if by_dataset:
        assert prompts["mceval8k/mlama"].endswith("The letter of the right option is")
        assert prompts["mceval8k/commonsenseqa"].endswith("Answer:")
        assert wordings["mceval8k/mlama"] == "inline"


@pytest.mark.parametrize(
    ("wording", "says"),
    [
        ({**OWN, "questoin": "x"}, "unknown field 'wording.own.questoin' of a wording; did you mean 'question'?"),
        ({"instruction": "x"}, "'wording.own.question' is missing; Template"),
        ({**OWN, "cue": "Answer: "}, "must not be empty or end in a space"),
        ({**OWN, "option": "{letter.__class__}"}, "asks for 'letter.__class__'; allowed: letter, text"),
        ({**OWN, "question": 3}, "wording.own.question is 3"),
        ({"mceval8k/fevr": "inline"}, "wording names dataset 'mceval8k/fevr', which is not in this run"),
        ([1], r"wording is \[1\]"),
    ],
)
def test_a_bad_wording_is_refused_in_one_line(wording, says):
    with pytest.raises(NegError, match=says) as refused:
        read_run_file(SkillRun, None, {"model": ["m"], "dataset": ["mceval8k/fever"], "wording": wording})
    assert isinstance(refused.value, RunError)
    assert "\n" not in str(refused.value)


@needs_mceval8k
def test_a_wording_that_asks_for_another_field_is_refused_with_the_datasets(small, tmp_path):
    run = small.settings[0].model_copy(update={"dataset": ("mceval8k/fever",)})
    values = run.model_dump(exclude_none=True) | {"wording": {**OWN, "question": "{premise.__class__}"}}
    with pytest.raises(DatasetError, match="asks for 'premise.__class__'; allowed: claim"):
        plan(read_run_file(SkillRun, None, values))


# Runs side by side


def answered(dataset, probe, share, **changes):
    fields = {"model": "m", "shots": 0, "genre": "nli", "group": "", "n_neurons": 4, "low": 0.1, "high": 0.9}
    fields |= {"n_correct": 1, "n_test": 10, "n_train": 20, "majority": 0.5, "random": 0.5, "overlapping": False}
    return AccuracyRow(**(fields | {"dataset": dataset, "probe": probe, "accuracy": share} | changes))


def test_runs_stand_side_by_side_where_two_have_the_dataset():
    clean = [answered("mceval8k/paws", "lm", 0.25), answered("mceval8k/paws", "magn", 0.5)]
    clean.append(answered("mceval8k/ner", "lm", 0.1))
    released = [answered("mceval8k/paws", "magn", 0.75, overlapping=True)]
    released += [answered("mceval8k/paws", "magn", 0.875, group="de")]
    text = printed([comparison_table({"clean": clean, "released[/]": released})])
    assert "ner" not in text and ".875" not in text
    first, second = (line for line in text.splitlines() if "clean" in line or "released[/]" in line)
    assert first.split()[:2] == ["paws", "clean"] and ".250" in first and ".500" in first
    assert ".750" in second and "overlapping" in text


def test_the_best_floor_is_bold_and_a_probe_that_does_not_pass_it_is_marked():
    floors = {"majority": 0.3, "random": 0.25, "options_only": 0.6, "calibrated": 0.4, "label_mass": 0.043}
    rows = [
        answered("mini/nli", probe, share, low=share - 0.1, **floors)
        for probe, share in (("lm", 0.5), ("polar", 0.65), ("magn", 0.75), ("act", 0.3))
    ]
    (table,) = accuracy_tables(rows, [], n_datasets=1)
    (((_, beside, shown, *cells),),) = table.pieces
    assert [(piece.text, piece.style) for piece in shown if piece.text.strip()] == [
        (".250", ""), (".300", ""), (".600", "bold"), (".400", "")
    ]  # fmt: skip
    assert [(piece.text, piece.style) for piece in beside if piece.text.strip()] == [
        ("20", ""),
        ("10", ""),
        (".043", "red"),
    ]
    marked = ["<= floor" in "".join(piece.text for piece in cell) for cell in cells]
    assert marked == [False, True, False, True]  # LM-Prob is no probe of neurons


def test_the_widest_comparison_fits_a_terminal_of_100_columns():
    probes = ("lm", "polar", "magn", "act", "tree")
    rows = [
        answered("mceval8k/amazon-review-multi", probe, 0.25, n_neurons=16384 if probe != "lm" else None, n_train=6000)
        for probe in probes
    ]
    text = printed([comparison_table({"clean": rows, "released": [replace(one, overlapping=True) for one in rows]})])
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text


def test_tables_of_earlier_versions_can_be_compared(tmp_path):
    new = {"options_only", "calibrated", "label_mass"}
    old = pa.schema([field for field in _schema(tmp_path) if field.name not in new])
    for name, value in (("one", 0.25), ("two", 0.75)):
        rows = [asdict(answered("mini/nli", probe, value)) for probe in ("lm", "magn")]
        (tmp_path / name).mkdir()
        with pa.ipc.new_file(tmp_path / name / "accuracy.arrow", old) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=old))
    ran = neg("compare", tmp_path / "one", tmp_path / "two")
    assert ran.returncode == 0, ran.stderr
    assert ".250" in ran.stdout and ".750" in ran.stdout


def _schema(folder):
    write_table(folder / "new.arrow", AccuracyRow, [])
    return pa.ipc.open_file(folder / "new.arrow").schema


def test_runs_are_compared_by_a_command_that_refuses_what_is_none(tmp_path):
    for name, value in (("one", 0.25), ("two", 0.75)):
        write_table(tmp_path / name / "accuracy.arrow", AccuracyRow, [asdict(answered("mini/nli", "lm", value))])
    ran = neg("compare", tmp_path / "one", tmp_path / "two")
    assert ran.returncode == 0 and ".250" in ran.stdout and ".750" in ran.stdout
    alone = neg("compare", tmp_path / "one", tmp_path / "one")
    assert alone.returncode == 2 and "at least two" in alone.stderr
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "accuracy.arrow").write_bytes(b"no table")
    assert "was not written by this version" in neg("compare", tmp_path / "one", tmp_path / "three").stderr
    assert "cannot be read" in neg("compare", tmp_path / "one", tmp_path / "absent").stderr
