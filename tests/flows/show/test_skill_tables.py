"""Tables and figures of skill neurons, from invented findings: no model, no shards."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from flows.show import skill_figures
from flows.show.accuracy_tables import short
from flows.show.drawing import save_figures
from flows.show.skill_figures import skill_figures as all_figures
from flows.show.skill_tables import skill_tables, summary
from flows.show.text import printable
from negcore.analysis.causal import DIRECTIONS
from negcore.analysis.effects import CausalRow
from negcore.analysis.shared_neurons import CommonNeuronRow, LayerShareRow, OverlapRow, genre_overlaps, jaccard_chance
from negcore.analysis.skills import (
    DEPTHS,
    TREES,
    BandRow,
    ForestRow,
    NeuronCountRow,
    TrainingRowsRow,
    TransferRow,
    band_starts,
    training_sizes,
)
from tasks.skills import DatasetFindings, ReferenceRow, SkillFindings

PROBES = ("polar", "magn")
TOPS = (16, 256, 4096)
SHIFTS = (0.5, -0.5, 2.0, -2.0)
N_LAYERS, N_NEURONS, N_TRAIN, N_TEST = 30, 1536, 200, 100
CONDITIONS = ("zero-shot", "zero-shot, inline", "one-shot", "one-shot, others")
HOSTILE = "local/$x_1$[b]\x1b[3m`"
DATASETS = {
    "mceval8k/agnews": "classification",
    "mceval8k/amazon-review-multi": "multilingual",
    "mceval8k/imdb": "classification",
    HOSTILE: "multilingual",
}


chance_of = cache(jaccard_chance)


class Numbers:
    """Numbers that look like measured ones, drawn from a seed; no two alike."""

    def __init__(self, seed: str) -> None:
        self.rng = np.random.default_rng([*seed.encode()])

    def near(self, value: float, spread: float = 0.03) -> float:
        return float(value + self.rng.normal(0, spread))

    def measured(self, value: float) -> tuple[float, float, float]:
        accuracy = float(np.clip(self.near(value), 0.02, 0.98))
        return accuracy, max(0.0, accuracy - 0.09), min(1.0, accuracy + 0.1)


def dataset_findings(
    name: str, genre: str, probes: Sequence[str] = PROBES, conditions: Sequence[str] = CONDITIONS
) -> DatasetFindings:
    numbers = Numbers(name)
    reference = ReferenceRow(genre, N_TRAIN, 90, N_TEST, *numbers.measured(0.3), 0.26, 0.25, 0.4, 0.35, 0.123)
    found = DatasetFindings(name, [reference], [], [], [], [], [], [], [])
    for probe in probes:
        found.causal.extend(causal_rows(probe, numbers))
        found.layers.extend(layer_rows(probe, numbers))
        for order, gain in (("best", 0.05), ("random", 0.01)):
            for power in range(15):
                k, value = 2**power, 0.3 + gain * min(power, 7)
                found.neuron_counts.append(NeuronCountRow(probe, order, k, *numbers.measured(value)))
        for i, n_train in enumerate(training_sizes(N_TRAIN)):
            found.training_rows.append(TrainingRowsRow(probe, n_train, 2**i, *numbers.measured(0.35 + 0.06 * i)))
        for trained_on, tested_on in product(conditions, conditions):
            value = 0.6 if trained_on == tested_on else 0.4
            found.transfers.append(TransferRow(probe, trained_on, tested_on, 64, *numbers.measured(value)))
        for i, start in enumerate(band_starts(N_LAYERS * N_NEURONS, 64)):
            found.bands.append(BandRow(probe, start, start + 64, *numbers.measured(0.6 - 0.03 * i)))
    for depth, n_trees in product(DEPTHS, TREES) if "magn" in probes else ():
        value = 0.4 + 0.03 * np.log2(n_trees) + 0.02 * (depth or 16) ** 0.5
        found.forests.append(ForestRow(n_trees, depth, 8192, *numbers.measured(value)))
    return found


def causal_rows(probe: str, numbers: Numbers) -> list[CausalRow]:
    rows = []
    for size, neurons, direction, shift in product(TOPS, ("top", "random", "bottom"), DIRECTIONS, SHIFTS):
        strength = {"top": 1.0, "random": 0.5, "bottom": 0.02}[neurons] * (1 if direction == "gold" else 0.4)
        change = numbers.near(0.3 * strength * np.tanh(shift * np.log10(size) / 3), 0.02)
        prob = numbers.near(change / 3, 0.005)
        around = (prob - 0.02, prob + 0.02)
        values = (0.27, 0.27 + change, change, change - 0.07, change + 0.08, prob, *around, change / 2)
        rows.append(CausalRow(probe, neurons, size, direction, shift, N_TEST, *values))
    return rows


def layer_rows(probe: str, numbers: Numbers) -> list[LayerShareRow]:
    rows = []
    for top in TOPS:
        weights = np.linspace(0.2, 1, N_LAYERS) ** 2
        share = numbers.rng.multinomial(top, weights / weights.sum()) / top
        rows += [LayerShareRow(probe, top, layer, float(share[layer]), 1 / N_LAYERS) for layer in range(N_LAYERS)]
    return rows


def overlap_rows(genres: dict[str, str], probes: Sequence[str] = PROBES) -> list[OverlapRow]:
    numbers, rows = Numbers("overlaps"), []
    for probe, top in product(probes, TOPS):
        chance = chance_of(top, N_LAYERS * N_NEURONS)
        for a, b in combinations(genres, 2):
            much = 0.3 if genres[a] == genres[b] else 0.02
            n_shared = int(numbers.rng.binomial(top, min(1, much * numbers.rng.random() + chance.mean)))
            jaccard = n_shared / (2 * top - n_shared)
            rows.append(OverlapRow(probe, top, a, b, genres[a], genres[b], n_shared, jaccard, *chance))
    return rows


def common_rows(probes: Sequence[str] = PROBES) -> list[CommonNeuronRow]:
    """Three of the best 256 and 25 of the best 4096."""
    worst = {256: (21, 99, 200), 4096: (21, 99, 200, *range(1000, 1022))}
    return [
        CommonNeuronRow(probe, top, rank % N_LAYERS, 7 * rank % N_NEURONS, rank, 3)
        for probe, top in product(probes, worst)
        for rank in worst[top]
    ]


def skill_findings(
    genres: dict[str, str] = DATASETS, probes: Sequence[str] = PROBES, conditions: Sequence[str] = CONDITIONS
) -> SkillFindings:
    datasets = [dataset_findings(name, genre, probes, conditions) for name, genre in genres.items()]
    found = SkillFindings("tiny $y$ [b]\x07", tuple(conditions), datasets)
    if len(datasets) > 1:
        found.overlaps.extend(overlap_rows(genres, probes))
        found.genre_overlaps.extend(genre_overlaps(found.overlaps))
        found.common.extend(common_rows(probes))
    return found


@pytest.fixture(scope="module")
def findings():
    return skill_findings()


@pytest.fixture(scope="module")
def tables(findings):
    """Tables by the first words of their titles; of the causal checks the second dataset's."""
    shown = skill_tables(findings)
    return {"causal": shown[1]} | {table.title.partition(" (causal")[0]: table for table in shown[4:]}


