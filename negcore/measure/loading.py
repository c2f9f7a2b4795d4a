"""Load models for measuring. Every model is checked on the way, known or not, and knows what its check found."""

import logging
from dataclasses import replace
from typing import Any

from negcore.measure.model_check import check_model
from negcore.model.architectures import DeviceMap, Dtype, Router, SiteChoice, Way
from negcore.model.attention import ATTENTION_NAME
from negcore.model.check import COMPARED, Compared, ModelCheck
from negcore.model.language_model import LanguageModel, ModelCard, read_model, wrap_model

logger = logging.getLogger(__name__)

FASTER: tuple[Way, ...] = ("virtual", "cached")
"""Ways that are faster than whole prompts, the fastest first."""


def load_model(
    ref: str | ModelCard,
    *,
    dtype: Dtype = "float32",
    device: str | None = None,
    site: SiteChoice = "paper",
    router: Router = "through",
    device_map: DeviceMap | None = None,
) -> LanguageModel:
    """Load a model for measuring, frozen, in evaluation mode and with exact attention, and check it on one prompt.

    Parameters
    ----------
    ref : str or ModelCard
        As for `describe_model`, or its result.
    dtype : {"float32", "bfloat16", "float16", "float64"}
        Type of weights and activations. In half types NeurGrad loses the signs of small NEGs (SmolLM2: 2 % of all in
        bfloat16). What takes differences of predictions (sweeps, ablation, interventions) computes in float32 with
        them, a layer at a time. In float64 the normalisations of many models still round to float32.
    device : str, optional
        A torch device; by default the first GPU if there is one, else the CPU.
    site : {"paper", "up", "act", "gate"}
        Vector whose coordinates are the neurons; `paper` is `up` in gated models and `act` in the others.
    router : {"through", "fixed"}
        In a mixture of experts, whether a shift moves the routing of later layers: `through` differentiates through
        the router's weights, `fixed` holds experts and weights as they are without a shift.
    device_map : {"auto", "cpu", "disk"} or mapping, optional
        For a model that is larger than a device. `auto` spreads it over all GPUs; with `cpu` or `disk` the weights of
        its blocks wait in main memory or in their files and pass through `device`. A mapping names the device
        (`cuda:0`, `cpu`, `disk`) of each part of the model by its path, as in accelerate.

    Raises
    ------
    ModelError
        If the model cannot be found or loaded, has no such site, or fails the check: see `check_model`.
    """
    return checked(read_model(ref, dtype=dtype, device=device, site=site, router=router, device_map=device_map))


def as_language_model(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    revision: str = "memory",
    site: SiteChoice = "paper",
    router: Router = "through",
) -> LanguageModel:
    """Wrap a transformers model that is already in memory, such as one you trained or changed, and check it.

    The model itself is changed: it is frozen, put in evaluation mode and given the attention of `negcore`.

    Parameters
    ----------
    model : transformers model
        Of a family in `negcore.model.architectures`, or of another whose feed-forward layers a search finds.
    tokenizer : transformers tokenizer
    name, revision : str
        Recorded with every result. Give another revision to other weights of the same name.
    site, router
        As for `load_model`.

    Raises
    ------
    ModelError
        If its feed-forward layers are not found, it has no such site, or it fails the check: see `check_model`.
    """
    return checked(wrap_model(model, tokenizer, name=name, revision=revision, site=site, router=router))


def checked(lm: LanguageModel) -> LanguageModel:
    """Return a model with what its check found, on the fastest way that is right.

    Raises
    ------
    ModelError
        As for `accept`.
    """
    lm = settled(lm)
    assert lm.check is not None
    accept(lm)
    for line in lm.check.replaced:
        logger.warning("model %s: %s", lm.card.name, line)
    return lm


def accept(lm: LanguageModel) -> None:
    """Refuse a model that is right on no way.

    Raises
    ------
    ModelError
        If its logits are not those of the untouched model, or its prompts change each other, side by side or as a
        shared prefix: then no number is right.
        If it is in no row and anything at all failed: then its places may be wrong.
    """
    lm.require(*_needed(lm))


def settled(lm: LanguageModel) -> LanguageModel:
    """Check a model, and take a slower way where its family's fails; the check is there even if all of them do.

    One that no row names is given the fastest way that passes.
    """
    for way in _faster_ways(lm):
        for joined in (False, True):
            faster = replace(lm.along(way), joined=joined)
            if (check := check_model(faster)).passed:
                return replace(faster, check=check)
    check = check_model(lm)
    if check.failed and lm.way != "whole":  # its code may work on keys and values itself
        joining = replace(lm, joined=True)
        again = check_model(joining)
        if len(again.failed) < len(check.failed):
            lm, check = joining, again
    if check.failed and all(one.name == "virtual" for one in check.failed):
        # All that virtual tokens do beyond the cached way is shifting: nothing else is to be checked again.
        check = check.in_place_of(check, "single neurons are shifted by hooks, which is slower")
        return replace(lm.along("cached"), check=check)
    if check.failed and lm.way != "whole":
        slower = lm.along("whole")
        again = check_model(slower)
        if _is_usable(slower, again) and (len(again.failed) < len(check.failed) or not _is_usable(lm, check)):
            lm, check = slower, again.in_place_of(check, "every prompt runs whole, which is slower")
    return _with_own_attention(replace(lm, check=check))


def _faster_ways(lm: LanguageModel) -> tuple[Way, ...]:
    """Return the ways to try before whole prompts."""
    return FASTER if lm.arch.discovered and not lm.arch.masked else ()


def _with_own_attention(lm: LanguageModel) -> LanguageModel:
    """Give a model that would be refused its own attention, if it is right with that, on whole prompts."""
    assert lm.check is not None
    if not lm.takes_attention or _is_usable(lm, lm.check):
        return lm
    lm.model.set_attn_implementation("eager")
    slower = lm.along("whole")
    check = check_model(slower)
    if check.passed:
        return replace(slower, check=check.in_place_of(lm.check, "the model's own attention runs, which is slower"))
    lm.model.set_attn_implementation(ATTENTION_NAME)
    return lm


def _is_usable(lm: LanguageModel, check: ModelCheck) -> bool:
    return all(check[name].passed for name in _needed(lm))


def _needed(lm: LanguageModel) -> tuple[Compared, ...]:
    """Return the comparisons without which a model is not measured on its way."""
    if lm.arch.discovered:
        return tuple(COMPARED)
    return ("logits", "batch") if lm.way == "whole" else ("logits", "batch", "prefix")
