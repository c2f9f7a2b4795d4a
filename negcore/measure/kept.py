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
from negcore.measure.neurgrad import Kept, Negs, away_from_zero, contiguous
from negcore.measure.votes import Rule, Signal, Vote
from negcore.model.language_model import LanguageModel
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
    keep = partial(_chosen, lm, neurons) if storage == "stats" and neurons is not None else _KEEPS[storage]

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


def _values(negs: Negs, rows: _Rows) -> Kept:
    return Kept({"act": negs.activations_LBN, "neg": negs.negs_LOBN.transpose(1, 2)})


def _bfloat16(negs: Negs, rows: _Rows) -> Kept:
    return Kept({name: bfloat16_bits(values) for name, values in _values(negs, rows).by_layer.items()})


def _codes(negs: Negs, rows: _Rows) -> Kept:
    return Kept({"act": negs.activations_LBN, "code": codes(negs.negs_LOBN)})


def _vote_sums(negs: Negs, rows: _Rows) -> Kept:
    return Kept(sums={vote.column: sums_M for vote, sums_M in vote_sums(negs, rows.gold_B, rows.is_finite_B).items()})


def _chosen(lm: LanguageModel, neurons: Sequence[int], negs: Negs, rows: _Rows) -> Kept:
    layers_K, neurons_K = (on_device(lm, places) for places in np.divmod(neurons, negs.negs_LOBN.shape[-1]))
    negs_KOB = negs.negs_LOBN[layers_K, :, :, neurons_K]
    activations_KB = negs.activations_LBN[layers_K, :, neurons_K]
    return Kept(by_row={"act": activations_KB.T, "neg": negs_KOB.permute(2, 1, 0)})


_KEEPS: Mapping[StorageName, Callable[[Negs, _Rows], Kept]] = MappingProxyType(
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


def vote_sums(negs: Negs, gold_B: Tensor, is_counted_B: Tensor) -> dict[Vote, Tensor]:
    """Score every neuron by every vote over some of the rows, as `negcore.measure.votes.vote_sums` does.

    Within a prompt, the plain gradient is NEG times -1 or 1 and gradient x activation is NEG times a factor that is
    not negative, so that a prompt's score by these is its score by NEG times -1, 0 or 1.

    Parameters
    ----------
    gold_B : int Tensor (B,)
    is_counted_B : bool Tensor (B,)

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
        Vote(rule, signal): (scores[rule] * factors[signal]).sum(1).flatten()
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
