"""The plan of a linearity study, checked before any model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from negcore.analysis.linearity import nested_grid
from negcore.arrays import Ints
from negcore.datasets import Example, FactSet, load_facts
from negcore.errors import DatasetError, NegError
from negcore.measure.estimators import ESTIMATORS, WITH_REFERENCES
from negcore.measure.interventions import SET_SIZES
from negcore.measure.sweeps import draw_neurons
from negcore.model.language_model import ModelCard, describe_model, refuse_experts
from negcore.model.tokenizer_file import tokenizer_warning
from negcore.store.publish import ShardPlace
from tasks.config.linearity_run import LinearityRun
from tasks.measure.examples import EncodedExample, encode_examples
from tasks.measure.measurement import Measurement
from tasks.measure.references import References, all_prompts, partners
from tasks.measure.shard_set import ShardSet
from tasks.measure.study import Estimates, Interventions, Sweeps
from tasks.model_plans import ModelPlans, plan_models
from tasks.names import check_distinct
from tasks.plan import check_router, run_identity


@dataclass(frozen=True)
class PlannedStudy:
    """One model and all that is measured of it."""

    card: ModelCard
    facts: FactSet
    shard_sets: tuple[ShardSet, ...]
    partners: References | None
    """The prompt that each prompt is patched from; None if no estimator does that."""
    warning: str | None = None
    """A warning of what must be read with care, in one line."""

    def of_kind(self, kind: str) -> list[ShardSet]:
        """Return the sets of one kind: ``sweeps``, ``estimates`` or ``interventions``."""
        return [one for one in self.shard_sets if one.place.kind == kind]

    @property
    def n_shards(self) -> int:
        """Shards of all sets."""
        return sum(len(one.shards) for one in self.shard_sets)


def plan_linearity(run: LinearityRun) -> ModelPlans[PlannedStudy]:
    """Read the facts with every model's tokenizer, check all prompts, and draw neurons and sets.

    Raises
    ------
    NegError
        If no model can be used: it or the facts are unknown or malformed, a prompt is too long, or it has too few
        neurons.
    """
    check_distinct("models", run.model_refs, run.model_names.__getitem__)
    return plan_models(run.model_refs, lambda ref: _plan_study(run, ref))


def _plan_study(run: LinearityRun, ref: str) -> PlannedStudy:
    card = describe_model(ref, run.model_names[ref])
    _check_experts(run, card)
    facts = _whole_facts(load_facts(run.facts, card.tokenizer, seed=run.seed, masked=card.arch.masked), run.prompts)
    if run.target == "logit-difference":
        facts = _with_options(facts)
    examples = encode_examples(card, facts.name, facts.examples)
    neurons_K2 = _neurons(run, card)
    sizes = tuple(size for size in SET_SIZES if size <= min(run.largest_set, _n_neurons(card)))
    grid_S = nested_grid(run.ranges, run.points)
    references = _references(run, card, facts, examples)
    spread_over, mixed = _spread_over(run, examples), card.has_experts
    measurements: list[tuple[str, str, Measurement]] = [
        *(
            ("sweeps", name, Sweeps(block_K2, grid_S, run.nodes, run.ranges, run.target, spread_over, mixed))
            for name, block_K2 in _blocks(neurons_K2, run.block_layers)
        ),
        *(
            (
                "estimates",
                name,
                Estimates(name, neurons_K2, references.get(WITH_REFERENCES.get(name)), run.target, mixed),
            )
            for name in dict.fromkeys(run.estimator)
        ),
        (
            "interventions",
            "nested",
            Interventions(sizes, run.draws, run.set_shift, run.seed, run.target, spread_over, mixed),
        ),
    ]
    shard_sets = tuple(_shard_set(run, card, facts, examples, *one) for one in measurements)
    warning = tokenizer_warning(card, [example.prompt for example in examples])
    return PlannedStudy(card, facts, shard_sets, references.get("each"), warning)


def _check_experts(run: LinearityRun, card: ModelCard) -> None:
    """Refuse what a study asks of a mixture of experts and is not made for it, or of another model and means nothing.

    Raises
    ------
    ModelError
    """
    check_router(run, card)
    unable = [name for name in run.estimator if name in WITH_REFERENCES]
    if unable:
        able = ", ".join(name for name in ESTIMATORS if name not in WITH_REFERENCES)
        refuse_experts(
            card,
            f"estimators that take activations from other prompts ({', '.join(unable)})",
            f"give --estimator of {able}",
        )


def _references(
    run: LinearityRun, card: ModelCard, facts: FactSet, examples: tuple[EncodedExample, ...]
) -> dict[str | None, References]:
    """Return the prompts that the run's estimators take activations from, by what `WITH_REFERENCES` says of them."""
    wanted = {WITH_REFERENCES.get(name) for name in run.estimator}
    found: dict[str | None, References] = {"any": all_prompts(examples)} if "any" in wanted else {}
    return found | ({"each": partners(card, facts.name, examples, run.seed)} if "each" in wanted else {})


