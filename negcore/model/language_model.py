"""Find, describe and load language models.

A model reference is a Hugging Face id (`org/name`, optionally `@revision`), a local directory, a `.gguf` file, or an
alias of a model that ships as a Python package. Weights are safetensors or GGUF, never pickles; code that comes with
a model is never run.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from xxhash import xxh3_128

from negcore.errors import ModelError
from negcore.hub import Commit, HubError, commit_of, download_problem, file_of
from negcore.model.adapters import adapter_digest, check_adapter, merged
from negcore.model.architectures import Architecture, DeviceMap, Dtype, Router, Site, SiteChoice, Way
from negcore.model.attention import ATTENTION_NAME, register_attention
from negcore.model.check import Compared, ModelCheck
from negcore.model.discovery import find_architecture
from negcore.model.embedded import EMBEDDED
from negcore.model.experts import EXPERTS_NAME, register_experts, stacked_experts
from negcore.model.gguf_cache import convert_gguf, embedded_files
from negcore.model.layer_shapes import LayerShape
from negcore.model.model_files import (
    check_directory,
    check_sizes,
    check_snapshot,
    directory_digest,
    plain_reason,
    read_object,
    reading,
)
from negcore.model.past import Prefixes
from negcore.model.placement import main_device, placed, resolved_map, with_weights
from negcore.model.quantised import plain_config, plain_model, storage_note
from negcore.model.references import is_directory, is_gguf, model_name, parse_reference, with_adapter
from negcore.model.skeleton import (
    auto_class,
    dense_row,
    down_rows,
    feed_forwards,
    layer_shapes,
    skeleton,
    unused_positions,
)
from negcore.model.whole_weights import load_whole
from negcore.store.files import near_path
from negcore.texts import did_you_mean

DTYPES: MappingProxyType[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }
)


@dataclass(frozen=True, eq=False)
class ModelCard:
    """Facts about a model that are known before its weights are loaded."""

    name: str
    """Name of the model in every output: its reference without `@revision`, or with it in a run that has several."""
    source: str
    """Hub id or local directory of the weights."""
    revision: str
    """Hub commit, or `xxh3:<digest>` of local files; with an adapter, `+xxh3:<digest>` of its files behind it."""
    config: Any = field(repr=False)
    """Configuration of transformers."""
    tokenizer: Any = field(repr=False)
    """Tokenizer of transformers."""
    arch: Architecture
    adapter: Path | None = None
    """Folder of the adapter that is merged into the weights of `source`."""

    @property
    def base_revision(self) -> str:
        """Revision of the weights of `source`."""
        return self.revision.partition("+")[0]

    @property
    def ref(self) -> str:
        """Reference that loads exactly these weights again."""
        if not self.base_revision.startswith("xxh3:"):
            return with_adapter(f"{self.source}@{self.base_revision}", self.adapter)
        return with_adapter(parse_reference(self.name).base if self.adapter else self.name, self.adapter)

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def n_layers(self) -> int:
        """Layers with feed-forward neurons."""
        return len(self.places)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Place of each such layer among all layers of the model: 0, 1, 2 ... where every layer has neurons."""
        return tuple(feed_forwards(self._skeleton, self.arch))

    @property
    def vocab_size(self) -> int:
        return int(self.text_config.vocab_size)

    @property
    def cached_numbers(self) -> int:
        """Numbers that a token's keys and values take in all layers."""
        config = self.text_config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * width)

    @cached_property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Counts of each layer's neurons, read from a model without weights."""
        return layer_shapes(feed_forwards(self._skeleton, self.arch).values(), self.arch)

    @property
    def layer_width(self) -> int:
        """Neurons of a layer; where layers differ, as those of experts may, of the widest."""
        return max(shape.n_neurons for shape in self.layer_shapes)

    @property
    def active_width(self) -> int:
        """Neurons that a token has in a layer, at most: of a layer of experts those of the routed ones alone."""
        return max(shape.n_active for shape in self.layer_shapes)

    @property
    def has_experts(self) -> bool:
        return any(shape.n_experts for shape in self.layer_shapes)

    @cached_property
    def _skeleton(self) -> Any:
        return skeleton(self.config, masked=self.arch.masked)

    @cached_property
    def context_tokens(self) -> int:
        """Most tokens of a prompt."""
        config = self.text_config
        named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        positions = next((limit for limit in named if limit is not None), None)
        if positions is not None:
            positions -= unused_positions(self._skeleton)
        limits = [positions, self.tokenizer.model_max_length]
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("longrope", "dynamic"):
            # Beyond this length these rescale positions that a cache already holds.
            limits.append(rope.get("original_max_position_embeddings"))
        return min(int(limit) for limit in limits if limit is not None)

    @cached_property
    def tokenizer_digest(self) -> str:
        """xxh3-128 of the tokenizer's full definition."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return xxh3_128(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A loaded model and the site of its neurons."""

    model: Any
    """Model of transformers, frozen and in evaluation mode."""
    card: ModelCard
    site: Site
    check: ModelCheck | None = None
    """The findings of the check at load; None only while it is being made."""
    router: Router = "through"
    """The routing of experts under shifts: see `Router`. Without experts it means nothing."""
    joined: bool = False
    """True if the model's own code works on keys and values behind the cache: then they come whole."""
    prefixes: Prefixes | None = None
    """Given by who alone has the model and does not change it: NEGs then run the tokens that prompts share once."""

    def __repr__(self) -> str:
        family, shape = self.card.config.model_type, f"{self.n_layers} layers x {self.layer_width} neurons"
        # 13 characters hold the prefix of a local digest and its first 8 digits.
        name = f"{self.card.name}@{self.revision[:13]}"
        return f"LanguageModel({name}, {family}, {shape}, site {self.site}, {self.dtype} on {self.device})"

    @property
    def tokenizer(self) -> Any:
        return self.card.tokenizer

    @property
    def revision(self) -> str:
        return self.card.revision

    @property
    def arch(self) -> Architecture:
        return self.card.arch

    @property
    def n_layers(self) -> int:
        """Layers with feed-forward neurons."""
        return len(self.layers)

    @cached_property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Counts of each layer's neurons."""
        if self.arch.experts is None:  # the width of the down projection's input
            return (LayerShape(int(self.down_rows(0).shape[0])),) * self.n_layers
        return layer_shapes(self.layers, self.arch)

    @cached_property
    def layer_width(self) -> int:
        """Neurons of a layer; where layers differ, as those of experts may, of the widest."""
        return max(shape.n_neurons for shape in self.layer_shapes)

    @cached_property
    def active_width(self) -> int:
        """Neurons that a token has in a layer, at most: of a layer of experts those of the routed ones alone."""
        return max(shape.n_active for shape in self.layer_shapes)

    @cached_property
    def has_experts(self) -> bool:
        return any(shape.n_experts for shape in self.layer_shapes)

    @property
    def device(self) -> torch.device:
        """Device of tokens, logits and shifts; a model on several devices takes and gives them there."""
        return main_device(self.model)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def result_type(self) -> type[np.float32] | type[np.float64]:
        """Number type of measurements: float64 for a float64 model, else float32."""
        return np.float64 if self.dtype == "float64" else np.float32

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The layers with feed-forward neurons."""
        return list(feed_forwards(self.model, self.arch).values())

    @property
    def last_block(self) -> nn.Module:
        """The last of all layers, whether it has neurons or not."""
        blocks = self.model.get_submodule(self.arch.layers)
        assert isinstance(blocks, nn.ModuleList)
        return blocks[-1]

    @property
    def body(self) -> nn.Module:
        """The model without its language head."""
        return self.body_parts[0]

    @cached_property
    def body_parts(self) -> list[nn.Module]:
        """The modules around the layers, the outermost first: the body, and its decoder or language part if any."""
        path = self.arch.layers.split(".")[:-1]
        return [self.model.get_submodule(".".join(path[: depth + 1])) for depth in range(len(path))]

    @property
    def way(self) -> Way:
        """Way through the model: that of its family, or `whole` for a masked model or one with its own attention."""
        return "whole" if self.arch.masked or not self.takes_attention else self.arch.way

    @property
    def batched_backward(self) -> bool:
        """True if one backward pass may serve several options: a model's own attention or scan may not be batched."""
        return self.takes_attention and (self.arch.masked or self.arch.way != "whole")

    @property
    def takes_attention(self) -> bool:
        """True if the model runs with the attention of `negcore`; some families keep their own."""
        return bool(self.model.config._attn_implementation == ATTENTION_NAME)

    def along(self, way: Way) -> "LanguageModel":
        """Return the same model on another way, without its check."""
        return replace(self, card=replace(self.card, arch=replace(self.arch, way=way)), check=None)

    def require(self, *names: Compared) -> None:
        """Refuse a way to measure that failed the check at load.

        Raises
        ------
        ModelError
            If one of these comparisons failed.
        """
        if self.check is not None:
            self.check.require(self.card.name, names)

    def refuse_experts(self, what: str) -> None:
        """Refuse to measure something of a model with experts.

        Parameters
        ----------
        what : str
            Measurement that knows dense neurons alone, in the plural.

        Raises
        ------
        ModelError
        """
        refuse_experts(self.card, what)

    def down(self, layer: int) -> Any:
        """Return the down projection of a layer."""
        return self.layers[layer].get_submodule(self.arch.down)

    def down_rows(self, layer: int) -> Tensor:
        """Return what one unit of each neuron's `act` adds to the layer's output: shape (N, hidden)."""
        with with_weights(self.down(layer)):
            return down_rows(self.down(layer))

    def down_row(self, layer: int, neuron: int) -> Tensor:
        """Return what one unit of a neuron's `act` adds to the layer's output: shape (hidden,).

        Of a routed expert's neuron it is what the expert returns, before the router's weight.
        """
        experts, shape = self.experts(layer), self.layer_shapes[layer]
        if experts is not None and neuron < shape.n_experts * shape.n_units:
            expert, unit = divmod(neuron, shape.n_units)
            with with_weights(experts):
                weight: Tensor = experts.down_proj[expert]
            return weight[unit] if experts.is_transposed else weight[:, unit]
        row = self.arch if experts is None else dense_row(self.layers[layer], self.arch)
        assert row is not None
        down = self.layers[layer].get_submodule(row.down)
        with with_weights(down):
            return down_rows(down)[neuron - shape.n_experts * shape.n_units]

    def experts(self, layer: int) -> Any | None:
        """Return the module of a layer's routed experts; None if it has none."""
        return stacked_experts(self.layers[layer], self.arch)

    def site_module(self, layer: int) -> nn.Module | None:
        """Return the module whose output (for `act`: input) is the site of a layer's dense neurons, if it has any."""
        row = self.arch if self.arch.experts is None else dense_row(self.layers[layer], self.arch)
        if row is None:
            return None
        path = {"up": row.up, "gate": row.gate, "act": row.down}[self.site]
        assert path is not None
        return self.layers[layer].get_submodule(path)