def grid(table):
    """The text of the cells, row by row."""
    rows = (row for block in table.pieces for row in block)
    return [tuple("".join(piece.text for piece in cell) for cell in row) for row in rows]


def of_dataset(table, name):
    """The rows of one dataset, of which only the first has its name."""
    rows = grid(table)
    start = [row[0] for row in rows].index(name)
    n = next((i for i, row in enumerate(rows[start + 1 :], 1) if row[0]), len(rows) - start)
    return [row[1:] for row in rows[start : start + n]]


def cell(row):
    """An accuracy and its interval as a table shows them; all are above 0 and below 1."""
    return f"{row.accuracy:.3f}\n{row.low:.3f}-{row.high:.3f}".replace("0.", ".")


def lines(findings, width=100):
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=False)
    for table in skill_tables(findings):
        console.print(table)
    return console.export_text().splitlines()


# Tables


def test_the_causal_checks_come_first_and_every_other_title_points_back_to_them(findings):
    titles = [table.title for table in skill_tables(findings)]
    for title, name in zip(titles[:4], ("agnews", "amazon-review-multi", "imdb", "local/$x_1$"), strict=True):
        assert title.startswith(f"Causal check of the rankings\n{name}")
        assert "100 test rows, accuracy .270 without a shift" in title
    assert len(titles) == 14
    assert all(title.endswith("(causal check above)") for title in titles[4:])


