"""The page that has the paper's figures beside ours."""

import tomllib

import build_paper
import pytest

from negcore.analysis.linearity import AgreementRow, InterventionRow, RangeRow
from tasks.probe import AccuracyRow
from tasks.rundir.tables import write_table

REPORTED = tomllib.loads(build_paper.REPORTED.read_text(encoding="utf-8"))


def rows_of(kind, *changes):
    """Rows whose other numbers are nothing."""
    nothing = {str: "", float: 0.0, int: 0, bool: False}
    plain = {name: nothing.get(hint) for name, hint in kind.__annotations__.items()}
    return [plain | change for change in changes]


@pytest.fixture
def campaign(tmp_path):
    folder = tmp_path / "my-model" / "linearity" / "linearity"
    model = {"model": "org/my-model", "dataset": "facts"}
    agreement = [
        {"estimator": name, "range": size, "layer": layer, "pearson": r}
        for name, size, layer, r in [
            ("neurgrad", 2.0, None, 0.998),
            ("neurgrad", 10.0, None, 0.85),
            ("gradient", 2.0, None, 0.1),
            ("gradient", 2.0, 0, 0.7),
        ]
    ]
    ranges = [{"range": 2.0, "layer": None, "linear_share": 0.957, "positive_share": 0.48}]
    together = [
        {"set_size": size, "shift": shift, "pearson": r}
        for size, shift, r in [(1, 0.5, 1.0), (64, 0.5, 0.9), (64, 2.0, 0.4)]
    ]
    for name, kind, rows in [
        ("agreement", AgreementRow, agreement),
        ("ranges", RangeRow, ranges),
        ("interventions", InterventionRow, together),
    ]:
        named = [model | row for row in rows_of(kind, *rows)]
        write_table(folder / f"{name}.arrow", kind, named, names=("model", "dataset"))
    accuracy = {
        "model": "org/my-model",
        "dataset": "mceval8k/ner",
        "probe": "lm",
        "accuracy": 0.25,
        "low": 0.1,
        "high": 0.5,
    }
    shown = rows_of(AccuracyRow, accuracy, accuracy | {"shots": 1, "accuracy": 0.5}, accuracy | {"group": "de"})
    write_table(tmp_path / "my-model" / "mceval8k" / "accuracy.arrow", AccuracyRow, shown)
    return tmp_path


def test_the_page_is_what_its_figures_make():
    assert build_paper.PAGE.read_text(encoding="utf-8") == build_paper.current_page(), "run: make paper"


def test_figures_of_a_campaign_stand_beside_those_of_the_paper(campaign):
    measured = build_paper.measured_figures(campaign)
    assert measured["org/my-model"]["estimators"] == {"neurgrad": "±2: .998; ±10: .850", "gradient": "±2: .100"}
    assert measured["org/my-model"]["linearity"] == {
        "linear neurons within ±2": ".957",
        "NEG above 0": ".480",
        "r of 64 neurons together": ".900 by 0.5; .400 by 2",
    }
    assert measured["org/my-model"]["accuracy"] == {"ner": {"lm": ".250 (.100-.500)"}}
    assert measured["org/my-model, 1-shot"]["accuracy"] == {"ner": {"lm": ".500 (.100-.500)"}}
    text = build_paper.page(f"before\n{build_paper.BEGIN}old{build_paper.END}\nafter", REPORTED, measured)
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    lines = text.splitlines()
    assert "| NeurGrad | .81 | .9998 | ±2: .998; ±10: .850 |" in lines
    at = lines.index("| ner | paper: Llama 2 7B | .361 | .453 | .498 | .740 |")
    assert lines[at + 1] == "| ner | here: org/my-model | .250 (.100-.500) |  |  |  |"


def test_a_directory_without_a_campaign_is_refused_by_name(tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path}: no tables of a finished campaign"):
        build_paper.measured_figures(tmp_path)


def test_every_figure_has_a_source_and_a_name_that_tables_know():
    assert REPORTED["source"].startswith("Zhao, Jiang, Yoshinaga")
    for of in REPORTED.values():
        if isinstance(of, dict):
            assert set(of) <= {"estimators", "linearity", "accuracy"}
            assert set(of.get("estimators", ())) <= set(build_paper.ESTIMATOR_TITLES)
            assert all(set(cells) == set(build_paper.PROBES) for cells in of.get("accuracy", {}).values())
