"""Certificates of a run's estimates: the sweeps that they need, and what follows from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negcore.analysis.certificates import Certificate, Sizes, certificates, missed_neurons
from negcore.arrays import Floats, Ints
from negcore.errors import RunError, ShardError
from negcore.measure.sweeps import DEFAULT_SHIFTS, draw_neurons
from negcore.model.layer_shapes import LayerShape
from negcore.store.identity import content_digest
from negcore.store.publish import ShardPlace
from negcore.store.reader import NegSplit
from negcore.store.study import joined_sweep, read_study
from negcore.targets import DEFAULT_TARGET
from tasks.config.dataset_runs import SkillRun
from tasks.measure.measurement import study_settings
from tasks.measure.shard_set import ShardSet
from tasks.measure.study import Sweeps

NODES = 5
"""Nodes that stand for the grid of shifts: see `negcore.measure.sweeps.sweep`."""
LARGE_SHARE = 0.01
"""Share of a model's estimates that are above the size of a large NEG, unless a run names one."""


@dataclass(frozen=True)
class CertificateRow(Certificate):
    """A certificate of one dataset's estimates."""

    model: str
    shots: int
    dataset: str
    n_rows: int
    """Test rows in which neurons were swept."""
    above: float
    """Size of the measured NEGs that must not be missed, in target per unit of activation."""
    below: float
    """Size that the estimate of a missed neuron is below."""
    target: str = DEFAULT_TARGET
    """The number of the gold option whose slope NEGs are."""


def plan_sweeps(run: SkillRun, split: ShardSet) -> ShardSet:
    """Plan the sweeps of a certificate: random neurons of every layer, for the gold option of random test rows.

    Its directory is named after neurons, rows and shifts, so that another choice finds a place of its own.

    Parameters
    ----------
    split : ShardSet
        The NEGs of the test split.

    Raises
    ------
    RunError
        If no neuron would be left that is only estimated.
    """
    random = np.random.default_rng([abs(run.seed), len(split.examples)])
    rows = np.sort(random.permutation(len(split.examples))[: run.certify_rows]).tolist()
    identity = split.identity
    if run.certify >= identity.n_neurons:
        raise RunError(
            f"certify {run.certify} leaves no neuron that is only estimated: layers of {identity.model} have "
            f"{identity.n_neurons}, so give at most {identity.n_neurons - 1}"
        )
    n_chosen = run.certify * identity.n_layers
    neurons_K2 = draw_neurons((LayerShape(identity.n_neurons),) * identity.n_layers, n_chosen, seed=run.seed)
    sweeps = Sweeps(neurons_K2, DEFAULT_SHIFTS, NODES, (float(DEFAULT_SHIFTS.max()),), run.target)
    settings = sweeps.settings | {"option": "gold"}
    chosen = [split.examples[row] for row in rows]
    name = f"{split.place.part}-{content_digest([settings, [one.id for one in chosen]])[:16]}"
    return replace(
        split,
        place=ShardPlace("sweeps", split.place.model, split.place.dataset, name),
        identity=replace(identity, study=study_settings(settings, identity.dtype)),
        examples=tuple(chosen),
        measurement=sweeps,
        shard_rows=1,
        title=f"{split.title} sweeps",
    )


def certificate_rows(run: SkillRun, sweeps: ShardSet, test: NegSplit) -> list[CertificateRow]:
    """Compare the swept neurons with their estimates, and bound what can be missed among the others.

    Parameters
    ----------
    sweeps : ShardSet
        From `plan_sweeps`, measured.
    test : NegSplit
        Estimated NEGs of the test split.

    Raises
    ------
    NegError
        If shards are missing or damaged, or hold no row in common.
    """
    study = read_study(sweeps.place.path(run.directory))
    stored = {id_: row for row, id_ in enumerate(test.ids)}
    ids = [id_ for id_ in study.ids if id_ in stored]
    if not ids:
        raise ShardError(f"no row of {sweeps.title} has estimates: each one was set aside")
    swept = joined_sweep([study.take(ids)])
    estimated_PLN = _gold_estimates(test, [stored[id_] for id_ in ids])
    sizes = _sizes(run, estimated_PLN)
    layers_K, neurons_K = swept.neurons_K2.T
    missed_K = missed_neurons(swept.negs_PK, estimated_PLN[:, layers_K, neurons_K], sizes)
    large_K = (np.abs(swept.negs_PK) > sizes.above).any(axis=0)
    found = certificates(missed_K, large_K, layers_K, n_layers=test.n_layers, layer_width=test.n_neurons)
    place: dict[str, Any] = {
        "model": sweeps.place.model,
        "shots": run.shots,
        "dataset": sweeps.place.dataset,
        "n_rows": len(ids),
        "target": swept.target,
    }
    return [CertificateRow(**asdict(one), **place, **sizes._asdict()) for one in found]


def _sizes(run: SkillRun, estimated_PLN: Floats) -> Sizes:
    """Return the sizes that a run names, or those of its estimates: they know nothing of the sweeps."""
    above = run.missed_above or float(np.quantile(np.abs(estimated_PLN), 1 - LARGE_SHARE))
    return Sizes(above, run.missed_below or above / 2)


def _gold_estimates(test: NegSplit, rows: Sequence[int]) -> NDArray[np.float64]:
    """Return the NEGs of all neurons for the gold option of some rows: (P, L, N)."""
    places: Ints = np.asarray(rows)
    estimated_PLN = np.empty((len(rows), test.n_layers, test.n_neurons))
    for shard in test.shards():
        inside = np.flatnonzero((places >= shard.rows.start) & (places < shard.rows.stop))
        at = places[inside] - shard.rows.start
        for layer in range(test.n_layers) if len(at) else ():
            estimated_PLN[inside, layer] = shard.negs_PON(layer)[at, test.gold_P[places[inside]]]
    return estimated_PLN
