"""Fitted probes on disk: one plain Arrow file each, with the data they were fitted on named in it.

A file has one row, whose columns are the probe's arrays as lists, and metadata under ``neg_probe`` as JSON: kind,
settings, array shapes, and the origin. Nothing in a file is ever executed, and every number that would be used as an
index is checked first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from negcore.errors import ProbeError, RunError
from negcore.measure.votes import Ints, Ranking, Vote
from negcore.probing.fitted import FittedAct, FittedForest, FittedLogistic, FittedProbe, FittedVote, Forest
from negcore.probing.probes import ActProbe, ActSplit
from negcore.store.files import draft, location, read_bytes
from negcore.store.identity import canonical_json, content_digest
from negcore.store.reader import NegSplit

FORMAT = 1
_KEY = b"neg_probe"
_SAME = ("model", "model_revision", "tokenizer_hash", "site", "dtype", "n_layers", "n_neurons", "number_format")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a probe was fitted on.

    Parameters
    ----------
    partition : mapping
        Model, dataset and split, by name.
    identity : mapping
        The `RunIdentity` of the NEGs, without package versions.
    digest : str
        Its digest.
    n_options : int
        Options of every prompt.
    label_ids : list of int or None
        Token of each option's label; None if they differ from prompt to prompt.
    """

    partition: Mapping[str, str]
    identity: Mapping[str, Any]
    digest: str
    n_options: int
    label_ids: list[int] | None

    @classmethod
    def of(cls, split: NegSplit) -> Origin:
        """A split as an origin."""
        first_O = split.label_ids_PO[0]
        return cls(
            partition=split.place.names,
            identity=split.identity.comparable(),
            digest=split.identity.digest,
            n_options=split.n_options,
            label_ids=first_O.tolist() if (split.label_ids_PO == first_O).all() else None,
        )

    def comparable(self) -> dict[str, Any]:
        """What must be equal where the probe is used: model, site, numbers and labels, but not the dataset."""
        return {name: self.identity[name] for name in _SAME} | {
            "n_options": self.n_options,
            "label_ids": self.label_ids,
        }


@dataclass(frozen=True)
class SavedProbe:
    """A probe as read from its file."""

    path: Path
    name: str
    probe: FittedProbe
    origin: Origin

    def predict(self, split: NegSplit) -> Ints:
        """Index of the option chosen for every prompt of a split: shape (P,).

        Raises
        ------
        ProbeError
            If the split is of another model, site, number type or label set.
        """
        here, there = Origin.of(split).comparable(), self.origin.comparable()
        for key, value in here.items():
            if value != there[key]:
                raise ProbeError(
                    f"{str(self.path)!r} was fitted with {key} {there[key]!r} and cannot answer NEGs with {key} "
                    f"{value!r}: use a probe of the same model, site and labels"
                )
        return self.probe.predict(split)


def save_probe(path: Path, name: str, probe: FittedProbe, train: NegSplit) -> None:
    """Write a fitted probe, whole or not at all.

    Parameters
    ----------
    path : Path
        The file; its folder is made.
    name : str
        The probe's name in tables, such as ``polar-random``.
    train : NegSplit
        What it was fitted on.
    """
    kind = next(kind for kind, codec in _CODECS.items() if isinstance(probe, codec.cls))
    plain = _CODECS[kind].encode(probe)
    columns = {key: pa.array([values.ravel()]) for key, values in plain.arrays.items()}
    about = {
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "settings": plain.settings,
        "shapes": {key: list(values.shape) for key, values in plain.arrays.items()},
        "origin": asdict(Origin.of(train)),
    }
    about |= {"xxh3": _checksum(plain.arrays), "seal": content_digest(about)}
    table = pa.table(columns).replace_schema_metadata({_KEY: canonical_json(about)})
    with (
        draft(path) as file,
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer,
    ):
        writer.write_table(table)


