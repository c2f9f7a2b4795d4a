"""Identities of runs, which say whether their numbers are comparable, and digests."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import xxhash

from negcore.targets import DEFAULT_TARGET

NUMBER_FORMAT = 1
"""Version of what the stored numbers mean: raised when the same inputs would give other columns or values."""


StorageName = Literal["values", "bfloat16", "codes", "stats"]
"""Names of the storage levels, whose classes are in `negcore.store.levels`."""
DEFAULT_STORAGE: StorageName = "values"
"""The level of runs from before there was a choice: their identities and run files do not name it."""


_LATER_FIELDS = {"storage": DEFAULT_STORAGE, "neurons": None, "study": None, "experts": None, "target": DEFAULT_TARGET}


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The settings that make numbers comparable: shards may be used together only if their digests are equal."""

    model: str
    model_revision: str
    """Exact revision of the weights: commit or content hash."""
    tokenizer_hash: str
    """Hash of the tokenizer's content."""
    site: str
    """Resolved site of the neurons: ``up``, ``act`` or ``gate``, never ``paper``."""
    dtype: str
    """Number type the model was computed in."""
    n_layers: int
    n_neurons: int
    """Neurons a layer: N; with experts, of the widest layer."""
    prompt: Mapping[str, Any]
    """Prompt settings, as JSON: wording, demonstrations, seed."""
    dataset_fingerprint: str
    """Hash of the examples the run was made from."""
    number_format: int = NUMBER_FORMAT
    """Version of what the stored numbers mean."""
    storage: str = DEFAULT_STORAGE
    """Storage level of NEGs: see `negcore.store.levels.STORAGE_LEVELS`."""
    neurons: str | None = None
    """Digest of the chosen neurons, if only their numbers are stored (see `choice_digest`); empty until they are
    chosen."""
    study: Mapping[str, Any] | None = None
    """Settings of a measurement other than NEGs, as JSON: neurons, shifts, estimator."""
    experts: Mapping[str, Any] | None = None
    """The router's part in a mixture of experts (``router``), and the counts of each layer's neurons
    (``layers``: dense ones, experts, experts of a token, neurons of an expert)."""
    target: str = DEFAULT_TARGET
    """The number of each option whose slope NEGs are, see `negcore.targets`."""
    versions: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Package versions. Informational: not part of the digest and not compared."""

    def __post_init__(self) -> None:
        # Through JSON once, so that a tuple and the list it is read back as are the same setting.
        object.__setattr__(self, "prompt", json.loads(canonical_json(self.prompt)))
        object.__setattr__(self, "study", json.loads(canonical_json(self.study)))
        object.__setattr__(self, "experts", json.loads(canonical_json(self.experts)))
        object.__setattr__(self, "versions", dict(self.versions))

    def comparable(self) -> dict[str, Any]:
        """Return everything but `versions`, as plain JSON values.

        Fields that were added later are left out at their default, so that older digests stay valid.
        """
        left_out = {"versions"} | {name for name, default in _LATER_FIELDS.items() if getattr(self, name) == default}
        return {key: value for key, value in asdict(self).items() if key not in left_out}

    @property
    def is_permuted(self) -> bool:
        """True if rows were asked in several orders of their options: ids of prompts then hold the order."""
        return bool(self.prompt.get("permutations", 1) != 1)

    @property
    def digest(self) -> str:
        """xxh3-128, in hex, of the canonical JSON of everything but `versions`."""
        return content_digest(self.comparable())

    def difference(self, other: "RunIdentity | Mapping[str, Any]") -> str:
        """Name every setting in which `other` differs, in one line: ``site: 'up' here, 'act' there``."""
        return difference(self.comparable(), other if isinstance(other, Mapping) else other.comparable())


def difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Name every setting in which two identities differ, in one line: ``site: 'up' here, 'act' there``."""
    default = {"storage": DEFAULT_STORAGE, "target": DEFAULT_TARGET}
    mine, theirs = default | _flat(here), default | _flat(there)
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    return "; ".join(f"{key}: {_shown(mine, key)} here, {_shown(theirs, key)} there" for key in differing)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_json(value: Any) -> str:
    """Return JSON that spells each value in one way: sorted keys, no blanks, ASCII, no NaN."""
    return _CANONICAL.encode(value)


def content_digest(value: Any) -> str:
    """Return the xxh3-128, in hex, of the canonical JSON of a value."""
    return xxhash.xxh3_128_hexdigest(canonical_json(value).encode())


def choice_digest(neurons: Sequence[int]) -> str:
    """Return the digest of chosen neurons, which are given by their flat layer-major indices."""
    return content_digest(list(neurons))


class AskedPrompt(Protocol):
    """As much of an example as tells its prompt from others."""

    @property
    def prompt(self) -> str: ...


def prompt_hash(example: AskedPrompt) -> str:
    """Return the `text_hash` of a prompt; one whose neurons are read before its end has another, by the place."""
    end = getattr(example, "probe_end", None)
    return text_hash(example.prompt if end is None else f"{example.prompt}\0{end}")


def text_hash(text: str) -> str:
    """Return the xxh3-128, in hex, of a prompt, which may hold lone surrogates, as hostile JSON can."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "nothing"
    shown = repr(settings[key])
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
