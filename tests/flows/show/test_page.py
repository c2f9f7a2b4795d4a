"""The page of a run in a real browser: figures, tables, one neuron, narrow and dark screens, paper, hostile texts."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from browser import CHROMIUM, browser

from flows.pipeline import Results
from flows.show.about import about_run
from flows.show.report import write_report
from tasks.comparisons import ComparisonRow
from tasks.config.dataset_runs import SkillRun
from tasks.config.run_file import write_run_file
from tasks.neurons import NeuronRow
from tasks.probe import AccuracyRow, Confusion
from tasks.results import SplitAccount, averages
from tasks.rundir.manifest import Shards

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: make browser")

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>{{7*7}}&amp;\u2028'\"`"
DATASETS = ("mini/fact", "mini/nli", HOSTILE)
PROBES = ("lm", "polar", "magn")


def score(dataset: str, probe: str, n_correct: int, group: str = "") -> AccuracyRow:
    share = n_correct / 40
    kept = {"lm": None, "polar": 64, "magn": 512}[probe]
    values = (kept, share, max(0.0, share - 0.15), min(1.0, share + 0.14), n_correct, 40, 80, 0.3, 0.25, False)
    return AccuracyRow("tiny", 0, "knowledge", dataset, group, probe, *values, 0.35, 0.4, 0.9)


def neuron(dataset: str, probe: str, place: int, layer: int, number: int) -> NeuronRow:
    where = ("tiny", 0, dataset, "", probe, place, layer, number)
    return NeuronRow(*where, 1 if place % 2 else -1, 30 - place, 0.9, 1, 4, 12.5, [1e-3, -2e-3, 0.0], None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The page of a run whose names are hostile, with neurons and paired tests beside its accuracies."""
    directory = tmp_path_factory.mktemp("run") / "run <b>& 1"
    directory.mkdir()
    write_run_file(SkillRun(model="tiny", dataset=HOSTILE, out=directory))
    scores = [
        score(dataset, probe, 10 + 7 * i + 5 * j)
        for i, dataset in enumerate(DATASETS)
        for j, probe in enumerate(PROBES)
    ]
    results = Results(directory, scores=scores, averages=averages(scores), n_datasets=3, warnings=[HOSTILE])
    results.splits = [
        SplitAccount("knowledge", name, 0, "plain", split, "clean", 100, 90, 80, HOSTILE, False)
        for name in DATASETS
        for split in ("train", "valid", "test")
    ]
    results.confusion = [Confusion("tiny", 0, "mini/fact", "magn", gold, said, 0) for gold in (0, 1) for said in (0, 1)]
    results.neurons = [
        neuron(dataset, probe, place, place, 7 * place + (dataset != "mini/fact"))
        for dataset in DATASETS
        for probe in PROBES[1:]
        for place in range(1, 7)
    ]
    counts = {"n_test": 40, "n_first": 2, "n_second": 3, "difference": -0.025}
    compared = {"p": 1.0, "p_corrected": 1.0, "n_comparisons": 1}
    results.comparisons = [ComparisonRow("tiny", 0, name, "polar", "magn", **counts, **compared) for name in DATASETS]
    shards = {"negs/model=tiny/dataset=a/split=test": Shards(1, 20, 10, 2, "", {"torch": {"2.0": 1}})}
    results.about = about_run(directory, shards, datetime(2026, 1, 2, tzinfo=UTC))
    write_report(results)
    return directory


