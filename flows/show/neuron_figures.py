"""The best neurons of a run on its page: a map of the layers they are in, and a list with NEG by option."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from flows.show.accuracy_tables import SHOTS, asked, probe_title, short
from flows.show.drawing import BLUE, GREY, ORANGE, Chart, Figure, Part, field, layer, measured, panel
from flows.show.neuron_tables import SIGNS, listed_name
from flows.show.table import by
from tasks.neurons import NeuronRow

_HALF = 9
"""Half the height of the largest bar, in pixels."""


@dataclass(frozen=True)
class ListedNeuron:
    """A neuron in the list, and the bars of its NEG by option."""

    row: NeuronRow
    question: str
    """Dataset, and the model and number of demonstrations where they differ."""

    @property
    def name(self) -> str:
        return listed_name(self.row)

    @property
    def probe(self) -> str:
        return probe_title(self.row.probe)

    @property
    def sign(self) -> str:
        return SIGNS[self.row.polarity]

    @property
    def places(self) -> str:
        low, high = self.row.place_low, self.row.place_high
        return "" if low is None or high is None else f"{low}-{high}"

    @cached_property
    def negs(self) -> list[float]:
        """Mean NEG by option; those that are not finite are 0."""
        return [neg if math.isfinite(neg) else 0.0 for neg in self.row.mean_negs or ()]

    @property
    def bars(self) -> list[tuple[float, float, str]]:
        """Top, height and class of a bar for each option, in a picture 20 high with zero in its middle."""
        most = max(map(abs, self.negs), default=0.0) or 1.0
        sizes = [(neg, _HALF * abs(neg) / most) for neg in self.negs]
        return [(10 - size, size, "up") if neg > 0 else (10.0, size, "down") for neg, size in sizes]

    @property
    def in_words(self) -> str:
        """The same in words."""
        labels = self.row.labels or [f"option {i}" for i in range(len(self.negs))]
        return ", ".join(f"{label.strip()}: {neg:+.2e}" for label, neg in zip(labels, self.negs, strict=True))


def listed_neurons(rows: Sequence[NeuronRow]) -> list[ListedNeuron]:
    """Return the list of a run's best neurons."""
    is_one = len({(row.model, row.shots) for row in rows}) == 1
    return [
        ListedNeuron(row, short(row.dataset) + ("" if is_one else f"; {asked(row.model, row.shots)}")) for row in rows
    ]


def neuron_figures(rows: Sequence[NeuronRow]) -> Iterator[Figure]:
    """Return the map of the best neurons of every model and number of demonstrations."""
    for of_model in by(rows, "model").values():
        for own in by(of_model, "shots").values():
            yield layer_map(own)


def layer_map(rows: Sequence[NeuronRow]) -> Figure:
    """Draw the best neurons of every dataset and probe by layer and number."""
    first, last = rows[0], (max(row.layer for row in rows), max(row.neuron for row in rows))
    panels = [
        _map(own, last) for of_dataset in by(rows, "dataset").values() for own in by(of_dataset, "probe").values()
    ]
    return Figure(
        model=first.model,
        name=f"neurons-{SHOTS[first.shots]}",
        title=f"layers of the best neurons, {asked(first.model, first.shots)}",
        says="Where the best neurons of every ranking are: a point is a neuron; it is large if it is among the best in "
        "most samples of the rows. Many points above each other are a layer that holds the skill. Choose a point to "
        "see that neuron in every dataset.",
        parts=[Part(panels)],
    )


def _map(rows: Sequence[NeuronRow], last: tuple[int, int]) -> Chart:
    shown = [
        {
            "name": listed_name(row),
            "layer": row.layer,
            "neuron": row.neuron,
            "place": row.place,
            "score": row.score,
            "polarity": SIGNS[row.polarity],
            "agreement": row.agreement,
            "size": 0.5 if row.agreement is None else row.agreement,
        }
        for row in rows
    ]
    signs = {"domain": list(SIGNS.values()), "range": [BLUE, GREY, ORANGE]}
    return panel(
        shown,
        layer("circle", {"opacity": 0.75}),
        title=f"{short(rows[0].dataset)}, {probe_title(rows[0].probe)}",
        x=field("layer:Q", scale={"domain": [0, last[0]]}, axis={"tickMinStep": 1, "format": "d"}),
        y=field("neuron:Q", scale={"domain": [0, last[1]]}, axis={"format": "d"}),
        size=field("size:Q", scale={"domain": [0, 1], "range": [10, 80]}, legend=None),
        color=field("polarity:N", scale=signs, legend={"title": "polarity"}),
        tooltip=[field("name:N"), *measured("place", "score"), field("polarity:N"), *measured("agreement")],
    )
