"""Run files of the runs on datasets: extraction and probes, evaluation of MCEval8K, analysis of skill neurons."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from negcore.datasets.base import PromptFormat, PromptSettings, SplitPolicy
from negcore.datasets.load import is_own_file
from negcore.datasets.mceval8k import SPECS
from negcore.model.prompt_ids import AnswerKind
from negcore.store.identity import DEFAULT_STORAGE, StorageName
from negcore.targets import DEFAULT_TARGET, Target
from tasks.config.run_file import CountOrAll, PositiveFloat, RunFile, Several
from tasks.config.wordings import WordingChoice, check_wordings, wording_for

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from negcore.store.levels import StorageLevel

ProbeName = Literal[
    "polar",
    "magn",
    "act",
    "tree",
    "polar-gradient",
    "magn-gradient",
    "polar-gxa",
    "magn-gxa",
    "polar-random",
    "magn-random",
    "polar-logistic",
    "magn-logistic",
]


_OF_CERTIFICATES = ("certify_rows", "missed_above", "missed_below")
"""Fields that say something of certificates alone."""

RANDOM_FOLDER = "random-weights"
"""Folder of the control with random weights, below the directory of its run."""

_VOTES = ("polar", "magn", "polar-gradient", "magn-gradient", "polar-gxa", "magn-gxa")
"""Probes that are votes of the neurons that they rank."""


def _digit(value: Any) -> Any:
    """Return a number that the command line gives as text as a number."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class _PromptedRun(RunFile):
    """The fields that all runs on datasets have."""

    dataset: Several[str] = Field(
        description="Dataset: mceval8k/NAME, mini/GENRE or a .jsonl file (see `neg datasets`). Repeatable."
    )
    wording: WordingChoice = Field(
        "default",
        description="Name of one of the dataset's wordings; in a run file also your own, see "
        "docs/own-data-and-models.md.",
    )
    prompt_format: PromptFormat = Field(
        "plain", description="plain: prompts as they are; chat: in the form of the model's own chat template."
    )
    system_prompt: str | None = Field(None, description="System text in front of a chat. By default none.")
    limit: int | None = Field(None, ge=1, description="Most rows of each split, sampled by answer. By default all.")
    eval_limit: int | None = Field(
        None, ge=1, description="Most rows of the valid and of the test split. By default as --limit."
    )
    split_policy: SplitPolicy = Field(
        "clean",
        description="clean removes double rows, and rows that share their text or unit (a sentence) with another "
        "split; clean-rows lets splits share units; released leaves the files as they are.",
    )
    unreadable: Literal["fail", "skip"] = Field(
        "fail",
        description="Rows that a model cannot read (prompt too long, labels of another number or of several tokens): "
        "refuse the dataset, or skip them; they are counted.",
    )
    permutations: CountOrAll = Field(
        1,
        description="Orders of its options that each row is asked in, drawn by the seed, the given one first; all for "
        "every order of up to 4 options. See docs/analyses.md.",
    )
    answers: AnswerKind = Field(
        "token",
        description="token: every label is one token; sequence: labels may be several, and NEG is of the probability "
        "of all of them, one after the other. See docs/analyses.md.",
    )
    mceval8k: Path | None = Field(None, description="Folder with MCEval8K. By default $NEG_MCEVAL8K, else the hub.")
    max_neurons: int = Field(2**14, ge=1, description="Largest number of neurons a probe may keep.")
    tree_neurons: int = Field(
        2**13, ge=1, description="Neurons the forest reads, best first by Magn's score: 5 bytes x training rows each."
    )
    shard_rows: int = Field(32, ge=1, description="Prompts in a shard: what a crash can cost.")
    batch_size: int | None = Field(None, ge=1, description="Prompts in a batch. By default chosen by length.")
    storage: StorageName = Field(
        DEFAULT_STORAGE,
        description="What is kept of NEGs: values; bfloat16 (values and activations in half the room: their range, "
        "and 2 to 3 digits); codes (16 bits for order and signs of up to 5 options; every "
        "probe but logistic regression gives the same); or stats (vote sums, and in a second pass the values of the "
        "neurons that the run's probes choose; every probe but act gives the same).",
    )

    not_science = RunFile.not_science | {"mceval8k", "shard_rows", "batch_size"}

    @property
    def subjects(self) -> tuple[str, ...]:
        return self.dataset

    @property
    def science(self) -> dict[str, Any]:
        science = super().science
        for name in ("storage", "unreadable", "prompt_format", "system_prompt", "permutations", "answers"):
            if science[name] == type(self).model_fields[name].default:
                del science[name]  # runs have the names from before there was a choice
        return science

    @property
    def level(self) -> "StorageLevel":
        """The storage level: what it keeps and can answer."""
        from negcore.store.levels import STORAGE_LEVELS  # needs pyarrow, which the command line starts without

        return STORAGE_LEVELS[self.storage]

    @model_validator(mode="after")
    def _check_nonfinite(self) -> Self:
        if self.nonfinite == "keep" and not self.level.has_nonfinite:
            level = f"storage {self.storage!r}"
            raise ValueError(f"{level} has none for NaN and infinity: set nonfinite to fail or skip, not keep")
        return self

    @model_validator(mode="after")
    def _check_system_prompt(self) -> Self:
        if self.system_prompt is not None and self.prompt_format != "chat":
            raise ValueError("system_prompt is for chats: set prompt_format to chat, or leave it out")
        return self

    @model_validator(mode="after")
    def _check_wordings(self) -> Self:
        check_wordings(self.wording, self.dataset)
        return self


