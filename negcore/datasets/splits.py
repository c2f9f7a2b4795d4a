"""Cut rows into splits, and sample the rows that are used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import xxhash

from negcore.datasets.base import SPLITS, Change, Overlap, SplitPolicy
from negcore.datasets.rows import Row
from negcore.errors import DatasetError

Rows = Mapping[str, Sequence[Row]]
K = TypeVar("K", bound=Hashable)

# A split that must be drawn from another one gets one of every five rows (train: the other four).
ONE_IN = 5
COMPARED = (("test", "train"), ("valid", "test"), ("valid", "train"))


@dataclass(frozen=True, slots=True)
class Cut:
    """Splits under a policy, with the changes that the policy made."""

    rows: Rows
    overlaps: tuple[Overlap, ...]
    dropped: tuple[Change, ...]
    drawn: tuple[Change, ...]


def seeded_order(rows: Sequence[Row], *tags: object) -> list[Row]:
    """Return rows in an order that depends only on the tags and the ids.

    Sorting by a digest gives the same order in every Python version, and a longer sample contains a shorter one.
    """
    salt = repr(tags)
    return sorted(rows, key=lambda row: xxhash.xxh3_128_digest(f"{salt}\n{row.id}".encode()))


def quotas(sizes: Mapping[K, int], n: int) -> dict[K, int]:
    """Divide n in proportion to sizes: each key gets its share rounded down or up (largest remainder)."""
    total = sum(sizes.values())
    assert n <= total, "cannot take more than there is"
    shares = {key: n * size // total for key, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda key: -(n * sizes[key] % total))
    for key in by_remainder[: n - sum(shares.values())]:
        shares[key] += 1
    return shares


def stratified_sample(rows: Sequence[Row], n: int, *tags: object) -> list[Row]:
    """Draw a seeded sample of at most n rows, in proportion to answers and, within an answer, to groups.

    Returns
    -------
    list of Row
        In seeded order. The number of rows of each answer is within one of proportional.
    """
    ordered = seeded_order(rows, *tags)
    if n >= len(ordered):
        return ordered
    chosen = {
        row.id
        for of_answer in _strata(ordered, n, lambda row: row.answer)
        for of_group in _strata(of_answer.rows, of_answer.n, lambda row: row.group)
        for row in of_group.rows[: of_group.n]
    }
    return [row for row in ordered if row.id in chosen]


def split_rows(rows: Sequence[Row], *tags: object) -> Rows:
    """Cut rows without splits into 60 % train, 20 % valid and 20 % test, with answers in equal proportions."""
    n = len(rows) // ONE_IN
    test = stratified_sample(rows, n, *tags, "test")
    rest = _not_in(rows, test)
    valid = stratified_sample(rest, n, *tags, "valid")
    return {"train": _not_in(rest, valid), "valid": valid, "test": test}


def _not_in(rows: Sequence[Row], taken: Sequence[Row]) -> list[Row]:
    ids = {row.id for row in taken}
    return [row for row in rows if row.id not in ids]


@dataclass(frozen=True, slots=True)
class _Stratum:
    rows: list[Row]
    n: int


def _strata(rows: Sequence[Row], n: int, key: Callable[[Row], Hashable]) -> list[_Stratum]:
    members: dict[Hashable, list[Row]] = {}
    for row in rows:
        members.setdefault(key(row), []).append(row)
    shares = quotas({k: len(v) for k, v in members.items()}, n)
    return [_Stratum(v, shares[k]) for k, v in members.items()]


def cut_splits(released: Rows, policy: SplitPolicy, seed: int, name: str) -> Cut:
    """Apply a split policy to the splits as released.

    `clean` keeps test whole. It drops rows of valid and train that ask what a test row asks, and rows of train that
    ask what a valid row asks. If valid loses more than half of its rows, a fifth of train (at most as many rows as the
    released valid) replaces it, with answers in equal proportions. Without train, four fifths of valid become train;
    if nothing is left of valid either, test is cut in three like a file without splits. `released` changes nothing.

    Raises
    ------
    DatasetError
        If there are no test rows, or `clean` leaves train or valid empty.

    Notes
    -----
    Differs from the paper: its released splits overlap in most datasets; `released` reproduces that.
    """
    released = {split: released.get(split, ()) for split in SPLITS}
    overlaps = tuple(_overlap(released, split, other) for split, other in COMPARED)
    if not released["test"]:
        raise DatasetError(f"{name}: there are no test rows; at least one is needed")
    if policy == "released":
        return Cut(released, overlaps, (), ())
    return _clean(released, overlaps, seed, name)


def _overlap(rows: Rows, split: str, other: str) -> Overlap:
    whole = {row.whole for row in rows[other]}
    content = {row.content for row in rows[other]}
    return Overlap(
        split,
        other,
        n_whole_rows=sum(row.whole in whole for row in rows[split]),
        n_same_text=sum(row.content in content for row in rows[split]),
    )


def without(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Return the rows that do not ask what one of the others asks."""
    asked = {row.content for row in others}
    return [row for row in rows if row.content not in asked]


