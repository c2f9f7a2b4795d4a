"""The text about a whole run on Prefect's pages: rows, files, problems, and no markup but our own."""

import re
from dataclasses import dataclass, field

import pytest
from markdown_it import MarkdownIt
from support import negs_place
from upath import UPath

from flows.show import report
from flows.show.about import About
from flows.show.report import RunResults, Section
from flows.show.summary import run_summary, summary_title
from flows.show.table import Number, Table, numbers, texts
from negcore.store.publish import SetAside
from tasks.measure.missing import Extracted, Failure

HOSTILE = "[click](http://evil) <b>bold<b> `code` www.evil.org *x* | \x1b[31m"


@dataclass
class Shown(RunResults):
    shown: list[Section] = field(default_factory=list)

    @property
    def sections(self):
        return self.shown


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "negs").mkdir()
    for name in ("accuracy.arrow", "run.yaml", "claim.json", ".hidden"):
        (tmp_path / name).touch()
    return tmp_path


def extracted(n_rows: int, **values):
    place = negs_place("tiny", "mini/fact", "train")
    return Extracted(
        place, "tiny mini/fact train", n_rows, n_reused=2, n_computed=1, n_bytes=10, **({"failures": ()} | values)
    )


def rendered(text: str) -> str:
    markdown = MarkdownIt("gfm-like", {"linkify": False})
    markdown.validateLink = lambda url: True  # whether files may be linked is each page's own decision
    return markdown.render(text)


def links(text: str) -> list[str]:
    return re.findall(r'href="([^"]*)"', rendered(text))


def test_every_file_is_named_and_known_ones_are_explained_without_a_link_that_is_dead_elsewhere(directory):
    text = run_summary(RunResults(directory))
    assert links(text) == []
    assert str(directory) in text
    assert f"`neg view {directory}`" in text
    for name in ("accuracy.arrow", "negs", "run.yaml"):
        assert f"`{name}`" in text
    assert "NEG shards" in text and "file://" not in text


def test_it_says_itself_what_the_report_says_first(directory):
    columns = [*texts("dataset"), *numbers("train\ntest\nmass", "Magn")]
    accuracy = Table("accuracy-tiny", "Accuracy", columns, [[["knowledge"], ["fact", "100", Number(0.75)]]])
    other = Table("rows", "Rows used", texts("dataset"), [[["nli"]]])
    sentences = [f"finding {i}" for i in range(25)]
    results = Shown(directory, shown=[Section("", [other, accuracy], sentences=sentences)])
    results.about = About((), "neg pipeline 'a b/run.yaml'", "")
    text = run_summary(results)
    for part in ("finding 0", "finding 19", "and 5 more", "| fact | 0.75 |", "`neg pipeline 'a b/run.yaml'`"):
        assert part in text
    assert "Rows used" not in text and "finding 20" not in text
    assert "<table>" in rendered(text)
    assert summary_title(results) == "finding 0"


def test_without_findings_its_title_counts_the_rows(directory):
    assert summary_title(RunResults(directory, extracted=[extracted(10)])).startswith("10 rows done")


def test_rows_are_counted_over_all_parts(directory):
    failure = Failure(0, 7, "lost")
    aside = SetAside(id="row", cause="error", reason="a reason")
    parts = [extracted(10), extracted(5, failures=(failure,), set_aside=(aside,))]
    text = run_summary(RunResults(directory, extracted=parts))
    assert "15 rows done, 1 set aside, 7 failed; 6 shards, 0 MiB; 4 shards reused" in text


def test_hostile_names_and_errors_are_code(directory):
    place = directory / HOSTILE.replace("/", "_")
    place.mkdir()
    shown = [Section("", [], sentences=[HOSTILE])]
    text = run_summary(Shown(place, shown=shown, problems=[HOSTILE], warnings=[HOSTILE]))
    html = rendered(text)
    assert links(text) == []
    assert set(re.findall(r"<(\w+)", html)) == {"p", "code", "strong", "ul", "li", "h2"}
    assert html.count("<code>") == 5
    assert "Missing: 1" in text and "Warnings: 1" in text
    assert "[click](http://evil) &lt;b&gt;bold" in html
    assert "\x1b" not in html


def test_a_place_in_a_bucket_is_linked_by_its_url(monkeypatch):
    bucket = UPath("s3://bucket/my runs)")
    monkeypatch.setattr(report, "find", lambda folder, pattern: [folder / "negs"])
    assert links(run_summary(RunResults(bucket))) == ["s3://bucket/my%20runs%29", "s3://bucket/my%20runs%29/negs"]
