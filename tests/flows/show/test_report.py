"""The page of a run: what it shows, that it is readable markup, and that hostile text stays text."""

import base64
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import get_args
from urllib.parse import unquote

import pytest

from flows.show.drawing import Figure, Part, field, layer, panel
from flows.show.report import REPORT_FILE, RunResults, Section, write_report
from flows.show.table import Number, Style, Table, Words, numbers, texts
from flows.show.text import change, printable, share

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'text' {{ 7 * 7 }} \x1b[31m"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page as a browser would take it: elements properly closed, text, links, rows of tables."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
            return
        self.text += data
        if {"td", "th"} & set(self.open[-2:]):
            self.rows[-1][-1] += data


@dataclass
class Shown(RunResults):
    shown: list[Section] = dataclasses.field(default_factory=list)

    @property
    def sections(self):
        return self.shown


def page_of(results: RunResults) -> Page:
    return Page(report_of(results).decode())


def report_of(results: RunResults) -> bytes:
    write_report(results)
    return (results.directory / REPORT_FILE).read_bytes()


BLOCKS = [[[Words("fact", "bold")]], [["  de", (Number(0.5, share, "bold"), Words(" 8", "dim"), "\n.1-.9")]]]


def table_of(blocks):
    return Table(
        "accuracy", "Accuracy on test", [*texts("dataset"), *numbers("train\ntest")], blocks, "Below: interval"
    )


@pytest.fixture
def table():
    return table_of(BLOCKS)


def test_a_table_is_shown_whole_with_its_styles(tmp_path, table):
    page = page_of(Shown(tmp_path, shown=[Section("tiny on questions", [table])]))
    assert page.rows == [["dataset", "train\ntest"], ["fact", ""], ["  de", ".500 8\n.1-.9"]]
    for part in ("tiny on questions", "Accuracy on test", "Below: interval"):
        assert part in page.text
    markup = (tmp_path / REPORT_FILE).read_text()
    assert '<span class="bold">.500</span>' in markup
    assert markup.count("<tbody>") == 2
    assert markup.count('td class="number"') == 2


def test_every_style_and_alignment_has_a_rule(tmp_path):
    styles = set(get_args(Style)) - {""}
    table = table_of([[[tuple(Words("a", style) for style in styles), Number(1)]]])
    write_report(Shown(tmp_path, shown=[Section("", [table])]))
    markup = (tmp_path / REPORT_FILE).read_text()
    used = set(re.findall(r'<(?:span|td|th) class="([^"]+)"', markup))
    assert used == styles | {"number"} == {"bold", "dim", "italic", "red", "yellow", "green", "number"}
    assert all(re.search(rf"\.{name}\b.*\{{", markup) for name in used)


def test_hostile_names_and_errors_are_text(tmp_path):
    table = Table("hostile", HOSTILE, [*texts(HOSTILE), *numbers("b")], [[[HOSTILE, Words(HOSTILE, "red")]]], HOSTILE)
    directory = tmp_path / HOSTILE.replace("/", "_")
    (directory / "a b<i>.arrow").mkdir(parents=True)
    shown = [Section(HOSTILE, [table])]
    page = page_of(Shown(directory, shown=shown, problems=[HOSTILE], set_aside=[HOSTILE], warnings=[HOSTILE]))
    assert len(page.scripts) == 2 and not any("alert" in script for script in page.scripts)
    assert page.text.count("<script>alert(1)</script> & \"quoted\" 'text' {{ 7 * 7 }}") >= 9
    assert "\x1b" not in page.text
    assert page.links == ["a%20b%3Ci%3E.arrow"]


def test_what_is_missing_needs_care_or_was_set_aside_is_counted_and_named(tmp_path, table):
    lost, rows = ["shard 3 is lost"], ["row 1: nan", "row 2: nan"]
    care = ["little probability"]
    page = page_of(Shown(tmp_path, shown=[Section("", [table])], problems=lost, set_aside=rows, warnings=care))
    for text in ("Missing: 1", *lost, "Warnings: 1", *care, "Rows set aside: 2", *rows):
        assert text in page.text


def figure_of(title: str, name: str = "curves") -> Figure:
    rows = [{"x": 1, "name": title}]
    point = layer("point", x=field("x:Q"), color=field("name:N"))
    return Figure("tiny", name, title, f"It shows {title}.", [Part([panel(rows, point, title=title)], title)])


def test_links_lead_to_figures_reports_of_parts_and_data_wherever_the_directory_is_moved(tmp_path, table):
    run, moved = tmp_path / "run", tmp_path / "moved"
    (run / "org%2Fmodel" / "mceval8k").mkdir(parents=True)
    for file in (run / "accuracy.arrow", run / "claim.json", run / "org%2Fmodel" / "mceval8k" / REPORT_FILE):
        file.touch()
    write_report(Shown(run, shown=[Section("", [table], [figure_of("curves")], folder="linearity/figures")]))
    run.rename(moved)
    links = Page((moved / REPORT_FILE).read_text()).links
    assert all((moved / unquote(link)).exists() for link in links)
    assert {unquote(link) for link in links} == {
        *(f"linearity/figures/tiny-curves.{kind}" for kind in ("svg", "png", "pdf")),
        f"org%2Fmodel/mceval8k/{REPORT_FILE}",
        "accuracy.arrow",
        "linearity",
        "org%2Fmodel",
    }


def test_the_page_fetches_nothing_and_its_policy_names_the_scripts_that_it_runs(tmp_path, table):
    page = page_of(Shown(tmp_path, shown=[Section("", [table], [figure_of(HOSTILE)])]))
    assert not page.names & {"link", "iframe", "object", "base"}
    assert all(not re.match(r"[a-z]+:|//", link) for link in page.links)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', (tmp_path / REPORT_FILE).read_text())[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy
    data, *run = page.scripts
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in run]
    assert re.search("script-src ([^;]*);", policy)[1] == " ".join(f"'sha256-{one}'" for one in hashes)
    assert json.loads(data)["figures"][0]["spec"]["concat"][0]["data"]["values"][0]["name"] == printable(HOSTILE)


