"""Fitted probes on disk: one safetensors file each, which names the data that the probe was fitted on.

The tensors of a file are the probe's arrays. Its metadata holds everything else as JSON under ``neg_probe``: kind,
settings, origin, and checksums of all of it (safetensors has none).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import load, save

from negcore.arrays import Ints
from negcore.errors import ProbeError, RunError
from negcore.measure.votes import Vote, neuron_pairs
from negcore.probing.arrow_probes import MAGIC, read_arrow
from negcore.probing.fitted import FittedProbe, FittedVote
from negcore.probing.probe_parts import Arrays, ProbeParts, parts_of, probe_from
from negcore.store.files import draft, location, read_bytes
from negcore.store.identity import canonical_json, content_digest
from negcore.store.reader import NegSplit
from negcore.targets import DEFAULT_TARGET

FORMAT = 2
"""Version of the files; `negcore.probing.arrow_probes` reads version 1."""

_KEY = "neg_probe"
_SAME = ("model", "model_revision", "tokenizer_hash", "site", "dtype", "n_layers", "n_neurons", "number_format")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The data that a probe was fitted on."""

    partition: Mapping[str, str]
    """Model, dataset and split, by name."""
    identity: Mapping[str, Any]
    """The `RunIdentity` of the NEGs, without package versions."""
    digest: str
    """Its digest."""
    n_options: int
    """Options of every prompt."""
    label_ids: list[int] | None
    """Token of each option's label; None if they differ from prompt to prompt."""

    @classmethod
    def of(cls, split: NegSplit) -> Origin:
        """Describe a split as an origin."""
        first_O = split.label_ids_PO[0]
        return cls(
            partition=split.place.names,
            identity=split.identity.comparable(),
            digest=split.identity.digest,
            n_options=split.n_options,
            label_ids=first_O.tolist() if (split.label_ids_PO == first_O).all() else None,
        )

    def comparable(self) -> dict[str, Any]:
        """Return everything that must be equal where the probe is used."""
        prompt = self.identity.get("prompt") or {}
        return {name: self.identity[name] for name in _SAME} | {
            "experts": self.identity.get("experts"),
            "target": self.identity.get("target", DEFAULT_TARGET),
            "n_options": self.n_options,
            "label_ids": self.label_ids,
            "probed": prompt.get("probed", "the prompt's end"),
            "answers": prompt.get("answers", "token"),
        }


@dataclass(frozen=True)
class SavedProbe:
    """A probe as read from its file."""

    path: Path
    name: str
    probe: FittedProbe
    origin: Origin

    @property
    def neurons_K2(self) -> Ints:
        """Layer and neuron of each neuron that it reads: shape (K, 2), best first where the probe ranks them."""
        return neuron_pairs(self.probe.kept_K, self.origin.identity["n_neurons"])

    def predict(self, split: NegSplit) -> Ints:
        """Return the index of the option chosen for every prompt of a split: shape (P,).

        Raises
        ------
        ProbeError
            If the split is of another model, site, number type, target, label set or probed place.
        """
        here, there = Origin.of(split).comparable(), self.origin.comparable()
        for key, value in here.items():
            if value != there[key]:
                raise ProbeError(
                    f"{str(self.path)!r} was fitted with {key} {there[key]!r} and cannot answer NEGs with {key} "
                    f"{value!r}: use a probe of the same model, site, target, place and labels"
                )
        return self.probe.predict(split)

    def shifts(self, size: float, k: int | None = None) -> list[tuple[int, int, float]]:
        """Return (layer, neuron, size) of the best k neurons, or of all that the probe keeps, for `negcore.steer`.

        Parameters
        ----------
        size : float
            In units of activation. Each neuron moves as its polarity says that the gold option gains: by so much away
            from zero, or towards it.
        k : int, optional

        Raises
        ------
        ProbeError
            If the probe has no polarities of NEGs, which Polar and Magn alone have, or keeps fewer neurons.
        """
        if not isinstance(self.probe, FittedVote):
            raise ProbeError(
                f"{str(self.path)!r} ({self.name}) has no polarities to shift by: use a polar or magn probe"
            )
        check_polarities(self.path, self.name, self.probe.vote)
        if k is not None and not 1 <= k <= self.probe.n_kept:
            raise ProbeError(f"{str(self.path)!r} keeps {self.probe.n_kept} neurons, so its best {k} are not known")
        return self.probe.ranking.top(k or self.probe.n_kept).shifts(size, index(self.origin.identity["n_neurons"]))


