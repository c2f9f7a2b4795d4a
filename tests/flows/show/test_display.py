"""Progress bars; and a dataset as `neg datasets NAME` shows it: dropped rows, and what splits still share, are told."""

import io
import json
import re

import pytest
from rich.console import Console
from support import tiny_tokenizer

from flows.show.display import Display, describe_dataset
from flows.show.progress_columns import Pace, pace
from negcore.datasets import PromptSettings, load_dataset
from negcore.errors import RunError
from tasks.pool.base import Stopped
from tasks.steps import Progress


def shown(tmp_path, rows, **settings):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = Console(width=120, record=True, file=io.StringIO())
    dataset = load_dataset(str(file), tiny_tokenizer(), settings=PromptSettings(**settings))
    describe_dataset(console, dataset, tiny_tokenizer())
    return console.export_text().splitlines()


def rows(split, n, **more):
    return [
        {"prompt": f"{split} {i}? Answer:", "labels": ["A", "B"], "answer": i % 2, "split": split} | more
        for i in range(n)
    ]


def test_doubles_contradictions_and_shared_units_are_told(tmp_path):
    test = rows("test", 6, unit="a sentence")
    test += [test[0], test[1] | {"answer": 0}]
    mine = rows("train", 12) + [rows("train", 13, unit="A  sentence")[-1]] + rows("valid", 4) + test
    lines = shown(tmp_path, mine)
    assert "dropped 2 rows of test: asked before in the split" in lines
    assert "dropped 1 row of test: same text with another answer in the split" in lines
    assert "dropped 1 row of train: of a unit in test" in lines
    assert "test rows: 5 of a unit in train" in shown(tmp_path, mine, split_policy="clean-rows")
    released = shown(tmp_path, mine, split_policy="released")
    assert "test rows: 2 asked before in the split" in released and "test rows: 1 texts with two answers" in released
    assert not any(line.startswith("test rows") for line in lines)


def test_groups_that_give_the_answer_away_are_told(tmp_path):
    told = "no groups: each has one answer only, so accuracies by group would say nothing"
    mine = [row | {"group": "xy"[row["answer"]]} for split in ("train", "valid", "test") for row in rows(split, 10)]
    assert told in shown(tmp_path, mine)
    assert told not in shown(tmp_path, [row | {"group": f"g{i // 10}"} for i, row in enumerate(mine)])


def test_the_time_left_follows_the_mean_pace_and_grows_as_long_as_nothing_comes():
    assert pace(10, 20, elapsed_s=60) == "10 a minute, 2 min left"
    assert pace(10, 20, elapsed_s=600) == "1 a minute, 20 min left"
    assert [pace(0, 5, 9), pace(5, 0, 9), pace(5, 5, 0)] == ["", "", ""]


@pytest.fixture
def terminal():
    return Console(width=120, record=True, file=io.StringIO(), force_terminal=True)


def test_progress_says_what_is_started_then_parts_and_a_pace_without_those_that_were_there(terminal):
    clock = iter(range(0, 10**6, 30))  # half a minute passes at every look
    with Display(terminal, "pipeline", 40) as display:
        display.starting("Ray")
        display._progress.refresh()
        display._progress.get_time = lambda: next(clock)
        display.advance(Progress("m d train", 10, 20))
        display.advance(Progress("m d train", 12, 20))
        (whole, step) = display._progress.tasks
        assert (whole.completed, whole.fields["reused"], whole.fields["note"]) == (12, 10, "")
        elapsed = step.get_time() - step.fields["since"]
        assert Pace().render(step).plain == pace(2, 8, elapsed + 30)
    shown = terminal.export_text()
    assert "0/40 parts" in shown and "starting Ray" in shown


@pytest.mark.parametrize(("error", "told"), [(Stopped("stopped on request"), False), (RunError("broken"), True)])
def test_a_step_that_was_stopped_is_not_called_failed(terminal, error, told):
    with Display(terminal, "pipeline", 2) as display:
        display.advance(Progress("m d train", 1, 2))
        display.finish("m d train", error)
    assert ("failed m d train" in terminal.export_text()) == told


def test_the_probed_token_stands_between_brackets_and_one_that_holds_more_than_its_piece_is_told(tmp_path):
    mine = [row | {"probe_at": "train"} for row in rows("train", 8)]
    mine += [row | {"probe_at": "tes"} for row in rows("test", 4)] + rows("valid", 4)
    lines = shown(tmp_path, mine)
    said = "neurons are read at the token that probe_at names in 12 of 16 rows"
    assert f"{said} (in 4 it holds characters behind that piece too); below it stands between [[ ]]" in lines
    assert any(re.fullmatch(r"t\[\[est\]\] \d\? Answer:", line) for line in lines)
