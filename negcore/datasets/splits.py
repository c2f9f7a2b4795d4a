"""Cut rows into splits, and sample the rows that are used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import xxhash

from negcore.datasets.base import SPLITS, Change, Overlap, SplitPolicy
from negcore.datasets.rows import Row
from negcore.errors import DatasetError

Rows = Mapping[str, Sequence[Row]]
K = TypeVar("K", bound=Hashable)
R = TypeVar("R", bound="Sampled")

SPLIT_RULES = 2
"""Version of the rules by which rows are cut and left out: raised when the same settings would give other rows."""

# A split that must be drawn from another one gets one of every five rows (train: the other four).
ONE_IN = 5
COMPARED = (("test", "train"), ("valid", "test"), ("valid", "train"))


class Sampled(Protocol):
    """The unit that a sample is drawn by."""

    @property
    def id(self) -> str: ...

    @property
    def answer(self) -> int: ...

    @property
    def group(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Cut:
    """Splits under a policy, with the changes that the policy made."""

    rows: Rows
    overlaps: tuple[Overlap, ...]
    still_shared: tuple[Overlap, ...]
    dropped: tuple[Change, ...]
    drawn: tuple[Change, ...]


def seeded_order(rows: Sequence[R], *tags: object) -> list[R]:
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


def stratified_sample(rows: Sequence[R], n: int, *tags: object) -> list[R]:
    """Draw a seeded sample of at most n rows, in proportion to answers and, within an answer, to groups.

    Returns
    -------
    list of rows
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


def by_text(row: Row) -> Hashable:
    """Return what rows that ask the same have in common."""
    return row.content


def by_unit(row: Row) -> Hashable:
    """Return what rows about the same sentence, or other unit, have in common; rows without a unit ask the same."""
    return ("unit", row.unit) if row.unit else row.content


