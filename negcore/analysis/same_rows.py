"""Rows that two splits have in common: models are compared on the same prompts and options, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np

from negcore.arrays import Ints
from negcore.errors import NegError
from negcore.store.reader import NegSplit


def row_order(first: NegSplit, second: NegSplit) -> Ints:
    """Return the places in one split of the rows of another, which may be of another model and tokenizer.

    Rows are the same if they have the same id, the same prompt (by its hash), the same right option and as many
    options; of the same tokenizer also the same tokens of the options.

    Returns
    -------
    array of int64, shape (P,)
        Place in `second` of each row of `first`.

    Raises
    ------
    NegError
        If the rows are not the same, or the numbers do not mean the same; the message names the first difference.
    """
    for what in ("number_format", "target"):
        _refuse_unlike(what, getattr(first.identity, what), getattr(second.identity, what), first, second)
    _refuse_unlike("options a row", first.n_options, second.n_options, first, second)
    at = {id_: place for place, id_ in enumerate(second.ids)}
    for one, other, known in ((first, second, at.keys()), (second, first, set(first.ids))):
        if missing := [id_ for id_ in one.ids if id_ not in known]:
            raise NegError(
                f"{_named(one)} has row {missing[0]!r} and {_named(other)} has not ({len(missing)} of {one.n_rows}): "
                "measure both on the same rows (dataset, limit, seed, splits)"
            )
    order_P = np.array([at[id_] for id_ in first.ids])
    texts = [second.text_hashes[place] for place in order_P]
    _check_rows("its prompt", np.array(first.text_hashes), np.array(texts), first, second)
    _check_rows("its right option", first.gold_P, second.gold_P[order_P], first, second)
    if first.identity.tokenizer_hash == second.identity.tokenizer_hash:
        _check_rows("its options", first.label_ids_PO, second.label_ids_PO[order_P], first, second)
    return order_P


def _refuse_unlike(what: str, here: Any, there: Any, first: NegSplit, second: NegSplit) -> None:
    if here != there:
        raise NegError(f"{what}: {here} in {_named(first)}, {there} in {_named(second)}: their NEGs are not comparable")


def _check_rows(what: str, here: Any, there: Any, first: NegSplit, second: NegSplit) -> None:
    differing = np.flatnonzero((here != there).reshape(len(here), -1).any(axis=1))
    if len(differing):
        raise NegError(
            f"row {first.ids[differing[0]]!r}: {what} is not the same in {_named(first)} and {_named(second)} "
            f"({len(differing)} of {first.n_rows} rows): measure both with the same wording, demonstrations and options"
        )


def _named(split: NegSplit) -> str:
    return f"{str(split.folder)!r}"
