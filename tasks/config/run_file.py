"""The run file: everything that a run depends on, validated, written into its run directory, and replayed from there.

Every field is also an option of the command line: its description is the option's help.
"""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from negcore.datasets import PromptSettings, list_datasets
from negcore.errors import RunError
from negcore.model.architectures import Dtype, SiteChoice
from negcore.store.files import draft, is_dir, local_directory, location, read_bytes
from negcore.store.identity import StorageLevel, content_digest
from tasks.config.wordings import OwnWording, WordingChoice, check_wordings, wording_for
from tasks.pool.base import Resources

RUN_FILE = "run.yaml"

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
EstimatorName = Literal[
    "neurgrad",
    "gradient",
    "gradient_x_activation",
    "integrated_gradients",
    "log_probability_increase",
    "ablation",
]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Several = Field(min_length=1)


def _digit(value: Any) -> Any:
    """The command line gives numbers as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _count_or_all(value: Any) -> Any:
    """A union's own message would name the types of its members."""
    number = _digit(value)
    if value != "all" and (not isinstance(number, int) or number < 1):
        raise ValueError("give a whole number from 1, or 'all'")
    return number


def _location(value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str) and not hasattr(value, "joinpath"):
        raise ValueError("give a directory, or s3://BUCKET/PREFIX")
    return location(value)


Location = Annotated[
    Path | None,
    PlainValidator(_location, json_schema_input_type=str | None),
    PlainSerializer(lambda value: None if value is None else str(value), when_used="json"),
]
"""A directory on disk, or in a bucket."""


class RunFile(BaseModel):
    """What every run has: models, how they are computed, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[tuple[str, ...], Several] = Field(
        description="Model: Hugging Face id (org/name[@revision]), folder, .gguf file or smollm2-135m. Repeatable."
    )
    out: Location = Field(
        None,
        description="Run directory, or s3://BUCKET/PREFIX. By default runs/NAME, named after what decides the numbers.",
    )
    site: SiteChoice = Field("paper", description="Which vector's coordinates are the neurons.")
    dtype: Dtype = Field("float32", description="Number type of the model. Half types lose signs of small gradients.")
    seed: int = Field(0, description="Decides samples, demonstrations and their order.")
    nonfinite: Literal["fail", "skip", "keep"] = Field(
        "fail",
        description="NaN or infinity in a row's numbers: fail its shard, skip the row, or keep it (no probe reads it).",
    )

    device: str | None = Field(None, description="Torch device. By default the first GPU, else the CPU.")
    backend: Literal["ray", "local"] = Field("ray", description="Where workers run: Ray actors, or this process.")
    workers: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        description="Ray actors a model. By default one a core.",
    )
    cpus: int = Field(1, ge=1, description="Cores for each worker.")
    gpus: float = Field(
        0, ge=0, le=1, description="Share of a GPU for each actor, up to a whole one: a model is on one device. 0: CPU."
    )
    job_timeout_s: float | None = Field(
        None, gt=0, description="A worker silent for so long is replaced. By default never."
    )
    ray_address: str | None = Field(None, description="Ray cluster. By default $RAY_ADDRESS, else one on this machine.")

    not_science: ClassVar[frozenset[str]] = frozenset(
        {"out", "nonfinite", "device", "backend", "workers", "cpus", "gpus", "job_timeout_s", "ray_address"}
    )
    """Fields that never change which numbers come out."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def directory(self) -> Path:
        """The run directory, absolute."""
        return (self.out or Path("runs") / self.name).absolute()

    @property
    def local_directory(self) -> Path:
        """The run directory; of one in a bucket, the one on this machine for what needs local files."""
        return local_directory(self.directory)

    @property
    def name(self) -> str:
        """A name that is the same whenever the same numbers are asked for."""
        first = Path(self.model[0]).name.split("@")[0]
        return f"{first}-{content_digest(self.science)[:8]}"

    @property
    def science(self) -> dict[str, Any]:
        """What decides the numbers, as plain JSON values."""
        return self.model_dump(mode="json", exclude=set(self.not_science))

    @property
    def worker_device(self) -> str | None:
        """Device of a worker; `None` is the first GPU, else the CPU.

        Ray shows every GPU to an actor that has none reserved: such an actor must not take one by itself.
        """
        return self.device or ("cpu" if self.backend == "ray" and self.gpus == 0 else None)

    @property
    def resources(self) -> Resources:
        return Resources(
            workers=self.workers,
            cpus=self.cpus,
            gpus=self.gpus,
            job_timeout_s=self.job_timeout_s,
            address=self.ray_address,
        )