def sample_together(rows: Sequence[Row], n: int, *tags: object, key: Callable[[Row], Hashable]) -> list[Row]:
    """Draw a seeded sample of about n rows: all that have a key in common, or none of them.

    The sample is in proportion to the answers of each key's first row; without rows in common it is
    `stratified_sample`.
    """
    together: dict[Hashable, list[Row]] = {}
    for row in rows:
        together.setdefault(key(row), []).append(row)
    firsts = [members[0] for members in together.values()]
    n_firsts = max(n * len(firsts) // len(rows), min(n, 1)) if rows else 0
    return [row for first in stratified_sample(firsts, n_firsts, *tags) for row in together[key(first)]]


def split_rows(rows: Sequence[Row], *tags: object, key: Callable[[Row], Hashable] = by_unit) -> Rows:
    """Cut rows without splits into about 60 % train, 20 % valid and 20 % test, with answers in equal proportions.

    Rows that have a key in common, by default a unit or else their text, go into the same split.
    """
    n = len(rows) // ONE_IN
    test = sample_together(rows, n, *tags, "test", key=key)
    rest = _not_in(rows, test)
    valid = sample_together(rest, n, *tags, "valid", key=key)
    return {"train": _not_in(rest, valid), "valid": valid, "test": test}


def _not_in(rows: Sequence[Row], taken: Sequence[Row]) -> list[Row]:
    ids = {row.id for row in taken}
    return [row for row in rows if row.id not in ids]


@dataclass(frozen=True, slots=True)
class _Stratum(Generic[R]):
    rows: list[R]
    n: int


def _strata(rows: Sequence[R], n: int, key: Callable[[R], Hashable]) -> list[_Stratum[R]]:
    members: dict[Hashable, list[R]] = {}
    for row in rows:
        members.setdefault(key(row), []).append(row)
    shares = quotas({k: len(v) for k, v in members.items()}, n)
    return [_Stratum(v, shares[k]) for k, v in members.items()]


def cut_splits(released: Rows, policy: SplitPolicy, seed: int, name: str) -> Cut:
    """Apply a split policy to the splits as released.

    `clean` drops, within every split, rows that ask what an earlier row asks, and rows whose text has another answer
    in such a double. It then drops rows of valid and train that share their text or unit (such as the sentence) with
    a test row, and rows of train that share theirs with a valid row; nothing else is dropped from test. If valid loses
    more than half of its rows, a fifth of train (at most as many rows as the released valid) replaces it, with answers
    in equal proportions. Without train, four fifths of valid become train; if nothing is left of valid either, test is
    cut in three like a file without splits. What is drawn keeps units whole.

    `clean-rows` does the same but lets splits share units. `released` changes nothing.

    Raises
    ------
    DatasetError
        If there are no test rows, or a policy leaves a split empty.

    Notes
    -----
    Differs from the paper: its released splits overlap in most datasets; `released` reproduces that.
    """
    released = {split: released.get(split, ()) for split in SPLITS}
    if not released["test"]:
        raise DatasetError(f"{name}: there are no test rows; at least one is needed")
    overlaps = _overlaps(released)
    if policy == "released":
        return Cut(released, overlaps, overlaps, (), ())
    cleaner = _Cleaner(seed, name, by_unit if policy == "clean" else by_text)
    rows = cleaner.clean(released)
    empty = [split for split in SPLITS if not rows[split]]
    if empty:
        raise _nothing_left(released, overlaps, policy, empty[0], name)
    return Cut(rows, overlaps, _overlaps(rows), tuple(cleaner.dropped), tuple(cleaner.drawn))


def _overlaps(rows: Rows) -> tuple[Overlap, ...]:
    return tuple(_overlap(rows, split, other) for split, other in COMPARED)


def _overlap(rows: Rows, split: str, other: str) -> Overlap:
    whole = {row.whole for row in rows[other]}
    content = {row.content for row in rows[other]}
    units = {row.unit for row in rows[other] if row.unit}
    return Overlap(
        split,
        other,
        n_whole_rows=sum(row.whole in whole for row in rows[split]),
        n_same_text=sum(row.content in content for row in rows[split]),
        n_same_unit=sum(row.unit in units for row in rows[split]),
    )


def without(rows: Sequence[Row], others: Sequence[Row], key: Callable[[Row], Hashable] = by_text) -> list[Row]:
    """Return the rows that have no key, by default their text, in common with one of the others."""
    taken = {key(row) for row in others}
    return [row for row in rows if key(row) not in taken]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without later ones that ask the same."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.content, row)
    return list(first.values())


def contradictory(rows: Sequence[Row]) -> set[str]:
    """Return the texts that have two or more answers."""
    golds: dict[str, set[str]] = {}
    for row in rows:
        golds.setdefault(row.content, set()).add(row.gold)
    return {content for content, of_text in golds.items() if len(of_text) > 1}


@dataclass
class _Cleaner:
    """Policies `clean` and `clean-rows`, which differ in what may not be shared, with a record of the changes."""

    seed: int
    name: str
    key: Callable[[Row], Hashable]
    dropped: list[Change] = field(default_factory=list)
    drawn: list[Change] = field(default_factory=list)

    def clean(self, released: Rows) -> Rows:
        """Return the splits without what they share and without doubles."""
        train, valid, test = (self._once(split, released[split]) for split in SPLITS)
        valid = self._apart("valid", valid, test, "test")
        train = self._apart("train", train, test, "test")
        if train and (not valid or 2 * len(valid) < len(released["valid"])):
            self._drop("valid", valid, [], "too few left: valid is drawn from train instead")
            most = len(released["valid"]) or len(train)
            valid = self._draw("valid", train, min(most, len(train) // ONE_IN), "train")
            train = _not_in(train, valid)
        elif not train and not valid:
            rows = split_rows(test, self.seed, self.name, key=self.key)
            self.drawn += [Change(split, len(rows[split]), "drawn from test") for split in ("train", "valid")]
            return rows
        elif not train:
            train = self._draw("train", valid, len(valid) - len(valid) // ONE_IN, "valid")
            valid = _not_in(valid, train)
        return {"train": self._apart("train", train, valid, "valid"), "valid": valid, "test": test}

    def _once(self, split: str, rows: Sequence[Row]) -> list[Row]:
        """Drop doubles, and texts with two answers."""
        once = self._drop(split, rows, distinct(rows), "asked before in the split")
        texts = contradictory(rows)
        plain = [row for row in once if row.content not in texts]
        return self._drop(split, once, plain, "same text with another answer in the split")

    def _apart(self, split: str, rows: Sequence[Row], others: Sequence[Row], other: str) -> list[Row]:
        apart = self._drop(split, rows, without(rows, others), f"also in {other}")
        return self._drop(split, apart, without(apart, others, self.key), f"of a unit in {other}")

    def _draw(self, split: str, rows: Sequence[Row], n: int, origin: str) -> list[Row]:
        drawn = sample_together(rows, n, self.seed, self.name, split, key=self.key)
        self.drawn.append(Change(split, len(drawn), f"drawn from {origin}"))
        return drawn

    def _drop(self, split: str, rows: Sequence[Row], kept: list[Row], reason: str) -> list[Row]:
        if len(kept) < len(rows):
            self.dropped.append(Change(split, len(rows) - len(kept), reason))
        return kept


def _nothing_left(
    released: Rows, overlaps: Sequence[Overlap], policy: SplitPolicy, split: str, name: str
) -> DatasetError:
    held = ", ".join(f"{s} {len(released[s])}" for s in SPLITS)
    shared = ", ".join(f"{o.n_same_text} of {o.split} in {o.other}" for o in overlaps if o.n_same_text)
    return DatasetError(
        f"{name}: split policy {policy!r} leaves no {split} rows (rows found: {held}; shared: {shared or 'none'}); "
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
