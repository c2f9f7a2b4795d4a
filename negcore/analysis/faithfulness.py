"""Faithfulness of a ranking: what is lost as its neurons fall silent one after the other, and what they keep up alone.

*Deletion* silences the best neurons, *insertion* silences all but the best. The same is done with random neurons: as
many of the same layers, or as many of the same layers, size of NEG and norm of output vector (`strata`). Sizes are
MIB's shares of all neurons, so the insertion curve of the logit difference gives MIB's measures of a circuit:

- faithfulness of the best k: f(k) = (m(k) - m(0)) / (m(all) - m(0)), with m the mean logit difference;
- CPR, the area under f, and CMD, the area between f and 1, both over the share of neurons from .001 to 1.

References
----------
Mueller et al. (2025), "MIB: A Mechanistic Interpretability Benchmark", arXiv 2504.13151: CPR and CMD.
Samek et al. (2017), "Evaluating the visualization of what a deep neural network has learned": deletion curves.
Rao, Wu (1988), "Resampling inference with complex survey data": samples of n - 1 of n, so that few draws do not look
more alike than they are.

Shapes: P prompts, O options, C conditions, D draws of a kind, S sizes, M neurons, B bootstrap samples (the first is
the sample itself).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from negcore.analysis.effects import paired_difference
from negcore.analysis.linearity import bootstrap_weights
from negcore.arrays import Floats, Ints
from negcore.errors import NegError
from negcore.measure.ablation import AblationResult
from negcore.measure.votes import Ranking, check_finite
from negcore.probing.draws import matched_neurons
from negcore.store.answers import AnswerView

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all neurons that curves are measured at: those of MIB."""

Kind = Literal["ranking", "same layers", "matched"]
Mode = Literal["deletion", "insertion"]
Metric = Literal["probability", "accuracy", "KL", "logit difference"]

_STRATA = 4
"""Parts that NEG sizes and output norms are each divided into, within a layer."""


class Condition(NamedTuple):
    """The neurons that stay or fall silent."""

    mode: Mode
    neurons: Kind
    draw: int
    size: int
    """Neurons silent (deletion) or all that are not (insertion)."""


@dataclass(frozen=True)
class CurveRow:
    """One point of a curve: a mean over prompts, and over draws of random neurons."""

    probe: str
    """Name of the probe that made the ranking."""
    mode: str
    metric: str
    """probability and logit difference (gold less the best other) of the gold option; accuracy; KL in nats: divergence
    of the prediction over the vocabulary from that with all neurons."""
    neurons: str
    size: int
    share: float
    """Share of all neurons."""
    value: float
    low: float
    """Lower end of the 95 % interval: bootstrap over prompts and draws."""
    high: float


@dataclass(frozen=True)
class AreaRow:
    """The mean height of a curve over the logarithm of the share of neurons, .001 to 1, and how far the ranking's is
    from it."""

    probe: str
    mode: str
    metric: str
    neurons: str
    area: float
    low: float
    high: float
    difference: float
    """The ranking's area less this one, by prompt and draw (`paired_difference`); 0 for the ranking."""
    difference_low: float
    difference_high: float
    n_draws: int


@dataclass(frozen=True)
class CircuitRow:
    """The neurons as circuits in MIB's terms, with zero ablation at the probed token."""

    probe: str
    neurons: str
    cpr: float
    """Area under the faithfulness; larger is better."""
    cpr_low: float
    cpr_high: float
    cmd: float
    """Area between the faithfulness and 1; smaller is better."""
    cmd_low: float
    cmd_high: float
    full: float
    """Mean logit difference with all neurons."""
    empty: float
    """Mean logit difference with all neurons silent."""


def strata(sizes_M: Floats, norms_M: Floats, layer_width: int) -> Ints:
    """Divide neurons into strata: by layer, then by size of NEG, then by norm of the output vector; int (M,).

    Parameters
    ----------
    sizes_M : float array of shape (M,), target per unit of activation
        Mean |NEG|.
    norms_M : float array of shape (M,)
    layer_width : int
        Neurons of a layer.
    """
    layers_M = np.arange(len(sizes_M)) // layer_width
    by_size_M = _parts(sizes_M, layers_M)
    within_M = layers_M * _STRATA + by_size_M
    return within_M * _STRATA + _parts(norms_M, within_M)


