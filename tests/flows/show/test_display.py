"""A dataset as `neg datasets NAME` shows it: rows that were dropped, and what splits still share, are told."""

import io
import json

from rich.console import Console
from support import tiny_tokenizer

from flows.show.display import describe_dataset
from negcore.datasets import PromptSettings, load_dataset


def shown(tmp_path, rows, **settings):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = Console(width=120, record=True, file=io.StringIO())
    describe_dataset(console, load_dataset(str(file), tiny_tokenizer(), settings=PromptSettings(**settings)))
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
