"""Fitted probes as plain settings and arrays, and back again: the parts that a file of a probe holds.

Parts that come from a file may be hostile. `probe_from` executes nothing, and checks the type and shape of every
array and every number that would be used as an index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negcore.measure.votes import Ranking, Vote
from negcore.probing.act_probe import ActProbe
from negcore.probing.fitted import ExpertWeights, FittedAct, FittedForest, FittedLogistic, FittedProbe, FittedVote
from negcore.probing.forest import Forest

Arrays = Mapping[str, NDArray[Any]]
Settings = Mapping[str, Any]


class ProbeParts(NamedTuple):
    """A fitted probe as plain values."""

    kind: str
    """Key of `_KINDS`."""
    settings: Settings
    """JSON values."""
    arrays: Arrays


def parts_of(probe: FittedProbe) -> ProbeParts:
    """Take a fitted probe apart."""
    kind, of_kind = next((kind, one) for kind, one in _KINDS.items() if isinstance(probe, one.cls))
    return ProbeParts(kind, *of_kind.parts_of(probe))


def probe_from(parts: ProbeParts, *, n_all: int, n_options: int) -> FittedProbe:
    """Put a fitted probe together again, for a model with ``n_all`` neurons.

    Raises
    ------
    ValueError, KeyError, TypeError, OverflowError
        If a part is missing, or is not what `parts_of` makes of a probe for such a model and options.
    """
    return _KINDS[parts.kind].probe_from(parts.settings, parts.arrays, n_all, n_options)


class _Kind(NamedTuple):
    cls: type[FittedProbe]
    parts_of: Callable[[Any], tuple[Settings, Arrays]]
    probe_from: Callable[[Settings, Arrays, int, int], FittedProbe]


def _vote_parts(probe: FittedVote) -> tuple[Settings, Arrays]:
    return {"vote": list(probe.vote)}, {"order": probe.ranking.order_K, "polarity": probe.ranking.polarity_K}


def _vote_from(settings: Settings, arrays: Arrays, n_all: int, n_options: int) -> FittedVote:
    order_K = _indices(arrays["order"], n_all)
    ranking = Ranking(order_K, _typed(arrays, "polarity", "i", order_K.shape))
    return FittedVote(_vote(settings), ranking, n_options, n_all)


def _act_parts(probe: FittedAct) -> tuple[Settings, Arrays]:
    act = probe.estimator
    arrays = {"order": act.kept_, "polarity": act.polarity_, "threshold": act.threshold_}
    return {"classes": act.classes_.tolist(), "n_neurons": probe.n_kept}, arrays


def _act_from(settings: Settings, arrays: Arrays, n_all: int, n_options: int) -> FittedAct:
    probe = ActProbe(n_kept=int(settings["n_neurons"]))
    probe.classes_ = _indices(np.array(settings["classes"], np.int64), n_options)
    probe.n_features_in_ = n_all
    shape = (len(probe.classes_) - 1, probe.n_kept)
    _require(probe.n_kept >= 1, "it keeps no neurons")
    reshaped = {name: values.reshape(shape) for name, values in arrays.items()}
    for order_K in reshaped["order"]:
        _indices(order_K, n_all)
    probe.kept_ = reshaped["order"]
    probe.polarity_ = _typed(reshaped, "polarity", "i", shape)
    probe.threshold_ = _typed(reshaped, "threshold", "f", shape)
    return FittedAct(probe)


_FOREST = ("classes_C", "root_T", "feature_V", "left_V", "right_V", "threshold_V", "probs_VC")


def _forest_parts(probe: FittedForest) -> tuple[Settings, Arrays]:
    return {}, {"order": probe.order_K} | {name: getattr(probe.forest, name) for name in _FOREST}


def _forest_from(settings: Settings, arrays: Arrays, n_all: int, n_options: int) -> FittedForest:
    forest, order_K = Forest(**{name: arrays[name] for name in _FOREST}), _indices(arrays["order"], n_all)
    n_nodes, n_classes = len(forest.left_V), len(_indices(forest.classes_C, n_options))
    _indices(forest.root_T, n_nodes)
    for child_V in (forest.left_V, forest.right_V):
        _indices(child_V, n_nodes, least=-1)
        # Children come after their node, so that every walk ends.
        _require(((child_V < 0) == (forest.left_V < 0)).all(), "a node has one child")
        _require((child_V[child_V >= 0] > np.flatnonzero(child_V >= 0)).all(), "a node comes before its parent")
    _require(_indices(forest.feature_V, len(order_K), least=-1).shape == (n_nodes,), "features of other nodes")
    _typed(arrays, "threshold_V", "f", (n_nodes,))
    _typed(arrays, "probs_VC", "f", (n_nodes, n_classes))
    return FittedForest(order_K, forest)


_LOGISTIC = ("classes_C", "mean_OK", "scale_OK", "coef_COK", "intercept_C")


def _logistic_parts(probe: FittedLogistic) -> tuple[Settings, Arrays]:
    arrays = {"order": probe.order_K} | {name: getattr(probe, name) for name in _LOGISTIC}
    return {"vote": list(probe.vote)}, arrays | ({} if probe.experts is None else probe.experts._asdict())


def _logistic_from(settings: Settings, arrays: Arrays, n_all: int, n_options: int) -> FittedLogistic:
    order_K, classes_C = _indices(arrays["order"], n_all), _indices(arrays["classes_C"], n_options)
    n_rows = 1 if len(classes_C) == 2 else len(classes_C)
    shape_OK = (n_options, len(order_K))
    return FittedLogistic(
        _vote(settings),
        order_K,
        classes_C,
        mean_OK=_typed(arrays, "mean_OK", "f", shape_OK),
        scale_OK=_typed(arrays, "scale_OK", "f", shape_OK),
        coef_COK=_typed(arrays, "coef_COK", "f", (n_rows, *shape_OK)),
        intercept_C=_typed(arrays, "intercept_C", "f", (n_rows,)),
        experts=_expert_weights(arrays, len(order_K), n_rows) if "first_E" in arrays else None,
    )


def _expert_weights(arrays: Arrays, n_kept: int, n_rows: int) -> ExpertWeights:
    first_E = _indices(arrays["first_E"], n_kept)
    return ExpertWeights(first_E, _typed(arrays, "coef_CE", "f", (n_rows, len(first_E))))


_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "vote": _Kind(FittedVote, _vote_parts, _vote_from),
        "act": _Kind(FittedAct, _act_parts, _act_from),
        "forest": _Kind(FittedForest, _forest_parts, _forest_from),
        "logistic": _Kind(FittedLogistic, _logistic_parts, _logistic_from),
    }
)


def _require(is_so: bool | np.bool_, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)


def _typed(arrays: Arrays, name: str, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array of signed integers (kind "i") or floats (kind "f") of this shape."""
    values = arrays[name]
    is_so = values.dtype.kind == kind and values.shape == shape
    _require(is_so, f"{name} has type {values.dtype} and shape {values.shape}, not {shape}")
    return values


def _indices(values: NDArray[Any], below: int, *, least: int = 0) -> NDArray[Any]:
    is_so = values.dtype.kind == "i" and values.ndim == 1 and values.size > 0
    _require(is_so, f"indices have type {values.dtype} and shape {values.shape}")
    _require(((values >= least) & (values < below)).all(), f"an index is outside {least}..{below - 1}")
    return values


def _vote(settings: Settings) -> Vote:
    rule, signal = settings["vote"]
    _require(rule in ("polar", "magn") and signal in ("neg", "gradient", "gxa"), f"vote {settings['vote']!r}")
    return Vote(rule, signal)