@pytest.mark.parametrize("show", [skill_tables, all_figures])
def test_a_ranking_without_its_causal_check_is_not_shown(show):
    unchecked = skill_findings()
    unchecked.datasets[2].causal[:] = [row for row in unchecked.datasets[2].causal if row.probe != "magn"]
    with pytest.raises(AssertionError, match="imdb"):
        show(unchecked)


def test_without_forests_nothing_is_shown_of_them():
    for probe, shown in (("polar", False), ("magn", True)):
        findings = skill_findings(probes=[probe])
        assert any("forests" in table.title for table in skill_tables(findings)) is shown
        assert any(figure.name == "forests" for figure in all_figures(findings)) is shown


def test_a_causal_check_has_every_set_in_its_own_cell(findings, tables):
    rows = iter(grid(tables["causal"]))
    found = {(r.probe, r.size, r.direction, r.shift, r.neurons): r for r in findings.datasets[1].causal}
    for probe, title in (("polar", "Polar"), ("magn", "Magn")):
        assert next(rows) == (title, *[""] * 8)
        for size, (direction, by), shift in product(TOPS, (("gold", "NEG"), ("polarity", "rank")), (2.0, -2.0)):
            row = next(rows)
            assert row[:3] == (str(size), by, f"{shift:+.0f}")
            own = [found[probe, size, direction, shift, neurons] for neurons in ("top", "random", "bottom")]
            changes = [(r.accuracy_change, r.change_low, r.change_high) for r in own]
            changes += [(r.prob_change, r.prob_low, r.prob_high) for r in own]
            for shown, (value, low, high) in zip(row[3:], changes, strict=True):
                assert shown == f"{value:+.3f}\n{low:.3f} {high:.3f}".replace("0.", ".")
    assert next(rows, None) is None


def test_a_change_is_bold_where_its_interval_leaves_out_zero(findings):
    (table, *_) = skill_tables(findings)
    found = {(r.probe, r.size, r.direction, r.shift, r.neurons): r for r in findings.datasets[0].causal}
    best, last = (found["polar", 4096, "gold", 2.0, neurons] for neurons in ("top", "bottom"))
    assert best.change_low > 0 > last.change_low
    at = next(i for i, row in enumerate(grid(table)) if row[:3] == ("4096", "NEG", "+2"))
    row = [row for block in table.pieces for row in block][at]
    assert [row[i][0].style for i in (3, 5)] == ["bold", ""]


def test_references_and_the_chosen_probes_stand_beside_each_other(findings, tables):
    one = findings.datasets[2]
    ((genre, rows, floors, lm, polar, magn),) = of_dataset(tables["Accuracy on test: tiny $y$ [b]\x07"], "imdb")
    assert (genre, rows, floors) == ("classification", "200\n90, 100\n.123", ".250\n.260\n.400\n.350")
    assert lm == f"{one.reference.lm:.3f}\n{one.reference.low:.3f}-{one.reference.high:.3f}".replace("0.", ".")
    for probe, shown in (("polar", polar), ("magn", magn)):
        (row,) = [row for row in one.training_rows if (row.probe, row.n_train) == (probe, N_TRAIN)]
        mark = "" if row.low > 0.4 else "\n<= floor"
        assert shown == cell(row).replace("\n", f" {row.n_neurons}\n") + mark


