from itertools import product

import numpy as np
import pytest
import torch
from support import LABELS, PROMPTS, prompts_for, tiny_model

from negcore.analysis.causal import CausalResult, Condition, SkillSet, chosen_neurons, shift_sets, skill_sets
from negcore.analysis.effects import causal_rows
from negcore.errors import LabelError, NegError
from negcore.measure import interventions
from negcore.measure.hooks import tapped
from negcore.measure.neurgrad import neurgrad
from negcore.measure.votes import Ranking
from negcore.model.encoding import encode, encode_prompts

OPTIONS = LABELS[:3]
# Of different lengths, with and without a common beginning, one of them a single token.
MIXED = [PROMPTS[0], PROMPTS[3], "B"]
GOLD = [2, 0, 1]
SHIFTS = [-1.5, 0.5]


def mixed_prompts(lm):
    return [prompt + "<mask>" if lm.arch.masked else prompt for prompt in MIXED]


def gold_negs(lm, prompts, sets, gold=GOLD):
    """NEGs of the chosen neurons, here by NeurGrad in float64."""
    negs_POM = neurgrad(lm, prompts, OPTIONS).negs_POLN.reshape(len(prompts), len(OPTIONS), -1)
    return negs_POM[np.arange(len(prompts)), gold[: len(prompts)]][:, chosen_neurons(sets)]


def some_sets(lm, sizes=(1, 30), draws=2):
    scores_M = np.random.default_rng(0).integers(-9, 10, lm.n_layers * lm.layer_width)
    return skill_sets(Ranking.from_scores(scores_M), sizes, lm.n_layers, lm.layer_width, draws=draws, seed=1)


def shifted(lm, prompts, sets, shifts=SHIFTS, gold=GOLD, **settings):
    if "gold_negs_PK" not in settings:
        settings["gold_negs_PK"] = gold_negs(lm, prompts, sets, gold)
    return shift_sets(lm, prompts, OPTIONS, gold_P=gold[: len(prompts)], sets=sets, shifts=shifts, **settings)


