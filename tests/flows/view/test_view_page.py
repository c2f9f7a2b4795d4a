"""`neg view` in a real browser: from the index down to a neuron and a row, hostile texts, narrow and dark screens."""

import re

import pytest
from browser import CHROMIUM, browser
from views import EVIL, NAME, hostile_runs, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: make browser")

RUN = f"runs/{NAME}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(hostile_runs(tmp_path_factory.mktemp("view"))) as found:
        yield found


@pytest.fixture(scope="module")
def opened(server, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as page:
        page.open(f"{server.address}/?token={server.token}")
        yield page


@pytest.fixture
def page(opened, server):
    """The index on a wide screen; whatever a test does then, nothing fails and nobody else is asked for anything."""
    opened.window(1280)
    opened.open(server.address)
    yield opened
    assert opened.errors == []
    assert all(address.startswith(f"{server.address}/") for address in opened.requests)


def link(text: str, among: str = "a") -> str:
    """Name the first link of a text."""
    return f"[...document.querySelectorAll({among!r})].find(one => one.textContent.trim() === {text!r})"


def headings(page) -> list[str]:
    return page.value("[...document.querySelectorAll('h1, h2, h3')].map(one => one.textContent.trim())")


def test_from_the_index_a_click_leads_to_a_run_its_neurons_and_the_rows_that_one_moves(page):
    page.follow(link(RUN))
    assert headings(page)[0] == RUN
    best = "document.querySelector('details')"
    assert not page.value(f"{best}.querySelector('a').checkVisibility()")  # the lists of neurons are folded
    page.value(f"{best}.querySelector('summary').click()")
    assert page.value(f"{best}.querySelector('a').checkVisibility()")
    neuron = page.value(f"{best}.querySelector('a').textContent")
    page.follow(f"{best}.querySelector('a')")
    assert headings(page)[0] == f"Neuron {neuron}"
    row = page.value("document.querySelector('td a').textContent")
    page.follow("document.querySelector('td a')")
    assert headings(page) == [
        row,
        "Prompt",
        "Options",
        "Answers of the probes",
        "Neurons that move the right option most",
    ]
    page.follow(link(RUN, "nav a"))
    page.follow(link("runs", "nav a"))
    assert page.value("location.pathname") == "/"


def test_a_neuron_is_asked_for_by_layer_and_number_and_by_nothing_else(page):
    page.follow(link(RUN))
    page.value("document.querySelector('input[name=neuron]').value = 'best'")
    assert not page.value("document.querySelector('input[name=neuron]').form.reportValidity()")
    page.value("document.querySelector('input[name=neuron]').value = '1.7'")
    page.follow("document.querySelector('input[name=neuron]').form.querySelector('button')")
    assert headings(page)[0] == "Neuron 1.7"


def test_the_chosen_runs_are_put_side_by_side(page):
    for box in range(2):
        page.value(f"document.querySelectorAll('input[type=checkbox]')[{box}].click()")
    page.follow("document.querySelector('form button')")
    assert headings(page)[0] == "Runs side by side"
    shown = page.value("document.querySelector('table').innerText")
    assert NAME in shown and "copy" in shown


def test_the_report_of_a_run_draws_its_figures_in_its_sandbox(page):
    page.follow(link(RUN))
    page.follow(link("report of the run"))
    page.wait_for("document.documentElement.dataset.drawn !== undefined")
    assert page.value("document.querySelectorAll('.chart svg').length") > 0
    assert page.value("origin") == "null"


def addresses(page) -> dict[str, str]:
    """Return an address of every kind of page, by its kind; all tables, and the rows with hostile prompts."""
    found = {"index": page.value("location.href")}
    names = "[...document.querySelectorAll('input[type=checkbox]')].map(one => 'run=' + encodeURIComponent(one.value))"
    found["compare"] = f"{found['index']}compare?{page.value(f'{names}.join(String.fromCharCode(38))')}"
    found["run"] = page.value(f"{link(RUN)}.href")
    page.open(found["run"])
    for address in page.value("[...document.querySelectorAll('a')].map(one => one.href)"):
        kind, _, about = address.rpartition("/")[2].partition("?")
        if kind in ("neuron", "table") or (kind == "rows" and "hostile" in about):
            found[f"table {about}" if kind == "table" else kind] = address
    page.open(found["rows"])
    found["row"] = page.value("document.querySelector('td a').href")
    return found


def test_hostile_names_and_prompts_are_text_on_every_page(page):
    pages = addresses(page)
    assert {"index", "compare", "run", "neuron", "rows", "row", f"table run={RUN}"} - set(pages) == {f"table run={RUN}"}
    for kind, address in pages.items():
        page.open(address)
        assert page.value("document.querySelectorAll('script, img, iframe, object, b').length") == 0, kind
        shown = page.value("document.body.textContent")
        assert NAME in shown and "\u202e" not in shown, kind
        assert (EVIL in shown and "\\u202e" in shown) == (kind in ("neuron", "rows", "row")), kind
    assert page.value("document.querySelector('pre').textContent").endswith(f"{EVIL}\\u202e Answer:")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_no_column_is_cut_and_everything_can_be_read(page, width, dark):
    pages = addresses(page)
    page.window(width, dark=dark)
    for kind, address in pages.items():
        page.open(address)
        page.value("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert page.value("document.documentElement.scrollWidth <= innerWidth"), kind
        boxes = "[...document.querySelectorAll('.table, pre, td')]"
        assert page.value(f"{boxes}.filter(one => one.scrollWidth > one.clientWidth + 1).length") == 0, kind
        look = "(style => [style.color, style.backgroundColor])(getComputedStyle(document.body))"
        ink, paper = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in page.value(look)]
        assert (ink - paper) * (1 if dark else -1) > 450, kind
