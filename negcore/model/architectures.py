"""Places of the feed-forward neurons in every model family: one row a model type.

A new family is a row here and a line in the parametrised tests. Paths are relative to the model with its language
head; paths below a layer are relative to that layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from negcore.errors import ModelError

Site = Literal["up", "act", "gate"]
SiteChoice = Literal["up", "act", "gate", "paper"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Router = Literal["through", "fixed"]
"""The routing of experts when a neuron of an earlier layer moves.

- `through`: the router sees the move, as in the untouched model: NEGs are differentiated through its weights, and under
  a finite shift it may choose other experts.
- `fixed`: experts and their weights stay those of the unshifted pass.
"""
DeviceMap = Literal["auto", "cpu", "disk"] | Mapping[str, str | int]
"""The places of a model's parts: a device, `cpu` or `disk` for each by its path, or a word.

- `auto`: spread over all GPUs.
- `cpu`, `disk`: the blocks' weights wait in main memory or in their files, and pass through the device.
"""
Way = Literal["virtual", "cached", "whole"]
"""Ways through a causal model, the fastest first.

- `virtual`: shifted copies of the last token run side by side after the prompt's keys and values. The attention must be
  nothing but scores and values.
- `cached`: only the last token runs with a graph, after the keys and values of those before it. The attention must be
  the one that transformers lets us replace, and nothing else may look at earlier tokens.
- `whole`: every prompt runs whole. Any model can do that.
"""
WAYS: MappingProxyType[Way, str] = MappingProxyType(
    {
        "virtual": "the last token runs on a cache of the others; sweeps are virtual tokens beside it",
        "cached": "the last token runs on a cache of the others; sweeps shift it by hooks",
        "whole": "every prompt runs whole; sweeps shift its probed token by hooks",
    }
)
"""Every way in a sentence for people."""


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
    """Activation function of the gate, below a layer; None if there is no such module."""
    fused: bool = False
    """True if `up` computes gate and up side by side, in that order."""
    post_norm: str | None = None
    """Normalisation, below a layer, of the feed-forward's output before it joins the residual stream."""
    masked: bool = False
    """True if the model predicts a `[MASK]` and sees both sides of it."""
    way: Way = "virtual"
    """Fastest way through a causal model of this family that is right: see `Way`."""
    experts: str | None = None
    """Module, below a layer, with the stacked weights of its routed experts."""
    shared: str | None = None
    """Module, below a layer, of experts that every token has; its projections are named as those of dense layers."""
    discovered: bool = False
    """True if the family is in no row and its places were found by a traced pass."""

    @property
    def gated(self) -> bool:
        return self.up is not None

    @property
    def whole(self) -> bool:
        """True if every prompt runs whole: both sides of a mask matter, or no cache is right for the family."""
        return self.masked or self.way == "whole"

    @property
    def of_shared(self) -> "Architecture":
        """This row with the shared experts' projections in place of a dense layer's."""
        dense = self.down.rpartition(".")[0]
        down, up, gate = (
            path and f"{self.shared}{path.removeprefix(dense)}" for path in (self.down, self.up, self.gate)
        )
        assert down is not None
        return replace(self, down=down, up=up, gate=gate, shared=None)

    @property
    def found(self) -> str:
        """The places as parts of a row."""
        names = ("layers", "down", "up", "gate", "post_norm", "experts", "shared")
        return ", ".join(f"{name} {getattr(self, name)}" for name in names if getattr(self, name))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that there are; the first is the paper's: `up` in gated models, `act` in the others."""
        # The activated gate is no value of its own in the code of stacked experts.
        gate: tuple[Site, ...] = ("gate",) if self.gate is not None and self.experts is None else ()
        return ("up", "act", *gate) if self.gated else ("act",)

    def site(self, choice: SiteChoice) -> Site:
        """Resolve a site choice for this family.

        `paper` is the vector that the paper's code reads: `up` in gated models, `act` in the others.

        Raises
        ------
        ModelError
            If the family has no such site, or the choice is unknown.
        """
        if choice == "paper":
            return self.sites[0]
        if choice not in self.sites:
            allowed = ", ".join([*self.sites, "paper"])
            raise ModelError(f"site {choice!r} does not exist in this model; choose one of {allowed}")
        return choice


_GATED = Architecture(layers="model.layers", up="mlp.up_proj", gate="mlp.act_fn", down="mlp.down_proj")
_SEEING = replace(_GATED, layers="model.language_model.layers")
_POST_NORM = replace(_GATED, post_norm="post_feedforward_layernorm")
_SEEING_POST_NORM = replace(_SEEING, post_norm="post_feedforward_layernorm")
_FUSED = replace(_GATED, up="mlp.gate_up_proj", gate="mlp.activation_fn", fused=True)
_PLAIN = Architecture(layers="model.layers", down="mlp.down_proj")
_EXPERTS = Architecture(
    layers="model.layers",
    up="mlp.experts.gate_up_proj",
    down="mlp.experts.down_proj",
    experts="mlp.experts",
)
_EXPERTS_OR_DENSE = replace(_GATED, experts="mlp.experts")
_SHARED_EXPERTS = replace(_EXPERTS_OR_DENSE, shared="mlp.shared_experts")
_ROBERTA = Architecture(layers="roberta.encoder.layer", down="output.dense", masked=True)