def refuse_experts(card: ModelCard, what: str, remedy: str = "see docs/experts.md for what is") -> None:
    """Refuse a model with experts: see `LanguageModel.refuse_experts`.

    Raises
    ------
    ModelError
    """
    if card.has_experts:
        raise ModelError(
            f"model {card.name!r}: {what} are not made for mixtures of experts, where a prompt has the neurons of its "
            f"routed experts alone; {remedy}"
        )


def describe_model(ref: str, name: str | None = None) -> ModelCard:
    """Read a model's configuration and tokenizer and, in local files, the names and shapes of its weights.

    Parameters
    ----------
    ref : str
        Hugging Face id with optional `@revision`, local directory, `.gguf` file or alias. A GGUF file is converted
        to a safetensors directory in the cache on its first use (about half a minute for 135 M parameters). With
        `+FOLDER` behind it, the PEFT adapter in that folder is merged into the model.
    name : str, optional
        Name of the model in outputs, where that of `model_name` is another revision's too.

    Raises
    ------
    ModelError
        If the model cannot be found or read, its architecture is not in the table, or the adapter does not fit.
    """
    base, adapter = parse_reference(ref)
    card = _describe_base(ref) if adapter is None else _with_adapter(_describe_base(base), model_name(ref), adapter)
    return card if name is None else replace(card, name=name)


