"""The figure of NEGs over training: a panel a measure, by layer, a line a revision."""

from collections.abc import Iterator

from flows.show.campaign_tables import NEG_MEASURES, mean_of
from flows.show.drawing import Chart, Figure, Part, field, layer, measured, panel
from flows.show.table import by
from tasks.campaign import Comparison


def training_figures(comparison: Comparison) -> Iterator[Figure]:
    """Draw the NEGs of revisions by layer, if a campaign has any: the earlier a revision, the darker its line."""
    if not comparison.neg_profiles:
        return
    yield Figure(
        model="models",
        name="negs-over-training",
        title="NEGs over training, by layer",
        says="NEGs for the right option in the test rows that all revisions measured, mean over datasets: their size, "
        "the share of rows and neurons with the sign that they have in the revision before and in the last, and the "
        "rank correlation of the neurons' mean NEG with that of the last. A line is a revision, from dark (the first) "
        "to light.",
        parts=[Part([_panel(comparison, measure) for measure in NEG_MEASURES], columns=2)],
    )


def _panel(comparison: Comparison, measure: str) -> Chart:
    rows = [
        {"revision": comparison.names[model], "order": order, "layer": at, "value": value}
        for order, (model, own) in enumerate(by(comparison.neg_profiles, "model").items())
        for at, of_layer in by(own, "layer").items()
        if at is not None and (value := mean_of(of_layer, measure)) is not None
    ]
    names = list(dict.fromkeys(comparison.names[row.model] for row in comparison.neg_profiles))
    colour = field("revision:N", sort=names, scale={"domain": names, "scheme": "viridis"}, legend={"title": None})
    about = [field("revision:N"), field("layer:Q"), measured()[0]]
    return panel(
        rows,
        layer("line", {"strokeWidth": 1.5}, detail=field("order:Q")),
        layer("circle", {"size": 22, "opacity": 1}),
        title=NEG_MEASURES[measure],
        x=field("layer:Q", title="layer"),
        y=field("value:Q", title="", scale={"zero": measure == "mean_size"}),
        color=colour,
        tooltip=about,
    )