def test_accuracies_by_neurons_are_those_of_a_few_sizes(findings, tables):
    table = tables["Accuracy by number of neurons"]
    sizes = [1, 16, 256, 4096, 16384]
    assert [column.title for column in table.columns] == ["dataset", "probe", "neurons", *map(str, sizes)]
    found = {(row.probe, row.order, row.n_neurons): row for row in findings.datasets[1].neuron_counts}
    expected = [
        (title, order, *(cell(found[probe, order, k]) for k in sizes))
        for probe, title in (("polar", "Polar"), ("magn", "Magn"))
        for order in ("best", "random")
    ]
    assert of_dataset(table, "amazon-review-multi") == expected


def test_accuracies_by_training_rows_end_with_all_rows_of_each_dataset():
    findings = skill_findings()
    smaller = findings.datasets[0]
    smaller.references[:] = [replace(smaller.reference, n_train=100)]
    smaller.training_rows[:] = [replace(row, n_train=min(row.n_train, 100)) for row in smaller.training_rows[:4]]
    smaller.training_rows.extend(replace(row, probe="magn") for row in smaller.training_rows[:4])
    (table,) = [table for table in skill_tables(findings) if "training rows" in table.title]
    assert [column.title for column in table.columns[2:]] == ["16", "32", "64", "128", "all"]
    ((_, *shown), _) = of_dataset(table, "agnews")
    rows = smaller.training_rows[:4]
    expected = [cell(row).replace("\n", f" {row.n_neurons}\n") for row in rows]
    assert shown == [*expected[:3], "", expected[3]]


def test_transfers_have_a_row_for_what_was_trained_on_and_a_column_for_what_was_tested_on(findings, tables):
    table = tables["Accuracy under other conditions"]
    assert [column.title.replace("\n", " ") for column in table.columns[3:]] == list(CONDITIONS)
    found = {(row.probe, row.trained_on, row.tested_on): row for row in findings.datasets[0].transfers}
    row = of_dataset(table, "agnews")[4 + 1]
    assert row == ("Magn", CONDITIONS[1], *(cell(found["magn", CONDITIONS[1], name]) for name in CONDITIONS))


def test_bands_reach_from_the_first_to_the_last_rank(findings, tables):
    table = tables["Accuracy of 64 neurons further down the ranking"]
    starts = [0, 256, 2048, 16384, 46016]
    assert [column.title for column in table.columns[2:]] == [str(start) for start in starts]
    found = {row.first_rank: row for row in findings.datasets[0].bands if row.probe == "polar"}
    assert of_dataset(table, "agnews")[0] == ("Polar", *(cell(found[start]) for start in starts))


def test_forests_stand_beside_the_probes_that_vote(findings, tables):
    table = tables["Accuracy of forests on the best 8192 neurons by Magn's score"]
    assert [column.title for column in table.columns[2:]] == [*map(str, TREES), "Polar", "Magn"]
    found = {(row.depth, row.n_trees): row for row in findings.datasets[0].forests}
    rows = of_dataset(table, "agnews")
    assert [row[:6] for row in rows] == [
        ("any" if depth is None else str(depth), *(cell(found[depth, n]) for n in TREES)) for depth in DEPTHS
    ]
    assert [bool(row[6]) for row in rows] == [True, False, False, False, False]