@pytest.fixture(scope="module")
def page(directory, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as page:
        page.window(1280)
        page.open((directory / "report.html").as_uri())
        page.wait_for("document.documentElement.dataset.drawn !== undefined")
        yield page


def cells(page, table: str, column: int) -> list[str]:
    """Return what is seen in a column of a table."""
    return page.value(
        f"[...document.querySelectorAll('{table} tbody tr')].filter(row => !row.hidden)"
        f".map(row => row.cells[{column}].innerText.trim())"
    )


def table_of(page, title: str) -> str:
    """Name the table below a heading, and return how it is found."""
    page.value(
        "document.querySelectorAll('.table').forEach((box, i) => { let node = box; "
        "while (node && node.tagName !== 'H3') node = node.previousElementSibling; "
        f"if (node?.textContent.startsWith({title!r})) box.id = 'sought'; }})"
    )
    return "#sought"


def click(page, table: str, column: int) -> None:
    page.value(f"document.querySelectorAll('{table} th button')[{column}].click()")


def write(page, table: str, words: str) -> None:
    """Write into the field that filters a table."""
    page.value(
        f"(() => {{ const field = document.querySelector('{table}').previousElementSibling.querySelector('input'); "
        f"field.value = {words!r}; field.dispatchEvent(new Event('input')); }})()"
    )


def point(page, chart: int, number: int) -> tuple[float, float]:
    """Scroll to a point of a figure and return where it is on the screen."""
    x, y = page.value(
        f"(() => {{ const marks = document.querySelectorAll('.chart')[{chart}].querySelectorAll('.role-mark path'); "
        f"const mark = [...marks].filter(one => one.closest('.mark-symbol'))[{number}]; "
        "mark.scrollIntoView({block: 'center'}); const box = mark.getBoundingClientRect(); "
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    return x, y


def test_every_figure_is_drawn_without_an_error_or_a_request(page, directory):
    assert page.value("document.querySelectorAll('.chart svg').length") == 3
    drawn = page.value("[...document.querySelectorAll('.chart')].map(one => one.querySelectorAll('path').length)")
    assert min(drawn) > 20
    said = page.value("[...document.querySelectorAll('.chart')].map(one => one.getAttribute('aria-label'))")
    assert all(len(text) > 50 for text in said)
    assert page.errors == []
    assert set(page.requests) == {(directory / "report.html").as_uri()}


def test_the_policy_forbids_what_the_page_does_not_bring_along(page):
    blocked = (
        "new Promise(done => {{ addEventListener('securitypolicyviolation', event => done(event.effectiveDirective), "
        "{{once: true}}); {}; }})"
    )
    inline = "const s = document.createElement('script'); s.textContent = 'window.bad = 1'; document.body.append(s)"
    picture = "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i)"
    assert page.value(blocked.format(inline)) == "script-src-elem"
    assert page.value(blocked.format(picture)) == "img-src"
    assert page.value(blocked.format("fetch('http://127.0.0.1:9/').catch(() => 0)")) == "connect-src"
    assert page.value("(() => { try { return eval('1') } catch (error) { return error.name } })()") == "EvalError"
    assert page.value("window.bad === undefined")
    page.errors.clear()


def test_hostile_names_are_text_everywhere(page):
    assert page.value("document.querySelectorAll('img, iframe, object').length") == 1  # the test's own, above
    assert page.value("document.querySelectorAll('script').length") == 4
    shown = HOSTILE.replace("\u2028", "\\u2028")
    assert page.value("document.body.innerText").count(shown) >= 5
    titles = page.value("[...document.querySelectorAll('.chart text')].map(text => text.textContent).join(' ')")
    assert HOSTILE[:12] in titles


def test_a_tooltip_shows_hostile_names_as_text(page):
    place = point(page, chart=1, number=2)
    for dx in (-3, 0):
        page.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0] + dx, y=place[1])
    page.wait_for("document.querySelector('#vg-tooltip-element.visible') !== null")
    assert HOSTILE[:10] in page.value("document.querySelector('#vg-tooltip-element').innerText")
    assert page.value("document.querySelectorAll('#vg-tooltip-element img, #vg-tooltip-element script').length") == 0
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)