class _PromptedRun(RunFile):
    """What runs on datasets have in common."""

    wording: WordingChoice = Field(
        "default", description="Name of one of the dataset's wordings; in a run file also your own, see the README."
    )
    limit: int | None = Field(None, ge=1, description="Most rows of each split, sampled by answer. By default all.")
    eval_limit: int | None = Field(
        None, ge=1, description="Most rows of the valid and of the test split. By default as --limit."
    )
    split_policy: Literal["clean", "released"] = Field(
        "clean", description="clean removes rows that splits share; released leaves the files as they are."
    )
    mceval8k: Path | None = Field(None, description="Folder with MCEval8K. By default $NEG_MCEVAL8K, else the hub.")
    max_neurons: int = Field(2**14, ge=1, description="Largest number of neurons a probe may keep.")
    tree_neurons: int = Field(
        2**13, ge=1, description="Neurons the forest reads, best first by Magn's score: 5 bytes x training rows each."
    )
    shard_rows: int = Field(32, ge=1, description="Prompts in a shard: what a crash can cost.")
    batch_size: int | None = Field(None, ge=1, description="Prompts in a batch. By default chosen by length.")
    storage: StorageLevel = Field(
        "values",
        description="What is kept of NEGs: values; bfloat16 (values and activations in half the room: their range, "
        "and 2 to 3 digits); codes (16 bits for order and signs of up to 5 options; every "
        "probe but logistic regression gives the same); or stats (vote sums, and in a second pass the values of the "
        "neurons that the run's probes choose; every probe but act gives the same).",
    )

    not_science = RunFile.not_science | {"mceval8k", "shard_rows", "batch_size"}

    @property
    def science(self) -> dict[str, Any]:
        science = super().science
        if self.storage == "values":
            del science["storage"]  # runs have the names from before there was a choice
        return science

    @model_validator(mode="after")
    def _check_nonfinite(self) -> Self:
        if self.storage in ("codes", "stats") and self.nonfinite == "keep":
            level = f"storage {self.storage!r}"
            raise ValueError(f"{level} has none for NaN and infinity: set nonfinite to fail or skip, not keep")
        return self


class _ProbedRun(_PromptedRun):
    """What runs that compare probes have in common."""

    probe: Annotated[tuple[ProbeName, ...], Several] = Field(
        ("polar", "magn"), description=f"Probe beside LM-Prob: {', '.join(get_args(ProbeName))}. Repeatable."
    )
    confusion: bool = Field(False, description="Also count which option was answered for which.")

    not_science = _PromptedRun.not_science | {"confusion"}

    @model_validator(mode="after")
    def _check_storage(self) -> Self:
        for name in self.probe:
            if self.storage == "codes" and name.endswith("-logistic"):
                raise ValueError(f"probe {name!r} reads values, not codes: leave it out, or set storage to values")
            if self.storage == "stats" and name == "act":
                raise ValueError(
                    "probe 'act' reads the activations of all neurons, which storage 'stats' does not keep: leave it "
                    "out, or set storage to values or codes"
                )
        return self