@pytest.mark.parametrize("text", ["</script><script>", "<!--<script>", "\u2028&amp;]]>"])
def test_no_text_in_the_data_of_a_figure_ends_or_begins_an_element(tmp_path, table, text):
    page = page_of(Shown(tmp_path, shown=[Section("", [table], [figure_of(text)])]))
    assert len(page.scripts) == 3
    markup = (tmp_path / REPORT_FILE).read_text()
    block = markup[markup.index('id="drawings">') :].partition(">")[2].partition("</script>")[0]
    assert not set("<>&\u2028") & set(block)


def test_a_page_without_figures_does_not_carry_the_script_that_draws(tmp_path, table):
    assert len(report_of(Shown(tmp_path, shown=[Section("", [table])]))) < 40_000
    with_figures = report_of(Shown(tmp_path, shown=[Section("", [table], [figure_of("curves")])]))
    assert 500_000 < len(with_figures) < 1_200_000


def test_findings_come_before_figures_and_tables(tmp_path, table):
    sentences = [f"Finding {i} is {HOSTILE}." for i in range(20)]
    page = page_of(Shown(tmp_path, shown=[Section("", [table], [figure_of("curves")], sentences)]))
    places = [page.text.index(text) for text in ("Finding 0", "Finding 19", "It shows curves", "Accuracy on test")]
    assert places == sorted(places)
    assert "8 more" in page.text


def test_long_tables_are_folded(tmp_path):
    def rows(n):
        return Shown(tmp_path, shown=[Section("", [table_of([[["a", Number(1)]] * n])])])

    assert "details" not in page_of(rows(30)).names
    assert "details" in page_of(rows(31)).names


@pytest.mark.parametrize(("value", "is_bold"), [(0.0004, False), (-0.0004, False), (0.0006, True)])
def test_what_rounds_to_zero_is_never_bold(tmp_path, value, is_bold):
    write_report(Shown(tmp_path, shown=[Section("", [table_of([[["a", Number(value, change, "bold")]]])])]))
    assert ('class="bold"' in (tmp_path / REPORT_FILE).read_text()) is is_bold


def test_the_same_results_make_the_same_bytes(tmp_path, table):
    results = Shown(tmp_path, shown=[Section("", [table])])
    first = report_of(results)
    assert report_of(results) == first


def test_a_run_without_anything_to_report_leaves_an_earlier_report_as_it_is(tmp_path, table):
    write_report(RunResults(tmp_path))
    assert list(tmp_path.iterdir()) == []
    before = report_of(Shown(tmp_path, shown=[Section("", [table])]))
    assert report_of(RunResults(tmp_path)) == before


def test_a_run_that_failed_as_a_whole_replaces_the_report(tmp_path, table):
    write_report(Shown(tmp_path, shown=[Section("", [table])]))
    page = page_of(RunResults(tmp_path, problems=["everything is lost"]))
    assert "everything is lost" in page.text
    assert page.rows == []