def test_a_column_sorts_by_number_up_down_and_back(page):
    table = table_of(page, "Accuracy on test")
    before = cells(page, table, 0)
    click(page, table, 4)
    polar = [float(f"0{cell.split()[0]}") for cell in cells(page, table, 4)]
    assert polar == sorted(polar) and len(polar) == 5  # datasets and averages, without the genre's line
    click(page, table, 4)
    assert [float(f"0{cell.split()[0]}") for cell in cells(page, table, 4)] == polar[::-1]
    assert page.value(f"document.querySelectorAll('{table} th')[4].ariaSort") == "descending"
    click(page, table, 4)
    assert cells(page, table, 0) == before


def test_a_filter_keeps_the_rows_that_hold_its_words(page):
    table = table_of(page, "Accuracy on test")
    before = cells(page, table, 0)
    write(page, table, "MINI/N")
    assert cells(page, table, 0) == ["mini/nli"]
    write(page, table, "")
    assert cells(page, table, 0) == before


def test_one_neuron_is_picked_by_name_by_its_row_and_by_its_point(page):
    assert not page.value("document.getElementById('neurons').checkVisibility()")  # 36 rows are folded
    page.value("document.getElementById('pick').value = '3.21'")
    page.value("document.getElementById('pick').dispatchEvent(new Event('change'))")
    assert set(cells(page, "#neurons", 0)) == {"3.21"}
    assert cells(page, "#neurons", 1) == ["mini/fact", "mini/fact"]
    page.value("document.querySelector('#neurons tbody tr:not([hidden])').click()")
    assert len(cells(page, "#neurons", 0)) == 36
    place = point(page, chart=2, number=1)
    for event in ("mouseMoved", "mousePressed", "mouseReleased"):
        page.send("Input.dispatchMouseEvent", type=event, x=place[0], y=place[1], button="left", clickCount=1)
    page.wait_for("document.getElementById('pick').value !== ''")
    assert len(cells(page, "#neurons", 0)) < 36
    page.value("document.querySelector('#neurons tbody tr:not([hidden])').click()")


def test_the_command_that_repeats_the_run_is_copied(page, directory):
    page.value("document.querySelector('button.copy').click()")
    assert page.value("getSelection().toString()").strip() == f"neg pipeline '{directory}/run.yaml'"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_nothing_is_cut_and_everything_can_be_read(page, directory, width, dark):
    page.window(width, dark=dark)
    page.open((directory / "report.html").as_uri())
    page.wait_for("document.documentElement.dataset.drawn !== undefined")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    wide = page.value(
        "[...document.querySelectorAll('.table, .chart')].filter(one => one.scrollWidth > one.clientWidth).length"
    )
    assert wide == 0
    ink, paper = page.value("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (light[0] - light[1]) * (1 if dark else -1) > 450
    axis = page.value("getComputedStyle(document.querySelector('.chart .role-axis-label text')).fill")
    assert axis == ink
    assert page.errors == []


def test_no_column_is_cut_on_paper_and_folded_tables_are_open(page, directory, tmp_path):
    page.window(794, media="print")
    page.open((directory / "report.html").as_uri())
    page.wait_for("document.documentElement.dataset.drawn !== undefined")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    right = page.value(
        "Math.max(...[...document.querySelectorAll('td, th, svg')].map(one => one.getBoundingClientRect().right))"
    )
    assert right <= 794
    assert page.value("getComputedStyle(document.querySelector('input, button')).display") == "none"
    assert page.printed()[:5] == b"%PDF-"
    assert page.value("[...document.querySelectorAll('details')].every(one => one.open)")


def test_without_scripts_all_but_the_figures_is_there_and_their_files_are_named(page, directory):
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    page.window(1280)
    page.open((directory / "report.html").as_uri())
    text = page.value("document.body.innerText")
    page.send("Emulation.setScriptExecutionDisabled", value=False)
    for part in ("Polar and Magn cannot be told apart on these 40 rows", "neg pipeline", "drawn by a script"):
        assert part in text
    files = page.value(
        "[...document.querySelectorAll('.files a')].map(link => decodeURIComponent(new URL(link.href).pathname))"
    )
    assert len(files) == 9 and all(Path(file).is_file() for file in files)
