"""Fit skill-neuron probes to a dataset's NEG shards, save them, and measure them on its test split."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from negcore.arrays import Floats, Ints
from negcore.measure.votes import Ranking, Vote
from negcore.probing.evaluation import Accuracy, accuracy, confusion_counts
from negcore.probing.fitted import FittedProbe, FittedVote, fit_act, fit_forest, fit_logistic, fit_vote, random_vote
from negcore.probing.letter_bias import LetterBias, letter_bias
from negcore.probing.probes import LMProbe
from negcore.probing.rankings import Rankings, of_neurons
from negcore.probing.saved_probes import save_probe
from negcore.store.reader import NegSplit
from negcore.targets import DEFAULT_TARGET
from tasks.beyond_lm import BeyondRow, beyond_lm
from tasks.certificates import CertificateRow, certificate_rows
from tasks.config.dataset_runs import ProbeName, SkillRun
from tasks.config.recipes import RECIPES, reads_training_values, votes_of
from tasks.controls import ControlRow, permuted_row, with_permuted_gold
from tasks.floors import FloorAnswers
from tasks.letter_bias import LetterBiasRow
from tasks.measure.planned_negs import planned_negs
from tasks.neurons import NeuronRow, neuron_rows, vote_probes
from tasks.plan import SUMS, PlannedDataset
from tasks.pool.base import Pool
from tasks.predictions import Predictions
from tasks.rank import rank_split, ranking_workers
from tasks.resamples import ResampleRow, resample_rows
from tasks.steps import Step


@dataclass(frozen=True)
class AccuracyRow:
    """One probe's accuracy on one dataset's test split, or on one group of it."""

    model: str
    shots: int
    genre: str
    dataset: str
    group: str
    """Language (or other group) of the prompts; empty for the whole test split."""
    probe: str
    n_neurons: int | None
    """Number of kept neurons, chosen on validation; `None` for a probe that keeps none."""
    accuracy: float
    low: float
    """Lower end of the 95 % interval (Wilson)."""
    high: float
    n_correct: int
    n_test: int
    n_train: int
    majority: float
    """Accuracy of always giving the most common training answer."""
    random: float
    """Expected accuracy of guessing."""
    overlapping: bool
    """True if the splits share rows (policy `released`)."""
    options_only: float | None = None
    """Accuracy of a forest on options, lengths and group; None if it is unknown, as in tables of earlier versions."""
    calibrated: float | None = None
    """Accuracy of logistic regression on the options' probabilities."""
    label_mass: float | None = None
    """Probability of all options together, mean over the test prompts."""
    target: str = DEFAULT_TARGET
    """The number of an option whose slope the run's NEGs are."""
    n_orders: int = 1
    """Orders of its options that each row was asked in; `n_train` and `n_test` count every one."""
    reading: str = ""
    """What is unusual in how prompts are read: the probed token, answers of several tokens."""


@dataclass(frozen=True)
class Confusion:
    """Number of times that a probe answered one option when another (or the same) was gold."""

    model: str
    shots: int
    dataset: str
    probe: str
    gold: int
    predicted: int
    n: int