def _parts(values_M: Floats, groups_M: Ints) -> Ints:
    """Return which part of its group each value is in: parts of equal numbers, by rank."""
    parts_M = np.empty(len(values_M), np.int64)
    for group in np.unique(groups_M):
        (members,) = np.nonzero(groups_M == group)
        order = np.argsort(values_M[members], kind="stable")
        parts_M[members[order]] = np.arange(len(members)) * _STRATA // len(members)
    return parts_M


def curve_sets(
    ranking: Ranking, strata_M: Ints, layer_width: int, *, draws: int, seed: int
) -> dict[Condition, NDArray[np.bool_]]:
    """List the sets that curves need: which neurons are silent, bool (M,), by condition.

    Parameters
    ----------
    ranking : Ranking
        Ranking of all neurons.
    strata_M : int array of shape (M,)
        From `strata`: the matched neurons are of the same ones.
    draws : int
        Random sets of each kind and size. A set depends on the ranking, its size, its draw and the seed.

    Raises
    ------
    NegError
        If the ranking leaves neurons out, or there are no draws.
    """
    n_all = len(strata_M)
    if len(ranking.order_K) != n_all or draws < 1:
        raise NegError(f"a ranking of {len(ranking.order_K)} of {n_all} neurons with {draws} draws has no curves")
    layers_M = np.arange(n_all) // layer_width
    sets = {Condition("insertion", "ranking", 0, 0): np.ones(n_all, bool)}
    for size in sizes(n_all):
        top_K = ranking.order_K[:size]
        chosen: dict[tuple[Kind, int], Ints] = {("ranking", 0): top_K}
        for draw in range(draws):
            random = np.random.default_rng((seed, size, draw))
            chosen["same layers", draw] = matched_neurons(top_K, layers_M, random)
            chosen["matched", draw] = matched_neurons(top_K, strata_M, random)
        for (kind, draw), neurons_K in chosen.items():
            is_chosen_M = np.zeros(n_all, bool)
            is_chosen_M[neurons_K] = True
            sets[Condition("deletion", kind, draw, size)] = is_chosen_M
            sets[Condition("insertion", kind, draw, size)] = ~is_chosen_M
    return sets


def sizes(n_all: int) -> list[int]:
    """Return the numbers of neurons that curves are measured at, beside none and all."""
    found = dict.fromkeys(max(1, round(share * n_all)) for share in SHARES)
    return [size for size in found if size < n_all]


def curve_rows(
    probe: str,
    conditions: Sequence[Condition],
    gold_P: Ints,
    result: AblationResult,
    n_all: int,
    *,
    n_bootstrap: int,
    seed: int,
    answers: AnswerView | None = None,
) -> tuple[list[CurveRow], list[AreaRow], list[CircuitRow]]:
    """Summarise curves, their areas, and the circuits.

    Parameters
    ----------
    conditions : sequence of Condition
        Of the rows R of the result.
    gold_P : int array of shape (P,)
        Index of each prompt's gold option.
    n_all : int
        Neurons of the model.
    n_bootstrap : int
        Samples behind the intervals. They draw prompts, and draws of random neurons.
    answers : AnswerView, optional
        Rows and orders of the prompts, if rows were asked in several orders of their options: each row then counts as
        one prompt, with the mean over its orders.

    Raises
    ------
    NegError
        If there are no prompts, or a number is NaN or infinite.
    """
    if not len(gold_P):
        raise NegError(f"no prompts were asked for the ranking of {probe!r}; a mean needs at least one")
    for name, values in result._asdict().items():
        check_finite(values, name, ("row", "column", "option")[: values.ndim])
    found = metrics(gold_P, result)
    if answers is not None:
        found = {name: Metrics(*map(answers.means, of_metric)) for name, of_metric in found.items()}
    curves = _Curves(conditions, n_all, seed, n_bootstrap, found)
    keys = [(mode, metric) for mode in get_args(Mode) for metric in curves.base_P]
    points = [row for mode, metric in keys for row in curves.points(probe, mode, metric)]
    areas = [row for mode, metric in keys for row in curves.areas(probe, mode, metric)]
    return points, areas, [curves.circuit(probe, kind) for kind in curves.n_draws]


class Metrics(NamedTuple):
    """A value of every prompt: with all neurons (P,), and under every condition (P, C)."""

    base_P: Floats
    values_PC: Floats


