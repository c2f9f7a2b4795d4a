"""Tables of the probes' accuracies, at most 100 columns wide in a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Protocol

from flows.show.model_names import shown_model
from flows.show.table import Block, Cell, Column, Number, Piece, Table, Words, by, interval, lines, numbers, texts
from flows.show.text import share
from negcore.targets import DEFAULT_TARGET
from tasks.controls import Control, ControlRow
from tasks.floors import FLOORS, SMALL_MASS, Floored, best_floor
from tasks.probe import AccuracyRow, Confusion
from tasks.results import Average, SplitAccount

PROBE_TITLES = MappingProxyType(
    {
        "lm": "LM-Prob",
        "polar": "Polar",
        "magn": "Magn",
        "act": "Act",
        "tree": "Tree",
        "polar-gradient": "Polar\ngradient",
        "magn-gradient": "Magn\ngradient",
        "polar-gxa": "Polar\ngrad. x act.",
        "magn-gxa": "Magn\ngrad. x act.",
        "polar-random": "Polar\nrandom",
        "magn-random": "Magn\nrandom",
        "polar-logistic": "Polar\nlogistic",
        "magn-logistic": "Magn\nlogistic",
    }
)
FLOOR_TITLES = MappingProxyType(
    {"random": "random", "majority": "majority", "options_only": "options", "calibrated": "calibrated"}
)
"""Short titles of the floors, in the order of `FLOORS`."""
FLOORS_TITLE = "\n".join(FLOOR_TITLES[name] for name in FLOORS)
BESIDE_TITLES = ("train\ntest\nmass", "train\nvalid, test\nmass", FLOORS_TITLE, "genre")
"""Titles of the columns that stand between a dataset and its accuracies."""
SHOTS = ("zero-shot", "one-shot")
_PROBES_A_TABLE = 5
BESIDE_CAPTION = (
    "Floors, the best in bold: guessing; the commonest training answer; a forest that sees options, lengths and "
    "group, no word of the question; logistic regression on the options' probabilities. <= floor: the interval "
    "reaches down to the best floor. mass: probability of all options together."
)
_CAPTION = f"After an accuracy: neurons kept, chosen on valid. Below: 95 % interval (Wilson). {BESIDE_CAPTION}"
_OF_ORDERS = " Every order of a row's options is a prompt; intervals are for other rows, not for other orders."
_OF_AVERAGES = (
    " Averages count every dataset the same; their interval (MOVER of Wilson's) is for other rows of the same datasets."
)

_OF_CONTROLS = " perm.: the probe fitted on permuted answers, mean of them; rand.: on the model with random weights."
CONTROL_TITLES: Mapping[Control, str] = MappingProxyType({"permuted answers": "perm.", "random weights": "rand."})
"""Short titles of the controls."""

Row = AccuracyRow | Average
Controlled = Mapping[tuple[str, int, str, str], Mapping[Control, float]]
"""Accuracies by model, shots, dataset and probe, and by control."""
_ByProbe = dict[str, AccuracyRow]


class Measured(Protocol):
    """An accuracy and the ends of its 95 % interval."""

    @property
    def accuracy(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def accuracy_tables(
    scores: Sequence[AccuracyRow],
    averages: Sequence[Average],
    n_datasets: int,
    controls: Sequence[ControlRow] = (),
) -> Iterator[Table]:
    """Return a table for every model and number of demonstrations, or several where there are many probes.

    Parameters
    ----------
    n_datasets : int
        Datasets that were asked for: averages over fewer say so.
    controls : sequence of ControlRow
        What stands below the accuracies.
    """
    beside = controlled(controls)
    for model, shots in dict.fromkeys((score.model, score.shots) for score in scores):
        own = [score for score in scores if (score.model, score.shots) == (model, shots)]
        means = {(mean.genre, mean.probe): mean for mean in averages if (mean.model, mean.shots) == (model, shots)}
        names = list(dict.fromkeys(score.probe for score in own))
        for start in range(0, len(names), _PROBES_A_TABLE):
            probes = names[start : start + _PROBES_A_TABLE]
            yield Table(
                key=f"accuracy-{model}-{SHOTS[shots]}-{start}",
                title=f"Accuracy on test: {asked(model, shots, own[0].target)}",
                columns=[*texts("dataset"), *_accuracy_columns(probes)],
                blocks=(
                    list(_genre_blocks(own, means, probes, n_datasets, beside))
                    if means
                    else [_rows_of(own, probes, beside)]
                ),
                caption=_CAPTION
                + _OF_ORDERS * (own[0].n_orders > 1)
                + _OF_CONTROLS * bool(beside)
                + _OF_AVERAGES * bool(means),
                says=_says([score for score in own if score.probe in probes and not score.group]),
            )


def _caption(scores: Sequence[AccuracyRow]) -> str:
    return _CAPTION + _OF_ORDERS * any(score.n_orders > 1 for score in scores)


def _says(scores: Sequence[AccuracyRow]) -> str:
    """Return on how many datasets each probe of neurons is above the floors."""
    above: dict[str, list[bool]] = {}
    for score in scores:
        if score.probe != "lm" and (best := best_floor(score)):
            above.setdefault(probe_title(score.probe), []).append(score.low > best.accuracy)
    counts = (f"{probe} on {sum(found)} of {len(found)}" for probe, found in above.items())
    return f"Above the best floor with the whole interval, by dataset: {', '.join(counts)}." if above else ""


def _genre_blocks(
    scores: Sequence[AccuracyRow],
    means: Mapping[tuple[str, str], Average],
    probes: Sequence[str],
    n_datasets: int,
    beside: Controlled,
) -> Iterator[Block]:
    """Return a block for every genre, with its average if it has several datasets, and one for all genres."""
    for genre, of_genre in by(scores, "genre").items():
        own = [means[genre, probe] for probe in probes if (genre, probe) in means]
        average = [_average_row(own, f"average of {own[0].n_datasets}")] if own and own[0].n_datasets > 1 else []
        yield [[Words(genre, "bold")], *_rows_of(of_genre, probes, beside), *average]
    whole = [means["", probe] for probe in probes]
    n = whole[0].n_datasets
    name = f"average of {n}" if n == n_datasets else f"average of {n}\n({n_datasets - n} missing)"
    yield [_average_row(whole, name, Words("all genres\n", "bold"))]


def _rows_of(scores: Sequence[AccuracyRow], probes: Sequence[str], beside: Controlled) -> list[list[Cell]]:
    """Return a row for every dataset, and below it one for every group of its rows."""
    return [
        _score_row(of_group, probes, beside)
        for of_dataset in by(scores, "dataset").values()
        for of_group in by(of_dataset, "group").values()
    ]


def _score_row(scores: Sequence[AccuracyRow], probes: Sequence[str], beside: Controlled) -> list[Cell]:
    first, by_probe = scores[0], {score.probe: score for score in scores}
    cells = [_score_cell(by_probe[probe], beside) for probe in probes]
    if first.group:
        return [f"  {first.group}", rows_cell(first, "", f"{first.n_test}"), floor_cell(first), *cells]
    return [(*_marked(short(first.dataset), first.overlapping), _reading(first)), *_beside(first), *cells]


def _average_row(means: Sequence[Average], name: str, *heading: Words) -> list[Cell]:
    marked = _marked(Words(name, "italic"), means[0].overlapping)
    return [(*heading, *marked), rows_cell(means[0], "", ""), floor_cell(means[0]), *map(probe_cell, means)]


def _score_cell(score: AccuracyRow, beside: Controlled = MappingProxyType({})) -> Cell:
    cell = probe_cell(score, "" if score.n_neurons is None else kept(score.n_neurons))
    found = {} if score.group else beside.get((score.model, score.shots, score.dataset, score.probe), {})
    return (*cell, *(Words(f"\n{CONTROL_TITLES[control]} {share(mean)}", "dim") for control, mean in found.items()))


def controlled(controls: Sequence[ControlRow]) -> Controlled:
    """Return the accuracy of every probe under every control, the mean over its draws."""
    values: dict[tuple[str, int, str, str], dict[Control, list[float]]] = {}
    for row in controls:
        of_probe = values.setdefault((row.model, row.shots, row.dataset, row.probe), {})
        of_probe.setdefault(row.control, []).append(row.accuracy)
    return {
        key: {control: sum(found) / len(found) for control, found in of_probe.items()}
        for key, of_probe in values.items()
    }


def comparison_table(runs: Mapping[str, Sequence[AccuracyRow]]) -> Table:
    """Return accuracies of several runs side by side, for every model, shots and dataset that two of them have.

    Parameters
    ----------
    runs : mapping of name to scores
        Those of groups of rows are left out.
    """
    questions = _questions(runs)
    probes = list(dict.fromkeys(score.probe for scores in runs.values() for score in scores if not score.group))
    several = len({key[:2] for key in questions}) > 1
    blocks = []
    for question, by_run in questions.items():
        if len(by_run) > 1:
            rows = [_run_row(name, by_probe, probes) for name, by_probe in by_run.items()]
            blocks.append([[_question(*question, several=several), *rows[0]], *(["", *row] for row in rows[1:])])
    columns = [*texts("dataset", "run"), *_accuracy_columns(probes)]
    return Table(
        "runs",
        "Accuracy on test, run by run",
        columns,
        blocks,
        _caption([score for scores in runs.values() for score in scores]),
    )


def compared_rows(runs: Mapping[str, Sequence[AccuracyRow]]) -> list[dict[str, Any]]:
    """Return the accuracies of `comparison_table` as rows for other programs, with the run's name first."""
    return [
        {"run": name} | asdict(score)
        for by_run in _questions(runs).values()
        if len(by_run) > 1
        for name, by_probe in by_run.items()
        for score in by_probe.values()
    ]