@dataclass(frozen=True)
class Probed:
    """Results of the probes of one dataset."""

    scores: list[AccuracyRow] = field(default_factory=list)
    confusion: list[Confusion] = field(default_factory=list)
    predictions: list[Predictions] = field(default_factory=list)
    beyond: list[BeyondRow] = field(default_factory=list)
    resamples: list[ResampleRow] = field(default_factory=list)
    controls: list[ControlRow] = field(default_factory=list)
    letter_bias: list[LetterBiasRow] = field(default_factory=list)
    certificates: list[CertificateRow] = field(default_factory=list)
    neurons: list[NeuronRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def of_random_weights(self, seed: int) -> list[ControlRow]:
        """Return the accuracies of a model with random weights as those of a control, without groups of rows."""
        shared = [name for name in ControlRow.__dataclass_fields__ if name in AccuracyRow.__dataclass_fields__]
        return [
            ControlRow(control="random weights", draw=0, seed=seed, **{name: getattr(one, name) for name in shared})
            for one in self.scores
            if not one.group
        ]


class Answers(NamedTuple):
    """Answers of one probe to the test prompts."""

    probe: str
    n_kept: int | None
    predicted_P: Ints
    scores_PO: Floats | None = None
    """Scores behind the answers; only where rows were asked in several orders of their options."""


def probe_steps(run: SkillRun) -> int:
    """Return the number of steps in which probing one dataset reports progress.

    They are the ranking, each probe, each that is fitted on samples of the rows, and each permutation of the answers.
    """
    return 1 + len(run.probe) + (len(vote_probes(run)) if run.train_samples else 0) + run.controls


class Prober:
    """The probing of datasets, one at a time, so that only one takes memory.

    Parameters
    ----------
    pool : Pool
        Pool of `RankWorker`.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._turn = threading.Lock()

    def probe(self, run: SkillRun, planned: PlannedDataset, step: Step) -> Probed:
        """Fit probes on train, choose their number of neurons on valid, answer test. LM-Prob comes first.

        Raises
        ------
        NegError
            If a split is missing, incomplete or damaged, or a probe cannot be fitted.
        Stopped
            If the step is to stop.
        """
        while not self._turn.acquire(timeout=0.2):
            step.check_stop()
        try:
            return self._probe(run, planned, step)
        finally:
            self._turn.release()

    def _probe(self, run: SkillRun, planned: PlannedDataset, step: Step) -> Probed:
        parts = {split.place.part: split for split in planned.splits}

        def select(part: str) -> NegSplit:
            return planned_negs(run.directory, parts[part])

        n_steps, has_sums = probe_steps(run), run.level.has_vote_sums
        ranked = select(SUMS if has_sums else "train")
        train = select("train") if has_sums and reads_training_values(run) else ranked
        splits = Splits(train, select("valid"), select("test"))
        step.report(0, n_steps)
        rankings = self._rank(run, ranked, step)
        answers = [_lm_answers(splits)]
        fitter = ProbeFitter(run, splits, rankings)
        for done, name in enumerate(run.probe, 1):
            step.check_stop()
            step.report(done, n_steps)
            probe = fitter.fit(name)
            save_probe(probe_path(run.directory, planned.model, planned.dataset.name, name), name, probe, splits.train)
            scores_PO = probe.scores(splits.test) if splits.test.identity.is_permuted else None
            answers.append(Answers(name, probe.n_kept, probe.predict(splits.test), scores_PO))
        probed = _probed(run, planned, splits, answers)
        for sweeps in planned.sweeps:
            probed.certificates.extend(certificate_rows(run, sweeps, splits.test))
        probed.neurons.extend(neuron_rows(run, planned, ranked, splits.train, rankings, self._pool, step))
        for done, name in enumerate(vote_probes(run) if run.train_samples else (), 1 + len(run.probe)):
            step.report(done, n_steps)
            probed.resamples.extend(resample_rows(run, planned, name, *splits, self._pool, step))
        for draw in range(run.controls):
            step.report(n_steps - run.controls + draw, n_steps)
            probed.controls.extend(self._permuted(run, planned, splits, draw, step))
        step.report(n_steps, n_steps)
        return probed

    def _permuted(
        self, run: SkillRun, planned: PlannedDataset, splits: "Splits", draw: int, step: Step
    ) -> Iterator[ControlRow]:
        """Yield the accuracy of every probe that is fitted on permuted answers."""
        train, valid = (with_permuted_gold(split, run.seed, draw) for split in (splits.train, splits.valid))
        fitter = ProbeFitter(run, Splits(train, valid, splits.test), self._rank(run, train, step))
        for name in run.probe:
            step.check_stop()
            probe = fitter.fit(name)
            right = accuracy(splits.test.gold_P, probe.predict(splits.test), splits.test.answers.row_P)
            yield permuted_row(run, planned, name, draw, probe.n_kept, right)

    def _rank(self, run: SkillRun, train: NegSplit, step: Step) -> Rankings:
        ranked = rank_split(
            self._pool,
            run.directory,
            train,
            votes_of(run),
            step,
            act="act" in run.probe,
            n_blocks=ranking_workers(run),
        )
        return ranked[train.n_rows]


class Splits(NamedTuple):
    """The NEGs of a dataset."""

    train: NegSplit
    valid: NegSplit
    test: NegSplit


class ProbeFitter:
    """A dataset's probes, fitted one by one from the scores of its neurons."""

    def __init__(self, run: SkillRun, splits: Splits, rankings: Rankings) -> None:
        self._run, self._splits, self._act = run, splits, rankings.act
        self._scores = {vote: of_neurons(splits.train, scores_M) for vote, scores_M in rankings.votes_M.items()}
        self._voters: dict[Vote, FittedVote] = {}

    def fit(self, name: ProbeName) -> FittedProbe:
        """Fit the probe of this name."""
        kind, vote = RECIPES[name]
        train, seed = self._splits.train, self._run.seed
        if kind == "act":
            assert self._act is not None
            return fit_act(self._act, train.gold_P, self._splits.valid, max_neurons=self._run.max_neurons)
        assert vote is not None
        scores_M = self._scores[vote]
        if kind == "tree":
            return fit_forest(train, Ranking.from_scores(scores_M).top(self._run.tree_neurons).order_K, seed=seed)
        if kind == "random":
            return random_vote(self._voter(vote), scores_M, seed=seed, layer_shapes=train.layer_shapes)
        if kind == "logistic":
            return fit_logistic(vote, self._voter(vote).ranking.order_K, train)
        return self._voter(vote)

    def _voter(self, vote: Vote) -> FittedVote:
        """Return the vote probe, fitted once: its baselines take its number of neurons."""
        if vote not in self._voters:
            self._voters[vote] = fit_vote(
                vote, self._scores[vote], self._splits.valid, max_neurons=self._run.max_neurons
            )
        return self._voters[vote]


def probe_path(root: Path, model: str, dataset: str, probe: str) -> Path:
    """Return the file of a saved probe, which `negcore.load_probe` reads."""
    folder = root / "probes" / f"model={quote(model, safe='')}" / f"dataset={quote(dataset, safe='')}"
    return folder / f"{probe}.safetensors"


def _lm_answers(splits: Splits) -> Answers:
    probe, probs_PO = LMProbe().fit(splits.train.probs_PO), splits.test.probs_PO
    return Answers("lm", None, probe.predict(probs_PO), probs_PO if splits.test.identity.is_permuted else None)


def _probed(run: SkillRun, planned: PlannedDataset, splits: Splits, answers: Sequence[Answers]) -> Probed:
    test = splits.test
    place = {"model": planned.model, "shots": run.shots, "dataset": planned.dataset.name}
    common = {
        **place,
        "genre": planned.dataset.genre,
        "target": test.target,
        "reading": reading(test.identity.prompt),
        "n_train": splits.train.n_rows,
        "overlapping": planned.dataset.split_report.is_overlapping,
        "n_orders": test.answers.most_orders,
    }
    rows = {"": np.arange(test.n_rows)} | _groups(test)
    floors = FloorAnswers(planned.dataset, splits.train, test, seed=run.seed)
    beside = {group: {**common, "group": group, **floors.beside(chosen)} for group, chosen in rows.items()}
    biases = _biases(answers, floors, test) if test.identity.is_permuted else {}
    predictions = Predictions.of(test, run.shots, {one.probe: one.predicted_P for one in answers}, biases)
    probed = Probed(predictions=[predictions], warnings=[floors.warning] if floors.warning else [])
    probed.beyond.extend(beyond_lm(predictions, floors.calibrated_P, test.target))
    probed.letter_bias.extend(
        LetterBiasRow.of(planned.model, run.shots, planned.dataset.name, probe, bias) for probe, bias in biases.items()
    )
    for one in answers:
        for group, chosen in rows.items():
            result = accuracy(test.gold_P[chosen], one.predicted_P[chosen], test.answers.row_P[chosen])
            probed.scores.append(_accuracy_row(beside[group], one, result))
        if run.confusion:
            probed.confusion.extend(_confusion(place, one, test))
    return probed


def _biases(answers: Sequence[Answers], floors: FloorAnswers, test: NegSplit) -> dict[str, LetterBias]:
    """Return the letter bias of every probe, and behind LM-Prob's that of its calibrated answers."""
    lm, *others = answers
    calibrated = Answers("calibrated", None, floors.calibrated_P, floors.calibrated_PO)
    biases: dict[str, LetterBias] = {}
    for one in (lm, calibrated, *others):
        assert one.scores_PO is not None, one.probe
        biases[one.probe] = letter_bias(test.answers, test.gold_P, one.predicted_P, one.scores_PO)
    return biases


def reading(prompt: Mapping[str, Any]) -> str:
    """Return what is unusual in how a run's prompts are read, by the prompt settings of its identity; else nothing."""
    probed = "neurons at probe_at" * ("probed" in prompt)
    return ", ".join(filter(None, [probed, "answers of several tokens" * (prompt.get("answers") == "sequence")]))


def _groups(test: NegSplit) -> dict[str, Ints]:
    """Return the rows of each group, in alphabetical order; rows without a group are left out."""
    return {group: np.flatnonzero(np.array(test.groups) == group) for group in sorted({*test.groups} - {""})}


def _accuracy_row(common: dict[str, Any], one: Answers, result: Accuracy) -> AccuracyRow:
    return AccuracyRow(**common, probe=one.probe, n_neurons=one.n_kept, **result.columns)


def _confusion(place: dict[str, Any], one: Answers, test: NegSplit) -> list[Confusion]:
    counts_OO = confusion_counts(test.gold_P, one.predicted_P, test.n_options)
    return [
        Confusion(**place, probe=one.probe, gold=gold, predicted=predicted, n=int(n))
        for (gold, predicted), n in np.ndenumerate(counts_OO)
    ]
