"""The work of `neg skills`: it ranks the neurons, plans their causal check, and runs every analysis of skill neurons.

The analyses themselves are in `negcore.analysis`; here they are put together for a dataset and for a model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from negcore.analysis.causal import ExpertNeurons, skill_sets
from negcore.analysis.effects import CausalDifferenceRow, CausalRow, causal_differences, causal_rows
from negcore.analysis.faithfulness import (
    AreaRow,
    CircuitRow,
    CurveRow,
    curve_rows,
    curve_sets,
    mib_circuit,
    strata,
)
from negcore.analysis.shared_neurons import (
    CommonNeuronRow,
    GenreOverlapRow,
    LayerShareRow,
    OverlapRow,
    common_neurons,
    genre_overlaps,
    layer_shares,
    overlaps,
    rank_with_random_ties,
)
from negcore.analysis.skills import (
    BandRow,
    ForestRow,
    NeuronCountRow,
    TrainingRowsRow,
    TransferRow,
    accuracy_by_neurons,
    accuracy_by_rows,
    bands,
    forest_grid,
    training_sizes,
    transfer,
)
from negcore.arrays import Floats, Ints
from negcore.measure.votes import Ranking, Vote
from negcore.model.language_model import ModelCard, refuse_experts
from negcore.probing.evaluation import accuracy
from negcore.probing.fitted import fit_vote
from negcore.probing.probes import LMProbe
from negcore.probing.rankings import of_neurons
from negcore.store.files import output
from negcore.store.reader import NegSplit, open_negs
from tasks.config.dataset_runs import SkillsRun
from tasks.floors import FloorAnswers
from tasks.measure.causal import plan_causal, read_causal
from tasks.measure.examples import refuse_unusual
from tasks.measure.faithfulness import mean_sizes, plan_curves, read_curves
from tasks.measure.shard_set import ShardSet
from tasks.model_plans import ModelPlans, all_problems
from tasks.neurons import NEURONS_FILE, NeuronRow, neuron_rows
from tasks.plan import PlannedDataset, PlannedModel, of_each_model, plan
from tasks.pool.base import Pool
from tasks.probe import AccuracyRow
from tasks.rank import rank_split, ranking_workers
from tasks.rundir.tables import write_table, write_tables
from tasks.steps import Step

_BOOTSTRAP = 1000
_FOREST = Vote("magn", "neg")
"""The vote that chooses a forest's neurons, as for the Tree-Probe; a run without the probe "magn" has no forest."""


@dataclass(frozen=True)
class ReferenceRow:
    """Test accuracies to compare a dataset's probes with, as in `AccuracyRow`: LM-Prob and the floors."""

    genre: str
    n_train: int
    n_valid: int
    n_test: int
    lm: float
    low: float
    high: float
    majority: float
    random: float
    options_only: float | None = None
    calibrated: float | None = None
    label_mass: float | None = None
    overlapping: bool = False
    """True if the splits share rows (policy `released`)."""
    n_orders: int = 1
    """Orders of its options that each row was asked in; `n_train`, `n_valid` and `n_test` count every one."""


@dataclass(frozen=True)
class Faithfulness:
    """Rows of the curves of one dataset's rankings."""

    curves: list[CurveRow] = field(default_factory=list)
    areas: list[AreaRow] = field(default_factory=list)
    circuits: list[CircuitRow] = field(default_factory=list)
    mib: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Circuits as MIB's evaluation reads them, by probe."""


@dataclass(frozen=True)
class CausalByAnswer:
    """The causal check by answer: the probabilities of each answer are means over the orders of its row."""

    causal_by_answer: list[CausalRow] = field(default_factory=list)
    causal_differences_by_answer: list[CausalDifferenceRow] = field(default_factory=list)


@dataclass(frozen=True)
class DatasetFindings:
    """Rows of all analyses of one dataset's skill neurons; `negcore.analysis` describes them."""

    dataset: str
    references: list[ReferenceRow]
    causal: list[CausalRow]
    neuron_counts: list[NeuronCountRow]
    training_rows: list[TrainingRowsRow]
    transfers: list[TransferRow]
    bands: list[BandRow]
    forests: list[ForestRow]
    layers: list[LayerShareRow]
    neurons: Sequence[NeuronRow] = ()
    """Not a list: their table is that of other runs, in the run directory."""
    causal_differences: list[CausalDifferenceRow] = field(default_factory=list)
    faithfulness: Faithfulness | None = None
    """None without `SkillsRun.curves`."""
    by_answer: CausalByAnswer | None = None
    """None if rows are asked in one order of their options."""

    @property
    def reference(self) -> ReferenceRow:
        (row,) = self.references
        return row


