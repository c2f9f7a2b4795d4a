"""Every command and every piece of Python in the documents is run, or at least parsed, as it stands there."""

import json
import shlex
import shutil

import pytest
import yaml
from documents import (
    DOCUMENTS,
    MARKS,
    MODEL,
    NEG,
    blocks,
    check_other,
    commands,
    run_neg,
    run_python,
    save_stand_in,
    write_facts,
    write_mceval8k,
    write_own_table,
)
from support import REPOSITORY

from negcore.model import language_model
from tasks.config.kinds import RUN_KINDS
from tasks.config.reading import read_run_file, recorded_run

MINI = [f"mini/{genre}" for genre in ("classification", "fact", "linguistic", "multilingual", "nli", "self-reflection")]
WITH_CODE = [document for document in DOCUMENTS if any(b.language in ("bash", "python") for b in blocks(document))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def patched(model):
    """The tiny model answers to the name of the one that ships as a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "embedded_files", lambda alias: [model])
        patch.setattr(language_model, "convert_gguf", lambda file: model)
        yield


@pytest.fixture(scope="module")
def world(model, patched, tmp_path_factory):
    """A directory with everything that the documents take to be there: models, data and the demo's run."""
    world = tmp_path_factory.mktemp("world")
    shutil.copytree(model, world / "models" / "my-model")
    write_mceval8k(world / "data" / "MCEval8K")
    write_facts(world / "llama3.1-8b-it.feather")
    write_own_table(world / "mine.csv")
    shutil.copytree(REPOSITORY / "docs" / "run-files", world / "docs" / "run-files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        datasets = " ".join(f"--dataset {name}" for name in MINI)
        run_neg(f"neg pipeline --model {MODEL} {datasets} --shots 1 --limit 12 --out runs/demo")
    return world


@pytest.fixture
def here(world, monkeypatch):
    """That directory, in which every document finds what was made before."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("NEG_MCEVAL8K", str(world / "data" / "MCEval8K"))
    return world


@pytest.fixture(scope="module")
def was_run():
    """Commands that a document before has run: the same line in another one would change nothing."""
    return set()


def parse(command):
    """Check that a command and its options exist, and that they make a run file."""
    words = shlex.split(command)
    if words[0] != "neg":
        check_other(command)
        return
    name, *options = words[1:]
    if name.startswith("--"):
        assert name in {option for parameter in NEG.params for option in parameter.opts}, command
        return
    values = NEG.commands[name].make_context(name, options).params
    if name in RUN_KINDS and not values.pop("run_file"):
        given = {field: value for field, value in values.items() if value not in (None, ()) and field != "orchestrator"}
        read_run_file(RUN_KINDS[name].run_class, None, given)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_block_says_what_it_is(document):
    for block in blocks(document):
        assert set(block.marks) <= MARKS, str(block)
        if block.language == "bash" and MODEL in block.text:
            assert set(block.marks) & {"stand-in", "parsed"}, f"{block}: a tiny model stands in for {MODEL}: say so"


@pytest.mark.parametrize("document", WITH_CODE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_code_of_a_document_runs(document, here, was_run):
    names = {}
    for block in blocks(document):
        if "recipe" in block.marks:
            continue  # see test_contributing
        if block.language == "python":
            run_python("\n" * (block.line - 1) + block.text, str(document), names)
        if block.language == "bash":
            for command in commands(block):
                if "parsed" in block.marks:
                    parse(command)
                elif command not in was_run:
                    assert command.startswith("neg "), f"{command}: only neg is run; mark the block as parsed"
                    run_neg(command)
                    was_run.add(command)


YAML = [block for document in DOCUMENTS for block in blocks(document) if block.language == "yaml"]


@pytest.mark.parametrize("block", YAML, ids=str)
def test_the_run_files_in_documents_are_valid(block, tmp_path):
    values = yaml.safe_load(block.text)
    if "model" not in values:  # a part of one
        read_run_file(RUN_KINDS["pipeline"].run_class, None, {"model": "m", "dataset": "mceval8k/fever"} | values)
        return
    file = tmp_path / "run.yaml"
    file.write_text(block.text)
    recorded_run(file)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.name
)
def test_the_cells_of_a_notebook_run_in_order(path, here):
    names = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            run_python("".join(cell["source"]), f"{path.name}, cell {number}", names)
