"""Curves, areas and circuits of a ranking: by pencil, against loops, and by simulation of what intervals claim."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from support import CONFIGS, tiny_config

from negcore.analysis.causal import CausalResult
from negcore.analysis.causal import Condition as Shifted
from negcore.analysis.effects import causal_differences, paired_difference
from negcore.analysis.faithfulness import (
    SHARES,
    Condition,
    curve_rows,
    curve_sets,
    draw_weights,
    log_area,
    mib_circuit,
    sizes,
    strata,
)
from negcore.errors import NegError
from negcore.measure.ablation import AblationResult
from negcore.measure.votes import Ranking
from negcore.probing.draws import matched_neurons

N_ALL, WIDTH, DRAWS = 2000, 500, 2


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    strata_M = strata(rng.random(N_ALL), rng.random(N_ALL), WIDTH)
    ranking = Ranking.from_scores(rng.integers(-99, 100, N_ALL))
    return ranking, strata_M, curve_sets(ranking, strata_M, WIDTH, draws=DRAWS, seed=3)


def test_sets_are_the_best_and_as_many_of_the_same_layers_and_strata(sets):
    ranking, strata_M, found = sets
    assert sizes(N_ALL) == [2, 4, 10, 20, 40, 100, 200, 400, 1000]
    assert found[Condition("insertion", "ranking", 0, 0)].all()
    for size in sizes(N_ALL):
        best_M = found[Condition("deletion", "ranking", 0, size)]
        assert set(np.flatnonzero(best_M)) == set(ranking.order_K[:size].tolist())
        for kind, groups_M in (("same layers", np.arange(N_ALL) // WIDTH), ("matched", strata_M)):
            for draw in range(DRAWS):
                silent_M = found[Condition("deletion", kind, draw, size)]
                assert (np.bincount(groups_M[silent_M]).tolist()) == np.bincount(groups_M[best_M]).tolist()
                assert (found[Condition("insertion", kind, draw, size)] == ~silent_M).all()
                if size <= 40:
                    assert not (silent_M & best_M).any()


def test_strata_are_equal_parts_of_a_layer_by_size_then_norm():
    sizes_M, norms_M = np.arange(32.0), np.tile(np.arange(16.0)[::-1], 2)
    strata_M = strata(sizes_M, norms_M, 16)
    assert np.bincount(strata_M).tolist() == [1] * 32
    assert strata_M[:4].tolist() == [3, 2, 1, 0]  # the four smallest of the first layer, the last with the least norm


def test_a_draw_takes_the_tops_own_only_where_a_stratum_has_too_few_others():
    drawn = matched_neurons(np.array([0, 1, 2, 5]), np.array([0, 0, 0, 0, 1, 1, 1]), np.random.default_rng(0))
    assert 3 in drawn[:3] and set(drawn[:3]) < {0, 1, 2, 3} and drawn[3] in (4, 6)


def made_result(conditions, n_prompts=6, n_options=3, seed=1):
    rng = np.random.default_rng(seed)
    logs = np.log(rng.dirichlet(np.ones(n_options + 1), (n_prompts, 1 + len(conditions)))[..., :-1])
    return AblationResult(logs[:, 0], logs[:, 1:], rng.random((n_prompts, len(conditions))))


def test_rows_are_those_of_loops(sets):
    conditions = list(sets[2])
    result, gold_P = made_result(conditions), np.array([0, 1, 2, 0, 1, 2])
    points, areas, circuits = curve_rows("magn", conditions, gold_P, result, N_ALL, n_bootstrap=20, seed=0)
    gold_logs = [result.log_probs_PRO[p, :, gold_P[p]] for p in range(6)]

    def curve(mode, kind, of_row, base):
        values = []
        for size in sizes(N_ALL):
            draws = range(DRAWS) if kind != "ranking" else range(1)
            rows = [conditions.index(Condition(mode, kind, draw, size)) for draw in draws]
            values.append(np.mean([of_row(p, row) for p in range(6) for row in rows]))
        empty = conditions.index(Condition("insertion", "ranking", 0, 0))
        values.append(base if mode == "insertion" else np.mean([of_row(p, empty) for p in range(6)]))
        return np.array(values)

    for mode in ("deletion", "insertion"):
        for kind in ("ranking", "same layers", "matched"):
            probability = curve(
                mode,
                kind,
                lambda p, r: np.exp(gold_logs[p][r]),
                np.mean(np.exp(result.base_log_probs_PO[range(6), gold_P])),
            )
            kl = curve(mode, kind, lambda p, r: result.kl_PR[p, r], 0.0)
            for metric, expected in (("probability", probability), ("KL", kl)):
                own = [one for one in points if (one.mode, one.neurons, one.metric) == (mode, kind, metric)]
                np.testing.assert_allclose([one.value for one in own], expected)
                assert [one.share for one in own] == pytest.approx(SHARES)
                assert all(one.low <= one.value <= one.high for one in own[:-1])
                (area,) = [one for one in areas if (one.mode, one.neurons, one.metric) == (mode, kind, metric)]
                heights = (expected[1:] + expected[:-1]) / 2 * np.diff(np.log(SHARES))
                assert area.area == pytest.approx(heights.sum() / np.log(1000))
    by_kind = {one.neurons: one for one in areas if (one.mode, one.metric) == ("insertion", "KL")}
    assert by_kind["matched"].difference == pytest.approx(by_kind["ranking"].area - by_kind["matched"].area)
    assert by_kind["ranking"].difference == by_kind["ranking"].difference_high == 0
    assert by_kind["matched"].difference_low < by_kind["matched"].difference < by_kind["matched"].difference_high

    def difference(p, row):
        logs_O = result.log_probs_PRO[p, row] if row is not None else result.base_log_probs_PO[p]
        return logs_O[gold_P[p]] - max(value for o, value in enumerate(logs_O) if o != gold_P[p])

    full = np.mean([difference(p, None) for p in range(6)])
    empty = np.mean([difference(p, conditions.index(Condition("insertion", "ranking", 0, 0))) for p in range(6)])
    f = (curve("insertion", "same layers", difference, full) - empty) / (full - empty)
    (circuit,) = [one for one in circuits if one.neurons == "same layers"]
    cpr = cmd = 0.0
    for left, right, low, high in zip(SHARES, SHARES[1:], f, f[1:], strict=False):
        cpr += (right - left) * (low + high) / 2
        cmd += (right - left) * (abs(1 - low) + abs(1 - high)) / 2
    assert (circuit.cpr, circuit.cmd) == (pytest.approx(cpr), pytest.approx(cmd))
    assert (circuit.full, circuit.empty) == (pytest.approx(full), pytest.approx(empty))


def test_areas_by_pencil():
    assert log_area(np.array([0.01, 0.1, 1]), np.array([[1.0, 2.0, 3.0]])).tolist() == pytest.approx([2.0])
    assert log_area(np.array([0.01, 1]), np.array([[0.0, 3.0]])).tolist() == pytest.approx([1.5])


def test_numbers_that_make_no_curves_are_refused(sets):
    conditions = list(sets[2])
    result = made_result(conditions)
    with pytest.raises(NegError, match="at least one"):
        curve_rows("magn", conditions, np.array([], int), result, N_ALL, n_bootstrap=5, seed=0)
    result.kl_PR[2, 3] = np.nan
    with pytest.raises(NegError, match="kl_PR of row 2, column 3 is nan"):
        curve_rows("magn", conditions, np.zeros(6, int), result, N_ALL, n_bootstrap=5, seed=0)
    with pytest.raises(NegError, match="has no curves"):
        curve_sets(sets[0].top(5), sets[1], WIDTH, draws=1, seed=0)


def test_weights_of_draws_vary_as_the_mean_of_draws_does():
    values_D = np.array([0.0, 1.0, 5.0, 2.0])
    means_B = draw_weights(4, 40000, 0)[1:] @ values_D
    assert means_B.var() == pytest.approx(values_D.var(ddof=1) / 4, rel=0.03)
    assert draw_weights(1, 3, 0).tolist() == [[1.0]] * 4


def made_check(rng, n_prompts, n_draws, spread):
    """Best neurons that raise the gold probability by .1 more than random ones do on average, whose draws differ."""
    conditions = [
        Shifted("top", 8, 0, "gold", 1.0),
        *(Shifted("random", 8, draw, "gold", 1.0) for draw in range(n_draws)),
    ]
    of_draw_M = np.concatenate([[0.1], rng.normal(0, spread, n_draws)])
    gold_PM = 0.4 + of_draw_M + rng.normal(0, 0.05, (n_prompts, 1)) + rng.normal(0, 0.02, (n_prompts, 1 + n_draws))
    probs_PMO = np.stack([gold_PM, 0.9 - gold_PM], axis=2)
    return CausalResult(tuple(conditions), np.zeros(n_prompts, int), probs_PMO[:, 0], probs_PMO)


@pytest.mark.parametrize("n_draws", [3, 8, 30])
def test_the_difference_to_random_neurons_covers_the_truth_where_draws_differ(n_draws):
    rng, n_trials, held, held_by_rows = np.random.default_rng(0), 600, [], []
    for _ in range(n_trials):
        result = made_check(rng, 30, n_draws, 0.05)
        (row,) = causal_differences("magn", result)
        held.append(row.prob_low <= 0.1 <= row.prob_high)
        by_rows = paired_difference(
            result.probs_PMO[:, [0], 0] - result.probs_PMO[:, 1:, 0].mean(axis=1, keepdims=True)
        )
        held_by_rows.append(by_rows.low <= 0.1 <= by_rows.high)
    assert np.mean(held) >= 0.95 - 3 * (0.95 * 0.05 / n_trials) ** 0.5
    assert np.mean(held_by_rows) < 0.6  # which an interval for other rows alone does not


def test_differences_by_pencil():
    assert paired_difference(np.array([[0.2]])) == (0.2, 0.2, 0.2)
    mean, low, high = paired_difference(np.array([[1.0, 3.0], [1.0, 3.0]]))  # rows alike: variance 1, one degree
    assert (mean, high - mean, mean - low) == pytest.approx((2, 12.706, 12.706), abs=1e-3)


def test_the_difference_is_paired_by_prompt():
    result = made_check(np.random.default_rng(1), 40, 3, 0.0)
    (row,) = causal_differences("magn", result)
    own_P = result.probs_PMO[:, 0, 0] - result.probs_PMO[:, 1:, 0].mean(axis=1)
    assert row.prob_difference == pytest.approx(own_P.mean()) and row.n_draws == 3
    assert row.prob_high - row.prob_low < 0.03  # that of unpaired prompts, which vary by .05, is twice as wide


def read_as_mib_does(circuit):
    """Read a graph by the rules of `Graph.from_json`: unknown names and missing keys are errors; None is "no score"."""
    assert circuit.keys() >= {"cfg", "nodes", "edges"}
    cfg = circuit["cfg"]
    assert {name: type(value) for name, value in cfg.items()} == {
        "n_layers": int,
        "n_heads": int,
        "parallel_attn_mlp": bool,
        "d_model": int,
    }
    scores = {"input": None}
    for layer in range(cfg["n_layers"]):
        scores |= {f"a{layer}.h{head}": None for head in range(cfg["n_heads"])} | {f"m{layer}": None}
    for name, node in circuit["nodes"].items():
        assert name in scores
        assert isinstance(node["in_graph"], bool)
        assert np.isfinite(node["score"])
        assert node.keys() == {"in_graph", "score"}  # lists of "neurons" would be of dimensions of the node's output
        scores[name] = node["score"]
    assert circuit["edges"] == {}
    return scores


def kept_as_mib_does(scores, n):
    """Keep the n nodes of highest score, and all that have none."""
    scored = sorted((name for name in scores if scores[name] is not None), key=lambda name: -abs(scores[name]))
    assert n <= len(scored)
    return {name for name in scores if scores[name] is None} | set(scored[:n])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_circuit_of_every_family_is_read_by_mibs_rules(family):
    config = tiny_config(family).get_text_config()
    places = range(config.num_hidden_layers)
    of_layers = np.arange(1.0, len(places) + 1)[::-1]
    circuit = mib_circuit(np.repeat(of_layers, 4) * np.tile([1, -1], 2 * len(places)), places, config, family)
    scores = read_as_mib_does(json.loads(json.dumps(circuit, allow_nan=False)))
    assert len(scores) == 1 + len(places) * (1 + config.num_attention_heads)
    for n in range(len(places) + 1):
        layers = {name for name in kept_as_mib_does(scores, n) if name.startswith("m")}
        assert layers == {f"m{layer}" for layer in range(n)}
    heads = {name for name in kept_as_mib_does(scores, 0) if name.startswith("a")}
    assert len(heads) == len(places) * config.num_attention_heads


def test_a_circuit_is_what_mibs_graph_reads():
    config = SimpleNamespace(num_hidden_layers=3, num_attention_heads=4, hidden_size=16)
    circuit = mib_circuit(np.array([1.0, -2.0, 0.5, 0.0]), (0, 2), config, "llama")
    assert circuit == {
        "cfg": {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16},
        "nodes": {"m0": {"in_graph": True, "score": 3.0}, "m2": {"in_graph": True, "score": 0.5}},
        "edges": {},
    }
    assert mib_circuit(np.ones(2), (0, 1), config, "gptj")["cfg"]["parallel_attn_mlp"]