@dataclass(frozen=True)
class SkillFindings:
    """Rows of all analyses of one model's skill neurons."""

    model: str
    conditions: tuple[str, ...]
    """Ways of asking the questions, the main one first. Only `DatasetFindings.transfers` is about the others."""
    datasets: Sequence[DatasetFindings]
    """Not a list: they have tables of their own."""
    overlaps: list[OverlapRow] = field(default_factory=list)
    genre_overlaps: list[GenreOverlapRow] = field(default_factory=list)
    common: list[CommonNeuronRow] = field(default_factory=list)


class PlannedSkills(NamedTuple):
    """One model, and the prompts that it reads under every condition."""

    card: ModelCard
    models: Mapping[str, PlannedModel]
    """Planned models by the condition's folder."""

    @property
    def datasets(self) -> tuple[PlannedDataset, ...]:
        """Datasets of the main condition."""
        return self.models["main"].datasets

    @property
    def n_shards(self) -> int:
        """Number of NEG shards under all conditions."""
        return sum(model.n_shards for model in self.models.values())


def plan_skills(run: SkillsRun) -> ModelPlans[PlannedSkills]:
    """Read every dataset under every condition with every model's tokenizer.

    Raises
    ------
    NegError
        As `plan`.
    """
    planned = [(condition.run, plan(condition.run)) for condition in run.conditions]
    folders = [condition.folder for condition in run.conditions]
    for _, models in planned if run.curves else ():
        for model in models:
            refuse_experts(model.card, "curves of rankings", "leave --curves out")
            for split in (split for dataset in model.datasets for split in dataset.splits):
                refuse_unusual(split.examples, "curves of rankings")
    usable = [models for models in of_each_model(planned) if len(models) == len(folders)]  # under every condition
    return ModelPlans(
        tuple(
            PlannedSkills(models[0][1].card, dict(zip(folders, (model for _, model in models), strict=True)))
            for models in usable
        ),
        tuple(all_problems(models for _, models in planned)),
    )


@dataclass(frozen=True, eq=False)
class NeuronScores:
    """Scores of all neurons of one model on one dataset: arrays of shape (M,)."""

    by_size: Mapping[int, Mapping[Vote, Ints]]
    """Scores under the main condition, by number of training rows; the last number is all rows."""
    by_condition: Mapping[str, Mapping[Vote, Ints]]
    """Scores on all training rows, by the condition's folder."""
    best: Sequence[NeuronRow]
    """The best neurons under the main condition."""

    @property
    def main(self) -> Mapping[Vote, Ints]:
        """Scores on all training rows of the main condition."""
        return self.by_condition["main"]


def rank_dataset(pool: Pool, run: SkillsRun, planned: PlannedDataset, step: Step) -> NeuronScores:
    """Score all neurons on the training rows under every condition, and on growing numbers of rows of the main one.

    Raises
    ------
    NegError
        If shards are missing or damaged, or cannot be ranked.
    Stopped
        If the step is to stop.
    """
    votes = tuple(Vote(name, "neg") for name in run.probe)
    by_size: dict[int, Mapping[Vote, Ints]] = {}
    by_condition: dict[str, Mapping[Vote, Ints]] = {}
    best: list[NeuronRow] = []
    for condition in run.conditions:
        root = condition.run.directory
        train = open_negs(root).select(planned.model, planned.dataset.name, "train")
        sizes = _training_prompts(train) if condition.folder == "main" else ()
        ranked = rank_split(pool, root, train, votes, step, sizes=sizes, n_blocks=ranking_workers(run))
        by_condition[condition.folder] = _of_neurons(train, ranked[train.n_rows].votes_M)
        if sizes:
            by_size = {size: _of_neurons(train, rankings.votes_M) for size, rankings in ranked.items()}
            best = neuron_rows(condition.run, planned, train, train, ranked[train.n_rows], pool, step)
    return NeuronScores(by_size, by_condition, best)


