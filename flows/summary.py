"""What Prefect's pages say of a whole run: what became of its rows, and where its files are."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

from flows.display import printable
from negcore.storage import find, is_remote
from tasks.extract import Extracted

_KNOWN = MappingProxyType(
    {
        "accuracy.arrow": "accuracy of every probe on test",
        "averages.arrow": "mean accuracy over datasets",
        "campaign": "comparison of the models",
        "confusion.arrow": "answers by gold option",
        "linearity": "tables and figures",
        "negs": "NEG shards",
        "probes": "fitted probes",
        "run.yaml": "run file: repeats the run",
        "skills": "tables and figures",
        "splits.arrow": "rows released and used",
    }
)
_UNINTERESTING = frozenset({"claim.json", "plan.json", "prefect"})
_MOST_PROBLEMS = 20
_LONGEST_PROBLEM = 300


def run_summary(directory: Path, extracted: Sequence[Extracted], problems: Sequence[str]) -> str:
    """Markdown that names a run's directory and files, with links, and counts its rows; no prompt is in it.

    Parameters
    ----------
    directory : Path
        The run directory, on disk or in a bucket. Browsers follow a link to a file only on the machine that has it,
        and not from every page, so the path is written out too.
    extracted : sequence of Extracted
    problems : sequence of str
        One line for everything that is missing.
    """
    lines = [f"Run directory: {_linked(directory, str(directory))}", "", *map(_file_line, _files(directory))]
    if extracted:
        lines = [f"**{_rows(extracted)}**", "", *lines]
    if problems:
        lines += ["", f"**Missing: {len(problems)}**", ""]
        lines += [f"- {_code(problem[:_LONGEST_PROBLEM])}" for problem in problems[:_MOST_PROBLEMS]]
    return "\n".join(lines)


def _rows(extracted: Sequence[Extracted]) -> str:
    n_done = sum(one.n_rows for one in extracted)
    n_aside = sum(len(one.set_aside) for one in extracted)
    n_failed = sum(failure.n_rows for one in extracted for failure in one.failures)
    n_shards = sum(one.n_reused + one.n_computed for one in extracted)
    n_reused = sum(one.n_reused for one in extracted)
    return (
        f"{n_done} rows done, {n_aside} set aside, {n_failed} failed; {n_shards} shards, of which {n_reused} were "
        "there already"
    )


def _files(directory: Path) -> list[Path]:
    return [path for path in find(directory, "*") if not path.name.startswith(".") and path.name not in _UNINTERESTING]


def _file_line(path: Path) -> str:
    what = _KNOWN.get(path.name)
    return f"- {_linked(path, path.name)}" + (f": {what}" if what else "")


def _linked(path: Path, text: str) -> str:
    return f"{_code(text)} ([open]({quote(str(path), safe=':/') if is_remote(path) else path.as_uri()}))"


def _code(text: str) -> str:
    """Text in which nothing is read as markup. (Prefect's pages show the backslashes of other ways to escape.)"""
    line = " ".join(printable(text).split())
    return f"`{line.replace('`', '?')}`"