def metrics(gold_P: Ints, result: AblationResult) -> dict[Metric, Metrics]:
    """Return what curves show of each prompt."""
    of_base, of_rows = (_of_labels(gold_P, logs) for logs in (result.base_log_probs_PO[:, None], result.log_probs_PRO))
    kl = Metrics(np.zeros(len(gold_P)), result.kl_PR.astype(np.float64))
    found: dict[Metric, Metrics] = {name: Metrics(of_base[name][:, 0], of_rows[name]) for name in of_base}
    return found | {"KL": kl}


def _of_labels(gold_P: Ints, log_probs_PCO: Floats) -> dict[Metric, Floats]:
    log_probs = log_probs_PCO.astype(np.float64)
    at_gold_PCO = np.broadcast_to(np.arange(log_probs.shape[2]) == gold_P[:, None, None], log_probs.shape)
    gold_PC = log_probs[at_gold_PCO].reshape(log_probs.shape[:2])
    others_PC = np.where(at_gold_PCO, -np.inf, log_probs).max(axis=2)
    right_PC = log_probs.argmax(axis=2) == gold_P[:, None]
    return {
        "probability": np.exp(gold_PC),
        "accuracy": right_PC.astype(np.float64),
        "logit difference": gold_PC - others_PC,  # of logits too: they differ from these by a constant
    }


class _Curves:
    """The curves of a ranking, and their bootstrap samples."""

    def __init__(
        self, conditions: Sequence[Condition], n_all: int, seed: int, n_bootstrap: int, found: Mapping[Metric, Metrics]
    ) -> None:
        self.base_P = {metric: of_metric.base_P for metric, of_metric in found.items()}
        self._values_PC = {metric: of_metric.values_PC for metric, of_metric in found.items()}
        self._at = {condition: index for index, condition in enumerate(conditions)}
        self._sizes = sorted({condition.size for condition in conditions if condition.size})
        self.shares_S = np.array([*self._sizes, n_all]) / n_all
        self._n_all = n_all
        self.n_draws: dict[Kind, int] = {}
        for condition in conditions:
            if condition.size:
                self.n_draws[condition.neurons] = max(condition.draw + 1, self.n_draws.get(condition.neurons, 0))
        n_prompts = len(next(iter(self.base_P.values())))
        self._prompts_BP = bootstrap_weights(n_prompts, n_bootstrap, seed) / n_prompts
        self._draws_BD = {kind: draw_weights(count, n_bootstrap, seed) for kind, count in self.n_draws.items()}

    def _samples_BS(self, mode: Mode, metric: Metric, kind: Kind) -> Floats:
        """Return the curve of every bootstrap sample, by size; all neurons last."""
        values_PSD = self._values_PC[metric][:, self._columns_SD(mode, kind)]
        means_BSD = np.einsum("bp,psd->bsd", self._prompts_BP, values_PSD)
        curve_BS = np.einsum("bsd,bd->bs", means_BSD, self._draws_BD[kind])
        whole_B = self._prompts_BP @ self._whole_P(mode, metric)
        return np.concatenate([curve_BS, whole_B[:, None]], axis=1)

    def _empty_P(self, metric: Metric) -> Floats:
        """Return what is left with all neurons silent."""
        return self._values_PC[metric][:, self._at[Condition("insertion", "ranking", 0, 0)]]

    def points(self, probe: str, mode: Mode, metric: Metric) -> list[CurveRow]:
        rows = []
        for kind in self.n_draws:
            samples_BS = self._samples_BS(mode, metric, kind)
            for at, share in enumerate(self.shares_S.tolist()):
                value = _interval(samples_BS[:, at])
                rows.append(CurveRow(probe, mode, metric, kind, round(share * self._n_all), share, *value))
        return rows

    def areas(self, probe: str, mode: Mode, metric: Metric) -> list[AreaRow]:
        own_P1 = self._areas_PD(mode, metric, "ranking")
        rows = []
        for kind, n_draws in self.n_draws.items():
            area = _interval(log_area(self.shares_S, self._samples_BS(mode, metric, kind)))
            difference = paired_difference(own_P1 - self._areas_PD(mode, metric, kind))
            rows.append(AreaRow(probe, mode, metric, kind, *area, *difference, n_draws))
        return rows

    def _areas_PD(self, mode: Mode, metric: Metric, kind: Kind) -> Floats:
        """Return the area of every prompt and draw."""
        values_PDS = self._values_PC[metric][:, self._columns_SD(mode, kind).T]
        whole_P = self._whole_P(mode, metric)
        whole_PD1 = np.broadcast_to(whole_P[:, None, None], (*values_PDS.shape[:2], 1))
        return log_area(self.shares_S, np.concatenate([values_PDS, whole_PD1], axis=2))

    def _columns_SD(self, mode: Mode, kind: Kind) -> Ints:
        """Return the place of every size and draw among the conditions."""
        draws = range(self.n_draws[kind])
        return np.array([[self._at[Condition(mode, kind, draw, size)] for draw in draws] for size in self._sizes])

    def _whole_P(self, mode: Mode, metric: Metric) -> Floats:
        """Return the end of a curve, where it is about all neurons."""
        return self.base_P[metric] if mode == "insertion" else self._empty_P(metric)

    def circuit(self, probe: str, kind: Kind) -> CircuitRow:
        samples_BS = self._samples_BS("insertion", "logit difference", kind)
        empty_B, full_B = self._prompts_BP @ self._empty_P("logit difference"), samples_BS[:, -1]
        with np.errstate(divide="ignore", invalid="ignore"):
            faithfulness_BS = (samples_BS - empty_B[:, None]) / (full_B - empty_B)[:, None]
        cpr_B = np.trapezoid(faithfulness_BS, self.shares_S, axis=1)
        cmd_B = np.trapezoid(np.abs(1 - faithfulness_BS), self.shares_S, axis=1)
        areas = (*_interval(np.asarray(cpr_B)), *_interval(np.asarray(cmd_B)))
        return CircuitRow(probe, kind, *areas, full=float(full_B[0]), empty=float(empty_B[0]))