def load_probe(path: str | Path) -> SavedProbe:
    """Read a probe that `save_probe` wrote.

    Raises
    ------
    ProbeError
        If the file is missing, damaged, or of another version of this software.
    """
    path = location(path)
    try:
        table = pa.ipc.open_file(pa.py_buffer(read_bytes(path))).read_all()
        about = json.loads(table.schema.metadata[_KEY])
        seal, checksum = about.pop("seal"), about.pop("xxh3")
        arrays = {key: _array(table.column(key), shape) for key, shape in about["shapes"].items()}
        if about["format"] != FORMAT:
            raise ProbeError(f"{str(path)!r} has format {about['format']!r}, not {FORMAT}: fit the probe again")
        if seal != content_digest(about) or checksum != _checksum(arrays):
            raise ValueError("its checksum is another")
        origin = Origin(**about["origin"])
        n_all = origin.identity["n_layers"] * origin.identity["n_neurons"]
        probe = _CODECS[about["kind"]].decode(about["settings"], arrays, _Size(n_all, origin.n_options))
    except (ProbeError, RunError):  # what it is, and where it is
        raise
    except FileNotFoundError:
        raise ProbeError(f"no probe at {str(path)!r}: `neg probe` and `neg mceval8k` write RUN/probes") from None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ProbeError(f"{str(path)!r} is no probe or damaged ({reason:.200}): fit the probe again") from None
    return SavedProbe(path, about["name"], probe, origin)


def _array(column: pa.ChunkedArray, shape: list[int]) -> NDArray[Any]:
    values: NDArray[Any] = column.combine_chunks().values.to_numpy(zero_copy_only=False)
    return values.reshape(shape)


def _checksum(arrays: Arrays) -> str:
    digest = xxhash.xxh3_128()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        digest.update(arrays[key].tobytes())
    return digest.hexdigest()


# What each kind of probe is made of


class _Plain(NamedTuple):
    settings: dict[str, Any]
    arrays: Arrays


class _Size(NamedTuple):
    n_all: int
    n_options: int


class _Codec(NamedTuple):
    cls: type[FittedProbe]
    encode: Callable[[Any], _Plain]
    decode: Callable[[dict[str, Any], Arrays, _Size], FittedProbe]


def _require(is_so: bool | np.bool_, what: str) -> None:
    if not is_so:
        raise ValueError(what)


def _indices(values: NDArray[Any], below: int, *, least: int = 0) -> NDArray[Any]:
    _require(values.ndim == 1 and values.dtype.kind == "i", "indices are no whole numbers")
    _require(((values >= least) & (values < below)).all(), f"an index is outside {least}..{below - 1}")
    return values


def _vote(settings: dict[str, Any]) -> Vote:
    rule, signal = settings["vote"]
    _require(rule in ("polar", "magn") and signal in ("neg", "gradient", "gxa"), f"vote {settings['vote']!r}")
    return Vote(rule, signal)


def _encode_vote(probe: FittedVote) -> _Plain:
    return _Plain({"vote": list(probe.vote)}, {"order": probe.ranking.order_K, "polarity": probe.ranking.polarity_K})


def _decode_vote(settings: dict[str, Any], arrays: Arrays, size: _Size) -> FittedVote:
    ranking = Ranking(_indices(arrays["order"], size.n_all), arrays["polarity"])
    _require(ranking.polarity_K.shape == ranking.order_K.shape, "polarities and neurons differ in number")
    return FittedVote(_vote(settings), ranking, size.n_options, size.n_all)


def _encode_act(probe: FittedAct) -> _Plain:
    act = probe.estimator
    settings = {
        "classes": act.classes_.tolist(),
        "n_neurons": probe.n_neurons,
        "questions": [[split.start, split.middle, split.stop] for split in act.splits_],
    }
    return _Plain(
        settings,
        {
            "order": np.array([split.kept.order_K for split in act.splits_], np.int64),
            "polarity": np.array([split.kept.polarity_K for split in act.splits_], np.int8),
            "threshold": np.array([split.threshold_K for split in act.splits_], np.float64),
        },
    )


