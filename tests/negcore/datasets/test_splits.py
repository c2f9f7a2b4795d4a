from collections import Counter
from itertools import combinations

import pytest

from negcore.datasets.rows import Row
from negcore.datasets.splits import (
    by_unit,
    cut_splits,
    draw_demonstrations,
    quotas,
    sample_together,
    seeded_order,
    split_rows,
    stratified_sample,
)
from negcore.errors import DatasetError


def row(
    id: str, answer: int = 0, group: str = "", content: str | None = None, whole: str | None = None, unit: str = ""
) -> Row:
    return Row(id, {}, ("x", "y"), answer, group, content or id, whole or id, unit)


def rows(prefix: str, n: int, n_answers: int = 2) -> list[Row]:
    """Sorted by answer, as the released files are."""
    return [row(f"{prefix}{i}", i * n_answers // n) for i in range(n)]


def ids(found: list[Row]) -> set[str]:
    return {r.id for r in found}


def test_quotas_round_each_share_down_or_up_and_sum_to_n():
    assert quotas({"a": 6, "b": 3, "c": 1}, 5) == {"a": 3, "b": 2, "c": 0}
    assert quotas({"a": 1, "b": 1}, 2) == {"a": 1, "b": 1}


@pytest.mark.parametrize("n", [1, 7, 10, 33, 99])
def test_a_sample_has_every_answer_within_one_of_proportional(n):
    population = [row(str(i), answer=min(i % 7, 3)) for i in range(100)]
    sizes = Counter(r.answer for r in population)
    sample = Counter(r.answer for r in stratified_sample(population, n, "seed"))
    assert sample.total() == n
    assert all(abs(sample[a] - n * sizes[a] / 100) < 1 for a in sizes)


def test_a_sample_spreads_each_answer_over_its_groups():
    population = [row(f"{i}", answer=i % 2, group=f"language {i % 10 // 2}") for i in range(100)]
    sample = stratified_sample(population, 20, 0)
    assert set(Counter((r.answer, r.group) for r in sample).values()) == {2}


def test_a_sample_is_not_the_first_rows_and_is_not_sorted_by_answer():
    sample = stratified_sample(rows("r", 1000), 20, 0)
    assert not ids(sample) <= {f"r{i}" for i in range(100)}
    assert [r.answer for r in sample] not in ([0] * 10 + [1] * 10, [1] * 10 + [0] * 10)


def test_order_depends_on_the_seed_and_the_ids_alone():
    population = rows("r", 50)
    assert seeded_order(population, 1) == seeded_order(population[::-1], 1)
    assert seeded_order(population, 1) != seeded_order(population, 2)


def test_clean_keeps_test_whole_and_drops_what_it_shares_from_valid_and_train():
    test = [row("t0"), row("t1", 1)]
    valid = [row("v0", content="t0"), *rows("v", 4)[1:]]
    train = [row("a", content="t1"), row("b", content="v1"), *rows("r", 6)]
    cut = cut_splits({"train": train, "valid": valid, "test": test}, "clean", 0, "x")
    assert list(cut.rows["test"]) == test
    assert ids(cut.rows["valid"]) == {"v1", "v2", "v3"}
    assert ids(cut.rows["train"]) == {f"r{i}" for i in range(6)}
    assert [(c.split, c.n_rows, c.reason) for c in cut.dropped] == [
        ("valid", 1, "also in test"),
        ("train", 1, "also in test"),
        ("train", 1, "also in valid"),
    ]


def changes(found) -> list[tuple[str, int, str]]:
    return [(change.split, change.n_rows, change.reason) for change in found]


def test_clean_keeps_the_first_of_double_rows_in_every_split():
    test = [row("t0"), row("t1", 1), row("t2", content="t0"), row("t3", content="t0")]
    valid = [*rows("v", 4), row("w", 1, content="v3")]
    train = [*rows("r", 6), row("s", content="r0")]
    cut = cut_splits({"train": train, "valid": valid, "test": test}, "clean", 0, "x")
    assert [r.id for r in cut.rows["test"]] == ["t0", "t1"]
    assert ids(cut.rows["valid"]) == {"v0", "v1", "v2", "v3"} and ids(cut.rows["train"]) == ids(rows("r", 6))
    assert changes(cut.dropped) == [
        (split, n, "asked before in the split") for split, n in (("train", 1), ("valid", 1), ("test", 2))
    ]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_clean_drops_all_rows_of_a_text_with_two_answers(split):
    splits = {"train": rows("r", 8), "valid": rows("v", 4), "test": rows("t", 4)}
    splits[split] += [row("a", 0, content="?"), row("b", 1, content="?"), row("c", 0, content="?")]
    cut = cut_splits(splits, "clean", 0, "x")
    assert all(r.content != "?" for r in cut.rows[split])
    assert changes(cut.dropped) == [
        (split, 2, "asked before in the split"),
        (split, 1, "same text with another answer in the split"),
    ]


def test_answers_are_compared_by_their_text_where_every_row_has_its_own_options():
    twin = row("a", 0, content="?"), Row("b", {}, ("y", "x"), 1, "", "?", "b")
    others = Row("c", {}, ("x", "y"), 0, "", "??", "c"), Row("d", {}, ("y", "x"), 0, "", "??", "d")
    splits = {"train": rows("r", 8), "valid": rows("v", 4), "test": [*twin, *others]}
    cut = cut_splits(splits, "clean", 0, "x")
    assert [r.id for r in cut.rows["test"]] == ["a"]


def test_clean_keeps_units_whole_and_clean_rows_does_not():
    test = [row("t0", unit="A"), row("t1", 1, unit="A"), row("t2", 1)]
    valid = [row("v0", unit="A"), *(row(f"v{i}", i % 2, unit="B") for i in range(1, 5))]
    train = [row("a", unit="A"), row("b", unit="B"), *(row(f"r{i}", i % 2, unit=f"U{i}") for i in range(6))]
    splits = {"train": train, "valid": valid, "test": test}
    cut = cut_splits(splits, "clean", 0, "x")
    assert list(cut.rows["test"]) == test
    assert ids(cut.rows["valid"]) == {"v1", "v2", "v3", "v4"}
    assert ids(cut.rows["train"]) == {f"r{i}" for i in range(6)}
    assert changes(cut.dropped) == [
        ("valid", 1, "of a unit in test"),
        ("train", 1, "of a unit in test"),
        ("train", 1, "of a unit in valid"),
    ]
    assert not any(shared.n_same_unit for shared in cut.still_shared)
    by_row = cut_splits(splits, "clean-rows", 0, "x")
    assert {split: list(found) for split, found in by_row.rows.items()} == splits and not by_row.dropped
    assert [(o.split, o.other, o.n_same_text, o.n_same_unit) for o in by_row.still_shared] == [
        ("test", "train", 0, 2),
        ("valid", "test", 0, 1),
        ("valid", "train", 0, 5),
    ]


@pytest.mark.parametrize(
    "splits",
    [
        {"train": 100, "test": 10},  # valid is drawn from train
        {"valid": 100, "test": 10},  # train is carved from valid
        {"test": 100},  # test is cut in three
    ],
)
def test_what_clean_draws_keeps_units_whole(splits):
    """Every unit has five rows; each split has its own units."""
    released = {
        split: [row(f"{split}{i}", i % 2, unit=f"{split} {i // 5}") for i in range(n)] for split, n in splits.items()
    }
    cut = cut_splits(released, "clean", 0, "x")
    units = {split: {r.unit for r in found} for split, found in cut.rows.items()}
    assert not any(units[a] & units[b] for a, b in combinations(units, 2))
    assert sum(map(len, cut.rows.values())) == sum(splits.values()) and not cut.dropped
    sizes = Counter(r.unit for found in cut.rows.values() for r in found)
    assert set(sizes.values()) == {5}


def test_rows_without_splits_are_cut_by_unit_or_else_by_text():
    population = [row(f"{i}", i % 2, content=f"text {i // 2}", unit=f"unit {i // 10}" * (i < 60)) for i in range(100)]
    cut = split_rows(population, "seed")
    keys = {split: {by_unit(r) for r in found} for split, found in cut.items()}
    assert not any(keys[a] & keys[b] for a, b in combinations(keys, 2))
    assert sorted(r.id for found in cut.values() for r in found) == sorted(r.id for r in population)


def test_a_sample_of_whole_units_is_stratified_and_has_at_least_one():
    population = [row(f"{i}", answer=i // 50, unit=f"{i // 5}") for i in range(100)]
    sample = sample_together(population, 40, "seed", key=by_unit)
    assert Counter(r.answer for r in sample) == {0: 20, 1: 20}
    assert len(sample_together(population, 1, "seed", key=by_unit)) == 5
    assert sample_together(population, 0, "seed", key=by_unit) == sample_together([], 3, "seed", key=by_unit) == []


def test_a_split_that_holds_nothing_but_contradictions_is_an_error():
    test = [row("a", 0, content="?"), row("b", 1, content="?")]
    with pytest.raises(DatasetError, match="'clean-rows' leaves no test rows"):
        cut_splits({"train": rows("r", 4), "valid": rows("v", 4), "test": test}, "clean-rows", 0, "x")


def test_clean_draws_valid_from_train_when_less_than_half_of_it_is_left():
    test = rows("t", 10)
    valid = [row(f"v{i}", content=f"t{i}") for i in range(10)] + rows("w", 4)
    train = rows("r", 100)
    cut = cut_splits({"train": train, "valid": valid, "test": test}, "clean", 0, "x")
    assert Counter(r.answer for r in cut.rows["valid"]) == {0: 7, 1: 7}
    assert ids(cut.rows["valid"]) | ids(cut.rows["train"]) == ids(train)
    assert not ids(cut.rows["valid"]) & ids(cut.rows["train"])
    assert ("valid", 4) in [(c.split, c.n_rows) for c in cut.dropped]
    assert [(c.split, c.n_rows, c.reason) for c in cut.drawn] == [("valid", 14, "drawn from train")]


def test_a_drawn_valid_takes_at_most_a_fifth_of_train_and_leaves_no_twin_behind():
    train = [row(f"r{i}", i // 4 % 2, content=f"text {i // 4}") for i in range(40)]
    cut = cut_splits({"train": train, "valid": [], "test": rows("t", 9)}, "clean", 0, "x")
    assert len(cut.rows["valid"]) == 2
    assert not {r.content for r in cut.rows["valid"]} & {r.content for r in cut.rows["train"]}


def test_clean_carves_train_from_valid_when_train_is_absent():
    cut = cut_splits({"valid": rows("v", 20), "test": rows("t", 4)}, "clean", 0, "x")
    assert Counter(r.answer for r in cut.rows["train"]) == {0: 8, 1: 8}
    assert Counter(r.answer for r in cut.rows["valid"]) == {0: 2, 1: 2}


def test_clean_says_so_when_too_little_is_left_to_cut():
    valid = [row(f"v{i}", content=f"t{i}") for i in range(4)]
    with pytest.raises(DatasetError, match=r"x: .*leaves no valid rows.*4 of valid in test.*'released'"):
        cut_splits({"valid": valid, "test": rows("t", 4)}, "clean", 0, "x")


def test_released_changes_nothing_and_counts_whole_rows_and_texts():
    test = [row("t0", content="same", whole="w"), row("t1")]
    train = [row("a", content="same", whole="w"), row("b", content="same", whole="other")]
    cut = cut_splits({"train": train, "valid": rows("v", 2), "test": test}, "released", 0, "x")
    assert cut.rows["train"] == train and cut.still_shared == cut.overlaps
    assert [(o.split, o.other, o.n_whole_rows, o.n_same_text) for o in cut.overlaps] == [
        ("test", "train", 1, 1),
        ("valid", "test", 0, 0),
        ("valid", "train", 0, 0),
    ]


def test_no_test_rows_is_an_error():
    with pytest.raises(DatasetError, match="no test rows"):
        cut_splits({"train": rows("r", 4), "valid": rows("v", 4)}, "clean", 0, "x")


def test_demonstrations_are_one_training_row_per_answer_that_no_other_split_asks():
    train = [row("leak", 0, content="t0"), *rows("r", 40, n_answers=4)]
    splits = {"train": train, "valid": rows("v", 4, 4), "test": rows("t", 4, 4)}
    for seed in range(30):
        drawn = draw_demonstrations(splits, seed, "x")
        assert sorted(r.answer for r in drawn) == [0, 1, 2, 3]
        assert "leak" not in ids(drawn)
    orders = {tuple(r.answer for r in draw_demonstrations(splits, seed, "x")) for seed in range(30)}
    assert len(orders) > 5


def test_an_answer_without_a_training_row_cannot_be_demonstrated():
    splits = {"train": [row("a", 0)], "valid": [row("b", 1)], "test": [row("c", 0)]}
    with pytest.raises(DatasetError, match="answer 1.*shots=0"):
        draw_demonstrations(splits, 0, "x")


def test_samples_of_demonstrations_share_no_row():
    splits = {"train": rows("r", 12, n_answers=3), "valid": [], "test": []}
    samples = [ids(draw_demonstrations(splits, 0, "x", sample=sample)) for sample in range(4)]
    assert [len(sample) for sample in samples] == [3] * 4
    assert len(set().union(*samples)) == 12
    with pytest.raises(DatasetError, match="sample 4"):
        draw_demonstrations(splits, 0, "x", sample=4)