def draw_weights(n_draws: int, n_samples: int, seed: int) -> Floats:
    """Return the weight of each draw in each bootstrap sample: shape (B, D), each row 1 in all; the first is even.

    A sample holds one draw less than there are, so that its mean varies as much as the mean of the draws does.
    """
    even = np.full(n_draws, 1 / n_draws)
    if n_draws == 1:
        return np.ones((1 + n_samples, 1))
    drawn = np.random.default_rng([abs(seed), n_draws]).multinomial(n_draws - 1, even, size=n_samples)
    return np.concatenate([even[None], drawn / (n_draws - 1)])


def log_area(shares_S: Floats, values: Floats) -> Floats:
    """Return the mean height of curves (..., S) over the logarithm of the share, by the trapezoidal rule: (...)."""
    logs_S = np.log(shares_S)
    areas: Floats = np.trapezoid(values, logs_S, axis=-1) / (logs_S[-1] - logs_S[0])
    return areas


def _interval(samples_B: NDArray[Any]) -> tuple[float, float, float]:
    low, high = np.quantile(samples_B[1:], (0.025, 0.975))
    return float(samples_B[0]), float(low), float(high)


PARALLEL_TYPES = frozenset({"codegen", "cohere", "cohere2", "gptj", "phi"})
"""Types of models whose attention always runs beside the feed-forward."""
_PARALLEL_FLAGS = MappingProxyType({"gpt_neox": "use_parallel_residual", "falcon": "parallel_attn"})


def mib_circuit(scores_M: Floats, places: Sequence[int], config: object, model_type: str) -> dict[str, object]:
    """Return a graph as MIB's evaluation reads it (`Graph.from_json`), for its level "node".

    Nodes of that graph are attention heads and whole feed-forward layers; what it calls neurons are dimensions of a
    node's *output*, of which a feed-forward neuron is none. So each feed-forward layer has one score, the sum of its
    neurons' absolute scores. Nodes without a score (attention heads, the input) stay in every circuit there.

    Parameters
    ----------
    scores_M : float array of shape (M,)
        Scores of all neurons.
    places : sequence of int, length L
        Place of each layer with neurons among all layers of the model.
    config : configuration of transformers, of the language part
    """
    parallel = model_type in PARALLEL_TYPES or bool(getattr(config, _PARALLEL_FLAGS.get(model_type, ""), False))
    scores_L = np.abs(scores_M).reshape(len(places), -1).sum(axis=1)
    return {
        "cfg": {
            "n_layers": int(config.num_hidden_layers),  # type: ignore[attr-defined]
            "n_heads": int(config.num_attention_heads),  # type: ignore[attr-defined]
            "parallel_attn_mlp": parallel,
            "d_model": int(config.hidden_size),  # type: ignore[attr-defined]
        },
        "nodes": {
            f"m{place}": {"in_graph": True, "score": float(score)}
            for place, score in zip(places, scores_L, strict=True)
        },
        "edges": {},
    }
