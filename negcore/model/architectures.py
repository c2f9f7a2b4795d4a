"""Places of the feed-forward neurons in every model family: one row a model type.

A new family is a row here and a line in the parametrised tests. Paths are relative to the model with its language
head; paths below a layer are relative to that layer.
"""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from negcore.errors import ModelError

Site = Literal["up", "act", "gate"]
SiteChoice = Literal["up", "act", "gate", "paper"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Module paths of one model family."""

    layers: str
    """List of transformer layers."""
    down: str
    """Down projection below a layer; its input is the `act` site."""
    up: str | None = None
    """Up projection below a layer; None if the feed-forward is not gated."""
    gate: str | None = None
    """Activation function of the gate, below a layer."""
    fused: bool = False
    """True if `up` computes gate and up side by side, in that order."""
    post_norm: str | None = None
    """Normalisation, below a layer, of the feed-forward's output before it joins the residual stream."""
    masked: bool = False
    """True if the model predicts a `[MASK]` and sees both sides of it."""

    @property
    def gated(self) -> bool:
        return self.up is not None

    def site(self, choice: SiteChoice) -> Site:
        """Resolve a site choice for this family.

        `paper` is the vector that the paper's code reads: `up` in gated models, `act` in the others.

        Raises
        ------
        ModelError
            If the family is not gated and `up` or `gate` is asked for, or the choice is unknown.
        """
        allowed = ("up", "act", "gate", "paper") if self.gated else ("act", "paper")
        if choice not in allowed:
            raise ModelError(f"site {choice!r} does not exist in this model; choose one of {', '.join(allowed)}")
        if choice == "paper":
            return "up" if self.gated else "act"
        return choice


_GATED = Architecture(layers="model.layers", up="mlp.up_proj", gate="mlp.act_fn", down="mlp.down_proj")
_POST_NORM = replace(_GATED, post_norm="post_feedforward_layernorm")

ARCHITECTURES = MappingProxyType(
    {
        "llama": _GATED,
        "mistral": _GATED,
        "qwen2": _GATED,
        "qwen3": _GATED,
        "gemma2": _POST_NORM,
        "gemma3_text": _POST_NORM,
        "gemma3": replace(_POST_NORM, layers="model.language_model.layers"),
        "olmo2": _POST_NORM,
        "phi3": Architecture(
            layers="model.layers",
            up="mlp.gate_up_proj",
            gate="mlp.activation_fn",
            down="mlp.down_proj",
            fused=True,
        ),
        "gpt2": Architecture(layers="transformer.h", down="mlp.c_proj"),
        "gpt_neox": Architecture(layers="gpt_neox.layers", down="mlp.dense_4h_to_h"),
        "opt": Architecture(layers="model.decoder.layers", down="fc2"),
        "bert": Architecture(layers="bert.encoder.layer", down="output.dense", masked=True),
        "roberta": Architecture(layers="roberta.encoder.layer", down="output.dense", masked=True),
        "distilbert": Architecture(layers="distilbert.transformer.layer", down="ffn.lin2", masked=True),
        "modernbert": Architecture(
            layers="model.layers", up="mlp.Wi", gate="mlp.act", down="mlp.Wo", fused=True, masked=True
        ),
    }
)


def architecture(model_type: str) -> Architecture:
    """Return the row of a model type (`config.model_type`).

    Raises
    ------
    ModelError
        If the family is not in the table; the message lists the known ones.
    """
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"architecture {model_type!r} is not known; known are {known}") from None