def _clean(released: Rows, overlaps: tuple[Overlap, ...], seed: int, name: str) -> Cut:
    dropped: list[Change] = []
    drawn: list[Change] = []

    def drop(split: str, rows: Sequence[Row], others: Sequence[Row], reason: str) -> list[Row]:
        kept = without(rows, others)
        if len(kept) < len(rows):
            dropped.append(Change(split, len(rows) - len(kept), reason))
        return kept

    test = released["test"]
    valid = drop("valid", released["valid"], test, "also in test")
    train = drop("train", released["train"], test, "also in test")
    if train and (not valid or 2 * len(valid) < len(released["valid"])):
        if valid:
            dropped.append(Change("valid", len(valid), "too few left: valid is drawn from train instead"))
        most = len(released["valid"]) or len(train)
        valid = stratified_sample(train, min(most, len(train) // ONE_IN), seed, name, "valid")
        drawn.append(Change("valid", len(valid), "drawn from train"))
        train = _not_in(train, valid)
    elif not train and not valid:
        rows = split_rows(_distinct(test), seed, name)
        drawn += [Change(split, len(rows[split]), "drawn from test") for split in ("train", "valid")]
        train, valid, test = list(rows["train"]), list(rows["valid"]), rows["test"]
    elif not train:
        n_valid = len(valid) // ONE_IN
        train = stratified_sample(valid, len(valid) - n_valid, seed, name, "train")
        drawn.append(Change("train", len(train), "drawn from valid"))
        valid = _not_in(valid, train)
    train = drop("train", train, valid, "also in valid")
    if not train or not valid:
        raise _nothing_left(released, overlaps, "train" if not train else "valid", name)
    return Cut({"train": train, "valid": valid, "test": test}, overlaps, tuple(dropped), tuple(drawn))


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without later ones that ask the same."""
    return list({row.content: row for row in reversed(rows)}.values())[::-1]


def _nothing_left(released: Rows, overlaps: Sequence[Overlap], split: str, name: str) -> DatasetError:
    held = ", ".join(f"{s} {len(released[s])}" for s in SPLITS)
    shared = ", ".join(f"{o.n_same_text} of {o.split} in {o.other}" for o in overlaps if o.n_same_text)
    return DatasetError(
        f"{name}: split policy 'clean' leaves no {split} rows (rows found: {held}; shared: {shared or 'none'}); "
        "add the missing split's file or choose split policy 'released'"
    )


def draw_demonstrations(rows: Rows, seed: int, name: str, *, sample: int = 0) -> list[Row]:
    """Draw one training row for each answer, in seeded order; none asks what a valid or test row asks.

    Sample 0 takes the first row of each answer, sample 1 the second, and so on.

    Raises
    ------
    DatasetError
        If an answer of any split is left without a training row.
    """
    candidates = without(rows["train"], [*rows["valid"], *rows["test"]])
    by_answer: dict[int, list[Row]] = {row.answer: [] for split in SPLITS for row in rows[split]}
    for row in seeded_order(candidates, seed, name, "demonstrations"):
        by_answer[row.answer].append(row)
    missing = sorted(answer for answer, of_answer in by_answer.items() if len(of_answer) <= sample)
    if missing:
        raise DatasetError(
            f"{name}: no training row to demonstrate answer {missing[0]} in sample {sample} of demonstrations "
            f"({len(rows['train'])} training rows, {len(candidates)} of them not in valid or test); use shots=0"
        )
    return seeded_order([by_answer[answer][sample] for answer in by_answer], seed, name, "order of demonstrations")