class SkillRun(_ProbedRun):
    """Extract the NEGs of models on datasets and probe them."""

    dataset: Annotated[tuple[str, ...], Several] = Field(
        description="Dataset: mceval8k/NAME, mini/GENRE or a .jsonl file (see `neg datasets`). Repeatable."
    )
    shots: Literal[0, 1] = Field(0, description="Demonstrations in front of a question: none, or one of each class.")
    demonstrations: int = Field(
        0, ge=0, description="Which sample of demonstrations: 0, 1, ... are other training rows each."
    )

    @model_validator(mode="after")
    def _check(self) -> "SkillRun":
        check_wordings(self.wording, self.dataset)
        return self

    def prompts(self, dataset: str) -> PromptSettings:
        """How the rows of one dataset, named as in `dataset`, become prompts."""
        wording = wording_for(self.wording, dataset)
        return PromptSettings(
            shots=self.shots,
            demonstrations=self.demonstrations,
            wording=wording if isinstance(wording, str) else wording.wording(),
            seed=self.seed,
            limit=self.limit,
            eval_limit=self.eval_limit,
            split_policy=self.split_policy,
        )


class EvaluationRun(_ProbedRun):
    """Evaluate probes on MCEval8K: every dataset, without and with demonstrations."""

    dataset: Annotated[tuple[str, ...], Several] = Field(
        tuple(info.name for info in list_datasets() if info.name.startswith("mceval8k/")),
        description="Dataset, to leave out the others. By default all 22 of MCEval8K. Repeatable.",
    )
    shots: Annotated[tuple[Annotated[Literal[0, 1], BeforeValidator(_digit)], ...], Several] = Field(
        (0, 1), description="Demonstrations in front of a question: 0, or 1 of each class. Repeatable."
    )
    probe: Annotated[tuple[ProbeName, ...], Several] = Field(
        ("polar", "magn", "act", "tree"),
        description=f"Probe beside LM-Prob: {', '.join(get_args(ProbeName))}. Repeatable.",
    )

    @model_validator(mode="after")
    def _check(self) -> "EvaluationRun":
        check_wordings(self.wording, self.dataset)
        return self

    @property
    def settings(self) -> tuple[SkillRun, ...]:
        """A run for each number of demonstrations, in a folder of its own below this one's."""
        shared = {name: getattr(self, name) for name in _ProbedRun.model_fields if name != "out"}
        return tuple(
            SkillRun(**shared, dataset=self.dataset, shots=shots, out=self.directory / f"shots-{shots}")
            for shots in dict.fromkeys(self.shots)
        )


VoteProbe = Literal["polar", "magn"]
Variant = Literal["wording", "shots", "demonstrations"]


class Condition(NamedTuple):
    """One way to ask a dataset's questions."""

    folder: str
    """Where its NEGs are, below the run directory."""
    name: str
    """What it is, for people."""
    run: SkillRun


class SkillsRun(_PromptedRun):
    """Analyse the skill neurons of models on datasets."""

    dataset: Annotated[tuple[str, ...], Several] = Field(
        description="Dataset: mceval8k/NAME, mini/GENRE or a .jsonl file (see `neg datasets`). Repeatable."
    )
    shots: Literal[0, 1] = Field(0, description="Demonstrations in front of a question: none, or one of each class.")
    variant: Annotated[tuple[Variant, ...], Several] = Field(
        get_args(Variant),
        description="What is asked otherwise too, to see how far probes carry over: wording, shots, demonstrations. "
        "Repeatable.",
    )
    probe: Annotated[tuple[VoteProbe, ...], Several] = Field(
        get_args(VoteProbe), description="Probe whose ranking of the neurons is analysed: polar, magn. Repeatable."
    )
    top: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Several] = Field(
        (16, 256, 4096), description="So many of the best neurons are the skill neurons. Repeatable."
    )
    shift: Annotated[tuple[PositiveFloat, ...], Several] = Field(
        (0.5, 2.0),
        description="Shift of the skill neurons towards and away from the gold option, in units of activation. "
        "Repeatable.",
    )
    draws: int = Field(3, ge=1, description="Random sets of neurons that the skill neurons are compared with.")
    band: int = Field(64, ge=1, description="Neurons of a band of the ranking.")

    @model_validator(mode="after")
    def _check(self) -> "SkillsRun":
        if self.storage == "stats":
            raise ValueError("storage 'stats' keeps too little to analyse skill neurons: set it to values or codes")
        check_wordings(self.wording, self.dataset)
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

    def _asked(self, folder: str, **change: Any) -> SkillRun:
        shared = {name: getattr(self, name) for name in (*_PromptedRun.model_fields, "dataset", "shots", "probe")}
        return SkillRun(**(shared | change | {"out": self.directory / folder}))