class _ProbedRun(_PromptedRun):
    """The fields of runs that compare probes."""

    probe: Several[ProbeName] = Field(
        ("polar", "magn"), description=f"Probe beside LM-Prob: {', '.join(get_args(ProbeName))}. Repeatable."
    )
    target: Target = Field(
        DEFAULT_TARGET,
        description="The number of an option whose slope NEG is: probability; log-probability; or logit-difference, "
        "its logit less the largest of the prompt's other options.",
    )
    confusion: bool = Field(False, description="Also count which option was answered for which.")

    train_samples: int = Field(
        0,
        ge=0,
        description="Also fit Polar- and Magn-like probes on so many samples of the training rows, valid and test as "
        "they are: how much accuracies depend on the rows drawn. By default bootstrap samples.",
    )
    sample_rows: int | None = Field(
        None,
        ge=1,
        description="Rows of each of these samples, drawn without replacement as --limit draws them, under the seed of "
        "the run and those after it. Nothing is measured again.",
    )

    controls: int = Field(
        0,
        ge=0,
        description="Also fit every probe on so many permutations of the right answers, and on the same model with "
        "random weights: how much of an accuracy needs neither answers nor training.",
    )

    certify: int = Field(
        0,
        ge=0,
        description="Also sweep so many random neurons of each layer, and state how many of all others can have a "
        "large NEG that the estimate misses, at 95 % confidence; see docs/analyses.md.",
    )
    certify_rows: int = Field(8, ge=1, description="Random test rows in which they are swept.")
    missed_above: PositiveFloat | None = Field(
        None,
        description="Measured |NEG| that must not be missed. By default what 1 % of the estimates are above.",
    )
    missed_below: PositiveFloat | None = Field(
        None, description="A neuron is missed if its estimate is below this. By default half of missed_above."
    )

    not_science = _PromptedRun.not_science | {
        "confusion",
        "train_samples",
        "sample_rows",
        "controls",
        "certify",
        "certify_rows",
        "missed_above",
        "missed_below",
    }

    @property
    def science(self) -> dict[str, Any]:
        science = super().science
        if self.target == DEFAULT_TARGET:
            del science["target"]
        return science

    @model_validator(mode="after")
    def _check_storage(self) -> Self:
        for name in self.probe:
            if name.endswith("-logistic") and not self.level.has_values:
                raise ValueError(
                    f"probe {name!r} reads values, not {self.storage}: leave it out, or set storage to values"
                )
            if name == "act" and not self.level.has_all_neurons:
                raise ValueError(
                    f"probe {name!r} reads the activations of all neurons, which storage {self.storage!r} does not "
                    "keep: leave it out, or set storage to values or codes"
                )
        return self

    @model_validator(mode="after")
    def _check_certify(self) -> Self:
        if self.certify and not (self.level.has_values and self.level.has_all_neurons):
            raise ValueError(
                f"certify compares values of all neurons, which storage {self.storage!r} does not keep: set storage to "
                "values or bfloat16"
            )
        for name in _OF_CERTIFICATES:
            if not self.certify and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for certificates: set certify, or leave {name} out")
        return self

    @model_validator(mode="after")
    def _check_controls(self) -> Self:
        if self.controls and not self.level.has_all_neurons:
            raise ValueError(
                f"controls rank neurons by permuted answers, for which storage {self.storage!r} keeps no rows: set "
                "storage to values, bfloat16 or codes"
            )
        if self.controls and self.random_weights is not None:
            raise ValueError("controls compare with random weights, which this run has itself: leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_train_samples(self) -> Self:
        if self.train_samples == 1:
            raise ValueError("train_samples is 1, and one sample has no spread: set it to 2 or more, or to 0")
        if self.train_samples and not self.level.has_all_neurons:
            raise ValueError(
                f"train_samples draws training rows, which storage {self.storage!r} does not keep: set storage to "
                "values, bfloat16 or codes"
            )
        if self.sample_rows and not self.train_samples:
            raise ValueError(
                f"sample_rows is {self.sample_rows}, but no samples are drawn: set train_samples to their number"
            )
        if self.train_samples and not any(name in _VOTES for name in self.probe):
            raise ValueError(f"train_samples is for the probes {', '.join(_VOTES)}: add one of them, or leave it out")
        return self


class SkillRun(_ProbedRun):
    """Extract NEGs and probe them.

    Example: `neg pipeline --model smollm2-135m --dataset mceval8k/agnews --limit 200 --shots 1`

    The run directory holds run.yaml; `neg pipeline DIR/run.yaml` repeats the run and computes only what is missing.
    """

    kind: Literal["pipeline"] = "pipeline"

    shots: Literal[0, 1] = Field(0, description="Demonstrations in front of a question: none, or one of each class.")
    demonstrations: int = Field(
        0, ge=0, description="Which sample of demonstrations: 0, 1, ... are other training rows each."
    )

    @property
    def dataset_runs(self) -> "tuple[SkillRun, ...]":
        return (self,)

    @property
    def with_control(self) -> "tuple[SkillRun, ...]":
        """The run, and behind it the same with random weights if it has controls, in a folder below it."""
        if not self.controls:
            return (self,)
        without: dict[str, Any] = {
            "controls": 0,
            "train_samples": 0,
            "sample_rows": None,
            "confusion": False,
            "certify": 0,
        }
        without |= {name: type(self).model_fields[name].default for name in _OF_CERTIFICATES}
        place = {"out": self.directory / RANDOM_FOLDER, "random_weights": abs(self.seed)}
        return self, self.model_copy(update=without | place)

    def prompts(self, dataset: str) -> PromptSettings:
        """Return how the rows of one dataset, named as in `dataset`, become prompts."""
        wording = wording_for(self.wording, dataset)
        return PromptSettings(
            shots=self.shots,
            demonstrations=self.demonstrations,
            wording=wording if isinstance(wording, str) else wording.wording(),
            prompt_format=self.prompt_format,
            system_prompt=self.system_prompt,
            seed=self.seed,
            limit=self.limit,
            eval_limit=self.eval_limit,
            split_policy=self.split_policy,
            unreadable=self.unreadable,
            permutations=self.permutations,
            answers=self.answers,
        )


class EvaluationRun(_ProbedRun):
    """Evaluate probes on all 22 datasets of MCEval8K, without demonstrations and with one of each class.

    Example: `neg mceval8k --model smollm2-135m --mceval8k data/MCEval8K --limit 200 --out runs/mceval8k`

    DIR holds the tables (accuracy, averages, splits) as Arrow files, DIR/shots-0 and DIR/shots-1 the NEGs and the
    fitted probes. A dataset that cannot be used is left out and named at the end; the exit code is then 1.
    `neg mceval8k DIR/run.yaml` repeats the run and computes only what is missing.
    """

    kind: Literal["mceval8k"] = "mceval8k"

    dataset: Several[str] = Field(
        tuple(SPECS),
        description="Dataset, to leave out the others. By default all 22 of MCEval8K. Repeatable.",
    )
    shots: Several[Annotated[Literal[0, 1], BeforeValidator(_digit)]] = Field(
        (0, 1), description="Demonstrations in front of a question: 0, or 1 of each class. Repeatable."
    )
    probe: Several[ProbeName] = Field(
        ("polar", "magn", "act", "tree"),
        description=f"Probe beside LM-Prob: {', '.join(get_args(ProbeName))}. Repeatable.",
    )

    skips_unusable_datasets: ClassVar[bool] = True

    @property
    def dataset_runs(self) -> tuple[SkillRun, ...]:
        return self.settings

    @property
    def settings(self) -> tuple[SkillRun, ...]:
        """A run for each number of demonstrations, in a folder of its own below this one's."""
        shared = self.shared_with(_ProbedRun)
        return tuple(
            SkillRun(**shared | {"shots": shots, "out": self.directory / f"shots-{shots}"})
            for shots in dict.fromkeys(self.shots)
        )


VoteProbe = Literal["polar", "magn"]
Variant = Literal["wording", "shots", "demonstrations"]


class Condition(NamedTuple):
    """One way to ask a dataset's questions."""

    folder: str
    """The directory of its NEGs, below the run directory."""
    name: str
    """The name that people read."""
    run: SkillRun


class SkillsRun(_PromptedRun):
    """Analyse skill neurons: how many are enough, how far they carry over, which are shared, what they cause.

    Example: `neg skills --model smollm2-135m --dataset mini/fact --dataset mini/nli --limit 60 --out runs/skills`

    Every dataset is asked in several ways, so the NEGs of each are extracted: DIR/main, DIR/wording, DIR/shots and
    DIR/demonstrations. Tables and figures are in DIR/skills. Rankings are shown with their causal check only: the
    effect of shifting the best, random and last neurons. `neg skills DIR/run.yaml` computes only what is missing.
    """

    kind: Literal["skills"] = "skills"

    shots: Literal[0, 1] = Field(0, description="Demonstrations in front of a question: none, or one of each class.")
    variant: Several[Variant] = Field(
        get_args(Variant),
        description="Other way to ask, to see how far probes carry over: wording, shots, demonstrations. Repeatable.",
    )
    probe: Several[VoteProbe] = Field(
        get_args(VoteProbe), description="Probe whose ranking of the neurons is analysed: polar, magn. Repeatable."
    )
    top: Several[Annotated[int, Field(ge=1)]] = Field(
        (16, 256, 4096), description="So many of the best neurons are the skill neurons. Repeatable."
    )
    shift: Several[PositiveFloat] = Field(
        (0.5, 2.0),
        description="Shift of the skill neurons towards and away from the gold option, in units of activation. "
        "Repeatable.",
    )
    draws: int = Field(3, ge=1, description="Random sets of neurons that the skill neurons are compared with.")
    band: int = Field(64, ge=1, description="Neurons of a band of the ranking.")
    curves: bool = Field(
        False,
        description="Also silence growing parts of each ranking, and all but these, beside random neurons: deletion "
        "and insertion curves, and circuits in MIB's terms; see docs/analyses.md.",
    )

    not_science = _PromptedRun.not_science | {"curves"}

    @model_validator(mode="before")
    @classmethod
    def _choose_variants(cls, values: Any) -> Any:
        """Leave out the other wording where a dataset has none, unless variants were asked for."""
        if not isinstance(values, dict) or values.get("variant") is not None:
            return values
        named = values.get("dataset") or ()
        if own := [one for one in ([named] if isinstance(named, str) else named) if is_own_file(one)]:
            logger.warning("the variant wording is left out: prompts of your own, as in %s, have no other", own[0])
            return values | {"variant": [one for one in get_args(Variant) if one != "wording"]}
        return values

    @model_validator(mode="after")
    def _check_wording_variant(self) -> Self:
        own = [one for one in self.dataset if is_own_file(one)]
        if own and "wording" in self.variant:
            raise ValueError(f"variant 'wording' is not for {own[0]!r}, whose prompts are ready-made: leave it out")
        return self

    @model_validator(mode="after")
    def _check_stats(self) -> Self:
        if not self.level.has_all_neurons:
            raise ValueError(
                f"storage {self.storage!r} keeps too little to analyse skill neurons: set it to values or codes"
            )
        if self.curves and not self.level.has_values:
            raise ValueError(
                f"curves match neurons by their NEG's size, which storage {self.storage!r} does not keep: set storage "
                "to values or bfloat16"
            )
        return self

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The ways to ask, the main one first: a run for each, in a folder of its own below this one's."""
        other_wording = "default" if self.wording == "inline" else "inline"
        ways: dict[str, tuple[str, dict[str, Any]]] = {
            "main": (f"{_SHOTS[self.shots]}", {}),
            "wording": (f"{_SHOTS[self.shots]}, {other_wording}", {"wording": other_wording}),
            "shots": (_SHOTS[1 - self.shots], {"shots": 1 - self.shots}),
            "demonstrations": ("one-shot, others", {"shots": 1, "demonstrations": 1}),
        }
        return tuple(
            Condition(folder, name, self._asked(folder, **change))
            for folder, (name, change) in ways.items()
            if folder in ("main", *self.variant)
        )

    @property
    def dataset_runs(self) -> tuple[SkillRun, ...]:
        return tuple(condition.run for condition in self.conditions)

    def _asked(self, folder: str, **change: Any) -> SkillRun:
        own = {"shots": self.shots, "probe": self.probe, "out": self.directory / folder}
        return SkillRun(**self.shared_with(_PromptedRun) | own | change)


_SHOTS = ("zero-shot", "one-shot")
