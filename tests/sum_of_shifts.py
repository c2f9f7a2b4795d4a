"""Print where sums of single NEGs stop to foretell what neurons do together, and how far these are shifted there.

Run it from the repository: `python -m tests.sum_of_shifts MODEL [TARGET]`; a few minutes of a core for a small model.
Random sets of neurons of the whole model are shifted in the direction of their NEG, in prompts of `mini/facts`: by 1
unit of activation each, and by 1 standard deviation of their own over these prompts.

Shapes: P prompts, D shifts, M sets, R rows of a pass, H hidden width.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from negcore.arrays import Floats
from negcore.datasets import load_facts
from negcore.measure.interventions import InterventionResult, intervene, random_sets
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.spread import activation_spreads
from negcore.model.encoding import encode
from negcore.model.language_model import LanguageModel
from negcore.targets import ShiftUnit, checked_target

_PROMPTS = 12
_DRAWS = 3
_SIZES = (1, 16, 64, 128, 256, 512, 1024, 4096)
_HEAD = "| unit | neurons | r | same sign | summed change | true change | shift, median sd | stream moved |"


def main(ref: str, target: str = "probability") -> None:
    """Print a row for each unit and size of sets, as a Markdown table."""
    lm = load_model(ref)
    facts = load_facts("mini/facts", lm.tokenizer, limit=_PROMPTS, masked=lm.arch.masked).examples
    answers = sorted({one.labels[0] for one in facts}) if target == "logit-difference" else []
    labels = [[one.labels[0], *(other for other in answers if other != one.labels[0])] for one in facts]
    encoded = encode(lm.card, [one.prompt for one in facts], labels)
    sets = [one for draw in range(_DRAWS) for one in random_sets(lm, _SIZES, seed=draw)]
    spreads = [activation_spreads(lm, encoded.ids, one) for one in sets]
    negs_PLN = neurgrad(lm, encoded, target=checked_target(target)).negs_POLN[:, 0]
    options: dict[str, Any] = {"sets": sets, "shifts": [1.0], "negs_PLN": negs_PLN, "target": checked_target(target)}
    options["answers"] = [0] * len(facts)
    print(f"{ref}, {target}, {_PROMPTS} prompts x {_DRAWS} draws\n\n{_HEAD}\n{'|---' * 8}|")
    units: dict[ShiftUnit, Any] = {"activation": None, "sd": spreads}
    for unit, own in units.items():
        with _streams(lm) as seen:
            found = intervene(lm, encoded, spreads=own, **options)
        moved_PM = _moved(seen, len(sets))
        sds = [np.ones(len(one)) if own else 1 / one[one > 0] for one in spreads]
        for size in _SIZES:
            print(_row(unit, size, found, np.median(np.concatenate([sds[m] for m in _of_size(found, size)])), moved_PM))
    if target == "probability":
        room_P, summed_P = 1 - found.base_P.astype(np.float64), np.abs(negs_PLN).sum(axis=(1, 2))
        r = np.corrcoef(summed_P, room_P)[0, 1]
        print(f"\nRoom above, 1 - p: mean {room_P.mean():.2f}; r with a prompt's sum of all |NEG|: {r:.2f}")


def _of_size(found: InterventionResult, size: int) -> NDArray[np.int64]:
    return np.flatnonzero(found.sizes_M == size)


def _row(unit: str, size: int, found: InterventionResult, sd: float, moved_PM: Floats) -> str:
    own = _of_size(found, size)
    summed, true = found.predicted_PDM[:, 0, own], found.changes_PDM[:, 0, own]
    cells = [
        f"{np.corrcoef(summed.ravel(), true.ravel())[0, 1]:.3f}",
        f"{(true > 0).mean():.2f}",
        f"{summed.mean():+.2g}",
        f"{true.mean():+.2g}",
        f"{sd:.2g}",
        f"{np.median(moved_PM[:, own]):.2f}",
    ]
    return f"| {' | '.join([unit, str(size), *cells])} |"


@contextmanager
def _streams(lm: LanguageModel) -> Iterator[list[Tensor]]:
    """Keep the last block's output at the last token of every row, pass by pass."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        values_RTH = output[0] if isinstance(output, tuple) else output
        seen.append(values_RTH[:, -1].detach().float())

    handle = lm.last_block.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _moved(seen: list[Tensor], n_sets: int) -> Floats:
    """Return how far each shift moved the stream, as a share of its length: shape (P, M), prompts in any order."""
    passes = [one for one in seen if len(one) > 1]  # the unshifted token is the first row of each
    shares = [(one[1:] - one[:1]).norm(dim=1) / one[0].norm() for one in passes]
    return torch.cat(shares).reshape(-1, n_sets).double().numpy()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(*sys.argv[1:])
