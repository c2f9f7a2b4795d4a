"""Everything that is wrong with a run file, one line each."""

from collections.abc import Iterator
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from negcore.texts import quoted
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


def _lines(run_class: type[RunFile], place: tuple[str, ...], problem: ErrorDetails) -> Iterator[str]:
    field, message = ".".join(place), problem["msg"].removeprefix("Value error, ")
    is_wording = place[:1] == ("wording",)
    known = field_keys(OwnWording) if is_wording else run_class.key_descriptions()
    if problem["type"] == "extra_forbidden":
        owner = "a wording" if is_wording else f"a {kind_of(run_class)} run"
        near = get_close_matches(place[-1], known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        yield f"unknown field {quoted(field)} of {owner}; {advice}"
    elif problem["type"] == "missing":
        yield f"{field!r} is missing; {known[place[-1]]}"
    elif not field:  # fields that contradict each other
        yield from message.splitlines()
    else:
        yield f"{field} is {quoted(problem['input'], 200)}: {message}"
