"""Causal checks as jobs: what is stored is what the library measures, and only what is missing is computed."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from support import save_tiny_model, write_negs

from negcore.analysis.causal import chosen_neurons, shift_sets, skill_sets
from negcore.analysis.effects import causal_rows
from negcore.errors import ShardError
from negcore.measure.loading import load_model
from negcore.measure.votes import Ranking
from negcore.probing.rankings import Vote, rank_layers
from negcore.store.publish import SetAside
from negcore.store.reader import open_negs
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.measure.causal import plan_causal, read_causal
from tasks.measure.missing import measure_missing
from tasks.measure.worker import ModelWorker
from tasks.plan import plan
from tasks.pool.base import Resources
from tasks.pool.opening import open_pool
from tasks.steps import Step

SHIFTS = (-1.0, 0.5)
MAGN = Vote("magn", "neg")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 36 prompts of different lengths whose NEGs are there."""
    folder = tmp_path_factory.mktemp("causal")
    rng, rows = random.Random(0), []
    words = "the best of times it was capital France Germany Paris Berlin one two three".split()  # noqa: SIM905
    for index in range(36):
        prompt = "Question: secret " + " ".join(rng.choices(words, k=rng.randint(2, 9))) + " Answer:"
        row = {"prompt": prompt, "labels": [" A", " B", " C"], "answer": index % 3}
        rows.append(json.dumps(row | {"split": ("train", "valid", "test")[index // 12]}))
    (folder / "questions.jsonl").write_text("\n".join(rows))
    model = save_tiny_model("llama", folder / "tiny-llama")
    values = {"model": [str(model)], "dataset": [str(folder / "questions.jsonl")], "backend": "local", "shard_rows": 5}
    run = read_run_file(SkillRun, None, values | {"out": folder / "run"})
    extract(run)
    return run


def recipe(run):
    return {"model": run.model[0], "dtype": run.dtype, "device": None, "site": run.site, "threads": 1}


def extract(run):
    (model,) = plan(run)
    with open_pool("local", ModelWorker, recipe(run), Resources(), label="negs") as pool:
        measure_missing(pool, model.datasets[0].splits, run.directory, Step())


def planned_test(run):
    return plan(run)[0].datasets[0].splits[2]


def magn_sets(run, sizes=(2, 8), seed=0):
    train = open_negs(run.directory).select(split="train")
    scores_M = rank_layers(train, range(train.n_layers), [MAGN], act=False).votes_M[MAGN]
    return skill_sets(Ranking.from_scores(scores_M), sizes, train.n_layers, train.n_neurons, draws=2, seed=seed)


def a_part(run, root, shifts=SHIFTS, **settings):
    """The part, in a run directory of its own that shares the NEGs."""
    root.mkdir(exist_ok=True)
    if not (root / "negs").exists():
        (root / "negs").symlink_to(run.directory / "negs")
    return plan_causal(root, planned_test(run), "magn", magn_sets(run, **settings), shifts)


def check(run, root, part):
    """Compute what is missing."""
    with open_pool("local", ModelWorker, recipe(run), Resources(), label="causal") as pool:
        (done,) = measure_missing(pool, [part], root, Step())
    assert done.failures == ()
    return done


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("part-*")}


@pytest.fixture
def checked(run, tmp_path):
    part = a_part(run, tmp_path / "run")
    check(run, tmp_path / "run", part)
    return tmp_path / "run", part


def test_the_shards_hold_what_the_library_measures(run, checked):
    root, part = checked
    examples, sets = planned_test(run).examples, magn_sets(run)
    gold = np.array([example.answer for example in examples])
    negs_POK = open_negs(root).select(split="test").neurons(chosen_neurons(sets))
    expected = shift_sets(
        load_model(run.model[0]),
        [example.prompt for example in examples],
        [example.labels for example in examples],
        gold_P=gold,
        gold_negs_PK=negs_POK[np.arange(len(gold)), gold],
        sets=sets,
        shifts=SHIFTS,
    )
    result = read_causal(root, part)
    assert result.conditions == expected.conditions and len(result.conditions) == 2 * 4 * 2 * 2
    assert result.gold_P.tolist() == gold.tolist()
    np.testing.assert_allclose(result.base_probs_PO, expected.base_probs_PO, rtol=1e-4)
    np.testing.assert_allclose(result.probs_PMO, expected.probs_PMO, rtol=1e-4)


def test_a_table_is_made_of_what_was_stored(checked):
    root, part = checked
    rows = causal_rows("magn", read_causal(root, part), n_bootstrap=20)
    assert [(row.neurons, row.size, row.direction, row.shift) for row in rows] == [
        (neurons, size, direction, shift)
        for size in (2, 8)
        for neurons in ("top", "random", "bottom")
        for direction in ("gold", "polarity")
        for shift in SHIFTS
    ]
    assert all(row.n_prompts == 12 for row in rows)
    assert all(
        (row.prob_change > 0) == (row.shift > 0) for row in rows if (row.neurons, row.direction) == ("top", "gold")
    )


def test_a_finished_check_is_not_computed_again(run, checked, monkeypatch):
    root, part = checked
    monkeypatch.setattr("tasks.measure.worker.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    again = check(run, root, a_part(run, root))
    assert (again.n_reused, again.n_computed) == (3, 0)


def test_only_a_damaged_shard_is_computed_again_and_has_the_same_bytes(run, checked):
    root, part = checked
    folder = part.place.path(root)
    before = contents(folder)
    shard = folder / "part-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ShardError, match=r"part-00001.arrow' is damaged \(.* bytes long"):
        read_causal(root, part)
    again = check(run, root, part)
    assert (again.n_reused, again.n_computed) == (2, 1)
    assert contents(folder) == before and len(before) == 6


def test_a_run_that_was_stopped_goes_on(run, checked, tmp_path, monkeypatch):
    honest = ModelWorker.run

    def interrupted(self, job):
        if job.index == 2:
            raise KeyboardInterrupt
        return honest(self, job)

    root = tmp_path / "stopped"
    part = a_part(run, root)
    monkeypatch.setattr(ModelWorker, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(run, root, part)
    monkeypatch.undo()
    again = check(run, root, part)
    assert (again.n_reused, again.n_computed) == (2, 1)
    whole_root, whole = checked
    assert contents(part.place.path(root)) == contents(whole.place.path(whole_root))


@pytest.mark.parametrize("change", [{"sizes": (2, 9)}, {"seed": 1}, {"shifts": (-1.0, 0.25)}])
def test_other_sets_or_shifts_are_another_directory_and_leave_the_first(run, checked, change):
    root, part = checked
    before = contents(part.place.path(root))
    other = a_part(run, root, **change)
    assert other.identity.digest != part.identity.digest
    assert check(run, root, other).n_computed == 3
    assert contents(part.place.path(root)) == before
    assert check(run, root, part).n_computed == 0


def test_the_order_of_neurons_within_a_set_does_not_matter(run, checked):
    root, part = checked
    turned = [
        one._replace(neurons_K=one.neurons_K[::-1], polarity_K=one.polarity_K[::-1]) for one in part.measurement.sets
    ]
    assert plan_causal(root, planned_test(run), "magn", turned, SHIFTS).place == part.place


def test_another_model_in_the_same_directory_is_refused_with_the_difference(run, checked):
    root, part = checked
    split = plan(run.model_copy(update={"site": "act"}))[0].datasets[0].splits[2]
    with pytest.raises(ShardError, match="site: 'act' here, 'up' there"):
        check(run, root, plan_causal(root, split, "magn", part.measurement.sets, SHIFTS))


def test_negs_of_another_run_are_refused_with_the_difference(run, tmp_path):
    part = a_part(run, tmp_path / "run")
    split = plan(run.model_copy(update={"site": "act"}))[0].datasets[0].splits[2]
    job = plan_causal(tmp_path / "run", split, "magn", part.measurement.sets, SHIFTS).job(tmp_path / "run", 0)
    with pytest.raises(ShardError, match="another run's .this run here, that one there: site: 'act' here, 'up' there"):
        ModelWorker(**recipe(run)).run(job)


def test_negs_are_found_by_row_whatever_shard_they_are_in(run, checked, tmp_path):
    root, part = checked
    other = plan_causal(root, replace(planned_test(run), shard_rows=7), "magn", part.measurement.sets, SHIFTS)
    a_part(run, tmp_path / "other")
    assert check(run, tmp_path / "other", other).n_computed == 2
    expected, result = read_causal(root, part), read_causal(tmp_path / "other", other)
    np.testing.assert_allclose(result.probs_PMO, expected.probs_PMO, rtol=1e-4)


def test_a_row_without_negs_is_named(run, tmp_path):
    part = a_part(run, tmp_path / "run")
    job = part.job(tmp_path / "run", 0)
    check = job.measurement
    elsewhere = replace(job, measurement=replace(check, negs=check.negs._replace(part="train")))
    with pytest.raises(ShardError, match="lack the row .*: extract the rows of this run first"):
        ModelWorker(**recipe(run)).run(elsewhere)


def write_negs_without(run, root, reasons):
    """The test split's NEGs once more, some rows set aside."""
    split, negs = planned_test(run), open_negs(run.directory).select(split="test")
    negs_POLN = np.stack([negs.layer(layer) for layer in range(negs.n_layers)], axis=2)
    activations_PM = negs.activations(range(negs.n_layers * negs.n_neurons))
    for index, rows in enumerate(split.shards):
        kept = [negs.ids.index(row.id) for row in rows if row.id not in reasons]
        write_negs(
            root,
            split.place,
            index,
            len(split.shards),
            identity=split.identity,
            examples=[split.examples[place] for place in kept],
            label_ids_PO=negs.label_ids_PO[kept],
            negs_POLN=negs_POLN[kept],
            activations_PLN=activations_PM[kept].reshape(-1, negs.n_layers, negs.n_neurons),
            probs_PO=negs.probs_PO[kept],
            set_aside=[reasons[row.id] for row in rows if row.id in reasons],
        )


def test_rows_without_negs_are_set_aside_here_too(run, checked, tmp_path):
    root, whole = checked
    split, other = planned_test(run), tmp_path / "other"
    lost = [split.shards[0][2], *split.shards[1]]  # one row of the first shard, all rows of the second
    reasons = {row.id: SetAside(id=row.id, cause="failure", reason="poison") for row in lost}
    write_negs_without(run, other, reasons)
    part = a_part(run, other)
    done = check(run, other, part)
    assert (done.n_rows, done.n_computed, list(done.set_aside)) == (6, 3, list(reasons.values()))
    assert check(run, other, part).n_reused == 3
    kept = [place for place, row in enumerate(split.examples) if row.id not in reasons]
    expected, result = read_causal(root, whole), read_causal(other, part)
    assert result.gold_P.tolist() == expected.gold_P[kept].tolist()
    np.testing.assert_allclose(result.probs_PMO, expected.probs_PMO[kept], rtol=1e-4)


def test_no_prompt_is_stored(checked):
    root, part = checked
    files = [path for path in part.place.path(root).rglob("*") if path.is_file()]
    assert files and not any(b"secret" in path.read_bytes() for path in files)


def test_a_poison_row_is_isolated_and_the_check_goes_on_without_it(run, checked, tmp_path, monkeypatch):
    root, whole = checked
    poison, honest = planned_test(run).examples[6].id, ModelWorker._measure

    def failing(self, job, examples):
        if poison in [example.id for example in examples]:
            raise RuntimeError("poison row")
        return honest(self, job, examples)

    monkeypatch.setattr(ModelWorker, "_measure", failing)
    other = tmp_path / "other"
    part = a_part(run, other)
    done = check(run, other, part)
    assert [(row.id, row.cause, row.reason) for row in done.set_aside] == [
        (poison, "failure", "RuntimeError: poison row")
    ]
    expected, result = read_causal(root, whole), read_causal(other, part)
    kept = [row for row, example in enumerate(planned_test(run).examples) if example.id != poison]
    assert result.gold_P.tolist() == expected.gold_P[kept].tolist()
    np.testing.assert_allclose(result.probs_PMO, expected.probs_PMO[kept], rtol=1e-4)
    assert [row.n_prompts for row in causal_rows("magn", result, n_bootstrap=20)][0] == 11


def test_probabilities_that_are_not_finite_fail_the_shard_of_the_check(run, tmp_path, monkeypatch):
    row, honest = planned_test(run).examples[0], ModelWorker._measure

    def spoilt(self, job, examples):
        columns = honest(self, job, examples)
        for place in [place for place, example in enumerate(examples) if example.id == row.id]:
            columns["base_probs"][place, 0] = np.nan
        return columns

    monkeypatch.setattr(ModelWorker, "_measure", spoilt)
    part = a_part(run, tmp_path / "run")
    with open_pool("local", ModelWorker, recipe(run), Resources(), label="causal") as pool:
        (done,) = measure_missing(pool, [part], tmp_path / "run", Step())
    (failure,) = done.failures
    assert f"{row.id}: 1 NaN or infinite values, in base_probs" in failure.error