def check_polarities(path: Path, name: str, vote: Vote) -> None:
    """Refuse to shift by polarities that do not say what moving away from zero does.

    Raises
    ------
    ProbeError
        If they are those of plain gradients.
    """
    if vote.signal == "gradient":
        raise ProbeError(
            f"{str(path)!r} ({name}) has polarities of the plain gradient, which say nothing of shifts away from "
            "zero: use a polar or magn probe"
        )


def save_probe(path: Path, name: str, probe: FittedProbe, train: NegSplit) -> None:
    """Write a fitted probe, whole or not at all.

    Parameters
    ----------
    path : Path
        The file; its folder is made.
    name : str
        The probe's name in tables, such as ``polar-random``.
    train : NegSplit
        The data that it was fitted on.
    """
    parts = parts_of(probe)
    about = {"format": FORMAT, "kind": parts.kind, "name": name, "settings": parts.settings}
    about |= {"origin": asdict(Origin.of(train))}
    about |= _checksums(about, parts.arrays)
    # safetensors would write the memory of a view as it lies.
    dense = {key: np.ascontiguousarray(values) for key, values in parts.arrays.items()}
    with draft(path) as file:
        file.write_bytes(save(dense, {_KEY: canonical_json(about)}))


def load_probe(path: str | Path) -> SavedProbe:
    """Read a probe that `save_probe` wrote, or an earlier version of it.

    Parameters
    ----------
    path : str or Path
        A file on disk, or in a bucket as ``s3://BUCKET/KEY``.

    Raises
    ------
    ProbeError
        If the file is missing, damaged, or of another version of this software.

    Examples
    --------
    ``neg mceval8k`` and ``neg probe`` leave every probe in their run directory. It answers other prompts of the same
    model that have the same labels:

    >>> from negcore import load_probe, open_negs
    >>> polar = load_probe("RUN/probes/model=smollm2-135m/dataset=agnews/polar.safetensors")
    >>> polar.predict(open_negs("RUN").select("smollm2-135m", "agnews", "test"))  # doctest: +SKIP
    array([2, 0, 3, 1])
    >>> polar.neurons_K2  # layer and neuron, best first  # doctest: +SKIP
    array([[ 20,  322], [ 19,  693]])
    """
    path = location(path)
    try:
        return _saved_probe(path, read_bytes(path))
    except (ProbeError, RunError):  # their messages say what is wrong
        raise
    except FileNotFoundError:
        raise ProbeError(f"no probe at {str(path)!r}: `neg probe` and `neg mceval8k` write RUN/probes") from None
    except Exception as error:  # a hostile file can make its readers raise anything
        reason = " ".join(str(error).split())
        raise ProbeError(f"{str(path)!r} is not a probe or is damaged ({reason:.200}): fit the probe again") from None


def _saved_probe(path: Path, content: bytes) -> SavedProbe:
    is_arrow = content.startswith(MAGIC)
    about, arrays = read_arrow(content) if is_arrow else _read(content)
    readable = 1 if is_arrow else FORMAT
    if about["format"] != readable:
        raise ProbeError(f"{str(path)!r} has format {about['format']!r}, not {readable}: fit the probe again")
    stored = {key: about.pop(key) for key in ("seal", "xxh3")}
    if stored != _checksums(about, arrays):
        raise ValueError("its content does not have its checksum")
    origin = Origin(**about["origin"])
    origin.comparable()  # raises if a setting is missing
    n_all = index(origin.identity["n_layers"]) * index(origin.identity["n_neurons"])
    parts = ProbeParts(about["kind"], about["settings"], arrays)
    probe = probe_from(parts, n_all=n_all, n_options=index(origin.n_options))
    return SavedProbe(path, about["name"], probe, origin)


def _read(content: bytes) -> tuple[dict[str, Any], Arrays]:
    arrays = load(content)  # checks the header, which is JSON after eight bytes of its length
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"][_KEY]), arrays


def _checksums(about: Mapping[str, Any], arrays: Arrays) -> dict[str, str]:
    digest = xxhash.xxh3_128()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        digest.update(arrays[key].tobytes())
    return {"seal": content_digest(about), "xxh3": digest.hexdigest()}