_SHOTS = ("zero-shot", "one-shot")


class LinearityRun(RunFile):
    """Measure NEGs by sweeps and compare every estimator with them."""

    facts: str = Field(
        "mini/facts",
        description="Single-answer facts: mini/facts, or a .feather, .parquet or .jsonl file in MyriadLAMA's form, "
        "on disk or hf://datasets/ORG/NAME/FILE.",
    )
    prompts: int = Field(30, ge=1, description="Prompts, a sample of whole facts: a fact comes in all its wordings.")
    neurons: Annotated[int | Literal["all"], BeforeValidator(_count_or_all)] = Field(
        600,
        description="Neurons that are swept in every prompt, as many in each layer, drawn once at random; or all.",
    )
    range: Annotated[tuple[PositiveFloat, ...], Several] = Field(
        (0.5, 1.0, 2.0, 5.0, 10.0),
        description="Range of shifts, from minus to plus so many units of activation. Repeatable.",
    )
    points: int = Field(
        5, ge=2, description="Shifts on each side of zero in a range, evenly spaced; a range has the smaller ones' too."
    )
    estimator: Annotated[tuple[EstimatorName, ...], Several] = Field(
        get_args(EstimatorName), description="Estimator to compare with the sweep. Repeatable."
    )
    set_shift: Annotated[tuple[PositiveFloat, ...], Several] = Field(
        (0.5, 1.0, 2.0), description="Shift of neurons that are shifted together, in units of activation. Repeatable."
    )
    largest_set: int = Field(
        4096, ge=1, description="Most neurons shifted together: sets hold 1, 2, 4... up to it or all of the model."
    )
    draws: int = Field(4, ge=1, description="Random sets of each size.")
    bootstrap: int = Field(1000, ge=1, description="Samples of prompts behind the 95 % intervals.")
    shard_prompts: int = Field(5, ge=1, description="Prompts in a shard: with block-layers, what a crash can cost.")
    block_layers: int = Field(5, ge=1, description="Layers that are swept together.")

    not_science = RunFile.not_science | {"shard_prompts", "block_layers"}

    @property
    def main_range(self) -> float:
        """The range nearest to the paper's +-2: tables that need one range are about it."""
        return min(self.range, key=lambda largest: abs(largest - 2))


StageName = Literal["mceval8k", "linearity", "skills"]
StageFields = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
"""Fields of a stage's own run, by name; in YAML also nothing behind the colon."""

_STAGE_RUNS: dict[StageName, type[RunFile]] = {
    "mceval8k": EvaluationRun,
    "linearity": LinearityRun,
    "skills": SkillsRun,
}


class CampaignPart(NamedTuple):
    """One stage of a campaign with one model."""

    model: str
    folder: str
    """Of the model's runs, below the campaign's directory: a name that no other of its models has."""
    stage: StageName
    run: RunFile


