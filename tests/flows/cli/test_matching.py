"""`neg match` as its user sees it: the table by layer, the single matches, and what is refused."""

import csv
import io
import json

import pytest
from support import identity_of, save_tiny_model, write_questions
from typer.testing import CliRunner

from flows.cli.app import app
from flows.pipeline import run_extract
from flows.show.match_tables import match_table
from negcore import match_neurons, open_negs
from negcore.errors import NegError
from tasks.config.dataset_runs import SkillRun
from tasks.matches import Choice, LayerMatches, Matches, MatchRow, match_runs
from tasks.steps import PlainSteps


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two families on the same rows: a, b, and of both in one directory."""
    place = tmp_path_factory.mktemp("match")
    models = [str(save_tiny_model(family, place / family)) for family in ("llama", "gpt_neox")]
    dataset = write_questions(place)
    for name, chosen in {"a": models[:1], "b": models[1:], "both": models}.items():
        run = SkillRun(model=chosen, dataset=dataset, backend="local", workers=1, out=place / name)
        assert run_extract(run, PlainSteps()).problems == []
    return place


def match(*arguments):
    return CliRunner().invoke(app, ["match", *map(str, arguments)])


def test_the_table_has_a_row_for_every_layer_and_one_for_all(runs):
    found = match(runs / "a", runs / "b", "--shuffles", 19, "--neurons", 8)
    assert found.exit_code == 0, found.output
    lines = [line.split() for line in found.output.splitlines()]
    counts = {line[0]: int(line[1]) for line in lines if line and line[0] in ("0", "1", "2", "all")}
    assert list(counts) == ["0", "1", "2", "all"]
    assert (counts.pop("all"), sum(counts.values())) == (8, 8)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert "neurons of llama among those of gpt_neox" in found.output
    whole = next(line for line in lines if line[:1] == ["all"])
    assert whole[5] == "-"  # 19 shuffles tell no match at .01


def test_single_matches_are_written_and_are_those_of_the_library(runs):
    found = match(runs / "a", runs / "b", "--shuffles", 9, "--layer", 1, "--format", "csv")
    assert found.exit_code == 0, found.output
    rows = list(csv.DictReader(io.StringIO(found.stdout)))
    width = next(iter(open_negs(runs / "a"))).n_neurons
    assert [int(row["neuron"]) for row in rows] == list(range(width))
    splits = [
        [
            next(split for split in open_negs(runs / name) if split.place.part == part)
            for part in ("train", "valid", "test")
        ]
        for name in ("a", "b")
    ]
    expected = match_neurons(*splits, [width + neuron for neuron in range(width)], n_shuffles=9)
    for row, one in zip(rows, expected, strict=True):
        assert (int(row["other_layer"]), int(row["other_neuron"])) == (one.other_layer, one.other_neuron)
        assert (float(row["r"]), float(row["p"])) == (one.r, one.p)


def test_models_of_one_run_are_matched_by_their_names(runs):
    models = [str(runs / family) for family in ("llama", "gpt_neox")]
    one = match(runs / "both", runs / "both", "--model", models[0], "--other-model", models[1], "--shuffles", 9)
    two = match(runs / "a", runs / "b", "--shuffles", 9)
    assert (one.exit_code, one.stdout) == (0, two.stdout)
    assert "has several models" in str(match(runs / "both", runs / "b").exception)


def test_the_best_neurons_of_a_ranking_are_matched(runs):
    (found,) = match_runs(runs / "a", runs / "a", Choice(top=5), probe="polar", n_shuffles=19)
    assert [(row.layer, row.neuron) for row in found.rows] == [
        (row.other_layer, row.other_neuron) for row in found.rows
    ]
    assert len(found.rows) == 5
    assert found.n_rows == 60


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--neurons", "0"], "give a whole number from 1, or all"),
        (["--neurons", "4", "--top", "2"], "give one of them"),
        (["--neurons", "100000"], "100000 neurons cannot be drawn"),
        (["--layer", "9"], "9.0 is no neuron"),
        (["--top", "4", "--probe", "tree"], "probe 'tree' ranks no neurons by votes"),
        (["--dataset", "mini/fact"], "dataset 'mini/fact' is not in this run"),
    ],
)
def test_neurons_that_are_not_there_are_refused(runs, options, says):
    found = match(runs / "a", runs / "b", *options)
    assert isinstance(found.exception, NegError)
    assert says in str(found.exception)


@pytest.fixture(scope="module")
def of_units(tmp_path_factory):
    """A run on rows of which two at a time are of one unit, and the file that names the units."""
    place = tmp_path_factory.mktemp("units")
    rows = [
        {
            "prompt": f"{number}. Is {number % 30} even?",
            "labels": [" A", " B"],
            "answer": number % 2,
            "id": f"r{number}",
        }
        | ({"unit": f"{number % 30}"} if number < 58 else {})
        for number in range(60)
    ]
    file = place / "units.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    model = str(save_tiny_model("llama", place / "model"))
    run = SkillRun(model=[model], dataset=[str(file)], backend="local", workers=1, out=place / "run")
    assert run_extract(run, PlainSteps()).problems == []
    return place / "run", file, rows


def test_rows_of_a_unit_are_shuffled_together(of_units):
    root, _, rows = of_units
    found = match(root, root, "--shuffles", 9, "--neurons", 4, "--format", "csv")
    assert found.exit_code == 0, found.output
    splits = [next(s for s in open_negs(root) if s.place.part == part) for part in ("train", "valid", "test")]
    units = {row["id"]: row.get("unit", "") for row in rows}
    ids = [id_ for split in splits for id_ in split.ids]
    expected = match_neurons(splits, splits, units=[units[id_] for id_ in ids], n_shuffles=9)
    known = {(one.layer, one.neuron): (one.chance, one.p) for one in expected}
    for row in csv.DictReader(io.StringIO(found.stdout)):
        chance, p = known[int(row["layer"]), int(row["neuron"])]
        assert (float(row["chance"]), float(row["p"])) == (pytest.approx(chance, abs=1e-6), p)
    table = match(root, root, "--shuffles", 9, "--neurons", 4).output
    n_units = len({units[id_] or id_ for id_ in ids})
    assert n_units < len(ids)
    assert f"9 shuffles of the {n_units} units of rows, and of the rows of each" in " ".join(table.split())


def test_units_that_are_no_longer_known_are_told(of_units):
    root, file, _ = of_units
    text = file.read_text()
    try:
        file.write_text(text.replace("Is 7 even", "Is 8 even"))
        found = match(root, root, "--shuffles", 9, "--neurons", 4)
    finally:
        file.write_text(text)
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert "rows were shuffled one by one: local/units: the data has no row" in said
    assert "9 shuffles of the rows" in said


def row(layer, neuron, other, p, mutual=True):
    known = {"other_layer": other, "other_neuron": 0, "r": 0.5, "chance": 0.4, "p": p, "is_mutual": mutual}
    if p is None:
        known = dict.fromkeys(known)
    return MatchRow("d", "m", "1", "n", "2", layer, neuron, **known)


def test_shares_are_of_neurons_that_vary_and_layers_of_those_that_are_matched():
    rows = [row(0, 0, 4, 0.01), row(0, 1, 6, 0.05, mutual=False), row(0, 2, 0, 0.06), row(0, 3, None, None)]
    rows += [row(1, 0, 9, 0.01), row(1, 1, 3, 0.5)]
    first, second, whole = Matches("d", identity_of(2, 5), identity_of(10, 5), 5, 99, rows).layers
    assert first == LayerMatches(0, 3, 0.5, 0.4, (2 / 3, 1 / 3), 1 / 3, (4.5, 5.0, 5.5))
    assert second == LayerMatches(1, 2, 0.5, 0.4, (0.5, 0.5), 0.5, (9.0, 9.0, 9.0))
    assert (whole.layer, whole.n_neurons, whole.shares) == (None, 5, (0.6, 0.4))
    assert Matches("d", identity_of(2, 5), identity_of(10, 5), 5, 99, rows).depth_correlation == pytest.approx(
        0.8660254
    )
    assert Matches("d", identity_of(2, 5), identity_of(10, 5), 5, 99, rows[2:3]).depth_correlation != 0


def test_revisions_of_one_name_and_random_weights_are_named():
    trained, later, random = (identity_of(2, 5, model_revision=name) for name in ("a" * 40, "b" * 40, "b+random-0"))
    rows = [row(0, 0, 0, 0.01)]
    titles = [match_table(Matches("d", trained, other, 5, 99, rows)).title for other in (trained, later, random)]
    assert titles == [
        "d: neurons of m among those of m",
        f"d: neurons of m@{'a' * 13} among those of m@{'b' * 13}",
        f"d: neurons of m@{'a' * 13} among those of m (random weights)",
    ]
