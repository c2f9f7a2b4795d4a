"""Tables of single neurons: any number of options, labels that are not known, levels that keep less, hostile texts."""

import numpy as np
from rich.console import Console

from flows.show.neuron_tables import best_table, moved_table, neuron_table, neuron_tables, places_line, top_table
from negcore.analysis.neurons import Moved, NeuronRows
from negcore.datasets import Example
from tasks.neurons import NeuronRow
from tasks.probe import AccuracyRow

ORDERS = "\x1b[31m[bold]\u202e"


def row(place=1, **changes):
    values = {
        "model": "m",
        "shots": 0,
        "dataset": "mini/fact",
        "group": "",
        "probe": "magn",
        "place": place,
        "layer": 10,
    }
    values |= {
        "neuron": 900 + place,
        "polarity": -1,
        "score": -31,
        "agreement": 0.875,
        "place_low": 1,
        "place_high": 40,
    }
    values |= {"random_score": 5.26, "mean_negs": [1e-4, -2e-4], "labels": [" A", " B"]}
    return NeuronRow(**values | changes)


def answered(probe, accuracy, **changes):
    values = {
        "model": "m",
        "shots": 0,
        "genre": "",
        "dataset": "mini/fact",
        "group": "",
        "probe": probe,
        "n_neurons": 1,
    }
    values |= {"accuracy": accuracy, "low": 0.0, "high": 1.0, "n_correct": 1, "n_test": 2, "n_train": 2}
    return AccuracyRow(**values | {"majority": 0.5, "random": 0.5, "overlapping": False} | changes)


def printed(*tables):
    console = Console(width=100, record=True, force_terminal=False)
    for table in tables:
        console.print(table)
    return " ".join(console.export_text().split())


def numbers_of(n_options=2, *, values=True):
    rng = np.random.default_rng(0)
    negs_PO = rng.standard_normal((8, n_options)).astype(np.float32)
    gold_P = np.arange(8) % n_options
    signs_PO = np.sign(negs_PO).astype(np.int8)
    return NeuronRows(np.linspace(-1, 1, 8), negs_PO if values else None, signs_PO, gold_P, np.ones(8, bool))


def test_a_neuron_is_a_line_with_its_name_score_and_sureness():
    text = printed(best_table([row(1), row(2, agreement=0.25)], "best"))
    assert "1 10.901 -31 5.3 .875 1-40 +1.0e-04 -2.0e-04" in text
    assert "1 of 2 stay in the top 2 in at least half of 200 bootstrap samples" in text
    assert "A B" in text


def test_a_level_that_keeps_no_values_is_named_of_experts_too():
    text = printed(best_table([row(name="10.3.5", active=0.5, mean_negs=None)], "best"))
    assert "1 10.3.5 " in text and "NEGs: this storage level keeps none." in text and "layer.expert.unit" in text
    assert "mean NEG over the training rows with it" in printed(best_table([row(name="10.3.5", active=0.5)], "best"))


def test_a_place_that_half_of_the_samples_do_not_give_is_marked():
    sure, unsure = (best_table([row(agreement=share)], "best").pieces[0][0][4][0].style for share in (0.5, 0.49))
    assert (sure, unsure) == ("", "yellow")


def test_many_options_stand_in_one_column_and_unknown_labels_are_numbers():
    names = [f" {letter}" for letter in "ABCDEFGHIJKLMNOPQRST"]
    many = best_table([row(mean_negs=[1e-4] * 20, labels=names)], "best")
    assert [column.title for column in many.columns][-1] == "NEG by option"
    assert "A +1.0e-04, B +1.0e-04" in printed(many) and "T +1.0e-04" in printed(many)
    assert [column.title for column in best_table([row(labels=None)], "best").columns][-2:] == ["0", "1"]


def test_what_a_level_does_not_keep_is_a_dash_and_a_word():
    nothing = row(agreement=None, place_low=None, place_high=None, mean_negs=None)
    text = printed(best_table([nothing], "best"))
    assert "1 10.901 -31 5.3 - -" in text
    assert "keeps no rows to sample" in text and "keeps none" in text
    assert "keeps no values of NEGs" in printed(neuron_table("mini/fact", numbers_of(values=False), None))


def test_every_model_shots_dataset_and_probe_has_a_table_of_its_own():
    rows = [row(place, shots=shots, probe=probe) for shots in (0, 1) for probe in ("polar", "magn") for place in (1, 2)]
    tables = list(neuron_tables(rows))
    assert [len(table.blocks[0]) for table in tables] == [2] * 4
    assert "mini/fact: best neurons by Polar; m, one-shot" in tables[2].title


def test_the_three_best_are_those_of_the_probe_that_answers_best():
    rows = [
        row(place, probe=probe, layer=layer) for probe, layer in (("polar", 1), ("magn", 2)) for place in range(1, 6)
    ]
    scores = [answered("lm", 0.9), answered("polar", 0.6), answered("magn", 0.4), answered("magn", 1.0, group="de")]
    (table,) = top_table(rows, scores)
    text = printed(table)
    assert "mini/fact Polar 1.901 1.902 1.903" in text and "1.904" not in text and "2.901" not in text
    assert list(top_table([], scores)) == []


def test_rows_of_a_right_option_have_a_line_of_their_own():
    numbers = numbers_of(3)
    text = printed(neuron_table("mini/fact", numbers, [" A", " B", " C"]))
    for option, name in enumerate("ABC"):
        negs_O = numbers.negs_PO[numbers.gold_P == option].mean(axis=0)
        assert f"right: {name}" in text
        assert all(f"{neg:+.1e}" in text for neg in negs_O)


def test_texts_of_rows_give_no_orders_and_unknown_ones_are_said_to_be():
    example = Example("r0", f"{ORDERS} " + "word " * 200 + "Answer:", (f" A{ORDERS}", " B"), 1, "")
    moved = [Moved(0, 0, 0.25), Moved(1, 1, -0.5)]
    table = moved_table("mini/fact", moved, ["r0", "r1"], numbers_of(), None, {"r0": example})
    text = printed(table)
    assert "\x1b" not in text and "\u202e" not in text and "A\\x1b[31m[bold]\\u202e" in text.replace(" ", "")
    assert "... " in text and "word Answer:" in text and "its text is not in the data" in text
    assert table.columns[-1].is_private and "word" not in str(table.records())


def test_the_lists_that_a_neuron_is_in_are_named_in_a_line():
    assert places_line([]) == "among the 20 best of no dataset and probe of the run"
    assert places_line([row(3)]) == "among the 20 best of mini/fact Magn (place 3, in .875 of samples)"
