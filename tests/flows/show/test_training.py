"""NEGs over training as a campaign shows them: means over datasets, tenths of depth, what has no value, one figure."""

import json
from math import nan

from rich.console import Console

from flows.show.campaign_tables import campaign_tables
from flows.show.training_figure import training_figures
from tasks.campaign import Comparison, OutcomeRow
from tasks.neg_profiles import NegProfileRow


def comparison(*rows):
    models = dict.fromkeys(row.model for row in rows)
    outcomes = [OutcomeRow(model, model.upper(), "mceval8k", "whole", 0, "") for model in models]
    return Comparison(outcomes, neg_profiles=list(rows))


def row(model, layer, size, previous, *, dataset="d", last=1.0, correlation=0.5):
    return NegProfileRow(model, "c", "mceval8k", dataset, 10, layer, size, previous, last, correlation)


ROWS = [
    *(row("a", layer, size, None, correlation=nan) for layer, size in ((0, 1e-3), (1, 3e-3), (None, 2e-3))),
    *(row("b", layer, 2e-3, 0.25) for layer in (0, 1, None)),
    *(row("b", layer, 4e-3, 0.75, dataset="e") for layer in (0, 1, None)),
]


def test_the_table_has_the_whole_and_tenths_of_depth_as_means_over_datasets():
    console = Console(width=100, record=True, force_terminal=False)
    console.print(list(campaign_tables(comparison(*ROWS)))[-1])
    lines = [line.split() for line in console.export_text().splitlines()]
    first, second = ([line for line in lines if line[:1] == [name]] for name in "AB")
    assert first[0][1:] == ["2.0e-03", *["0.50"] * 5, *["1.50"] * 5]
    assert second[0][1:] == ["3.0e-03", *["1.00"] * 10]
    assert first[1][1:] == ["-"] * 11
    assert second[1][1:] == [".500"] * 11
    assert first[3][1:] == ["-"] * 11
    assert second[3][1:] == [".500"] * 11


def test_the_figure_has_a_panel_a_measure_and_a_line_a_revision_in_order():
    (figure,) = training_figures(comparison(*ROWS))
    panels = figure.parts[0].panels
    assert [panel["title"] for panel in panels][1:] == [
        "sign as before",
        "sign as last",
        "order as last",
    ]
    assert panels[0]["data"]["values"] == [
        {"revision": "A", "order": 0, "layer": 0, "value": 1e-3},
        {"revision": "A", "order": 0, "layer": 1, "value": 3e-3},
        {"revision": "B", "order": 1, "layer": 0, "value": 3e-3},
        {"revision": "B", "order": 1, "layer": 1, "value": 3e-3},
    ]
    assert {one["revision"] for one in panels[1]["data"]["values"]} == {"B"}
    assert all(panel["encoding"]["color"]["scale"]["domain"] == ["A", "B"] for panel in panels)
    assert "NaN" not in json.dumps(panels)


def test_a_campaign_without_revisions_has_neither():
    assert not list(training_figures(comparison()))
    assert all(table.key != "campaign-neg-profiles" for table in campaign_tables(comparison()))
