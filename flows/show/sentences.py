"""The findings of a run in sentences, each with its uncertainty: what stands first on its page."""

from collections.abc import Iterator, Sequence

from flows.show import comparison_tables
from flows.show.accuracy_tables import FLOOR_TITLES, PROBE_TITLES, SHOTS, asked, probe_title, short
from flows.show.comparison_tables import listed
from flows.show.linearity_tables import ESTIMATOR_TITLES, whole_model
from flows.show.model_names import shown_model
from flows.show.skill_tables import DIRECTION_TITLES, probes, tops
from flows.show.table import by
from flows.show.text import change, correlation, count, share
from negcore.analysis.effects import CausalRow
from tasks.campaign import Comparison, GainRow
from tasks.comparisons import ComparisonRow
from tasks.floors import best_floor
from tasks.linearity import Findings
from tasks.probe import AccuracyRow
from tasks.results import Average
from tasks.skills import DatasetFindings, SkillFindings

Row = AccuracyRow | Average


def accuracy_sentences(
    scores: Sequence[AccuracyRow], averages: Sequence[Average], comparisons: Sequence[ComparisonRow] = ()
) -> Iterator[str]:
    """Say for every model and dataset what the probes reach beside the floors and each other, on average first."""
    whole = [score for score in scores if not score.group]
    for model, shots in dict.fromkeys((score.model, score.shots) for score in whole):
        asked_so = asked(model, shots)
        means = [one for one in averages if (one.model, one.shots, one.genre) == (model, shots, "")]
        compared = by([row for row in comparisons if (row.model, row.shots) == (model, shots)], "dataset")
        if means:
            yield _with(
                f"{asked_so}: {_said(f'on average over {means[0].n_datasets} datasets', means)}", compared.get("")
            )
        own = [score for score in whole if (score.model, score.shots) == (model, shots)]
        for dataset, rows in by(own, "dataset").items():
            where = f"on {short(dataset)} ({_tested(rows[0])})"
            yield _with(f"{asked_so}: {_said(where, rows)}", compared.get(dataset))


def campaign_sentences(comparison: Comparison) -> Iterator[str]:
    """Say which model answers best, what the probes of each reach on average, and how linear its neurons are."""
    for shots, best in by([row for row in comparison.gains if not row.genre], "shots").items():
        whole = [row for row in best if row.n_datasets == max(other.n_datasets for other in best)]
        if len(whole) > 1:
            fewer = [comparison.names[row.model] for row in best if row not in whole]
            yield f"{SHOTS[shots]}: {_ranked(comparison, whole)}{_left_out(fewer) if fewer else ''}"
    means = [one for one in comparison.accuracy if not one.genre]
    for (model, shots), rows in _by_model(means).items():
        said = _said(f"on average over {count(rows[0].n_datasets, 'dataset')}", rows)
        yield f"{comparison.names[model]}, {SHOTS[shots]}: {said}"
    for row in comparison.linearity:
        where = f"{comparison.names[row.model]} on {row.dataset}, within ±{row.range:g}"
        agreement = (
            f", and NeurGrad correlates with the measured NEG by {correlation(row.pearson)} "
            f"({correlation(row.pearson_low)} to {correlation(row.pearson_high)})"
            if row.pearson is not None and row.pearson_low is not None and row.pearson_high is not None
            else ""
        )
        n_pairs = row.n_prompts * row.n_neurons
        yield f"{where}: {share(row.linear_share)} of {n_pairs} pairs of prompt and neuron are linear{agreement}."


def _left_out(names: Sequence[str]) -> str:
    return f" {listed(names)} answered fewer datasets and {_verb(names, 'is', 'are')} left out here."


def _by_model(means: Sequence[Average]) -> dict[tuple[str, int], list[Average]]:
    groups: dict[tuple[str, int], list[Average]] = {}
    for one in means:
        groups.setdefault((one.model, one.shots), []).append(one)
    return groups


def _ranked(comparison: Comparison, best: Sequence[GainRow]) -> str:
    """Say which model's best probe is right most often, and of which others that is not clear."""
    first, *others = sorted(best, key=lambda row: -row.accuracy)
    where = f"{comparison.names[first.model]}'s best probe ({probe_title(first.probe)}) is right most often, in "
    above = [comparison.names[row.model] for row in others if row.high < first.low]
    near = [comparison.names[row.model] for row in others if row.high >= first.low]
    verdicts = [f"its interval lies above {_verb(above, 'that', 'those')} of {listed(above)}"] if above else []
    verdicts += [f"its interval meets {_verb(near, 'that', 'those')} of {listed(near)}"] if near else []
    chosen = "each model's best probe was chosen on these very test rows"
    return f"{where}{share(first.accuracy)} ({share(first.low)}-{share(first.high)}); {listed(verdicts)}; {chosen}."