def _questions(runs: Mapping[str, Sequence[AccuracyRow]]) -> dict[tuple[str, int, str], dict[str, _ByProbe]]:
    """Return accuracies by what was asked (model, shots, dataset), run and probe, without those of groups of rows."""
    questions: dict[tuple[str, int, str], dict[str, _ByProbe]] = {}
    for name, scores in runs.items():
        for score in scores:
            if not score.group:
                asked_of = (score.model, score.shots, score.dataset)
                questions.setdefault(asked_of, {}).setdefault(name, {})[score.probe] = score
    return questions


def _question(model: str, shots: int, dataset: str, *, several: bool) -> Cell:
    return short(dataset), Words(f"\n{asked(model, shots)}" if several else "", "dim")


def _run_row(name: str, by_probe: Mapping[str, AccuracyRow], probes: Sequence[str]) -> list[Cell]:
    first = next(iter(by_probe.values()))
    cells: list[Cell] = [_score_cell(by_probe[probe]) if probe in by_probe else "" for probe in probes]
    of_target = Words(named_target(first.target, "\n"), "dim")
    return [(*_marked(name, first.overlapping), of_target, _reading(first)), *_beside(first), *cells]


def rows_table(accounts: Sequence[SplitAccount]) -> Table:
    """Return how many rows of every dataset were used and why others were not, with demonstrations if there are any."""
    shots = max(account.shots for account in accounts)
    rows: list[list[Cell]] = []
    for dataset, splits in by([account for account in accounts if account.shots == shots], "dataset").items():
        sizes = [f"{split.n_released}\n{split.n_used}" for split in splits]
        notes = [f"{split.split}: {split.changes}" for split in splits if split.changes]
        rows.append([_marked(short(dataset), splits[0].overlapping), *sizes, "\n".join(notes)])
    asked = SHOTS[shots] + ", chat" * (accounts[0].prompt_format == "chat")
    title = f"Rows released and used, {asked}, split policy {accounts[0].policy}"
    columns = [*texts("dataset"), *numbers("train", "valid", "test"), *texts("left out, or drawn from elsewhere")]
    n_used = sum(account.n_used for account in accounts if account.shots == shots)
    says = f"{n_used} rows were used; of two numbers, the first is of rows released, the second of rows used."
    return Table("rows", title, columns, [rows], says=says)


