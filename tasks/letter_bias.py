"""Letter bias of the probes of a run whose rows were asked in several orders of their options."""

from dataclasses import dataclass

from negcore.probing.evaluation import Estimated
from negcore.probing.letter_bias import LetterBias

LETTER_BIAS_FILE = "letter_bias.arrow"


@dataclass(frozen=True)
class LetterBiasRow:
    """A probe's accuracy on one dataset's test rows by letter and by answer, and how it depends on the order.

    `_low` and `_high` end 95 % intervals over rows: Wilson's of shares, Student's of differences.
    """

    model: str
    shots: int
    dataset: str
    probe: str
    n_rows: int
    """Test rows with all their orders."""
    n_orders: int
    """Orders of each."""
    n_incomplete: int
    """Test rows that are left out, as an order of theirs was set aside."""
    given: float
    """Accuracy in the given order."""
    given_low: float
    given_high: float
    by_letter: float
    """Accuracy over all orders: every prompt counts."""
    by_letter_low: float
    by_letter_high: float
    by_answer: float
    """Accuracy of one decision a row: the answer with the largest mean score over the orders."""
    by_answer_low: float
    by_answer_high: float
    gain: float
    """`given` less `by_letter`: how much the given order helps."""
    gain_low: float
    gain_high: float
    always: float
    """Share of rows that are right in every order."""
    always_low: float
    always_high: float
    inconsistent: float
    """Share of rows whose chosen answer is not the same in every order."""
    inconsistent_low: float
    inconsistent_high: float
    from_gold: float
    """Total variation distance of the letters chosen from the gold ones, 0 to 1."""
    from_uniform: float
    """The same from equal shares."""
    chosen: list[float]
    """Share of the prompts in which each letter is chosen."""
    gold: list[float]
    """Share of the prompts in which each letter is gold."""

    @classmethod
    def of(cls, model: str, shots: int, dataset: str, probe: str, bias: LetterBias) -> "LetterBiasRow":
        """Return the row of a probe."""
        estimates: dict[str, Estimated] = {
            "given": bias.given,
            "by_letter": bias.by_letter,
            "by_answer": bias.by_answer,
            "gain": bias.gain,
            "always": bias.always,
            "inconsistent": bias.inconsistent,
        }
        columns: dict[str, float] = {}
        for name, one in estimates.items():
            columns |= {name: one.value, f"{name}_low": one.interval.low, f"{name}_high": one.interval.high}
        return cls(
            model=model,
            shots=shots,
            dataset=dataset,
            probe=probe,
            n_rows=len(bias.right_R),
            n_orders=bias.n_orders,
            n_incomplete=bias.n_incomplete,
            from_gold=bias.from_gold,
            from_uniform=bias.from_uniform,
            chosen=bias.chosen_O.tolist(),
            gold=bias.gold_O.tolist(),
            **columns,
        )