def slow_probabilities(lm, prompt, steps):
    """The slow, obvious twin: one prompt, one whole forward pass, the steps added to their neurons, a full softmax."""
    (tokens,) = encode_prompts(lm.card, [prompt])
    position = tokens.index(lm.tokenizer.mask_token_id) if lm.arch.masked else len(tokens) - 1
    rows = {layer: torch.zeros(1, lm.layer_width, dtype=torch.float64) for layer in range(lm.n_layers)}
    for neuron, step in steps.items():
        rows[neuron // lm.layer_width][0, neuron % lm.layer_width] += step
    with torch.no_grad(), tapped(lm, torch.tensor([position]), rows) as activations:
        probs_V = lm.model(input_ids=torch.tensor([tokens])).logits[0, position].softmax(-1)
    label_ids = encode(lm.card, [prompt], OPTIONS).label_ids_PO[0]
    return probs_V[label_ids].numpy(), torch.cat([activations[layer][0] for layer in range(lm.n_layers)]).numpy()


def a_set(*neurons, draw=0):
    return SkillSet("top", len(neurons), draw, np.array(neurons), np.ones(len(neurons), np.int8))


def a_result(base, conditions, probs, gold):
    return CausalResult(tuple(conditions), np.array(gold), np.array(base), np.array(probs))


def test_the_best_random_and_last_of_a_ranking_by_pencil():
    scores = [5, -4, 0, 1] + [3, 2, -6, 0]  # two layers; in order: 6 0 1 4 5 3 2 7
    top, random, bottom = skill_sets(Ranking.from_scores(scores), [3], 2, 4, draws=1, seed=0)
    assert (top.kind, top.size, top.neurons_K.tolist()) == ("top", 3, [6, 0, 1])
    assert (bottom.kind, bottom.size, bottom.neurons_K.tolist()) == ("bottom", 3, [3, 2, 7])
    assert (random.kind, random.size) == ("random", 3)
    assert {2, 3} < set(random.neurons_K.tolist()) and len({4, 5, 7} & set(random.neurons_K.tolist())) == 1


def test_random_neurons_are_of_the_tops_layers_and_not_of_the_top():
    ranking = Ranking.from_scores(np.random.default_rng(0).integers(-99, 100, 10 * 50))
    sets = skill_sets(ranking, [8, 60], 10, 50, draws=4, seed=0)
    assert [(one.kind, one.size, one.draw) for one in sets[:6]] == [
        ("top", 8, 0), ("random", 8, 0), ("random", 8, 1), ("random", 8, 2), ("random", 8, 3), ("bottom", 8, 0),
    ]  # fmt: skip
    tops = {one.size: one.neurons_K for one in sets if one.kind == "top"}
    randoms = [one for one in sets if one.kind == "random"]
    for one in randoms:
        assert len(set(one.neurons_K.tolist())) == one.size
        assert not set(one.neurons_K.tolist()) & set(tops[one.size].tolist())
        assert np.array_equal(np.bincount(one.neurons_K // 50), np.bincount(tops[one.size] // 50))
    assert len({tuple(sorted(one.neurons_K.tolist())) for one in randoms}) == len(randoms)


def test_a_layer_with_too_few_others_gives_them_all_and_some_of_the_top():
    top, *randoms, _ = skill_sets(Ranking.from_scores([9, 8, 7, 0] + [1, 0, 0, 0]), [3], 2, 4, draws=5, seed=0)
    assert top.neurons_K.tolist() == [0, 1, 2]
    for random in randoms:
        assert 3 in random.neurons_K and len(set(random.neurons_K.tolist())) == 3
        assert random.neurons_K.max() < 4


def test_a_set_depends_on_its_size_draw_and_seed_only():
    ranking = Ranking.from_scores(np.random.default_rng(0).integers(-9, 10, 100))

    def random(sizes, draws, seed):
        sets = skill_sets(ranking, sizes, 5, 20, draws=draws, seed=seed)
        return [one for one in sets if one[:3] == ("random", 10, 0)][0].neurons_K.tolist()

    assert random([10], 1, 0) == random([2, 10, 50], 3, 0) != random([10], 1, 1)


def test_a_size_given_twice_is_one_set():
    sets = skill_sets(Ranking.from_scores(np.arange(20)), [4, 4], 2, 10, draws=1, seed=0)
    assert len(sets) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": [0]}, "a set of 0 neurons cannot be checked; of 20 neurons take 1 to 10"),
        ({"sizes": [4, 11]}, "a set of 11 neurons"),
        ({"draws": 0}, "0 random draws leave nothing to compare"),
        ({"n_layers": 3}, "the ranking holds 20 neurons of 30"),
    ],
)
def test_bad_sets_are_refused_in_one_line(settings, message):
    with pytest.raises(NegError, match=message) as error:
        skill_sets(
            **{
                "ranking": Ranking.from_scores(np.arange(20)),
                **{"sizes": [4], "n_layers": 2, "layer_width": 10, "draws": 1, "seed": 0},
                **settings,
            }
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "bert", "modernbert"])
def test_all_options_get_the_probabilities_of_the_slow_twin(family):
    lm = tiny_model(family)
    prompts, sets = mixed_prompts(lm), some_sets(lm, draws=1)
    negs_PK, chosen_K = gold_negs(lm, prompts, sets), chosen_neurons(sets)
    result = shifted(lm, prompts, sets)
    assert result.conditions[:2] == (Condition("top", 1, 0, "gold", -1.5), Condition("top", 1, 0, "gold", 0.5))
    assert result.probs_PMO.shape == (3, len(sets) * 2 * len(SHIFTS), 3)
    moved = 0.0
    for row, prompt in enumerate(prompts):
        base_O, before_M = slow_probabilities(lm, prompt, {})
        np.testing.assert_allclose(result.base_probs_PO[row], base_O, rtol=0, atol=1e-10)
        negs = dict(zip(chosen_K.tolist(), negs_PK[row].tolist(), strict=True))
        column = 0
        for one in sets:
            polarity = dict(zip(one.neurons_K.tolist(), one.polarity_K.tolist(), strict=True))
            for towards, shift in product((negs, polarity), SHIFTS):
                away = {neuron: 1 if before_M[neuron] > 0 else -1 for neuron in polarity}
                steps = {neuron: shift * np.sign(towards[neuron]) * away[neuron] for neuron in away}
                probs_O, _ = slow_probabilities(lm, prompt, steps)
                np.testing.assert_allclose(result.probs_PMO[row, column], probs_O, rtol=0, atol=1e-10)
                moved = max(moved, np.abs(probs_O - base_O).max())
                column += 1
    assert moved > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bert"])
