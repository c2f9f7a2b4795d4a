"""Numbers that shards keep of NEGs, computed on the device that measures: only they are copied to the host.

Storage levels (`negcore.store.levels`) say in NumPy what they keep; what is here gives the same bits. Every step is
exact: comparisons, signs, whole numbers, and roundings to the nearest.

Shapes: B rows of a batch, P prompts, O options, L layers, N neurons a layer, M = L*N, K chosen neurons.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from types import MappingProxyType
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from negcore.arrays import Ints
from negcore.measure.forward import on_device
from negcore.measure.neurgrad import Experts, Kept, Negs, away_from_zero, contiguous
from negcore.measure.votes import Rule, Signal, Vote
from negcore.model.language_model import LanguageModel
from negcore.model.layer_shapes import chosen_places
from negcore.store.identity import StorageName

_NAN_BITS = 0x7FC0
"""The one NaN of bfloat16 that shards hold; devices make others."""


class _Rows(NamedTuple):
    """Facts about the rows of a batch beside their numbers."""

    gold_B: Tensor
    is_finite_B: Tensor
    """False where a NEG, an activation or a probability is NaN or infinite."""


def keeping(
    lm: LanguageModel, storage: StorageName, gold_P: Ints, neurons: Sequence[int] | None = None
) -> Callable[[Negs, Sequence[int]], Kept]:
    """Return what `measure_negs` calls to keep, of float32, what a storage level does.

    Parameters
    ----------
    gold_P : int array (P,)
        Index of each prompt's gold option.
    neurons : sequence of K int, optional
        As for `negcore.store.levels.StorageLevel.batch`.

    Returns
    -------
    callable
        What it keeps has the names that the level gives it. Besides there are ``probs_PO`` and ``nonfinite_PL``, the
        numbers of NaN and infinite NEGs and activations; rows with any of them enter no vote sum. Of a mixture of
        experts there are ``experts_PLK`` and ``router_weights_PLK`` too.
    """
    keep = partial(_KEEPS[storage], lm) if neurons is None or storage != "stats" else partial(_chosen, lm, neurons)

    def kept(negs: Negs, rows: Sequence[int]) -> Kept:
        nonfinite_BL = _nonfinite(negs)
        is_finite_B = negs.probs_BO.isfinite().all(1) & (nonfinite_BL == 0).all(1)
        of_level = keep(negs, _Rows(on_device(lm, gold_P[list(rows)]), is_finite_B))
        always = {"probs_PO": negs.probs_BO, "nonfinite_PL": nonfinite_BL}
        if negs.experts is not None:
            always |= negs.experts.by_row
        return Kept(contiguous(of_level.by_layer), contiguous({**of_level.by_row, **always}), of_level.sums)

    return kept


def _nonfinite(negs: Negs) -> Tensor:
    """Count each row's NaN and infinite NEGs and activations by layer: int32 (B, L)."""
    return (_count_nonfinite(negs.negs_LOBN, (1, 3)) + _count_nonfinite(negs.activations_LBN, (2,))).T