def _with_adapter(card: ModelCard, name: str, adapter: Path) -> ModelCard:
    with reading(f"model {name!r}: its adapter"):
        revision = f"{card.revision}+xxh3:{adapter_digest(adapter)}"
        check_adapter(skeleton(card.config, masked=card.arch.masked), adapter)
    return replace(card, name=name, revision=revision, adapter=adapter)


def _describe_base(ref: str) -> ModelCard:
    if ref in EMBEDDED:
        return _describe(ref, convert_gguf(*embedded_files(ref)))
    if is_directory(ref):
        return _describe(ref, Path(ref))
    if is_gguf(ref):
        return _describe(ref, convert_gguf(Path(ref)))
    name, revision = model_name(ref), ref.partition("@")[2]
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or not name.strip("/"):
        raise ModelError(f"model {ref!r}: {_no_directory(ref)}; {_allowed_refs()}")
    return _describe(name, name, _hub_commit(name, revision or None))


def read_model(
    ref: str | ModelCard,
    *,
    dtype: Dtype,
    device: str | None,
    site: SiteChoice,
    router: Router = "through",
    device_map: DeviceMap | None = None,
) -> LanguageModel:
    """Load a model without its check: see `negcore.measure.loading.load_model`.

    Raises
    ------
    ModelError
        If the model cannot be found or loaded, or has no such site.
    """
    _check_router(router)
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    card = describe_model(ref) if isinstance(ref, str) else ref
    resolved = card.arch.site(site)
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    reason = plain_reason if card.base_revision.startswith("xxh3:") else download_problem
    with reading(f"model {card.name!r}{storage_note(card.config)} could not be loaded", reason):
        model = _placed(card, DTYPES[dtype], target, device_map)
    _take_from_files(model)
    _check_files(card)
    return LanguageModel(_prepared(model), card, resolved, router=router)