def _of_neurons(train: NegSplit, votes_M: Mapping[Vote, Ints]) -> Mapping[Vote, Ints]:
    """Return scores with those masked that are of no neuron."""
    return {vote: of_neurons(train, scores_M) for vote, scores_M in votes_M.items()}


def _training_prompts(train: NegSplit) -> list[int]:
    """Return the numbers of training prompts to try: those of the first 16, 32, 64, ... rows, in all their orders."""
    row_P = train.answers.row_P
    return [int(np.count_nonzero(row_P < n_rows)) for n_rows in training_sizes(train.answers.n_rows)]


def plan_checks(run: SkillsRun, planned: PlannedDataset, card: ModelCard, scores: NeuronScores) -> dict[str, ShardSet]:
    """Plan the causal check of each probe's ranking, on the test split.

    Raises
    ------
    NegError
        If the model has too few neurons for the sizes.
    """
    test = planned_test(planned)
    train = open_negs(run.conditions[0].run.directory).select(card.name, planned.dataset.name, "train")
    experts = ExpertNeurons.of(train)
    shifts = [sign * shift for shift in run.shift for sign in (1, -1)]
    parts: dict[str, ShardSet] = {}
    for probe in run.probe:
        ranking = _shown_ranking(run, planned.dataset.name, scores.main[Vote(probe, "neg")])
        sets = skill_sets(
            ranking, tops(run, card), card.n_layers, card.layer_width, draws=run.draws, seed=run.seed, experts=experts
        )
        parts[probe] = plan_causal(run.conditions[0].run.directory, test, probe, sets, shifts)
    return parts