def test_a_tiny_shift_of_one_neuron_changes_the_probability_by_neg_times_shift(family):
    lm = tiny_model(family)  # their normalisations keep float64, which a tiny step needs
    prompts, neurons = prompts_for(lm)[:2], [0, 30, 71]
    sets = [a_set(neuron, draw=draw) for draw, neuron in enumerate(neurons)]
    result = shifted(lm, prompts, sets, [-1e-5, 1e-5], gold=[2, 0])
    negs_POM = neurgrad(lm, prompts, OPTIONS).negs_POLN.reshape(2, len(OPTIONS), -1)[:, :, neurons]
    signs_PM = np.sign(gold_negs(lm, prompts, sets, [2, 0]))
    changes_PMDO = result.probs_PMO.reshape(2, 3, 2, 2, 3)[:, :, 0] - result.base_probs_PO[:, None, None]
    for place, shift in enumerate([-1e-5, 1e-5]):
        expected_PMO = (negs_POM * signs_PM[:, None] * shift).transpose(0, 2, 1)
        scale = np.abs(expected_PMO).max()
        np.testing.assert_allclose(changes_PMDO[:, :, place], expected_PMO, rtol=1e-3, atol=1e-5 * scale)


def test_towards_gold_raises_it_and_away_lowers_it():
    lm = tiny_model("gpt2")
    result = shifted(lm, PROMPTS[:3], some_sets(lm), [-1e-3, 1e-3])
    gold_PM = np.take_along_axis(result.probs_PMO, result.gold_P[:, None, None], 2)[..., 0]
    changes_PM = gold_PM - result.base_probs_PO[np.arange(3), GOLD][:, None]
    signs = {one: np.sign(changes_PM[:, at]) for at, one in enumerate(result.conditions)}
    assert all((found == np.sign(one.shift)).all() for one, found in signs.items() if one.direction == "gold")
    by_polarity = np.concatenate([found for one, found in signs.items() if one.direction == "polarity"])
    # And 0, where rounding leaves no trace, of a lone neuron without polarity.
    assert {-1, 1} <= {*by_polarity}


