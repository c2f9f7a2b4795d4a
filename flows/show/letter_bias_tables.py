"""Tables of accuracies by letter and by answer, at most 100 columns wide in a terminal."""

from collections.abc import Iterator, Sequence

from flows.show.accuracy_tables import SHOTS, asked, probe_title, short
from flows.show.table import Block, Cell, Number, Table, by, interval, numbers, texts
from flows.show.text import change, count, share
from negcore.orders import LETTERS
from tasks.letter_bias import LetterBiasRow

_CAPTION = (
    "Given: the options in their given order. All: every order of a row, a prompt each. Answer: one decision a row, by "
    "the mean score of each answer over the orders. Gain: given less all. Always: rows that are right in every order. "
    "Changes: rows whose chosen answer is not the same in every order. Letters: distance of the letters chosen from "
    "the gold ones (share of the choices to be moved), and the letter chosen most. Below: 95 % interval over rows "
    "(Wilson; gain: Student)."
)


def letter_bias_tables(found: Sequence[LetterBiasRow]) -> Iterator[Table]:
    """Return a table for every model and number of demonstrations: a probe a row."""
    for of_model in by(found, "model").values():
        for of_shots in by(of_model, "shots").values():
            yield _table(of_shots)


def _table(found: Sequence[LetterBiasRow]) -> Table:
    first = found[0]
    titles = ("given", "all", "answer", "gain", "always", "changes", "letters")
    return Table(
        key=f"letter-bias-{first.model}-{SHOTS[first.shots]}",
        title=f"Accuracy by letter and by answer: {asked(first.model, first.shots)}",
        columns=[*texts("dataset, probe"), *numbers(*titles)],
        blocks=[_block(of_dataset) for of_dataset in by(found, "dataset").values()],
        caption=_CAPTION,
        says=_says(found),
    )


def _block(found: Sequence[LetterBiasRow]) -> Block:
    first = found[0]
    name = f"{short(first.dataset)}\n{count(first.n_rows, 'row')} x {first.n_orders}"
    name += f"\n{first.n_incomplete} left out" * bool(first.n_incomplete)
    return [[name], *([f"  {_title(one.probe)}", *_cells(one)] for one in found)]


def _title(probe: str) -> str:
    return "  calibrated" if probe == "calibrated" else probe_title(probe)


def _cells(one: LetterBiasRow) -> list[Cell]:
    gain: Cell = (
        Number(one.gain, change, "bold" if one.gain_low > 0 or one.gain_high < 0 else ""),
        interval(one.gain_low, one.gain_high, change, " "),
    )
    most = max(range(len(one.chosen)), key=one.chosen.__getitem__)
    letters: Cell = (Number(one.from_gold, share), f"\n{LETTERS[most]} {share(one.chosen[most])}")
    return [
        (Number(one.given, share), interval(one.given_low, one.given_high)),
        (Number(one.by_letter, share), interval(one.by_letter_low, one.by_letter_high)),
        (Number(one.by_answer, share, "bold"), interval(one.by_answer_low, one.by_answer_high)),
        gain,
        Number(one.always, share),
        (Number(one.inconsistent, share), interval(one.inconsistent_low, one.inconsistent_high)),
        letters,
    ]


def _says(found: Sequence[LetterBiasRow]) -> str:
    """Return what LM-Prob's choice depends on, by dataset."""
    own = [f"{share(one.inconsistent)} on {short(one.dataset)}" for one in found if one.probe == "lm"]
    return f"Share of rows in which LM-Prob's answer changes with the order of the options: {', '.join(own)}."