def confusion_tables(confusion: Sequence[Confusion]) -> Iterator[Table]:
    """Return for every model, shots and dataset how often each probe gave which answer, by gold option."""
    for of_model in by(confusion, "model").values():
        for of_shots in by(of_model, "shots").values():
            for of_dataset in by(of_shots, "dataset").values():
                yield _confusion_table(of_dataset)


def _confusion_table(counts: Sequence[Confusion]) -> Table:
    first, n_options = counts[0], max(count.gold for count in counts) + 1
    return Table(
        key=f"confusion-{first.model}-{SHOTS[first.shots]}-{first.dataset}",
        title=f"{short(first.dataset)}: answers by gold option; {asked(first.model, first.shots)}",
        columns=[*texts("probe"), *numbers("gold", *map(str, range(n_options)))],
        blocks=[
            [
                [
                    probe_title(probe) if gold == 0 else "",
                    Number(gold),
                    *(Number(one.n, style="bold" if one.predicted == gold else "") for one in of_gold),
                ]
                for gold, of_gold in by(of_probe, "gold").items()
            ]
            for probe, of_probe in by(counts, "probe").items()
        ],
        says="In bold, the right answers; a column that holds most rows is an answer given whatever is asked.",
    )


# Cells and columns


def accuracy_cell(row: Measured, *notes: Piece) -> tuple[Piece, ...]:
    """Return an accuracy, notes on it, and its interval below."""
    return Number(row.accuracy, share, "bold"), *notes, interval(row.low, row.high)