def _shard_set(
    run: LinearityRun,
    card: ModelCard,
    facts: FactSet,
    examples: tuple[EncodedExample, ...],
    kind: str,
    part: str,
    measurement: Measurement,
) -> ShardSet:
    return ShardSet(
        place=ShardPlace(kind, card.name, facts.name, part),
        identity=run_identity(
            run, card, {"seed": run.seed}, facts.fingerprint, target=run.target, study=measurement.settings
        ),
        examples=examples,
        measurement=measurement,
        shard_rows=run.shard_rows,
        nonfinite=run.nonfinite,
        title=f"{card.name} {facts.name} {kind} {part}",
    )


def _spread_over(run: LinearityRun, examples: tuple[EncodedExample, ...]) -> References | None:
    """Return the prompts whose activations' spread is the unit of shifts, if it is one.

    Raises
    ------
    NegError
        If there is one prompt.
    """
    if run.shift_unit == "activation":
        return None
    if len(examples) == 1:
        raise NegError(
            "shift unit 'sd' needs the spread of activations over prompts, and there is one prompt: measure more, or "
            "set shift_unit to activation"
        )
    return all_prompts(examples)


def _with_options(facts: FactSet) -> FactSet:
    """Give each fact options, as a target that compares them needs: its answer, and those of all other facts.

    Raises
    ------
    DatasetError
        If all facts have the same answer.
    """
    answers = sorted({example.labels[0] for example in facts.examples})
    if len(answers) == 1:
        raise DatasetError(
            f"{facts.name}: target 'logit-difference' compares a fact's answer with those of the others, and all "
            f"{len(facts.examples)} have the same; measure more prompts, or set target to probability or "
            "log-probability"
        )
    return replace(facts, examples=tuple(_among(example, answers) for example in facts.examples))


def _among(example: Example, answers: Sequence[str]) -> Example:
    own = example.labels[0]
    return replace(example, labels=(own, *(answer for answer in answers if answer != own)))


def _neurons(run: LinearityRun, card: ModelCard) -> Ints:
    try:
        return draw_neurons(card.layer_shapes, _n_neurons(card) if run.neurons == "all" else run.neurons, seed=run.seed)
    except NegError as error:
        raise NegError(f"{card.name}: {error}") from None


def _n_neurons(card: ModelCard) -> int:
    return sum(shape.n_neurons for shape in card.layer_shapes)


def _blocks(neurons_K2: Ints, block_layers: int) -> list[tuple[str, Ints]]:
    """Return neurons by blocks of layers, with the blocks' names; a layer without a neuron is in none."""
    blocks_K = neurons_K2[:, 0] // block_layers
    named = []
    for block in np.unique(blocks_K).tolist():
        first = block * block_layers
        named.append((f"layers-{first:02d}-{first + block_layers - 1:02d}", neurons_K2[blocks_K == block]))
    return named


def fact_of(example: Example, dataset: str) -> str:
    """Return the fact that a prompt asks for: its `uuid` in the source, which stands at the end of the id."""
    return example.id.removeprefix(f"{dataset}/").split("/", 1)[1]


def _whole_facts(facts: FactSet, n_prompts: int) -> FactSet:
    """Put the prompts of each fact together, so that wordings can be compared, and keep the first ones."""
    first_seen: dict[str, int] = {}
    for index, example in enumerate(facts.examples):
        first_seen.setdefault(fact_of(example, facts.name), index)
    together = sorted(facts.examples, key=lambda example: first_seen[fact_of(example, facts.name)])
    return replace(facts, examples=tuple(together[:n_prompts]))