class CampaignRun(RunFile):
    """Take several models through several stages and compare them."""

    stage: Annotated[tuple[StageName, ...], Several] = Field(
        ("mceval8k", "linearity"),
        description="What is done with every model: mceval8k, linearity, skills. Repeatable.",
    )
    mceval8k: StageFields = Field({}, description="Options of `neg mceval8k`, as a mapping.")
    linearity: StageFields = Field({}, description="Options of `neg linearity`, as a mapping.")
    skills: StageFields = Field({}, description="Options of `neg skills`, as a mapping.")

    @model_validator(mode="after")
    def _check(self) -> "CampaignRun":
        for stage in _STAGE_RUNS:
            if stage in self.stage or getattr(self, stage):
                self._stage_run(stage, self.model[0], None)
        return self

    @property
    def name(self) -> str:
        names = [self._stage_run(stage, model, None).name for model in self.folders for stage in self.stage]
        return f"campaign-{content_digest(names)[:8]}"

    @property
    def folders(self) -> dict[str, str]:
        """The folder of each model's runs: the last part of its name, and a digest behind it where that is taken."""
        folders: dict[str, str] = {}
        for model in dict.fromkeys(self.model):
            folder = Path(model).name
            is_taken = folder in _RESERVED_FOLDERS or folder in folders.values()
            folders[model] = f"{folder}-{content_digest(model)[:8]}" if is_taken else folder
        return folders

    @property
    def parts(self) -> tuple[CampaignPart, ...]:
        """Every stage with every model, each a run in a directory of its own, in the order they are carried out."""
        return tuple(
            CampaignPart(model, folder, stage, self._stage_run(stage, model, self.directory / folder / stage))
            for model, folder in self.folders.items()
            for stage in dict.fromkeys(self.stage)
        )

    def _stage_run(self, stage: StageName, model: str, out: Path | None) -> RunFile:
        kind, fields = _STAGE_RUNS[stage], getattr(self, stage)
        known = [name for name in kind.model_fields if name not in _OF_WHOLE_CAMPAIGN]
        for name in fields:
            if name in _OF_WHOLE_CAMPAIGN:
                raise ValueError(f"{stage}: {name!r} holds for the whole campaign: give it beside {stage!r}, not in it")
            if name not in known:
                raise ValueError(f"{stage}: unknown field {name!r}; known are {', '.join(known)}")
        shared = {name: getattr(self, name) for name in RunFile.model_fields}
        try:
            return kind.model_validate(shared | fields | {"model": (model,), "out": out})
        except ValidationError as error:
            raise ValueError(_first_problem(kind, error, stage)) from None


_OF_WHOLE_CAMPAIGN = RunFile.model_fields.keys() - {"nonfinite"}
"""Fields that no stage may set for itself."""

_RESERVED_FOLDERS = frozenset({"", "..", "campaign", "prefect"})
"""No names for a model's folder: what else is in a campaign's directory, and what is none of it."""


R = TypeVar("R", bound=RunFile)


def read_run_file(kind: type[R], path: str | Path | None, overrides: dict[str, Any]) -> R:
    """Read a run file, with the command line's values in place of its own.

    Parameters
    ----------
    kind : subclass of RunFile
    path : path, optional
        A YAML file of plain values, or a run directory that holds one; on disk or ``s3://BUCKET/...``.
    overrides : dict of field to value

    Raises
    ------
    RunError
        Naming file, field, value and what is allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        place = location(path)
        values = _read_yaml(place / RUN_FILE if is_dir(place) else place)
    try:
        return kind.model_validate(values | overrides)
    except ValidationError as error:
        raise RunError(_first_problem(kind, error, str(path) if path else "command line")) from None


def write_run_file(run: RunFile) -> Path:
    """Write the run file into the run directory, so that the same command on DIR/run.yaml repeats it.

    Raises
    ------
    RunError
        If the directory cannot be written.
    """
    absolute = run.model_copy(update={"out": run.directory})
    values = absolute.model_dump(mode="json", exclude_none=True)
    path = run.directory / RUN_FILE
    try:
        with draft(path) as file:
            file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise RunError(f"run directory {str(run.directory)!r} cannot be written: {error.strerror or error}") from error
    return path


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_bytes(file).decode("utf-8"))
    except OSError as error:
        raise RunError(f"run file {str(file)!r} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"run file {str(file)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RunError(f"run file {str(file)!r} must hold a mapping of fields, but holds {type(values).__name__}")
    return values


def _first_problem(kind: type[RunFile], error: ValidationError, place: str) -> str:
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    known = OwnWording.model_fields if problem["loc"][:1] == ("wording",) else kind.model_fields
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown field {field!r}; known are {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{place}: {field!r} is missing; {known[str(problem['loc'][-1])].description}"
    if not field:  # fields that contradict each other
        return f"{place}: {problem['msg'].removeprefix('Value error, ')}"
    return f"{place}: {field} is {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}"
