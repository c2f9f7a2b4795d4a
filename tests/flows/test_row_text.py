"""No text of a row reaches Prefect, whatever fails: a real server's whole database is searched for planted words.

The flows plan inside of them, as deployed and served ones do. Every failure happens once, in `kept`.
"""

import json
import logging
import re
import sqlite3
import stat
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from faults import FaultyWorker
from support import save_tiny_model

from flows.flow_run import IncompleteRun
from flows.prefect_flows import prefect_flow
from negcore.errors import NegError
from tasks.config.kinds import RUN_KINDS
from tasks.config.reading import read_run_file
from tasks.server import prefect_api
from tasks.withheld import Withheld, itself

CANARY = re.compile(r"zq[a-z]+qz")
"""Planted words, one for each place, so that a leak says where it came from."""
FIELDS = {"prompt": "zqpromptqz", "label": "zqlabelqz", "id": "zqidqz", "field": "zqfieldqz", "group": "zqgroupqz"}


def question(n: int, **changes: Any) -> dict[str, Any]:
    """A row that can be measured, with a word planted in its prompt and in its id."""
    split = ("train", "valid", "test")[n % 3]
    prompt = f"{FIELDS['prompt']}{n} Answer:"
    row = {"id": f"{FIELDS['id']}{n}", "prompt": prompt, "labels": ["A", "B"], "answer": n // 3 % 2, "split": split}
    return row | changes


def questions(**changes: Any) -> list[Any]:
    """Rows of which the eighth has other fields."""
    return [question(n, **(changes if n == 7 else {})) for n in range(24)]


LABEL, LONG = FIELDS["label"], "-".join([FIELDS["prompt"]] * 40)
PLANNING: dict[str, Any] = {
    "no JSON": '{"prompt": "zqpromptqz", "labels": [zqlabelqz]}',
    "no object": '"zqpromptqz"',
    "text behind it": '{"prompt": "zqpromptqz"} zqpromptqz',
    "a field twice": '{"zqfieldqz": 1, "zqfieldqz": "zqpromptqz"}',
    "no Unicode": question(7, prompt="zqpromptqz \ud800"),
    "no prompt": question(7, prompt=None),
    "a prompt of another type": question(7, prompt=["zqpromptqz"]),
    "labels of another type": question(7, labels="zqlabelqz"),
    "a label of another type": question(7, labels=[["zqlabelqz"], "B"]),
    "labels that repeat": question(7, labels=["zqlabelqz", "zqlabelqz"]),
    "another answer": question(7, answer="zqlabelqz"),
    "an ambiguous answer": question(7, labels=["1", "0", "zqlabelqz"], answer=0),
    "another split": question(7, split="zqfieldqz"),
    "an id of another type": question(7, id={"zqidqz": 1}),
    "a group of another type": question(7, group=["zqgroupqz"]),
    "an id twice": question(7, id="zqidqz8"),
    "more labels": question(7, labels=["A", "B", "zqlabelqz"]),
    "labels of several tokens": question(7, labels=["A", "zqlabelqz"]),
    "a label that joins": question(7, prompt="zqpromptqz Ans", labels=["wer", "B"]),
    "a prompt that is too long": question(7, prompt=f"{LONG} Answer:"),
    "a prompt that is empty": question(7, prompt="  "),
}


class Kept(NamedTuple):
    """What the failures left behind."""

    errors: dict[str, BaseException]
    """What each of them raised here, by its name."""
    texts: list[tuple[str, str, str]]
    """Table, column and text of everything in the server's database, but for the parameters of flow runs."""
    home: Path
    local: str
    """The log of this process."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    chat = save_tiny_model("llama", folder / "chat")
    template = "{{ raise_exception('I refuse: ' ~ messages[0]['content']) }}"
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return {"llama": str(save_tiny_model("llama", folder / "llama")), "chat": str(chat)}


@pytest.fixture(scope="module")
def kept(models, tmp_path_factory):
    folder, errors = tmp_path_factory.mktemp("runs"), {}
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("neg-local").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch, prefect_api(folder / "prefect") as api:
        api.wait_ready()

        def fails(name: str, kind: str, **values: Any) -> None:
            place = re.sub(r"\W", "-", name)
            given = {"model": [models["llama"]], "out": folder / place, "backend": "local", **values}
            run = read_run_file(RUN_KINDS[kind].run_class, None, given)
            try:
                prefect_flow(kind)(run)
            except Exception as error:
                errors[name] = error

        def data(name: str, rows: list[Any]) -> str:
            file = folder / f"{re.sub(r'[^a-z]', '-', name)}.jsonl"
            file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
            return str(file)

        for name, row in PLANNING.items():
            fails(name, "extract", dataset=[data(name, [*questions()[:7], row, *questions()[8:]])])
        _fail_later(fails, data, patch, models)
    logging.getLogger("neg-local").removeHandler(handler)
    return Kept(errors, _texts(folder / "prefect"), folder / "prefect", "\n".join(records))


def _fail_later(fails, data, patch, models):
    good = data("good", questions())
    chat = {"model": [models["chat"]], "prompt_format": "chat", "system_prompt": "zqsystemqz"}
    fails("a chat template", "extract", dataset=[good], **chat)
    wide = [{"uuid": "zqidqz", "prompt": "zqpromptqz", "tpl": "zqgroupqz", "answer": ["zqlabelqz"]}]
    fails("facts of another type", "linearity", facts=data("facts", wide))
    few = [{"uuid": "zqidqz", "prompt": "zqpromptqz", "tpl": "zqgroupqz", "answer": "zqlabelqz"}]
    fails("facts without answers", "linearity", facts=data("few", few))
    bad = data("bad", questions(labels=["A", "zqlabelqz"]))
    fails("skills", "skills", dataset=[bad])
    fails("an evaluation of two", "mceval8k", dataset=[good, bad], shots=[0], probe=["polar"])
    fails("a campaign", "campaign", stage=["mceval8k"], mceval8k={"dataset": [bad], "shots": [0]})
    with patch.context() as broken:
        broken.setattr("tasks.probe.Prober.probe", _raise)
        fails("probing", "pipeline", dataset=[good], probe=["polar"])
    with patch.context() as broken:
        broken.setattr("tasks.measure.worker.ModelWorker._measure", _raise_of_row)
        fails("measuring", "extract", dataset=[good])
    with patch.context() as broken:
        broken.setattr("tasks.measure.worker.ModelWorker", FaultyWorker)
        rows = questions(prompt="zqpromptqz !fail Answer:")
        fails("a poison row", "extract", dataset=[data("poison", rows)], shard_rows=4)
        rows = questions(prompt="zqpromptqz !nan Answer:")
        fails("numbers that are not finite", "extract", dataset=[data("nan", rows)], nonfinite="fail")
        fails("rows that are skipped", "extract", dataset=[data("skipped", rows)], nonfinite="skip")
    with patch.context() as broken:
        broken.setattr("flows.extraction.write_plan_file", _raise)
        fails("a bug", "extract", dataset=[good])


def _raise(*args: Any, **settings: Any) -> None:
    raise KeyError("zqpromptqz Answer:") from ValueError("zqlabelqz")


def _raise_of_row(self, job, examples):
    raise RuntimeError(f"cannot compute {examples[0].prompt} of {examples[0].id} for {examples[0].labels}")


def _texts(home: Path) -> list[tuple[str, str, str]]:
    (database,) = home.rglob("prefect.db")
    found = []
    with sqlite3.connect(database) as records:
        for (table,) in records.execute("select name from sqlite_master where type = 'table'").fetchall():
            rows = records.execute(f'select * from "{table}"')
            names = [column[0] for column in rows.description]
            found += [(table, name, str(value)) for row in rows for name, value in zip(names, row, strict=True)]
    return [one for one in found if one[:2] != ("flow_run", "parameters")]


def test_everything_failed_as_it_was_meant_to(kept, models):
    expected = {*PLANNING, "a chat template", "facts of another type", "facts without answers", "skills", "probing"}
    expected |= {"an evaluation of two", "a campaign", "measuring", "numbers that are not finite", "a bug"}
    assert set(kept.errors) == expected
    assert all(isinstance(error, (Withheld, IncompleteRun)) for error in kept.errors.values())


def test_no_text_of_a_row_is_in_the_servers_database(kept):
    leaks = {(table, column, word) for table, column, text in kept.texts for word in CANARY.findall(text)}
    assert leaks == set()


def test_the_database_says_what_failed_and_where(kept):
    states = [text for table, column, text in kept.texts if (table, column) == ("flow_run_state", "message")]
    for name in PLANNING:
        line = 9 if name == "an id twice" else 8
        place = f"{re.sub('[^a-z]', '-', name)}.jsonl:{line}"
        assert any(place in text for text in states), name


def test_whoever_started_the_run_is_told_the_text(kept):
    for name in ("another answer", "labels of several tokens", "an id twice"):
        error = itself(kept.errors[name])
        assert isinstance(error, NegError) and CANARY.search(str(error)), name
        assert not set(str(error)) & {"\ufdd0", "\ufdd1"}
    assert "zqpromptqz Answer:" in str(itself(kept.errors["a bug"]))
    assert "KeyError" in str(kept.errors["a bug"])


def test_the_log_of_the_process_alone_says_more(kept):
    assert "zqlabelqz" in kept.local


def test_the_servers_files_are_its_owners_alone(kept):
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in kept.home.rglob("*") if path.is_file()}
    assert {"prefect.db", "server.log", "password"} <= {path.name for path in found}
    assert {path.name: oct(mode) for path, mode in found.items() if mode & 0o077} == {}
    assert stat.S_IMODE(kept.home.stat().st_mode) == 0o700