def tops(run: SkillsRun, card: ModelCard) -> list[int]:
    """Return the numbers of skill neurons in the run file, each cut to at most half of the model's neurons."""
    n_neurons = sum(shape.n_neurons for shape in card.layer_shapes)
    return list(dict.fromkeys(min(top, n_neurons // 2) for top in run.top))


def _shown_ranking(run: SkillsRun, dataset: str, scores_M: Ints) -> Ranking:
    """Return the ranking that all tables with named neurons use, and its causal check too."""
    return rank_with_random_ties({dataset: scores_M}, seed=run.seed)[dataset]


def analyse_dataset(
    run: SkillsRun,
    planned: PlannedDataset,
    card: ModelCard,
    scores: NeuronScores,
    checks: Mapping[str, ShardSet],
    curves: Mapping[str, ShardSet] | None = None,
) -> DatasetFindings:
    """Run all analyses of one dataset's skill neurons on its shards.

    Parameters
    ----------
    checks, curves : mapping of probe to ShardSet
        What was measured of each ranking; curves only if the run asks for them.

    Raises
    ------
    NegError
        If shards are missing or damaged.
    """
    dataset = planned.dataset.name
    main = {split: open_negs(run.conditions[0].run.directory).select(card.name, dataset, split) for split in _SPLITS}
    valid, test = main["valid"], main["test"]
    votes, widths_L = {probe: Vote(probe, "neg") for probe in run.probe}, [one.n_neurons for one in card.layer_shapes]
    reference, measured = _reference(run, planned, main), _faithfulness(run, card, dataset, scores, curves or {})
    by_answer = None if run.permutations == 1 else CausalByAnswer()
    found = DatasetFindings(
        dataset, [reference], [], [], [], [], [], [], [], scores.best, faithfulness=measured, by_answer=by_answer
    )
    for probe, part in checks.items():
        result = read_causal(run.conditions[0].run.directory, part)
        found.causal.extend(causal_rows(probe, result, n_bootstrap=_BOOTSTRAP, seed=run.seed))
        found.causal_differences.extend(causal_differences(probe, result))
        if by_answer:
            answers = result.by_answer()
            by_answer.causal_by_answer.extend(causal_rows(probe, answers, n_bootstrap=_BOOTSTRAP, seed=run.seed))
            by_answer.causal_differences_by_answer.extend(causal_differences(probe, answers))
    for probe, vote in votes.items():
        scores_M, most = scores.main[vote], run.max_neurons
        found.neuron_counts.extend(accuracy_by_neurons(vote, scores_M, test, max_neurons=most, seed=run.seed))
        by_size = {size: of_size[vote] for size, of_size in scores.by_size.items()}
        found.training_rows.extend(accuracy_by_rows(vote, by_size, valid, test, max_neurons=most))
        found.transfers.extend(_transfers(run, card.name, dataset, vote, scores))
        found.bands.extend(bands(vote, scores_M, test, width=run.band))
        ranking = _shown_ranking(run, dataset, scores_M)
        found.layers.extend(layer_shares(probe, ranking, tops(run, card), widths_L))
    if _FOREST in votes.values():
        order_K = Ranking.from_scores(scores.main[_FOREST]).top(run.tree_neurons).order_K
        found.forests.extend(forest_grid(main["train"], test, order_K, seed=run.seed))
    return found


_SPLITS = ("train", "valid", "test")


def plan_ranking_curves(
    run: SkillsRun, planned: PlannedDataset, card: ModelCard, scores: NeuronScores, norms_M: Floats
) -> dict[str, ShardSet]:
    """Plan the curves of each probe's ranking, on the test split.

    Parameters
    ----------
    norms_M : float array of shape (M,)
        Norm of every neuron's output.

    Raises
    ------
    NegError
        If shards are missing or damaged.
    """
    dataset = planned.dataset.name
    train = open_negs(run.conditions[0].run.directory).select(card.name, dataset, "train")
    strata_M = strata(mean_sizes(train), norms_M, card.layer_width)
    parts: dict[str, ShardSet] = {}
    for probe in run.probe:
        ranking = _shown_ranking(run, dataset, scores.main[Vote(probe, "neg")])
        sets = curve_sets(ranking, strata_M, card.layer_width, draws=run.draws, seed=abs(run.seed))
        parts[probe] = plan_curves(planned_test(planned), probe, sets)
    return parts


def planned_test(planned: PlannedDataset) -> ShardSet:
    """Return the NEGs of a dataset's test split, as planned."""
    (test,) = [split for split in planned.splits if split.place.part == "test"]
    return test


def _faithfulness(
    run: SkillsRun, card: ModelCard, dataset: str, scores: NeuronScores, curves: Mapping[str, ShardSet]
) -> Faithfulness | None:
    """Make the tables of the curves that were measured; None if none were."""
    by_probe = {vote.name: scores_M for vote, scores_M in scores.main.items()}
    found = Faithfulness(mib={probe: _mib(card, by_probe[probe]) for probe in curves})
    n_all = card.n_layers * card.layer_width
    for probe, measured in curves.items():
        conditions, gold_P, result, answers = read_curves(run.conditions[0].run.directory, measured)
        points, areas, circuits = curve_rows(
            probe, conditions, gold_P, result, n_all, n_bootstrap=_BOOTSTRAP, seed=abs(run.seed), answers=answers
        )
        found.curves.extend(points)
        found.areas.extend(areas)
        found.circuits.extend(circuits)
    return found if curves else None


def _mib(card: ModelCard, scores_M: Ints) -> dict[str, object]:
    config = card.text_config
    return mib_circuit(scores_M.astype(np.float64), card.places, config, config.model_type)


def _reference(run: SkillsRun, planned: PlannedDataset, main: Mapping[str, NegSplit]) -> ReferenceRow:
    train, test = main["train"], main["test"]
    lm = accuracy(test.gold_P, LMProbe().fit(train.probs_PO).predict(test.probs_PO), test.answers.row_P)
    floors = FloorAnswers(planned.dataset, train, test, seed=run.seed)
    return ReferenceRow(
        genre=planned.dataset.genre,
        n_train=train.n_rows,
        n_valid=main["valid"].n_rows,
        n_test=test.n_rows,
        lm=lm.value,
        low=lm.interval.low,
        high=lm.interval.high,
        **floors.beside(np.arange(test.n_rows)),
        overlapping=planned.dataset.split_report.is_overlapping,
        n_orders=test.answers.most_orders,
    )


def _transfers(run: SkillsRun, model: str, dataset: str, vote: Vote, scores: NeuronScores) -> list[TransferRow]:
    fitted, tests = {}, {}
    for folder, name, of_condition in run.conditions:
        negs = open_negs(of_condition.directory)
        valid = negs.select(model, dataset, "valid")
        fitted[name] = fit_vote(vote, scores.by_condition[folder][vote], valid, max_neurons=run.max_neurons)
        tests[name] = negs.select(model, dataset, "test")
    return transfer(vote.name, fitted, tests)


def compare_datasets(
    run: SkillsRun, card: ModelCard, scores: Mapping[str, NeuronScores], findings: Sequence[DatasetFindings]
) -> SkillFindings:
    """Compare the datasets of a model. Only those with `findings`, and so with a causal check, take part."""
    result = SkillFindings(card.name, tuple(condition.name for condition in run.conditions), list(findings))
    genres = {one.dataset: one.reference.genre for one in findings}
    for probe in run.probe if len(genres) > 1 else ():
        scores_M = {name: scores[name].main[Vote(probe, "neg")] for name in genres}
        rankings = rank_with_random_ties(scores_M, seed=run.seed)
        result.overlaps.extend(overlaps(probe, rankings, genres, tops(run, card)))
        common = common_neurons(probe, rankings, tops(run, card), layer_width=card.layer_width)
        result.common.extend(replace(row, name=_name_of(card, row.layer, row.neuron)) for row in common)
    result.genre_overlaps.extend(genre_overlaps(result.overlaps))
    return result


def _name_of(card: ModelCard, layer: int, neuron: int) -> str:
    return f"{layer}.{card.layer_shapes[layer].name_of(neuron)}"


def accuracy_rows(run: SkillsRun, findings: Sequence[SkillFindings]) -> list[AccuracyRow]:
    """Return the accuracies of LM-Prob and of probes fitted on all training rows, as `neg pipeline` has them."""
    return [
        row for of_model in findings for one in of_model.datasets for row in _accuracy_rows(run, of_model.model, one)
    ]


def _accuracy_rows(run: SkillsRun, model: str, found: DatasetFindings) -> Iterator[AccuracyRow]:
    known = asdict(found.reference)
    lm = {name: known.pop(name) for name in ("lm", "low", "high")}
    n_test = known.pop("n_test")
    del known["n_valid"]
    fitted = [row for row in found.training_rows if row.n_train == known["n_train"]]
    of_probes = [(row.probe, row.n_neurons, row.accuracy, row.low, row.high) for row in fitted]
    for probe, n_neurons, value, low, high in [("lm", None, lm["lm"], lm["low"], lm["high"]), *of_probes]:
        yield AccuracyRow(
            model=model,
            shots=run.shots,
            dataset=found.dataset,
            group="",
            probe=probe,
            n_neurons=n_neurons,
            accuracy=value,
            low=low,
            high=high,
            n_correct=round(value * n_test),
            n_test=n_test,
            **known,
        )


def write_findings(run: SkillsRun, findings: Sequence[SkillFindings]) -> Path:
    """Write the tables of all models as Arrow files, and return their folder.

    Raises
    ------
    RunError
        If they cannot be written.
    """
    write_table(run.directory / "accuracy.arrow", AccuracyRow, [asdict(row) for row in accuracy_rows(run, findings)])
    neurons = [asdict(row) for of_model in findings for one in of_model.datasets for row in one.neurons]
    write_table(run.directory / NEURONS_FILE, NeuronRow, neurons)
    folder = run.directory / "skills"
    datasets = [((found.model, one.dataset), one) for found in findings for one in found.datasets]
    write_tables(folder, DatasetFindings, datasets, names=("model", "dataset"))
    write_tables(folder, SkillFindings, [((found.model,), found) for found in findings], names=("model",))
    by_answer = [(labels, one.by_answer) for labels, one in datasets if one.by_answer]
    if by_answer:
        write_tables(folder, CausalByAnswer, by_answer, names=("model", "dataset"))
    curves = [(labels, one.faithfulness) for labels, one in datasets if one.faithfulness]
    if curves:
        write_tables(folder, Faithfulness, curves, names=("model", "dataset"))
        for (model, dataset), faithfulness in curves:
            for probe, circuit in faithfulness.mib.items():
                _write_json(circuit_path(run.directory, model, dataset, probe), circuit)
    return folder


def circuit_path(root: Path, model: str, dataset: str, probe: str) -> Path:
    """Return the file of a ranking as MIB's evaluation reads it."""
    place = Path(f"model={quote(model, safe='')}") / f"dataset={quote(dataset, safe='')}"
    return root / "skills" / "circuits" / place / f"{probe}.json"


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    with output(path) as file:
        file.write_text(json.dumps(value), encoding="ascii")
