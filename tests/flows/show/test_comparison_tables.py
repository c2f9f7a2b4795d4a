"""What the comparisons of probes say in sentences."""

from dataclasses import replace

from rich.console import Console

from flows.show.comparison_tables import comparison_tables, sentences
from negcore.probing.paired import Paired
from tasks.comparisons import ComparisonRow


def row(first, second, n_first=0, n_second=0, *, n=60, p=None, dataset="mini/nli"):
    of_pair = Paired(n, n_first, n_second)
    p = of_pair.p if p is None else p
    counts = (n_first, n_second, of_pair.difference)
    return ComparisonRow("m", 0, dataset, first, second, n, *counts, p, p, n_comparisons=6)


def test_two_probes_that_cannot_be_told_apart():
    assert sentences([row("magn", "polar", 5, 3)]) == [
        "Magn and Polar cannot be told apart on these 60 rows (McNemar p = .73)."
    ]
    assert sentences([row("lm", "magn", n=1)]) == [
        "LM-Prob and Magn cannot be told apart on these 1 row (McNemar p = 1.00)."
    ]


def test_the_better_probe_comes_first_whichever_of_the_two_it_is():
    expected = ["Magn is better than Polar random (by .400, p < .0001)."]
    assert sentences([row("magn", "polar-random", 24, 0)]) == expected
    assert sentences([row("polar-random", "magn", 0, 24)]) == expected


def test_what_is_said_rests_on_the_corrected_p():
    one = row("magn", "polar", 8, 1)
    assert sentences([replace(one, p=0.04, p_corrected=0.04)]) == ["Magn is better than Polar (by .117, p = .04)."]
    assert "cannot be told apart" in sentences([replace(one, p=0.04, p_corrected=0.24)])[0]


def test_if_no_two_can_be_told_apart_the_closest_to_it_is_named():
    rows = [row("lm", "polar", 2, 3), row("lm", "magn", 1, 7), row("polar", "magn", 4, 4)]
    assert sentences(rows) == [
        "No two probes can be told apart on these 60 rows (smallest McNemar p = .07: LM-Prob and Magn)."
    ]


def test_few_pairs_are_named_one_by_one_and_many_are_counted():
    told = row("lm", "tree", 0, 30)
    few = [row("lm", "polar", 2, 3), row("polar", "magn", 4, 4)]
    assert sentences([told, *few]) == [
        "Tree is better than LM-Prob (by .500, p < .0001).",
        "Not to be told apart on these 60 rows: LM-Prob and Polar (p = 1.00), Polar and Magn (p = 1.00).",
    ]
    many = [row("lm", "polar", 2, 3), *[row("polar", "magn", 4, 4)] * 5]
    assert sentences([told, *many])[1].startswith("The other 6 pairs of probes cannot be told apart on these 60 rows (")


def test_a_p_that_rounds_to_zero_is_bounded_and_a_small_one_keeps_a_digit():
    assert "p = .003" in sentences([row("lm", "tree", 1, 30, p=0.00321)])[0]
    assert "p < .0001" in sentences([row("lm", "tree", 1, 30, p=0.0)])[0]


def test_a_table_a_model_and_number_of_demonstrations_that_fits_100_columns():
    rows = [row("lm", "tree", 0, 30), row("lm", "magn", 3, 20), row("lm", "polar", 4, 4)]
    rows += [replace(one, dataset="") for one in rows]
    tables = list(comparison_tables([*rows, *(replace(one, shots=1) for one in rows)]))
    assert [table.key for table in tables] == ["comparisons-m-zero-shot", "comparisons-m-one-shot"]
    console = Console(width=100, record=True, force_terminal=False)
    console.print(tables[0])
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    for part in ("mini/nli", "all datasets", "corrected for 6 comparisons", "Told apart: p at most .05"):
        assert part in " ".join(text.split())