def _decode_act(settings: dict[str, Any], arrays: Arrays, size: _Size) -> FittedAct:
    questions = [(int(start), int(middle), int(stop)) for start, middle, stop in settings["questions"]]
    shape = (len(questions), int(settings["n_neurons"]))
    classes = _indices(np.array(settings["classes"], np.int64), size.n_options)
    order_SK = _indices(arrays["order"].ravel(), size.n_all).reshape(shape)
    polarity_SK, threshold_SK = arrays["polarity"].reshape(shape), arrays["threshold"].reshape(shape)
    splits = [
        ActSplit(start, middle, stop, Ranking(order_SK[at], polarity_SK[at]), threshold_SK[at])
        for at, (start, middle, stop) in enumerate(questions)
    ]
    return FittedAct(ActProbe.from_splits(splits, classes, n_neurons=settings["n_neurons"], n_all=size.n_all))


def _encode_forest(probe: FittedForest) -> _Plain:
    return _Plain({}, {"order": probe.order_K} | {name: getattr(probe.forest, name) for name in _FOREST})


_FOREST = ("classes_C", "root_T", "feature_V", "left_V", "right_V", "threshold_V", "probs_VC")


def _decode_forest(settings: dict[str, Any], arrays: Arrays, size: _Size) -> FittedForest:
    forest = Forest(**{name: arrays[name] for name in _FOREST})
    order_K, n_nodes = _indices(arrays["order"], size.n_all), len(forest.left_V)
    _indices(forest.classes_C, size.n_options)
    _indices(forest.root_T, n_nodes)
    _indices(forest.feature_V, len(order_K), least=-1)
    for child_V in (forest.left_V, forest.right_V):
        _indices(child_V, n_nodes, least=-1)
        # Children stand behind their node, so that every walk ends.
        _require(((child_V < 0) == (forest.left_V < 0)).all(), "a node has one child")
        _require((child_V[child_V >= 0] > np.flatnonzero(child_V >= 0)).all(), "a node comes before its parent")
    _require(forest.probs_VC.shape == (n_nodes, len(forest.classes_C)), "class shares of other nodes")
    _require(len(forest.threshold_V) == len(forest.feature_V) == n_nodes, "thresholds of other nodes")
    return FittedForest(order_K, forest)


def _encode_logistic(probe: FittedLogistic) -> _Plain:
    return _Plain({"vote": list(probe.vote)}, {"order": probe.order_K} | {n: getattr(probe, n) for n in _LOGISTIC})


_LOGISTIC = ("classes_C", "mean_OK", "scale_OK", "coef_COK", "intercept_C")


def _decode_logistic(settings: dict[str, Any], arrays: Arrays, size: _Size) -> FittedLogistic:
    order_K = _indices(arrays["order"], size.n_all)
    _indices(arrays["classes_C"], size.n_options)
    shape = (size.n_options, len(order_K))
    _require(arrays["mean_OK"].shape == arrays["scale_OK"].shape == shape, "means of other neurons")
    n_rows = 1 if len(arrays["classes_C"]) == 2 else len(arrays["classes_C"])
    _require(arrays["coef_COK"].shape == (n_rows, *shape), "weights of other neurons")
    _require(arrays["intercept_C"].shape == (n_rows,), "intercepts of other classes")
    return FittedLogistic(_vote(settings), order_K, **{name: arrays[name] for name in _LOGISTIC})


_CODECS: Mapping[str, _Codec] = MappingProxyType(
    {
        "vote": _Codec(FittedVote, _encode_vote, _decode_vote),
        "act": _Codec(FittedAct, _encode_act, _decode_act),
        "forest": _Codec(FittedForest, _encode_forest, _decode_forest),
        "logistic": _Codec(FittedLogistic, _encode_logistic, _decode_logistic),
    }
)