def test_shared_neurons_stand_above_what_chance_would_give(findings, tables):
    table = tables["Skill neurons that datasets share"]
    rows = grid(table)
    found = {(row.probe, row.dataset_a, row.dataset_b, row.top): row for row in findings.overlaps}
    own = [found["magn", "mceval8k/agnews", "mceval8k/imdb", top] for top in TOPS]
    shown = next(row for row in rows if row[:2] == ("agnews, imdb", "Magn"))
    assert list(shown[2:]) == [f"{row.n_shared}  {row.jaccard:.3f}".replace("0.", ".") for row in own]
    assert rows[-2][0] == "two random sets: mean"
    assert [float(value) for value in rows[-2][2:]] == pytest.approx([row.chance for row in own], rel=0.05)
    assert [float(value) for value in rows[-1][2:]] == pytest.approx([row.chance_high for row in own], rel=0.05)
    cells = [row[4] for block in table.pieces for row in block]
    bold = {row[:2]: cell[-1].style == "bold" for row, cell in zip(rows, cells, strict=True)}
    assert all(
        bold[f"agnews, {name}", "Polar"] is (row.jaccard > row.chance_high)
        for name, dataset in (("imdb", "mceval8k/imdb"), ("amazon-review-multi", "mceval8k/amazon-review-multi"))
        for row in [found["polar", "mceval8k/agnews", dataset, 4096]]
    )


def test_of_many_pairs_those_that_share_most_are_shown():
    findings = skill_findings({f"mceval8k/d{i}": "nli" for i in range(9)}, probes=["magn"])
    (table,) = [table for table in skill_tables(findings) if "datasets share" in table.title]
    shown = [row[0] for row in grid(table)[:-2]]
    share = {f"d{a}, d{b}": 0.0 for a, b in combinations(range(9), 2)}
    for row in findings.overlaps:
        share[f"{row.dataset_a[9:]}, {row.dataset_b[9:]}"] += row.jaccard
    assert shown == sorted(share, key=lambda pair: -share[pair])[:28]
    assert "The 28 of 36 pairs that share most" in table.caption


def test_genres_are_compared_with_chance(findings, tables):
    rows = {row[:3]: row[3:] for row in grid(tables["Skill neurons that genres share"])}
    (own,) = [
        r
        for r in findings.genre_overlaps
        if (r.genre_a, r.genre_b, r.probe, r.top) == (*["multilingual"] * 2, "magn", 256)
    ]
    jaccard, ratio = rows["within multilingual", "1", "Magn"][1].split()
    assert (float(jaccard), float(ratio[:-1])) == pytest.approx((own.jaccard, own.jaccard / own.chance), rel=0.03)
    assert ("classification, multilingual", "4", "Magn") in rows


def test_of_the_neurons_of_all_datasets_ten_are_shown_and_all_are_counted(tables):
    rows = grid(tables["Neurons among the best of all 4 datasets"])
    assert rows[0] == ("Polar: 0 of 16, 3 of 256, 25 of 4096", *[""] * 4)
    assert rows[1] == ("", "21", "147", "21", "3")
    assert [row[3] for row in rows[1:11]] == ["21", "99", "200", *map(str, range(1000, 1007))]
    assert rows[11][0].startswith("Magn")


def test_layers_are_shown_by_thirds_and_the_richest(findings, tables):
    share = np.array([row.share for row in findings.datasets[2].layers if (row.probe, row.top) == ("magn", 256)])
    probe, top, *thirds, richest = of_dataset(tables["Layers of the skill neurons"], "imdb")[4]
    assert (probe, top) == ("Magn", "256")
    assert [float(third) for third in thirds] == pytest.approx([part.sum() for part in share.reshape(3, 10)], abs=6e-4)
    layers = [int(pair.split()[0]) for pair in richest.split(", ")]
    assert sorted(share[layers]) == sorted(share)[-5:]


@pytest.mark.parametrize("n", [1, 2, 9])
def test_tables_fit_100_columns_and_names_stay_text(n):
    names = [HOSTILE, *(f"mceval8k/amazon-review-multi-{i}" for i in range(n - 1))]
    shown = lines(skill_findings(dict(zip(names, ["nli", "fact"] * n, strict=False))))
    assert max(map(len, shown)) <= 100
    text = "\n".join(shown)
    assert "…" not in text
    assert "\x1b" not in text
    assert "local/$x_1$[b]\\x1b[3m`" in text


