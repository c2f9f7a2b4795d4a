"""Neurons of a layer by number: those of its experts, expert after expert, then those that every token has.

A token has only the neurons of the experts that it was routed to. Measurements hold these *active* neurons alone, in
the order of their numbers; all others of the layer are absent for that token, which is not the same as zero.

Shapes: P prompts, K routed experts of a token, A active neurons of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from negcore.arrays import Ints


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Counts that number the neurons of one layer; a dense layer has no experts."""

    n_dense: int
    """Neurons that every token has: of the feed-forward, or of the shared experts."""
    n_experts: int = 0
    top_k: int = 0
    """Experts that each token is routed to."""
    n_units: int = 0
    """Neurons of an expert."""

    @property
    def n_neurons(self) -> int:
        return self.n_experts * self.n_units + self.n_dense

    @property
    def n_routed(self) -> int:
        """Active neurons that belong to routed experts; the others of a token's are dense."""
        return self.top_k * self.n_units

    @property
    def n_active(self) -> int:
        """Neurons that a token has."""
        return self.n_routed + self.n_dense

    def active_neurons(self, experts_PK: Ints) -> Ints:
        """Return the number of each active neuron, rising in every row: shape (P, A).

        Parameters
        ----------
        experts_PK : int array (P, K)
            Numbers of the routed experts, rising in every row.
        """
        units_PKU = experts_PK[:, :, None].astype(np.int64) * self.n_units + np.arange(self.n_units)
        dense_D = np.arange(self.n_experts * self.n_units, self.n_neurons)
        n_rows = len(experts_PK)
        return np.hstack([units_PKU.reshape(n_rows, self.n_routed), np.broadcast_to(dense_D, (n_rows, self.n_dense))])

    def places_of(self, neurons_J: Ints, experts_PK: Ints) -> Ints:
        """Return the place of J neurons among the active ones of every prompt, -1 where they are absent: shape (P, J).

        Parameters
        ----------
        neurons_J : int array (J,)
            Numbers of neurons; one that the layer does not have is always absent.
        experts_PK : int array (P, K)
            As for `active_neurons`.
        """
        first_dense = self.n_experts * self.n_units
        dense_J = np.where(neurons_J < self.n_neurons, neurons_J - first_dense + self.n_routed, -1)
        if not self.n_experts:
            return np.broadcast_to(dense_J, (len(experts_PK), len(neurons_J)))
        ranks_PE = np.full((len(experts_PK), self.n_experts + 1), -1)
        np.put_along_axis(ranks_PE, experts_PK.astype(np.int64), np.arange(self.top_k)[None], axis=1)
        expert_J, unit_J = np.divmod(neurons_J, self.n_units)
        ranks_PJ = ranks_PE[:, np.minimum(expert_J, self.n_experts)]
        routed_PJ = np.where(ranks_PJ >= 0, ranks_PJ * self.n_units + unit_J, -1)
        return np.where(neurons_J < first_dense, routed_PJ, dense_J)

    def name_of(self, neuron: int) -> str:
        """Return the name of a neuron in its layer: ``expert.unit``, ``shared.unit`` or, in a dense layer, ``unit``."""
        if not self.n_experts:
            return str(neuron)
        expert, unit = divmod(neuron, self.n_units)
        if expert < self.n_experts:
            return f"{expert}.{unit}"
        return f"shared.{neuron - self.n_experts * self.n_units}"

    def number_of(self, *names: str) -> int | None:
        """Return the number of the neuron that `name_of` calls so, or that has this number; None if there is none."""
        expert, unit = names if len(names) == 2 else ("", names[0])
        if not unit.isdecimal() or not (expert.isdecimal() or expert in ("", "shared")):
            return None
        if expert == "":
            return int(unit) if int(unit) < self.n_neurons else None
        limit = self.n_dense if expert == "shared" else self.n_units
        first = self.n_experts if expert == "shared" else int(expert)
        is_there = self.n_experts and int(unit) < limit and (expert == "shared" or first < self.n_experts)
        return first * self.n_units + int(unit) if is_there else None


LayerShapes = tuple[LayerShape, ...]


def experts_in_words(shapes: LayerShapes) -> str:
    """Return the counts of the layers that have experts in words."""
    kinds = {
        f"{one.n_experts} of {one.n_units} neurons, {one.top_k} of them a token"
        + f", beside {one.n_dense} neurons of every token" * bool(one.n_dense)
        for one in shapes
        if one.n_experts
    }
    return "; ".join(sorted(kinds))


def neuron_groups(shapes: LayerShapes) -> Ints:
    """Number the groups of neurons that prompts have together, rising: that of each neuron, shape (M,).

    A group is an expert, or the neurons of a layer that every prompt has. M counts as many neurons in each layer as the
    widest has; numbers that a layer does not have are a group too.
    """
    width = max(shape.n_neurons for shape in shapes)
    groups_LN = np.empty((len(shapes), width), np.int64)
    first = 0
    for groups_N, shape in zip(groups_LN, shapes, strict=True):
        groups_N[:] = first + np.minimum(np.arange(width) // max(shape.n_units, 1), shape.n_experts)
        groups_N[shape.n_neurons :] = first + shape.n_experts + 1
        first += shape.n_experts + 2
    return groups_LN.ravel()


def chosen_places(shapes: LayerShapes, layers_J: Ints, neurons_J: Ints, experts_of: Callable[[int], Ints]) -> Ints:
    """Return the place of J neurons of any layers among the active ones of every prompt, as `places_of`: (P, J).

    Parameters
    ----------
    experts_of : callable
        Returns the numbers of the routed experts of a layer: int array (P, K). Those behind its own count are ignored.
    """
    places_PJ = np.empty((len(experts_of(0)), len(layers_J)), np.int64)
    for layer in np.unique(layers_J).tolist():
        at, shape = layers_J == layer, shapes[layer]
        places_PJ[:, at] = shape.places_of(neurons_J[at], experts_of(layer)[:, : shape.top_k])
    return places_PJ


def shapes_json(shapes: LayerShapes) -> list[list[int]]:
    """Return the counts of all layers as JSON."""
    return [list(astuple(shape)) for shape in shapes]


def shapes_of(experts: Mapping[str, Any] | None) -> LayerShapes | None:
    """Return the counts of all layers that an identity holds; None for a model without experts.

    Raises
    ------
    ValueError, TypeError, KeyError
        If they are something else.
    """
    if experts is None:
        return None
    layers: Sequence[Sequence[int]] = experts["layers"]
    return tuple(LayerShape(*map(int, counts)) for counts in layers)
