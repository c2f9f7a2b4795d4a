"""The page of a campaign: what it says of its models, and how that looks in a real browser."""

from dataclasses import replace

import pytest
from browser import CHROMIUM, browser

from flows.campaign import CampaignResults
from flows.show.report import write_report
from flows.show.sentences import campaign_sentences
from tasks.campaign import Comparison, LinearityRow, OutcomeRow, gains
from tasks.config.campaign_run import CampaignRun
from tasks.config.run_file import write_run_file
from tasks.results import Average

HOSTILE = "<img src=x onerror=alert(1)></script>{{7*7}}&amp;'\"`"
NAMES = {"a": "tiny-a", "b": HOSTILE}


def mean(model: str, probe: str, accuracy: float, half: float = 0.05) -> Average:
    values = {"accuracy": accuracy, "low": accuracy - half, "high": accuracy + half, "n_datasets": 3}
    floors = {"majority": 0.3, "random": 0.25, "options_only": 0.35}
    return Average(model=model, shots=0, genre="", probe=probe, overlapping=False, **values, **floors)


def comparison(*means: Average) -> Comparison:
    found = Comparison([OutcomeRow(model, name, "mceval8k", "whole", 0, "") for model, name in NAMES.items()])
    found.accuracy.extend(means)
    found.gains.extend(gains(found.accuracy))
    found.linearity.append(LinearityRow("a", "facts", 2.0, 4, 12, 0.9, 0.5, 0.998, 0.99, 0.999))
    return found


MEANS = [
    mean("a", "lm", 0.4),
    mean("a", "magn", 0.7),
    mean("a", "polar", 0.36),
    mean("b", "lm", 0.3),
    mean("b", "magn", 0.55),
]


def test_the_findings_tell_what_is_clear_and_what_is_not():
    first, of_a, of_b, linear = campaign_sentences(comparison(*MEANS))
    assert first.startswith("zero-shot: tiny-a's best probe (Magn) is right most often, in .700 (.650-.750); ")
    assert f"its interval lies above that of {HOSTILE}" in first and "chosen on these very test rows" in first
    assert "tiny-a, zero-shot: on average over 3 datasets, LM-Prob is right in .400 (.350-.450)" in of_a
    assert "Magn lies above the best floor" in of_a and "Polar cannot be told from the best floor" in of_a
    assert of_b.startswith(f"{HOSTILE}, zero-shot: ")
    assert ".900 of 48 pairs of prompt and neuron are linear, and NeurGrad correlates" in linear


def test_models_whose_intervals_meet_are_not_told_apart():
    near = [replace(one, low=0.1, high=0.9) for one in MEANS]
    assert f"its interval meets that of {HOSTILE}" in next(campaign_sentences(comparison(*near)))


def test_a_model_that_answered_fewer_datasets_is_not_ranked():
    third = [replace(one, model="c", n_datasets=2, accuracy=0.99) for one in MEANS[:2]]
    found = comparison(*MEANS, *third)
    found.outcomes.append(OutcomeRow("c", "tiny-c", "mceval8k", "in part", 1, "no"))
    first = next(campaign_sentences(found))
    assert first.startswith("zero-shot: tiny-a's best probe") and first.endswith(
        " tiny-c answered fewer datasets and is left out here."
    )


def test_a_campaign_without_accuracies_has_no_figure(tmp_path):
    results = CampaignResults(tmp_path)
    results.comparison = Comparison([OutcomeRow("a", "tiny-a", "linearity", "failed", 1, "no")])
    (section,) = results.sections
    assert (list(section.figures), list(section.sentences)) == ([], [])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "campaign"
    directory.mkdir()
    write_run_file(CampaignRun(model=("org/a", "org/b"), out=directory))
    results = CampaignResults(directory)
    results.comparison = comparison(*MEANS)
    write_report(results)
    return directory


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: make browser")
def test_in_a_browser_the_forest_is_drawn_names_are_text_and_nothing_is_cut(directory, tmp_path):
    address = (directory / "report.html").as_uri()
    with browser(tmp_path) as page:
        for width, dark in ((1280, False), (390, True)):
            page.window(width, dark=dark)
            page.open(address)
            page.wait_for("document.documentElement.dataset.drawn !== undefined")
            assert page.value("document.querySelectorAll('.chart svg').length") == 1
            assert page.value("document.querySelector('.chart').querySelectorAll('path').length") > 20
            assert page.value("document.documentElement.scrollWidth <= innerWidth")
            boxes = "[...document.querySelectorAll('.table, .chart')]"
            assert page.value(f"{boxes}.filter(one => one.scrollWidth > one.clientWidth).length") == 0
        assert page.value("document.querySelectorAll('.findings li').length") == 4
        assert page.value("document.querySelectorAll('img').length") == 0
        assert page.value("document.body.innerText").count(HOSTILE) >= 3
        links = "[...document.querySelectorAll('.files a')].map(one => decodeURIComponent(new URL(one.href).pathname))"
        folder = directory / "campaign" / "figures"
        assert page.value(links) == [f"{folder}/models-accuracy-zero-shot.{kind}" for kind in ("svg", "png", "pdf")]
        assert sorted(path.suffix for path in folder.iterdir()) == [".pdf", ".png", ".svg"]
        assert page.errors == [] and set(page.requests) == {address}
        page.window(1280)
        page.open(address)
        page.wait_for("document.documentElement.dataset.drawn !== undefined")
        page.picture(tmp_path / "page.png")