ARCHITECTURES = MappingProxyType(
    {
        # Gate and up beside each other
        "llama": _GATED,
        "bitnet": _GATED,
        "cohere": _GATED,
        "cohere2": _GATED,
        "cwm": _GATED,
        "diffllama": _GATED,
        "ernie4_5": _GATED,
        "gemma": _GATED,
        "granite": _GATED,
        "helium": _GATED,
        "hunyuan_v1_dense": _GATED,
        "hyperclovax": replace(_GATED, post_norm="post_norm2"),
        "minicpm3": _GATED,
        "ministral": _GATED,
        "ministral3": _GATED,
        "mistral": _GATED,
        "olmo": _GATED,
        "qwen2": _GATED,
        "qwen3": _GATED,
        "qwen3_5_text": replace(_GATED, way="whole"),
        "seed_oss": _GATED,
        "smollm3": _GATED,
        "stablelm": _GATED,
        "vaultgemma": _GATED,
        "youtu": _GATED,
        "lfm2": Architecture(
            layers="model.layers", up="feed_forward.w3", gate=None, down="feed_forward.w2", way="whole"
        ),
        "llama4_text": Architecture(  # its dense layers
            layers="model.layers",
            up="feed_forward.up_proj",
            gate="feed_forward.activation_fn",
            down="feed_forward.down_proj",
        ),
        # and a normalisation behind
        "exaone4": _POST_NORM,
        "gemma2": _POST_NORM,
        "gemma3_text": _POST_NORM,
        "gemma3n_text": replace(_POST_NORM, way="cached"),
        "gemma4_text": _POST_NORM,
        "olmo2": _POST_NORM,
        "olmo3": _POST_NORM,
        # Experts, beside dense layers or without
        "deepseek_v2": _SHARED_EXPERTS,
        "deepseek_v3": _SHARED_EXPERTS,
        "gpt_oss": _EXPERTS,
        "mixtral": _EXPERTS,
        "olmoe": _EXPERTS,
        "qwen2_moe": replace(_EXPERTS_OR_DENSE, shared="mlp.shared_expert"),
        "qwen3_moe": _EXPERTS_OR_DENSE,
        # Gate and up in one module
        "glm": _FUSED,
        "glm4": replace(_FUSED, post_norm="post_mlp_layernorm"),
        "phi3": _FUSED,
        # The language part of a model that also sees
        "gemma3": _SEEING_POST_NORM,
        "gemma4": _SEEING_POST_NORM,
        "idefics3": replace(_SEEING, layers="model.text_model.layers"),
        "llava": _SEEING,
        "mistral3": _SEEING,
        "qwen2_5_vl": _SEEING,
        "qwen2_vl": _SEEING,
        "qwen3_vl": _SEEING,
        "smolvlm": replace(_SEEING, layers="model.text_model.layers"),
        # Without a gate
        "apertus": _PLAIN,
        "arcee": _PLAIN,
        "nemotron": _PLAIN,
        "nanochat": Architecture(layers="model.layers", down="mlp.fc2"),
        "phi": Architecture(layers="model.layers", down="mlp.fc2"),
        "starcoder2": Architecture(layers="model.layers", down="mlp.c_proj"),
        "gpt2": Architecture(layers="transformer.h", down="mlp.c_proj"),
        "gpt_bigcode": Architecture(layers="transformer.h", down="mlp.c_proj", way="cached"),
        "gpt_neox": Architecture(layers="gpt_neox.layers", down="mlp.dense_4h_to_h"),
        "opt": Architecture(layers="model.decoder.layers", down="fc2"),
        "biogpt": Architecture(layers="biogpt.layers", down="fc2"),
        # and with an attention of their own, which makes its own masks
        "bloom": Architecture(layers="transformer.h", down="mlp.dense_4h_to_h", way="whole"),
        "codegen": Architecture(layers="transformer.h", down="mlp.fc_out", way="whole"),
        "falcon": Architecture(layers="transformer.h", down="mlp.dense_4h_to_h", way="whole"),
        "gpt_neo": Architecture(layers="transformer.h", down="mlp.c_proj", way="whole"),
        "gptj": Architecture(layers="transformer.h", down="mlp.fc_out", way="whole"),
        "mpt": Architecture(layers="transformer.blocks", down="ffn.down_proj", way="whole"),
        # Masked
        "bert": Architecture(layers="bert.encoder.layer", down="output.dense", masked=True),
        "ernie": Architecture(layers="ernie.encoder.layer", down="output.dense", masked=True),
        "megatron-bert": Architecture(layers="bert.encoder.layer", down="output.dense", masked=True),
        "rembert": Architecture(layers="rembert.encoder.layer", down="output.dense", masked=True),
        "roformer": Architecture(layers="roformer.encoder.layer", down="output.dense", masked=True),
        "electra": Architecture(layers="electra.encoder.layer", down="output.dense", masked=True),
        "deberta": Architecture(layers="deberta.encoder.layer", down="output.dense", masked=True),
        "deberta-v2": Architecture(layers="deberta.encoder.layer", down="output.dense", masked=True),
        "roberta": _ROBERTA,
        "camembert": _ROBERTA,
        "xlm-roberta": _ROBERTA,
        "xlm-roberta-xl": _ROBERTA,
        "distilbert": Architecture(layers="distilbert.transformer.layer", down="ffn.lin2", masked=True),
        "eurobert": replace(_GATED, masked=True),
        "modernbert": Architecture(
            layers="model.layers", up="mlp.Wi", gate="mlp.act", down="mlp.Wo", fused=True, masked=True
        ),
    }
)
"""Row of each model type (`config.model_type`)."""
