"""The documents hold together: links lead somewhere, what is generated is up to date, quoted messages are real."""

import ast
import json
import re
import shutil

import build_documents
import pytest
from documents import DOCUMENTS, blocks
from support import REPOSITORY

from tasks.config.kinds import run_classes
from tasks.config.reading import recorded_run

DOCS = REPOSITORY / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
RUN_FILES = sorted((DOCS / "run-files").rglob("*.yaml"))


def prose(document):
    """The text outside of fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", document.read_text(encoding="utf-8"))


def anchors(document):
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", prose(document))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(document):
    for link in LINK.findall(prose(document)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


def test_every_document_can_be_reached_from_the_readme():
    seen, new = set(), {REPOSITORY / "README.md"}
    while new:
        seen |= new
        links = [(page, link.partition("#")[0]) for page in new for link in LINK.findall(prose(page))]
        linked = {(page.parent / path).resolve() for page, path in links if path.endswith(".md")}
        new = {path for path in linked if path.exists()} - seen
    assert set(DOCUMENTS) - {REPOSITORY / "CHANGELOG.md"} <= seen


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200


def test_the_reference_of_run_files_is_up_to_date():
    assert (DOCS / "run-files.md").read_text(encoding="utf-8") == build_documents.run_files(), "run: make docs"


def test_the_families_in_the_readme_are_those_of_now():
    assert build_documents.README.read_text(encoding="utf-8") == build_documents.readme(), "run: make docs"


def test_the_benchmarks_are_those_of_the_raw_figures():
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == build_documents.benchmarks(), "run: make docs"


def test_the_picture_was_drawn_from_its_source():
    drawn = (DOCS / "pictures" / "way.svg").read_text(encoding="utf-8")
    assert f"<!-- drawn from {build_documents.source_digest()} -->" in drawn, "run: make docs"


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed (apt-get install graphviz)")
def test_the_picture_says_what_graphviz_draws():
    drawn, now = ((DOCS / "pictures" / "way.svg").read_text(encoding="utf-8"), build_documents.picture())
    texts = re.compile(r"<text[^>]*>(.*?)</text>")  # places differ from version to version
    assert texts.findall(drawn) == texts.findall(now)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_every_example_run_file_can_be_read(path):
    run = recorded_run(path)
    assert run.out is not None


def test_there_is_an_example_of_every_kind_of_run():
    assert {type(recorded_run(path)) for path in RUN_FILES} == set(run_classes().values())


def spoken():
    """Everything that the program's strings say, what varies in them left out, each string on a line of its own."""
    found = []
    for room in ("negcore", "tasks", "flows"):
        for path in (REPOSITORY / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


MESSAGES = [block for block in blocks(DOCS / "troubleshooting.md") if "message" in block.marks]


def test_quoted_messages_are_the_programs_own():
    said = spoken()
    for block in MESSAGES:
        pieces = [piece.strip(" ;:()") for piece in block.text.split("…")]
        missing = [piece for piece in pieces if piece and piece not in said]
        assert not missing, f"{block}: nothing says {missing}"


# The notebook: its code is run by test_snippets


@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_holds_no_outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
