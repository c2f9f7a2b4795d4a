from collections import Counter

import pytest

from negcore.datasets.rows import Row
from negcore.datasets.splits import cut_splits, draw_demonstrations, quotas, seeded_order, stratified_sample
from negcore.errors import DatasetError


def row(id: str, answer: int = 0, group: str = "", content: str | None = None, whole: str | None = None) -> Row:
    return Row(id, {}, ("x", "y"), answer, group, content or id, whole or id)


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
    train = [row(f"r{i}", i % 2, content=f"text {i // 4}") for i in range(40)]
    cut = cut_splits({"train": train, "valid": [], "test": rows("t", 9)}, "clean", 0, "x")
    assert len(cut.rows["valid"]) == 8
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
    assert cut.rows["train"] == train
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