@pytest.mark.parametrize("family", ["opt", "bert"])
def test_neither_the_batch_nor_the_row_budget_changes_the_result(family, monkeypatch):
    lm = tiny_model(family)
    prompts, sets = mixed_prompts(lm), some_sets(lm)
    negs_PK = gold_negs(lm, prompts, sets)
    together = shifted(lm, prompts, sets, gold_negs_PK=negs_PK)
    for row, prompt in enumerate(prompts):
        alone = shifted(lm, [prompt], sets, gold=GOLD[row:], gold_negs_PK=negs_PK[row : row + 1])
        np.testing.assert_allclose(alone.probs_PMO[0], together.probs_PMO[row], rtol=0, atol=1e-10)
    for budget in (1, 5 * 8 * (3 * 24 + 400)):
        monkeypatch.setattr(interventions, "_ROW_BYTES", budget)
        other = shifted(lm, prompts, sets, gold_negs_PK=negs_PK)
        np.testing.assert_allclose(other.probs_PMO, together.probs_PMO, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("budget", "size", "largest"),
    [("_ROW_BYTES", 5 * 8 * (3 * 24 + 400), 5), ("TOKEN_BUDGET", 4 * 14 + 1, 4), ("_ROW_BYTES", 1, 2)],
)
def test_a_pass_holds_no_more_rows_than_its_budget(budget, size, largest, monkeypatch):
    lm = tiny_model("llama")
    sets = some_sets(lm)
    negs_PK, widths = gold_negs(lm, PROMPTS[:1], sets), []
    monkeypatch.setattr(interventions, budget, size)
    handle = lm.layers[-1].register_forward_hook(lambda _, args, output: widths.append(args[0].shape[:2]))
    shifted(lm, PROMPTS[:1], sets, gold_negs_PK=negs_PK)
    handle.remove()
    assert widths[:2] == [(1, 14 - 1), (1, 1)]  # the prompt runs once, and unshifted
    assert max(n_rows for n_rows, _ in widths[2:]) == largest
    assert sum(n_rows - 1 for n_rows, _ in widths[2:]) == len(sets) * 2 * len(SHIFTS)  # one of each is unshifted
    assert {length for _, length in widths[2:]} == {1}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_model_is_bit_for_bit_the_same_afterwards(family, monkeypatch):
    lm = tiny_model(family)
    prompts, sets = mixed_prompts(lm), some_sets(lm)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    negs_PK = gold_negs(lm, prompts, sets)
    first = shifted(lm, prompts, sets, gold_negs_PK=negs_PK)
    head, calls = lm.model.get_output_embeddings().forward, []

    def breaks_later(hidden):
        calls.append(hidden)
        if len(calls) > 1:
            raise RuntimeError("broken on purpose")
        return head(hidden)

    monkeypatch.setattr(lm.model.get_output_embeddings(), "forward", breaks_later)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        shifted(lm, prompts, sets, gold_negs_PK=negs_PK)
    monkeypatch.undo()
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    assert np.array_equal(shifted(lm, prompts, sets, gold_negs_PK=negs_PK).probs_PMO, first.probs_PMO)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shifts": [1.0, 0.0]}, "shift 0.0 cannot be measured"),
        ({"shifts": [float("nan")]}, "shift nan cannot be measured"),
        ({"shifts": []}, "1 sets and 0 shifts were given"),
        ({"sets": []}, "0 sets and 1 shifts were given"),
        ({"sets": [a_set(72)]}, r"neuron 3\.0 does not exist; tiny-llama has layers 0\.\.2 with neurons 0\.\.23"),
        ({"sets": [a_set(-1)]}, r"neuron -1\.23 does not exist"),
        ({"gold_P": [0, 3]}, "row 1: gold option 3 is not one of the 3 options"),
        ({"gold_P": [0]}, "1 gold options for 2 prompts"),
        ({"gold_negs_PK": np.ones((2, 2))}, r"NEGs of shape \(2, 2\) do not fit; these prompts and sets need \(2, 3\)"),
        ({"gold_negs_PK": np.full((2, 3), np.nan)}, "NEG of row 0, chosen neuron 0 is nan"),
    ],
)
def test_what_cannot_be_shifted_is_refused_in_one_line(settings, message):
    fitting = {"gold_P": [0, 1], "gold_negs_PK": np.ones((2, 3)), "shifts": [1.0]}
    sets = [a_set(4, 0, 71)]
    with pytest.raises(NegError, match=message) as error:
        shift_sets(tiny_model("llama"), PROMPTS[:2], OPTIONS, **{**fitting, "sets": sets, **settings})
    assert "\n" not in str(error.value)


def test_options_that_are_not_one_token_are_refused():
    with pytest.raises(LabelError, match="must be exactly one"):
        shift_sets(
            tiny_model("llama"),
            PROMPTS[:1],
            [" A", " of course not"],
            **{"gold_P": [0], "gold_negs_PK": np.ones((1, 1)), "shifts": [1.0]},
            sets=[a_set(0)],
        )


def test_changes_are_means_over_prompts_of_what_the_shift_did_by_pencil():
    base = [[0.4, 0.1], [0.2, 0.3], [0.3, 0.3], [0.1, 0.1]]  # answers: 0, 1, 0 (a tie), 0
    up = [[0.5, 0.1], [0.1, 0.3], [0.6, 0.2], [0.2, 0.3]]  # answers: 0, 1, 0, 1
    result = a_result(base, [Condition("top", 2, 0, "gold", 0.5)], [[row] for row in up], gold=[0, 0, 1, 1])
    (row,) = causal_rows("magn", result, n_bootstrap=200)
    assert (row.probe, row.neurons, row.size, row.shift, row.n_prompts) == ("magn", "top", 2, 0.5, 4)
    assert (row.base_accuracy, row.accuracy, row.accuracy_change) == (0.25, 0.5, 0.25)
    assert row.prob_change == pytest.approx((0.1 - 0.1 - 0.1 + 0.2) / 4)
    shares = (0.5 / 0.6 - 0.8) + (0.25 - 0.4) + (0.25 - 0.5) + (0.6 - 0.5)
    assert row.share_change == pytest.approx(shares / 4)
    assert 0 == row.change_low <= 0.25 < row.change_high <= 1
    assert row.prob_low < row.prob_change < row.prob_high