def _count_nonfinite(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Count NaN and infinite values along some axes: int32. A comparison with NaN is false."""
    is_finite = values.abs() <= torch.finfo(torch.float32).max
    n_finite = is_finite.view(torch.uint8).sum(axes, dtype=torch.int32)
    return prod(values.shape[axis] for axis in axes) - n_finite


def _values(lm: LanguageModel, negs: Negs, rows: _Rows) -> Kept:
    return Kept({"act": negs.activations_LBN, "neg": negs.negs_LOBN.transpose(1, 2)})


def _bfloat16(lm: LanguageModel, negs: Negs, rows: _Rows) -> Kept:
    return Kept({name: bfloat16_bits(values) for name, values in _values(lm, negs, rows).by_layer.items()})


def _codes(lm: LanguageModel, negs: Negs, rows: _Rows) -> Kept:
    return Kept({"act": negs.activations_LBN, "code": codes(negs.negs_LOBN)})


def _vote_sums(lm: LanguageModel, negs: Negs, rows: _Rows) -> Kept:
    add_up: Callable[[Tensor], Tensor] = _sum_rows
    if negs.experts is not None:
        add_up = partial(_sum_active, lm, _active_numbers(lm, negs.experts))
    sums = vote_sums(negs, rows.gold_B, rows.is_finite_B, add_up)
    return Kept(sums={vote.column: sums_M for vote, sums_M in sums.items()})


def _sum_rows(scores_LBN: Tensor) -> Tensor:
    """Add up the rows' scores of every neuron: int64 (M,)."""
    return scores_LBN.sum(1).flatten()


def _sum_active(lm: LanguageModel, numbers_LBN: Tensor, scores_LBN: Tensor) -> Tensor:
    """Add up each neuron's scores over the rows that have it: int64 (M,)."""
    sums_LN = torch.zeros((lm.n_layers, lm.layer_width + 1), dtype=torch.int64, device=scores_LBN.device)
    sums_LN.scatter_add_(1, numbers_LBN.flatten(1), scores_LBN.flatten(1).long())
    return sums_LN[:, :-1].flatten()


def _active_numbers(lm: LanguageModel, experts: Experts) -> Tensor:
    """Return the number of each active neuron of each row in its layer: int64 (L, B, N).

    Where a layer has fewer active neurons than others, the width of a layer stands behind them: no neuron's number.
    """
    experts_LBK, width = experts.numbers_BLK.transpose(0, 1).long(), max(one.n_active for one in lm.layer_shapes)
    numbers_LBN = torch.full((*experts_LBK.shape[:2], width), lm.layer_width, device=lm.device)
    for numbers_BN, shape, experts_BK in zip(numbers_LBN, lm.layer_shapes, experts_LBK, strict=True):
        all_N = torch.arange(shape.n_neurons, device=lm.device)
        units_BKU = experts_BK[:, : shape.top_k, None] * shape.n_units + all_N[: shape.n_units]
        numbers_BN[:, : shape.n_routed] = units_BKU.flatten(1)
        numbers_BN[:, shape.n_routed : shape.n_active] = all_N[shape.n_experts * shape.n_units :]
    return numbers_LBN


def _chosen(lm: LanguageModel, neurons: Sequence[int], negs: Negs, rows: _Rows) -> Kept:
    if negs.experts is not None:
        return _chosen_active(lm, neurons, negs, negs.experts)
    layers_K, neurons_K = (on_device(lm, places) for places in np.divmod(neurons, negs.negs_LOBN.shape[-1]))
    negs_KOB = negs.negs_LOBN[layers_K, :, :, neurons_K]
    activations_KB = negs.activations_LBN[layers_K, :, neurons_K]
    return Kept(by_row={"act": activations_KB.T, "neg": negs_KOB.permute(2, 1, 0)})


def _chosen_active(lm: LanguageModel, neurons: Sequence[int], negs: Negs, experts: Experts) -> Kept:
    """Keep the numbers of chosen neurons, and 0 where a row does not have one."""
    layers_K, neurons_K = np.divmod(neurons, lm.layer_width)
    experts_LBK = experts.numbers_BLK.transpose(0, 1).cpu().numpy()
    places_BK = on_device(lm, chosen_places(lm.layer_shapes, layers_K, neurons_K, experts_LBK.__getitem__))
    rows_B1 = torch.arange(len(places_BK), device=lm.device)[:, None]
    at_BK = on_device(lm, layers_K), rows_B1, places_BK.clamp(min=0)
    negs_BKO = negs.negs_LOBN.permute(0, 2, 3, 1)[at_BK].masked_fill((places_BK < 0)[..., None], 0)
    activations_BK = negs.activations_LBN[at_BK].masked_fill(places_BK < 0, 0)
    return Kept(by_row={"act": activations_BK, "neg": negs_BKO.transpose(1, 2)})


_KEEPS: Mapping[StorageName, Callable[[LanguageModel, Negs, _Rows], Kept]] = MappingProxyType(
    {"values": _values, "bfloat16": _bfloat16, "codes": _codes, "stats": _vote_sums}
)


def bfloat16_bits(values: Tensor) -> Tensor:
    """Return the bits of the nearest bfloat16 numbers of float32, as `negcore.store.levels.bfloat16_bits` does."""
    bits = values.bfloat16().view(torch.int16).masked_fill_(values.isnan(), _NAN_BITS)
    return bits.view(torch.uint16)


def codes(negs_LOBN: Tensor) -> Tensor:
    """Return the codes of the order and signs of the options' NEGs, as `negcore.store.codes.encode` does.

    Returns
    -------
    Tensor of uint16, shape (L, B, N)
        Without meaning where a NEG is NaN or infinite.
    """
    options = negs_LOBN.unbind(1)
    codes_LBN = torch.zeros_like(options[0], dtype=torch.int16)  # 10 395 codes at most
    for option, value in enumerate(options):
        place_LBN = (value > 0).view(torch.int8) + (value >= 0).view(torch.int8)
        for before in options[:option]:
            place_LBN += (value > before).view(torch.int8)
            place_LBN += (value >= before).view(torch.int8)
        codes_LBN.mul_(2 * option + 3).add_(place_LBN)
    return codes_LBN.view(torch.uint16)


def vote_sums(
    negs: Negs, gold_B: Tensor, is_counted_B: Tensor, add_up: Callable[[Tensor], Tensor]
) -> dict[Vote, Tensor]:
    """Score every neuron by every vote over some of the rows, as `negcore.measure.votes.vote_sums` does.

    Within a prompt, the plain gradient is NEG times -1 or 1 and gradient x activation is NEG times a factor that is
    not negative, so that a prompt's score by these is its score by NEG times -1, 0 or 1.

    Parameters
    ----------
    gold_B : int Tensor (B,)
    is_counted_B : bool Tensor (B,)
    add_up : callable
        Takes the rows' scores (L, B, N), and returns their sums of every neuron (M,).

    Returns
    -------
    dict of Vote to Tensor of int64, shape (M,)
    """
    scores = {"polar": _polar(negs.negs_LOBN, gold_B), "magn": _magn(negs.negs_LOBN, gold_B)}
    counted_B1 = is_counted_B[:, None]
    factors = {
        "neg": counted_B1,
        "gradient": away_from_zero(negs.activations_LBN).to(torch.int8) * counted_B1,
        "gxa": (negs.activations_LBN != 0) & counted_B1,
    }
    return {
        Vote(rule, signal): add_up(scores[rule] * factors[signal])
        for rule in get_args(Rule)
        for signal in get_args(Signal)
    }


def _polar(negs_LOBN: Tensor, gold_B: Tensor) -> Tensor:
    """Return 2*sign(v_gold) - sum over options of sign(v) of each row and neuron: int32 (L, B, N)."""
    scores_LBN = torch.zeros_like(negs_LOBN[:, 0], dtype=torch.int32)
    for option, value_LBN in enumerate(negs_LOBN.unbind(1)):
        sign_B1 = torch.where(gold_B == option, 1, -1).to(torch.int8)[:, None]
        scores_LBN += _sign(value_LBN) * sign_B1
    return scores_LBN


def _magn(negs_LOBN: Tensor, gold_B: Tensor) -> Tensor:
    """Return the sum over options of sign(v_gold - v) of each row and neuron: int32 (L, B, N)."""
    gold_LBN = negs_LOBN[:, gold_B, torch.arange(len(gold_B), device=gold_B.device)]
    scores_LBN = torch.zeros_like(gold_LBN, dtype=torch.int32)
    for value_LBN in negs_LOBN.unbind(1):
        scores_LBN += (gold_LBN > value_LBN).view(torch.int8) - (gold_LBN < value_LBN).view(torch.int8)
    return scores_LBN


def _sign(values: Tensor) -> Tensor:
    return (values > 0).view(torch.int8) - (values < 0).view(torch.int8)