def _placed(card: ModelCard, dtype: torch.dtype, device: str, wanted: DeviceMap | None) -> Any:
    """Load a model onto its device or devices, with plain weights and its adapter merged."""

    def load(**options: Any) -> Any:
        model = plain_model(_weighted(card, dtype=dtype, **options), card.config, dtype)
        return model if card.adapter is None else merged(model, card.adapter)

    device_map = resolved_map(card._skeleton, card.arch.layers, wanted, device, dtype)
    if device_map is None:
        return load().to(device)
    return placed(load, device_map, at_once=card.adapter is None and not storage_note(card.config))


def _check_router(router: str) -> None:
    if router not in get_args(Router):
        raise ModelError(f"router {router!r} is not known; choose one of {', '.join(get_args(Router))}")


def _take_from_files(model: Any) -> None:
    """Copy weights on the CPU: those that are mapped from a file would change with it while they are used."""
    for weights in (*model.parameters(), *model.buffers()):
        if weights.device.type == "cpu":
            weights.data = weights.data.clone()


def _check_files(card: ModelCard) -> None:
    """Refuse a model whose files are no longer those that its card describes, or not those that the hub named.

    It comes after the weights were read: files that change while they are read are found too.
    """
    with reading(f"model {card.name!r}"):
        if not card.base_revision.startswith("xxh3:"):
            check_snapshot(_snapshot(card.source, card.base_revision), weights=True)
        elif (found := _local_revision(Path(card.source))) != card.base_revision:
            raise ModelError(f"its files changed: they are {found} now, and were {card.base_revision}; start again")
        if card.adapter is not None and (found := f"xxh3:{adapter_digest(card.adapter)}") not in card.revision:
            raise ModelError(f"its adapter's files changed: they are {found} now, of {card.revision}; start again")


def _snapshot(name: str, commit: str) -> Path:
    """Return the folder of a commit in the hub's cache, where its configuration was read."""
    file = file_of(name, "config.json", Commit(commit, "it is in the cache"), kind="model")
    assert file is not None
    return file.parent


def wrap_model(
    model: Any, tokenizer: Any, *, name: str, revision: str, site: SiteChoice, router: Router = "through"
) -> LanguageModel:
    """Wrap a model without its check: see `negcore.measure.loading.as_language_model`.

    Raises
    ------
    ModelError
        If it has no language head, its architecture cannot be measured, or it has no such site.
    """
    _check_router(router)
    if not isinstance(model, transformers.PreTrainedModel) or model.get_output_embeddings() is None:
        raise ModelError(
            f"model {name!r} is a {type(model).__name__}; give a model of transformers with its language head, as "
            "AutoModelForCausalLM or AutoModelForMaskedLM loads it, adapters merged"
        )
    arch = find_architecture(model.config, type(model).__name__)
    card = ModelCard(name, name, revision, model.config, tokenizer, arch)
    return LanguageModel(_prepared(model), card, arch.site(site), router=router)