def test_random_draws_are_averaged():
    base, gold = [[0.4, 0.1], [0.1, 0.4]], [0, 0]
    conditions = [Condition("random", 2, draw, "gold", 1.0) for draw in range(2)] + [
        Condition("bottom", 2, 0, "gold", 1.0)
    ]
    probs = [
        [[0.2, 0.3], [0.6, 0.1], [0.4, 0.1]],  # wrong, right; unchanged
        [[0.3, 0.1], [0.5, 0.3], [0.1, 0.4]],  # right, right; unchanged
    ]
    random, bottom = causal_rows("magn", a_result(base, conditions, probs, gold), n_bootstrap=50)
    assert (random.neurons, random.base_accuracy, random.accuracy, random.accuracy_change) == (
        "random",
        0.5,
        0.75,
        0.25,
    )
    assert random.prob_change == pytest.approx(((0.2 + 0.6) / 2 - 0.4 + (0.3 + 0.5) / 2 - 0.1) / 2)
    assert (bottom.neurons, bottom.accuracy_change, bottom.prob_change, bottom.share_change) == ("bottom", 0, 0, 0)
    assert (bottom.change_low, bottom.change_high, bottom.prob_low, bottom.prob_high) == (0, 0, 0, 0)


def test_intervals_are_those_of_a_mean_over_prompts():
    base = np.tile([[0.2, 0.6]], (400, 1))
    shifted_P = np.where(np.arange(400) % 2, 0.7, 0.2)  # half of the prompts become right
    probs = np.stack([shifted_P, np.full(400, 0.6)], axis=1)[:, None]
    result = a_result(base, [Condition("top", 1, 0, "gold", 1.0)], probs, [0] * 400)
    (row,) = causal_rows("magn", result, n_bootstrap=4000, seed=3)
    error = 0.5 / np.sqrt(400)
    assert row.change_low == pytest.approx(0.5 - 1.96 * error, abs=0.1 * error)
    assert row.change_high == pytest.approx(0.5 + 1.96 * error, abs=0.1 * error)
    assert row.prob_low == pytest.approx(0.25 - 1.96 * error / 2, abs=0.1 * error)
    assert row.prob_high == pytest.approx(0.25 + 1.96 * error / 2, abs=0.1 * error)
    assert causal_rows("magn", result, n_bootstrap=4000, seed=3) == [row]
    assert causal_rows("magn", result, n_bootstrap=4000, seed=4) != [row]


def test_one_prompt_has_an_interval_without_width():
    result = a_result([[0.5, 0.25]], [Condition("top", 1, 0, "gold", 1.0)], [[[0.75, 0.125]]], [0])
    (row,) = causal_rows("magn", result, n_bootstrap=10)
    assert row.prob_low == row.prob_change == row.prob_high == 0.25


def test_of_options_that_all_vanish_none_has_a_larger_share():
    result = a_result([[0.5, 0.5]], [Condition("top", 1, 0, "gold", 9.0)], [[[0.0, 0.0]]], [1])
    (row,) = causal_rows("magn", result, n_bootstrap=10)
    assert (row.share_change, row.prob_change) == (0.0, -0.5)


def test_a_probability_that_is_not_finite_is_refused_with_its_place():
    probs = [[[0.1, 0.2]], [[0.1, np.nan]]]
    with pytest.raises(NegError, match="probability of row 1, condition 0, option 1 is nan"):
        causal_rows(
            "magn", a_result([[0.1, 0.2]] * 2, [Condition("top", 1, 0, "gold", 1.0)], probs, [0, 1]), n_bootstrap=10
        )


def test_no_prompts_make_no_table():
    result = a_result(np.empty((0, 2)), [Condition("top", 1, 0, "gold", 1.0)], np.empty((0, 1, 2)), np.empty(0, int))
    with pytest.raises(NegError, match="no prompts were shifted"):
        causal_rows("magn", result, n_bootstrap=10)
