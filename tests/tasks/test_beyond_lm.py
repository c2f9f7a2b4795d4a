"""What probes add to the model's own answer, counted by hand, and as tables."""

from dataclasses import asdict, replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest
from support import neg

from flows.show.beyond_tables import beyond_comparison, beyond_tables
from tasks.beyond_lm import BEYOND_FILE, BeyondRow, beyond_lm
from tasks.predictions import Predictions
from tasks.probe import AccuracyRow
from tasks.rundir.tables import write_table

GOLD = [0, 1, 2, 0, 1, 2, 0, 1]
LM = [0, 0, 0, 0, 0, 0, 0, 0]  # right in rows 0, 3, 6
CALIBRATED = [0, 1, 0, 0, 1, 0, 1, 1]  # right in 0, 1, 3, 4, 7
MAGN = [1, 1, 2, 1, 1, 2, 0, 1]  # right in 1, 2, 4, 5, 6, 7


def answers():
    predicted_P = {"lm": np.array(LM), "magn": np.array(MAGN), "polar": np.array(LM)}
    ids = [f"row/{i}" for i in range(8)]
    return Predictions("tiny", 0, "mini/nli", ids, [""] * 8, np.array(GOLD), predicted_P)


def test_rows_that_only_one_answers_right_are_counted_with_a_pencil():
    magn, polar = beyond_lm(answers(), np.array(CALIBRATED), "log-probability")
    assert (magn.n_test, magn.accuracy, magn.lm, magn.calibrated) == (8, 6 / 8, 3 / 8, 5 / 8)
    assert (magn.only_probe, magn.only_lm) == (5 / 8, 2 / 8)
    assert (magn.only_probe_not_calibrated, magn.only_calibrated) == (3 / 8, 2 / 8)
    assert magn.p == pytest.approx(binomtest(5, 7).pvalue) and magn.p_calibrated == pytest.approx(
        binomtest(3, 5).pvalue
    )
    assert (polar.only_probe, polar.only_lm, polar.p) == (0, 0, 1)
    assert {magn.target, polar.target} == {"log-probability"}


def printed(tables):
    console = Console(file=StringIO(), width=100)
    console.print(*tables)
    return console.file.getvalue()


def test_a_table_holds_both_references_and_says_where_a_probe_adds_something():
    rows = list(beyond_lm(answers(), np.array(CALIBRATED), "logit-difference"))
    (table,) = beyond_tables([*rows, replace(rows[0], dataset="mini/fact", p_calibrated=0.001)])
    text = printed([table])
    assert "NEG of logit-difference" in text and "Magn on 1 of 2 datasets and Polar on 0 of 1 dataset" in table.says
    (line,) = [line for line in text.splitlines() if "mini/nli" in line]
    assert line.split() == ["mini/nli", "Magn", ".750", ".375", ".625", ".250", ".45", ".625", ".375", ".250", "1.00"]
    assert max(map(len, text.splitlines())) <= 100


def run_with(folder, name, target, accuracy):
    row = next(beyond_lm(answers(), np.array(CALIBRATED), target))
    score = {"model": "tiny", "shots": 0, "genre": "", "dataset": "mini/nli", "group": "", "probe": "magn"}
    score |= {"n_neurons": 4, "accuracy": accuracy, "low": 0.0, "high": 1.0, "n_correct": 1, "n_test": 8, "n_train": 9}
    score |= {"majority": 0.3, "random": 0.3, "overlapping": False, "target": target}
    write_table(folder / name / "accuracy.arrow", AccuracyRow, [asdict(AccuracyRow(**score))])
    write_table(folder / name / BEYOND_FILE, BeyondRow, [asdict(replace(row, accuracy=accuracy))])
    return folder / name


def test_runs_of_several_targets_are_shown_side_by_side_with_their_targets(tmp_path):
    p, log_odds = run_with(tmp_path, "p", "probability", 0.625), run_with(tmp_path, "odds", "logit-difference", 0.75)
    ran = neg("compare", p, log_odds)
    assert ran.returncode == 0, ran.stderr
    assert "What probes add to the model's own answer, run by run" in ran.stdout
    assert ran.stdout.count("NEG of logit-difference") == 2 and "NEG of probability" not in ran.stdout
    assert neg("compare", p, p, log_odds).returncode == 0  # a run that is named twice is one
    written = tmp_path / "both.csv"
    ran = neg("compare", p, log_odds, "--format", "csv", "--table", "beyond_lm", "--out", written)
    assert ran.returncode == 0, ran.stderr
    header, *lines = written.read_text().splitlines()
    assert header.startswith("run,model,shots,dataset,probe,n_test,accuracy,lm,only_probe") and len(lines) == 2
    exported = neg("export", p, "--table", "beyond_lm", "--format", "csv", "--out", tmp_path / "export")
    assert exported.returncode == 0 and (tmp_path / "export" / "beyond_lm.csv").is_file()


def test_runs_from_before_there_was_such_a_table_are_compared_without_it(tmp_path):
    runs = [run_with(tmp_path, name, "probability", 0.5) for name in ("one", "two")]
    for run in runs:
        (run / BEYOND_FILE).unlink()
    ran = neg("compare", *runs)
    assert ran.returncode == 0 and "run by run" in ran.stdout and "What probes add" not in ran.stdout
    refused = neg("compare", *runs, "--format", "csv", "--table", "beyond_lm")
    assert refused.returncode == 2 and "hold no table beyond_lm" in refused.stderr


def test_a_dataset_that_one_run_has_is_not_compared():
    row = next(beyond_lm(answers(), np.array(CALIBRATED), "probability"))
    assert not beyond_comparison({"one": [row], "two": [replace(row, dataset="mini/fact")]}).blocks