def test_one_dataset_asked_in_one_way_has_no_tables_of_what_it_lacks():
    findings = skill_findings({"mini/nli": "nli"}, conditions=["zero-shot"])
    titles = " ".join(table.title for table in skill_tables(findings))
    assert "conditions" not in titles
    assert "share" not in titles


# For Prefect


def test_artifacts_are_json_with_the_causal_check_first(findings):
    shown = skill_tables(findings)
    records = {table.key: table.records() for table in shown}
    assert len(records) == len(shown)
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert [table.key.startswith("causal") for table in shown] == [True] * 4 + [False] * 10
    rows = [row for key, own in records.items() if key.startswith("causal") for row in own]
    assert len(rows) == 4 * 2 * (1 + 3 * 2 * 2)  # datasets, probes; a heading, sizes, who says so, both directions
    first = next(r for r in findings.datasets[0].causal if (r.size, r.shift) == (16, 2.0))
    assert (rows[1]["k"], rows[1]["by"], rows[1]["shift"]) == (16, "NEG", "+2")
    assert rows[1]["accuracy best"].split(" / ")[0] == f"{first.accuracy_change:+.3f}".replace("0.", ".")
    assert "\x1b" not in str(records)


def test_the_summary_is_one_line_without_markup(findings):
    line = summary(findings)
    assert "agnews, amazon-review-multi, imdb, local/$x_1$[b]\\x1b[3m'" in line
    assert "800 training, 360 validation and 400 test rows" in line
    assert "zero-shot; zero-shot, inline; one-shot; one-shot, others" in line
    assert not {"\n", "`", "\x1b", "\x07"} & set(line)


# Figures


@pytest.fixture(scope="module")
def few():
    """Little to draw: figures take seconds."""
    return skill_findings({HOSTILE: "nli", "mceval8k/imdb": "fact"}, probes=["magn"], conditions=CONDITIONS[:2])


@pytest.fixture(scope="module")
def written(few, tmp_path_factory):
    return save_figures(all_figures(few), tmp_path_factory.mktemp("figures"))


NAMES = ["causal-magn-neg", "causal-magn-rank", "efficiency", "transfer", "bands", "forests", "overlap", "layers"]


def test_figures_are_drawn_in_three_forms_each_and_names_in_them_stay_text(written):
    kinds = ("svg", "png", "pdf")
    assert [path.name for path in written] == [f"tiny-y-b-e0b9478b-{name}.{kind}" for name in NAMES for kind in kinds]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written[1::3])
    assert all(path.read_bytes()[:5] == b"%PDF-" for path in written[2::3])
    for path in written[::3]:
        shown = "".join(ElementTree.fromstring(path.read_text()).itertext())
        assert "tiny $y$ [b]\\x07: " in shown
        assert "local/$x_1$[b]\\x1" in shown
        assert "\x1b" not in shown


@pytest.mark.parametrize("name", ["efficiency", "overlap"])
def test_figures_are_the_same_bytes_every_time(few, written, name, tmp_path):
    svg, png, _ = save_figures([getattr(skill_figures, name)(few)], tmp_path)  # the order of parts in a PDF varies
    for path in (svg, png):
        (other,) = [other for other in written if other.name == path.name]
        assert path.read_bytes() == other.read_bytes()


def test_figures_of_what_is_missing_are_left_out():
    alone = skill_findings({"mini/nli": "nli"}, conditions=["zero-shot"])
    causal = [f"causal-{probe}-{by}" for probe in PROBES for by in ("neg", "rank")]
    assert [figure.name for figure in all_figures(alone)] == [*causal, "efficiency", "bands", "forests", "layers"]


def rows_of(panel, **wanted):
    return [row for row in panel["data"]["values"] if all(row.get(name) == value for name, value in wanted.items())]


