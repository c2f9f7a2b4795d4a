"""The results of a run, and the page that shows them: `report.html` beside the data, with figures and tables.

The page is one file that can be mailed: it needs no network, and runs the scripts in it alone. Names and errors on it
are plain text, whatever they contain.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from flows.show.about import About
from flows.show.drawing import WIDTH, Figure, Part, look, save_figures
from flows.show.neuron_figures import listed_neurons
from flows.show.table import Table
from flows.show.text import count, printable
from flows.show.vega import vega_script
from negcore.store.files import find, output
from tasks.measure.missing import Extracted
from tasks.neurons import NeuronRow

REPORT_FILE = "report.html"

KNOWN_FILES = MappingProxyType(
    {
        REPORT_FILE: "every table and figure",
        "accuracy.arrow": "accuracy of every probe on test",
        "averages.arrow": "mean accuracy over datasets",
        "beyond_lm.arrow": "what probes add to the model's own answer",
        "campaign": "comparison of the models",
        "certificates.arrow": "how many large NEGs the estimates can miss",
        "checks": "check of every model where it was loaded",
        "comparisons.arrow": "paired tests between probes",
        "confusion.arrow": "answers by gold option",
        "controls.arrow": "accuracies with permuted answers and with random weights",
        "figures": "figures as SVG, PNG and PDF",
        "letter_bias.arrow": "accuracies by letter and by answer, over orders of the options",
        "linearity": "tables and figures",
        "manifest.json": "what belongs together, with checksums",
        "negs": "NEG shards",
        "neurons.arrow": "best neurons of every vote probe",
        "predictions.arrow": "answer of every probe to every test row",
        "probes": "fitted probes",
        "random-weights": "the control with random weights: a run of its own",
        "resamples.arrow": "accuracies by sample of the training rows",
        "run.yaml": "run file: repeats the run",
        "skills": "tables and figures",
        "splits.arrow": "rows released and used",
    }
)
_UNINTERESTING = frozenset({"claim.json", "plan.json", "prefect"})
_REPORTS_OF_PARTS = f"*/*/{REPORT_FILE}"
"""Reports of the parts of a campaign, in MODEL/STAGE."""


@dataclass(frozen=True)
class Section:
    """Sentences, figures and tables that belong together."""

    title: str
    """One line; may be empty."""
    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    sentences: Sequence[str] = ()
    """Findings, each with its uncertainty."""
    neurons: Sequence[NeuronRow] = ()
    """The best neurons, for the page alone."""
    folder: str = "figures"
    """Folder of the figures' files below the run directory."""


@dataclass
class RunResults:
    """The results of a run, and what is missing from them."""

    directory: Path
    extracted: list[Extracted] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    """One line for every row that could not be computed; the run went on without it."""
    problems: list[str] = field(default_factory=list)
    """One line for everything that is missing; empty if the run is whole."""
    warnings: list[str] = field(default_factory=list)
    """One line for everything that is there and must be read with care; the run is whole all the same."""
    checks: Section | None = None
    """The checks of the run's models, for its page alone."""
    about: About | None = None
    """The origin of the results, for the page alone."""
    report: Path | None = None
    """The page of this run; None until it is written."""

    def add(self, extracted: Extracted) -> None:
        """Add what became of the shards of a set."""
        self.extracted.append(extracted)
        self.set_aside += extracted.rows_set_aside
        self.problems += extracted.problems
        self.warnings += extracted.repairs

    @cached_property
    def sections(self) -> list[Section]:
        """The tables and figures to show, built once when the run is done; none if it only makes shards."""
        return []


def write_report(results: RunResults) -> None:
    """Write the figures and the page of a run that has something to report; otherwise an earlier run's page stays.

    Raises
    ------
    RunError
        If they cannot be written.
    """
    if not (results.sections or results.problems):
        return
    page, path = _page(results), results.directory / REPORT_FILE
    with output(path) as file:
        file.write_text(page, encoding="utf-8")
    results.report = path


