"""The run file: everything that a run depends on, validated, written into its run directory, and replayed from there.

Every field is also an option of the command line: its description is the option's help.
"""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from negcore.architectures import Dtype, SiteChoice
from negcore.datasets import PromptSettings
from negcore.errors import RunError
from negcore.identity import content_digest
from tasks.pool import Resources

RUN_FILE = "run.yaml"

ProbeName = Literal["polar", "magn"]
Several = Field(min_length=1)


class RunFile(BaseModel):
    """What every run has: models, how they are computed, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[tuple[str, ...], Several] = Field(
        description="Model: Hugging Face id (org/name[@revision]), folder, .gguf file or smollm2-135m. Repeatable."
    )
    out: Path | None = Field(
        None, description="Run directory. By default runs/NAME, named after what decides the numbers."
    )
    site: SiteChoice = Field("paper", description="Which vector's coordinates are the neurons.")
    dtype: Dtype = Field("float32", description="Number type of the model. Half types lose signs of small gradients.")
    seed: int = Field(0, description="Decides samples, demonstrations and their order.")

    device: str | None = Field(None, description="Torch device. By default the first GPU, else the CPU.")
    backend: Literal["ray", "local"] = Field("ray", description="Where workers run: Ray actors, or this process.")
    workers: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        description="Ray actors a model. By default one a core.",
    )
    cpus: int = Field(1, ge=1, description="Cores for each worker.")
    gpus: float = Field(0, ge=0, description="GPUs for each actor: a fraction of one, or several; 0 is the CPU.")
    job_timeout_s: float | None = Field(
        None, gt=0, description="A worker silent for so long is replaced. By default never."
    )
    ray_address: str | None = Field(None, description="Ray cluster. By default $RAY_ADDRESS, else one on this machine.")

    not_science: ClassVar[frozenset[str]] = frozenset(
        {"out", "device", "backend", "workers", "cpus", "gpus", "job_timeout_s", "ray_address"}
    )
    """Fields that never change which numbers come out."""

    @property
    def directory(self) -> Path:
        """The run directory, absolute."""
        return (self.out or Path("runs") / self.name).absolute()

    @property
    def name(self) -> str:
        """A name that is the same whenever the same numbers are asked for."""
        first = Path(self.model[0]).name.split("@")[0]
        science = self.model_dump(mode="json", exclude=set(self.not_science))
        return f"{first}-{content_digest(science)[:8]}"

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


class SkillRun(RunFile):
    """Extract the NEGs of models on datasets and probe them."""

    dataset: Annotated[tuple[str, ...], Several] = Field(
        description="Dataset: mceval8k/NAME, mini/GENRE or a .jsonl file (see `neg datasets`). Repeatable."
    )
    shots: Literal[0, 1] = Field(0, description="Demonstrations in front of a question: none, or one of each class.")
    wording: str = Field("default", description="Name of one of the dataset's wordings.")
    limit: int | None = Field(None, ge=1, description="Most rows of each split, sampled by answer. By default all.")
    split_policy: Literal["clean", "released"] = Field(
        "clean", description="clean removes rows that splits share; released leaves the files as they are."
    )
    mceval8k: Path | None = Field(None, description="Folder with MCEval8K. By default $NEG_MCEVAL8K, else the hub.")
    probe: Annotated[tuple[ProbeName, ...], Several] = Field(
        ("polar", "magn"), description="Skill-neuron probe beside LM-Prob: polar or magn. Repeatable."
    )
    max_neurons: int = Field(2**14, ge=1, description="Largest number of neurons a probe may keep.")
    shard_rows: int = Field(32, ge=1, description="Prompts in a shard: what a crash can cost.")
    batch_size: int | None = Field(None, ge=1, description="Prompts in a batch. By default chosen by length.")

    not_science = RunFile.not_science | {"mceval8k", "shard_rows", "batch_size"}

    @property
    def prompts(self) -> PromptSettings:
        return PromptSettings(
            shots=self.shots,
            wording=self.wording,
            seed=self.seed,
            limit=self.limit,
            split_policy=self.split_policy,
        )


R = TypeVar("R", bound=RunFile)


def read_run_file(kind: type[R], path: Path | None, overrides: dict[str, Any]) -> R:
    """Read a run file, with the command line's values in place of its own.

    Parameters
    ----------
    kind : subclass of RunFile
    path : Path, optional
        A YAML file of plain values, or a run directory that holds one.
    overrides : dict of field to value

    Raises
    ------
    RunError
        Naming file, field, value and what is allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        file = path / RUN_FILE if path.is_dir() else path
        values = _read_yaml(file)
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
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        draft.replace(path)
    except OSError as error:
        raise RunError(f"run directory {str(run.directory)!r} cannot be written: {error.strerror or error}") from error
    return path


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text())
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
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown field {field!r}; known are {', '.join(kind.model_fields)}"
    if problem["type"] == "missing":
        return f"{place}: {field!r} is missing; {kind.model_fields[str(problem['loc'][0])].description}"
    return f"{place}: {field} is {problem['input']!r}: {problem['msg']}"