def test_a_causal_figure_shows_changes_towards_and_away(findings):
    figure = skill_figures.causal(findings, "magn", "polarity")
    panel = figure.parts[0].panels[4 * 2 + 3]  # third dataset, probability at the larger shift
    assert panel["title"] == "imdb, ±2"
    rows = findings.datasets[2].causal
    wanted = ("magn", "polarity", "random", -2.0)
    expected = [(r.size, r.prob_change) for r in rows if (r.probe, r.direction, r.neurons, r.shift) == wanted]
    shown = rows_of(panel, line="random, away")
    assert [(row["neurons"], row["value"]) for row in shown] == expected


def test_causal_effects_have_one_scale_which_noise_does_not_fill(findings):
    def scales(of):
        return [p["layer"][-1]["encoding"]["y"]["scale"]["domain"] for p in of.parts[0].panels]

    shown = scales(skill_figures.causal(findings, "magn", "gold"))
    assert shown[0] == shown[1] == shown[4] != shown[2] == shown[3] == shown[6]
    least = min(row.change_low for one in findings.datasets for row in one.causal)
    assert shown[0][0] <= least
    still = skill_findings({"mini/nli": "nli"}, probes=["magn"])
    tiny = {"accuracy_change": 0.0, "change_low": 0.0, "change_high": 0.0}
    tiny |= {"prob_change": 1e-17, "prob_low": -1e-17, "prob_high": 1e-17}
    still.datasets[0].causal[:] = [replace(row, **tiny) for row in still.datasets[0].causal]
    for low, high in scales(skill_figures.causal(still, "magn", "gold")):
        assert high - low == pytest.approx(0.02)


@pytest.mark.parametrize("name", ["efficiency", "transfer", "bands", "forests", "overlap", "layers"])
def test_every_figure_of_a_ranking_has_the_causal_check_in_it(few, name):
    check = getattr(skill_figures, name)(few).parts[-1]
    assert check.heading == "Causal check: 256 neurons shifted together by 2 towards gold (bars: 95 %)"
    for panel, direction in zip(check.panels, DIRECTIONS, strict=True):
        wanted = ("top", 256, direction, 2.0)
        rows = [r for one in few.datasets for r in one.causal if (r.neurons, r.size, r.direction, r.shift) == wanted]
        shown = rows_of(panel, line="Magn, best")
        assert [row["value"] for row in shown] == [row.accuracy_change for row in rows]


def test_the_transfer_map_compares_with_the_probe_of_the_tested_condition(few):
    panel = skill_figures.transfer(few).parts[0].panels[1]
    accuracy = np.array([row.accuracy for row in few.datasets[1].transfers]).reshape(2, 2)
    shown = panel["data"]["values"]
    np.testing.assert_allclose([row["value"] for row in shown], (accuracy - np.diag(accuracy)[None, :]).ravel())
    assert [row["text"] for row in shown] == [f"{value:.3f}".removeprefix("0") for value in accuracy.flat]


def test_the_overlap_map_is_empty_where_random_sets_share_as_much(findings):
    panel = skill_figures.overlap(findings).parts[0].panels[3 + 1]  # Magn, 256
    assert panel["title"] == "Magn, best 256"
    order = sorted(DATASETS, key=DATASETS.get)
    found = {(r.dataset_a, r.dataset_b): r for r in findings.overlaps if (r.probe, r.top) == ("magn", 256)}
    assert {row.jaccard > row.chance_high for row in found.values()} == {True, False}
    for one, other in product(order, order):
        row = found.get((one, other), found.get((other, one)))
        beyond = row is not None and row.jaccard > row.chance_high
        names = [printable(short(name)) for name in (one, other)]
        (cell,) = rows_of(panel, a=names[0], b=names[1])
        assert cell["value"] == (pytest.approx(row.jaccard / row.chance) if beyond else None)


def test_the_layer_map_is_one_where_neurons_are_spread_evenly():
    even = skill_findings({"mini/nli": "nli"}, probes=["magn"])
    even.datasets[0].layers[:] = [replace(row, share=row.uniform) for row in even.datasets[0].layers]
    for part in skill_figures.layers(even).parts[:3]:
        (panel,) = part.panels
        assert [row["value"] for row in panel["data"]["values"]] == [1] * N_LAYERS