def counted(extracted: Sequence[Extracted]) -> str:
    """Return how many rows were done, in one line that is the same however often the run was interrupted."""
    n_done = sum(one.n_rows for one in extracted)
    n_aside = sum(len(one.set_aside) for one in extracted)
    n_failed = sum(failure.n_rows for one in extracted for failure in one.failures)
    n_shards = sum(one.n_reused + one.n_computed for one in extracted)
    size = sum(one.n_bytes for one in extracted) / 2**20
    return f"{n_done} rows done, {n_aside} set aside, {n_failed} failed; {n_shards} shards, {size:.0f} MiB"


def counted_now(extracted: Sequence[Extracted]) -> str:
    """Return the same line, how many shards were there before, and how many of these were damaged."""
    n_damaged = sum(len(one.damaged) for one in extracted)
    mended = f"; {count(n_damaged, 'damaged shard')} computed again" if n_damaged else ""
    return f"{counted(extracted)}; {sum(one.n_reused for one in extracted)} shards reused{mended}"


def files_of(directory: Path) -> list[Path]:
    """Return what people look for in a run directory, the report first."""
    found = [path for path in find(directory, "*") if not path.name.startswith(".")]
    shown = [path for path in found if path.name not in _UNINTERESTING]
    return sorted(shown, key=lambda path: path.name != REPORT_FILE)


# The page

_MOST_ROWS = 30
"""Rows of a table that is not folded."""
_MOST_SENTENCES = 12
"""Findings that are not folded."""
_LABELS = 64
"""Pixels beside a panel for labels."""


class _Link(NamedTuple):
    """A file below the run directory: the page and its data are moved together."""

    href: str
    name: str
    about: str = ""


class _Shown(NamedTuple):
    """A figure on the page."""

    figure: Figure
    parts: Sequence[tuple[int, str]]
    """Number of the drawing, and heading."""
    files: Sequence[_Link]


def _page(results: RunResults) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    template = environment.from_string(_file(REPORT_FILE))
    directory = results.directory
    figures, drawings = _figures(results.sections, directory)
    data = [path for path in files_of(directory) if path.name != REPORT_FILE]
    scripts = [*([vega_script()] if drawings else []), f"\n{_file('report.js')}"]
    return template.render(
        title=directory.name,
        about=results.about,
        counted=counted(results.extracted) if results.extracted else "",
        problems=results.problems,
        warnings=results.warnings,
        set_aside=results.set_aside,
        sentences=[sentence for section in results.sections for sentence in section.sentences],
        most_sentences=_MOST_SENTENCES,
        figures=figures,
        n_parts=len(drawings),
        neurons=listed_neurons([row for section in results.sections for row in section.neurons]),
        sections=[*results.sections, *([results.checks] if results.checks else [])],
        most_rows=_MOST_ROWS,
        parts=[_link(path, directory) for path in find(directory, _REPORTS_OF_PARTS)],
        data=[_link(path, directory, KNOWN_FILES.get(path.name, "")) for path in data],
        drawings=_json({"look": look("currentColor"), "figures": drawings}),
        scripts=[Markup(script) for script in scripts],
        script_hashes=[_hash(script) for script in scripts],
    )


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _json(value: Any) -> Markup:
    """Return a value as JSON that ends no element and begins none, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _hash(script: str) -> Markup:
    """Return what the page's policy calls a script by: no other is run."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'")


def _figures(sections: Sequence[Section], directory: Path) -> tuple[list[_Shown], list[dict[str, Any]]]:
    """Write the files of all figures; return the figures, and the drawings of their parts."""
    shown: list[_Shown] = []
    drawings: list[dict[str, Any]] = []
    for folder, figure in ((section.folder, figure) for section in sections for figure in section.figures):
        first = len(drawings)
        drawings += [_drawing(part) for part in figure.parts]
        files = save_figures([figure], directory / folder)
        parts = [(first + i, part.heading) for i, part in enumerate(figure.parts)]
        shown.append(
            _Shown(figure, parts, [_link(path, directory)._replace(name=path.suffix[1:].upper()) for path in files])
        )
    return shown, drawings


def _drawing(part: Part) -> dict[str, Any]:
    return {"spec": part.chart, "cell": WIDTH + _LABELS}


def _printable(value: Any) -> Any:
    """Make every text on the page printable; markup of the template itself stays."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _link(path: Path, directory: Path, about: str = "") -> _Link:
    place = str(path).removeprefix(str(directory)).lstrip("/")
    return _Link(quote(place), place, about)
