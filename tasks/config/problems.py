"""Everything that is wrong with a run file, one line each."""

import re
from collections.abc import Iterable, Iterator

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from negcore.texts import did_you_mean, quoted
from tasks.config.run_file import RunFile, field_keys, kind_of
from tasks.config.wordings import OwnWording


def problem_lines(run_class: type[RunFile], error: ValidationError, *, below: str = "") -> Iterator[str]:
    """Yield a line for each problem: the field, its value, and what is allowed.

    Parameters
    ----------
    below : str
        First part of the fields' places that is no field: the kind, where it was chosen from several.
    """
    problems = error.errors()
    unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
    for problem in problems:
        if problem["loc"] in unknown and problem["type"] != "extra_forbidden":
            continue  # nobody asks what an unknown field holds
        place = tuple(map(str, problem["loc"]))
        yield from _lines(run_class, place[1:] if below and place[:1] == (below,) else place, problem)


def as_options(run_class: type[RunFile], lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines with the names that fields have as options of the command line.

    A name of one word is one only where it must be the field: at the beginning, in quotes or in "set limit".
    """
    every = sorted(run_class.key_descriptions(), key=len, reverse=True)
    names, long = "|".join(every), "|".join(name for name in every if "_" in name)
    field = re.compile(
        rf"^(?P<first>{names})(?:\.\d+)?(?= is )|(?<=set )(?P<set>{names})\b|^'(?P<missing>{names})'(?= is missing)"
        rf"|(?<![\w/.'-])(?P<long>{long})(?![\w/.])"
    )
    for line in lines:
        yield field.sub(lambda found: f"--{found[found.lastgroup or 0].replace('_', '-')}", line)


def _lines(run_class: type[RunFile], place: tuple[str, ...], problem: ErrorDetails) -> Iterator[str]:
    field, message = ".".join(place), problem["msg"].removeprefix("Value error, ")
    is_wording = place[:1] == ("wording",)
    known = field_keys(OwnWording) if is_wording else run_class.key_descriptions()
    if problem["type"] == "extra_forbidden":
        owner = "a wording" if is_wording else f"a {kind_of(run_class)} run"
        advice = did_you_mean(place[-1], known) or f"known are {', '.join(known)}"
        yield f"unknown field {quoted(field)} of {owner}; {advice}"
    elif problem["type"] == "missing":
        yield f"{field!r} is missing; {known[place[-1]]}"
    elif not field:  # fields that contradict each other
        yield from message.splitlines()
    else:
        near = did_you_mean(f"{problem['input']}", _allowed(problem))
        yield f"{field} is {quoted(problem['input'], 200)}: {message}" + f"; {near}" * bool(near)


def _allowed(problem: ErrorDetails) -> list[str]:
    """Return the texts that a field may hold, if it may hold these alone."""
    allowed = problem.get("ctx", {}).get("expected", "") if problem["type"] == "literal_error" else ""
    return re.findall(r"'([^']*)'", allowed)
