"""Neurons of a layer by number: those of its experts, expert after expert, then those that every token has.

A token has only the neurons of the experts that it was routed to. Measurements hold these *active* neurons alone, in
the order of their numbers; all others of the layer are absent for that token, which is not the same as zero.

Shapes: P prompts, K routed experts of a token, A active neurons of a layer.
"""

from dataclasses import dataclass

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