def _weighted(card: ModelCard, **options: Any) -> Any:
    """Load the model that a card describes, whole, from safetensors."""
    kind = auto_class(card.config, masked=card.arch.masked)
    revision = "main" if card.base_revision.startswith("xxh3:") else card.base_revision
    return load_whole(
        kind, card.source, config=plain_config(card.config), use_safetensors=True, revision=revision, **options
    )


def _prepared(model: Any) -> Any:
    register_attention()
    register_experts()
    if model._can_set_attn_implementation():
        model.set_attn_implementation(ATTENTION_NAME)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(EXPERTS_NAME)
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.config.return_dict = True  # some old configurations ask for tuples
    return model.eval().requires_grad_(False)


def _hub_commit(name: str, revision: str | None) -> Commit:
    try:
        commit = commit_of(name, revision)
        if file_of(name, "config.json", commit, kind="model") is None:
            raise HubError(f"model {name!r} has no config.json: it is not a model of transformers")
    except HubError as error:
        raise ModelError(f"{error}; {_no_directory(name)} either; {_allowed_refs()}") from None
    return commit


def _describe(name: str, source: Path | str, commit: Commit | None = None) -> ModelCard:
    """Read configuration and tokenizer, and use both once: what they hold may be of a wrong type all the same."""
    options: dict[str, Any] = {"trust_remote_code": False}
    if commit:
        options |= {"revision": commit.id, "local_files_only": commit.problem is not None}
    with reading(f"model {name!r}"):
        revision = commit.id if commit else _local_revision(Path(source))
        check_sizes(read_object(_config_file(source, commit)))
    with reading(f"model {name!r} could not be read"):
        config = transformers.AutoConfig.from_pretrained(source, **options)
        config._attn_implementation = None  # ours takes its place, and the package of theirs may be absent
    with reading(f"model {name!r}"):
        arch = find_architecture(config)
        plain_config(config)
    with reading(f"model {name!r} could not be read: its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        _check_tokenizer(tokenizer)
    if commit:
        with reading(f"model {name!r}"):
            check_snapshot(_snapshot(str(source), commit.id), weights=False)
    card = ModelCard(name, str(source), revision, config, tokenizer, arch)
    with reading(f"model {name!r} could not be read: its configuration"):
        _check_shape(card)
    if commit is None and not storage_note(config):  # a quantised model is made plain of real weights only
        with reading(f"model {name!r} could not be loaded"):
            _weighted(card, device_map="meta")  # names and shapes alone, out of the files' headers
    return card


def _config_file(source: Path | str, commit: Commit | None) -> Path:
    """Return the configuration's file, which was looked for before."""
    file = file_of(str(source), "config.json", commit, kind="model") if commit else Path(source) / "config.json"
    assert file is not None
    return file


def _local_revision(directory: Path) -> str:
    check_directory(directory)
    return f"xxh3:{directory_digest(directory)}"


def _check_tokenizer(tokenizer: Any) -> None:
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1:
        raise ValueError(f"model_max_length is {limit!r} in tokenizer_config.json; a number from 1 is needed")
    if not tokenizer("A", add_special_tokens=False)["input_ids"]:
        raise ValueError("it makes nothing of the text 'A': its files are incomplete")


def _check_shape(card: ModelCard) -> None:
    if card.text_config.num_hidden_layers < 1:
        raise ValueError(f"num_hidden_layers is {card.text_config.num_hidden_layers}; a whole number from 1 is needed")
    if card.layer_width < 1 or card.context_tokens < 1:
        raise ValueError(f"layers of {card.layer_width} neurons and prompts of {card.context_tokens} tokens: too few")


def _no_directory(ref: str) -> str:
    near = did_you_mean(ref, EMBEDDED) or near_path(Path(ref)) if ref else ""
    return f"no such directory as {str(Path(ref).absolute()) if ref else ref!r}" + f" ({near})" * bool(near)


def _allowed_refs() -> str:
    aliases = ", ".join(EMBEDDED)
    return f"give a Hugging Face id (org/name[@revision]), a local directory, a .gguf file or one of: {aliases}"