def _with(said: str, compared: Sequence[ComparisonRow] | None) -> str:
    """Return a finding with what the paired tests of the probes say."""
    return " ".join([said, *(comparison_tables.sentences(compared) if compared else ())])


def _tested(row: AccuracyRow) -> str:
    """Return what a dataset's accuracies are of."""
    return f"{row.n_test} test rows" if row.n_orders == 1 else f"{row.n_test} test prompts, {row.n_orders} of each row"


def _said(where: str, rows: Sequence[Row]) -> str:
    """Say what one dataset, or the average of several, shows."""
    floor, found = best_floor(rows[0]), [row for row in rows if row.probe != "lm"]
    shown = [f"{probe_title(row.probe)} is right in {_measured(row)}" for row in rows]
    if floor is None or not found:
        return f"{where}, {listed(shown)}."
    above = [probe_title(row.probe) for row in found if row.low > floor.accuracy]
    others = [probe_title(row.probe) for row in found if row.low <= floor.accuracy]
    name = f"the best floor ({FLOOR_TITLES[floor.name]}, {share(floor.accuracy)})"
    verdicts = [f"{listed(above)} {_verb(above, 'lies', 'lie')} above {name}"] if above else []
    verdicts += [f"{listed(others)} cannot be told from {name}"] if others else []
    return f"{where}, {listed(shown)}; {listed(verdicts)}."


def _measured(row: Row) -> str:
    kept = f", {count(row.n_neurons, 'neuron')}" if isinstance(row, AccuracyRow) and row.n_neurons else ""
    return f"{share(row.accuracy)} ({share(row.low)}-{share(row.high)}{kept})"


def skill_sentences(findings: SkillFindings) -> Iterator[str]:
    """Say for every dataset and ranking whether its causal check tells the best neurons from random ones."""
    size, direction = tops(findings)[len(tops(findings)) // 2], next(iter(DIRECTION_TITLES))
    for one in findings.datasets:
        for probe in probes(findings):
            best, drawn = (_effect(one, probe, neurons, size, direction) for neurons in ("top", "random"))
            verdict = (
                "more than random ones do: the ranking found neurons that make the answer"
                if best.prob_low > max(drawn.prob_high, 0.0)
                else "which is not clearly more than random ones do: nothing is shown about these neurons"
            )
            yield (
                f"{shown_model(findings.model)} on {short(one.dataset)}: shifting {PROBE_TITLES[probe]}'s best {size} "
                f"neurons by {best.shift:g} towards gold changes the gold option's probability by {_effect_text(best)}"
                f", random ones of the same layers by {_effect_text(drawn)}; {verdict}."
            )


def _effect(one: DatasetFindings, probe: str, neurons: str, size: int, direction: str) -> CausalRow:
    """Return the effect of the furthest shift towards gold."""
    wanted = (probe, neurons, size, direction)
    rows = [row for row in one.causal if (row.probe, row.neurons, row.size, row.direction) == wanted]
    return max(rows, key=lambda row: row.shift)


def _effect_text(row: CausalRow) -> str:
    return f"{change(row.prob_change)} ({change(row.prob_low)} to {change(row.prob_high)})"


def linearity_sentences(findings: Findings) -> Iterator[str]:
    """Say how linear the neurons are and how well NeurGrad predicts them."""
    where = f"{shown_model(findings.model)} on {findings.dataset}, within ±{findings.main_range:g}"
    linear = [row for row in findings.ranges if row.layer is None and row.range == findings.main_range]
    if linear:
        row = linear[0]
        yield f"{where}: {share(row.linear_share)} of {row.n} pairs of prompt and neuron are linear (|r| ≥ .95)."
    for estimate in whole_model(findings, findings.main_range):
        yield (
            f"{where}: {ESTIMATOR_TITLES[estimate.estimator]} correlates with the measured NEG by "
            f"{correlation(estimate.pearson)} ({correlation(estimate.pearson_low)} to "
            f"{correlation(estimate.pearson_high)}) and gives the same sign in {correlation(estimate.signs)}."
        )


def _verb(subjects: Sequence[str], one: str, several: str) -> str:
    return one if len(subjects) == 1 else several