def probe_cell(row: Row, *notes: Piece) -> tuple[Piece, ...]:
    """Return a probe's accuracy, marked if it is not above the floors; LM-Prob is no probe of neurons."""
    return (*accuracy_cell(row, *notes), floor_mark(row, row) if row.probe != "lm" else "")


def kept(n_neurons: int) -> Words:
    """Return the note that a probe kept so many neurons."""
    return Words(f" {n_neurons}", "dim")


def _accuracy_columns(probes: Sequence[str]) -> list[Column]:
    return numbers("train\ntest\nmass", FLOORS_TITLE, *(PROBE_TITLES[probe] for probe in probes))


def floor_cell(row: Floored, names: Sequence[str] = FLOORS) -> Cell:
    """Return floors in a line each, the best of them in bold; one that is unknown is a dash."""
    best = best_floor(row, names)
    values = {name: getattr(row, name) for name in names}
    return lines(
        *(
            Words("-") if v is None else Number(v, share, "bold" if best and name == best.name else "")
            for name, v in values.items()
        )
    )


def mass_cell(row: Floored) -> Piece:
    """Return the label mass, marked if it is small; empty if it is unknown."""
    mass = row.label_mass
    return "" if mass is None else Number(mass, share, "red" if mass < SMALL_MASS else "")


def rows_cell(row: Floored, *sizes: str) -> Cell:
    """Return numbers of rows in a line each, and below them the label mass."""
    return lines(*sizes, mass_cell(row))


def _beside(row: AccuracyRow) -> list[Cell]:
    """Return what stands between a dataset and its accuracies."""
    return [rows_cell(row, f"{row.n_train}", f"{row.n_test}"), floor_cell(row)]


def floor_mark(accuracy: Measured, floors: Floored) -> Words:
    """Return the mark of an accuracy whose interval reaches down to the best floor, or lies below it."""
    best = best_floor(floors)
    return Words("\n<= floor" if best and accuracy.low <= best.accuracy else "", "yellow")


def _reading(row: AccuracyRow) -> Words:
    """Return what is unusual in how the row's prompts are read."""
    return Words(row.reading and "\n" + row.reading.replace(", ", "\n"), "dim")


def _marked(name: str | Words, overlapping: bool) -> tuple[str | Words, Words]:
    """Return a name, marked if its splits share rows."""
    return name, Words("\noverlapping" if overlapping else "", "red")


def asked(model: str, shots: int, target: str = DEFAULT_TARGET) -> str:
    """Return a model and the number of demonstrations it is shown, for people, and what NEGs are of if not usual."""
    return f"{shown_model(model)}, {SHOTS[shots]}{named_target(target, ', ')}"


def named_target(target: str, before: str) -> str:
    """Return the target that NEGs are of, behind some text; nothing if it is the probability."""
    return "" if target == DEFAULT_TARGET else f"{before}NEG of {target}"


def probe_title(probe: str) -> str:
    """Return a probe's title in one line."""
    return PROBE_TITLES[probe].replace("\n", " ")


def short(dataset: str) -> str:
    """Return a dataset's name without the benchmark's."""
    return dataset.removeprefix("mceval8k/")
