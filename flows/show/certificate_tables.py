"""Tables of certificates: how many neurons that were only estimated can have a large NEG all the same."""

import math
from collections.abc import Iterator, Sequence

from flows.show.accuracy_tables import SHOTS, asked, short
from flows.show.table import Cell, Number, Table, Words, by, numbers, texts
from flows.show.text import bare, count
from negcore.targets import neg_unit
from tasks.certificates import CertificateRow

_CAPTION = (
    "Large: swept neurons measured above {above}. Missed: those estimated below {below} where they are. Among the "
    'neurons that were not swept, no more than "at most" are missed with {confidence} confidence, each line by '
    "itself: a layer by the hypergeometric distribution (exact), the model by Clopper-Pearson over the layers. NEGs in "
    "{unit}, for the gold option, in any of {rows}."
)


def certificate_tables(certificates: Sequence[CertificateRow]) -> Iterator[Table]:
    """Return a table for every model, number of demonstrations and dataset: a layer a row, the model last."""
    for of_model in by(certificates, "model").values():
        for of_shots in by(of_model, "shots").values():
            for of_dataset in by(of_shots, "dataset").values():
                yield _table(of_dataset)


def _table(rows: Sequence[CertificateRow]) -> Table:
    first, model = rows[0], rows[-1]
    where, sizes = (
        f"{asked(first.model, first.shots, first.target)}",
        {"above": size(first.above), "below": size(first.below)},
    )
    confidence = f"{100 * first.confidence:g} %"
    return Table(
        key=f"certificates-{first.model}-{SHOTS[first.shots]}-{first.dataset}",
        title=f"{short(first.dataset)}: large NEGs that the estimates can miss; {where}",
        columns=[*texts("layer"), *numbers("swept", "large", "missed", "others", "at most", "of others")],
        blocks=[[_cells(row) for row in rows if row.layer is not None], [_cells(model)]],
        caption=_CAPTION.format(
            **sizes, confidence=confidence, rows=count(first.n_rows, "test row"), unit=neg_unit(first.target)
        ),
        says=(
            f"With {confidence} confidence at most {percent(model.share)} of the other neurons have a measured |NEG| "
            f"above {sizes['above']} while estimated below {sizes['below']}."
        ),
    )


def _cells(row: CertificateRow) -> list[Cell]:
    layer: Cell = Words("model", "bold") if row.layer is None else f"{row.layer}"
    numbers_of = (row.n_swept, row.n_large, row.n_missed, row.n_others, row.most_missed)
    return [layer, *map(Number, numbers_of), Number(row.share, percent, "bold" if row.layer is None else "")]


def size(value: float) -> str:
    """Return the size of a NEG with two digits."""
    return bare(f"{value:.2g}")


def percent(value: float) -> str:
    """Return a share in percent: two digits, rounded up, so that a bound stays one."""
    if value <= 0:
        return "0 %"
    if value >= 1:
        return "100 %"
    unit = 10.0 ** (math.floor(math.log10(100 * value)) - 1)
    rounded = math.ceil(100 * value / unit - 1e-9) * unit
    return f"{rounded:.2g} %" if rounded < 99.5 else "100 %"
