"""The run file: everything that a run depends on, validated, written into its run directory, and replayed from there.

Every field is also an option of the command line: its description is the option's help. The docstring of a kind of run
file is the help of its command.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_validator,
)

from negcore.errors import RunError
from negcore.model.architectures import DeviceMap, Dtype, Router, SiteChoice
from negcore.model.references import folder_name, model_names, whole_references, with_adapter
from negcore.store.files import draft, local_directory, location, shortened
from negcore.store.identity import content_digest
from tasks.config.provenance import written_by
from tasks.pool.base import Resources

RUN_FILE = "run.yaml"

FORMAT: Literal[1] = 1
"""Version of the form of run files: raised when an older version of this package could misread a new file."""

FORMER_KEYS = {"shard_rows": "shard_prompts"}
"""Second names of fields, which earlier run files use, by the present names."""

T = TypeVar("T")


def _as_list(value: Any) -> Any:
    return value if value is None or isinstance(value, (list, tuple)) else [value]


Several = Annotated[tuple[T, ...], BeforeValidator(_as_list), Field(min_length=1)]
"""One or more values; in a run file, one value may stand without brackets."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _count_or_all(value: Any) -> Any:
    """Return a number, or "all"; a union's own message would name the types of its members."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if value != "all" and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise ValueError("give a whole number from 1, or 'all'")
    return number


CountOrAll = Annotated[int | Literal["all"], BeforeValidator(_count_or_all)]
"""A whole number from 1, or "all"."""


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


def _node_label(text: str) -> str:
    name, _, value = text.partition("=")
    if not re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9.-]*/)?[A-Za-z0-9][\w.-]*", name) or not re.fullmatch(
        r"[\w.-]+", value
    ):
        raise ValueError(f"{text!r:.80} is no label of a node: give NAME=VALUE, as in ray.io/accelerator-type=H100")
    return text


NodeLabel = Annotated[str, AfterValidator(_node_label)]
"""A label of a Ray node, ``NAME=VALUE``."""


def _gpus(count: float | None) -> float | None:
    if count is not None and count > 1 and count != int(count):
        raise ValueError(f"{count} is not allowed: a worker takes a share of one GPU, or a whole number of GPUs")
    return count


def _device_map(wanted: Any) -> Any:
    if isinstance(wanted, str) and wanted not in ("cpu", "disk"):
        raise ValueError(f"{wanted!r} is not allowed: cpu, disk or, in a run file, a device for each part of the model")
    return wanted


Gpus = Annotated[float | None, Field(ge=0, le=64), AfterValidator(_gpus)]
"""GPUs of a worker; `None` is chosen when the run starts."""


class RunFile(BaseModel):
    """The fields of every run: models, how they are computed, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    kind: str = Field("", description="Kind of the run: the name of the command that it is for.")
    format: Literal[1] = Field(FORMAT, description="Version of the run file's form.")

    model: Several[str] = Field(
        description="Model: Hugging Face id (org/name[@revision]; @REVISION alone is one more of the model before it), "
        "folder, .gguf file or smollm2-135m. Repeatable."
    )
    adapter: str | None = Field(
        None, description="Folder of a PEFT adapter (adapter_model.safetensors) that is merged into the model."
    )
    out: Location = Field(
        None,
        description="Run directory, or s3://BUCKET/PREFIX. By default runs/NAME, named after what decides the numbers.",
    )
    site: SiteChoice = Field("paper", description="Which vector's coordinates are the neurons.")
    dtype: Dtype = Field(
        "float32",
        description="Number type of the model. Half types lose signs of small NEGs; sweeps compute in float32 anyway.",
    )
    router: Router = Field(
        "through",
        description="In a mixture of experts, whether a shift moves the routing of later layers (through, as in the "
        "model as it is) or leaves it as it was (fixed): see docs/experts.md.",
    )
    seed: int = Field(0, description="Decides samples, demonstrations and their order.")
    random_weights: int | None = Field(
        None,
        ge=0,
        description="Give the model weights as before any training, drawn with this seed: a control.",
    )
    nonfinite: Literal["fail", "skip", "keep"] = Field(
        "fail",
        description="NaN or infinity in a row's numbers: fail its shard, skip the row, or keep it (no probe reads it).",
    )

    device: str | None = Field(None, description="Torch device. By default the first GPU, else the CPU.")
    backend: Literal["ray", "local"] = Field("ray", description="Where workers run: Ray actors, or this process.")
    workers: int | None = Field(
        None, ge=1, description="Ray actors a model. By default as many as GPUs, or else cores and memory, allow."
    )
    cpus: int = Field(1, ge=1, le=1024, description="Cores for each worker.")
    gpus: Gpus = Field(
        None,
        description="GPUs of each actor, or a share of one; over several the model is spread. 0: CPU. By default one, "
        "if there are any.",
    )
    device_map: Annotated[str | dict[str, str | int] | None, AfterValidator(_device_map)] = Field(
        None,
        description="cpu or disk: where the blocks' weights wait, to pass through the device. In a run file also a "
        "device for each part of the model by its path.",
    )
    job_timeout_s: float | None = Field(
        None, gt=0, description="A worker silent for so long is replaced. By default never."
    )
    ray_address: str | None = Field(None, description="Ray cluster. By default $RAY_ADDRESS, else one on this machine.")
    node_label: Annotated[tuple[NodeLabel, ...], BeforeValidator(_as_list)] = Field(
        (), description="Label of the Ray nodes that workers run on, NAME=VALUE, as an accelerator's kind. Repeatable."
    )
    wait_for_nodes: bool = Field(
        False, description="Wait without limit for nodes of a cluster that grows. Deployed and served runs always do."
    )

    not_science: ClassVar[frozenset[str]] = frozenset(
        {
            "kind",
            "format",
            "out",
            "nonfinite",
            "device",
            "device_map",
            "backend",
            "workers",
            "cpus",
            "gpus",
            "job_timeout_s",
            "ray_address",
            "node_label",
            "wait_for_nodes",
        }
    )
    """Fields that never change which numbers come out."""
    skips_unusable_datasets: ClassVar[bool] = False
    """True for runs that go on without a dataset that cannot be used."""

    @model_validator(mode="before")
    @classmethod
    def _check_form(cls, values: Any) -> Any:
        """Leave out who wrote the file, read former keys, and refuse another form before any field is looked at."""
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if key != "written_by"}
        for key in FORMER_KEYS.keys() & cls.model_fields.keys():
            if FORMER_KEYS[key] in values:
                values.setdefault(key, values.pop(FORMER_KEYS[key]))
        cls._check_truth_values(values)
        if values.get("format", FORMAT) != FORMAT:
            raise ValueError(
                f"format is {values['format']!r}, but this version of neg reads {FORMAT} only: use the version that "
                "the file names under written_by, or write the file anew"
            )
        return values

    @field_validator("model")
    @classmethod
    def _write_revisions_out(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        return whole_references(given)

    @classmethod
    def _check_truth_values(cls, values: dict[str, Any]) -> None:
        """Refuse true and false where something else is wanted: they would be taken for the numbers 1 and 0."""
        wanted = {field.alias or name for name, field in cls.model_fields.items() if field.annotation is not bool}
        for name in values.keys() & wanted:
            for value in values[name] if isinstance(values[name], (list, tuple)) else [values[name]]:
                if isinstance(value, bool):
                    raise ValueError(
                        f"{name} is {str(value).lower()}, but is neither true nor false; YAML reads yes, no, on and "
                        "off so: put text in quotes"
                    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @classmethod
    def key_descriptions(cls) -> dict[str, str]:
        """Return what may stand in a run file of this kind, and its description."""
        return field_keys(cls)

    @property
    def directory(self) -> Path:
        """The run directory, absolute."""
        return (self.out or Path("runs") / self.name).absolute()

    @property
    def local_directory(self) -> Path:
        """The run directory; for a run in a bucket, the directory on this machine that holds its local files."""
        return local_directory(self.directory)

    @property
    def name(self) -> str:
        """A name that is the same whenever the same numbers are asked for."""
        first = shortened(folder_name(self.model[0]).split("@")[0])
        return f"{first}-{content_digest(self.science)[:8]}"

    @property
    def science(self) -> dict[str, Any]:
        """The fields that decide the numbers, as plain JSON values."""
        # Names are as before there was a choice.
        known = {"adapter": None, "random_weights": None, "router": "through"}
        defaults = {name for name, value in known.items() if getattr(self, name) == value}
        return self.model_dump(mode="json", exclude={*self.not_science, *defaults})

    @property
    def model_refs(self) -> tuple[str, ...]:
        """References of the models as they are measured: with the adapter, if there is one."""
        return tuple(with_adapter(ref, self.adapter) for ref in self.model)

    @property
    def model_names(self) -> dict[str, str]:
        """Names of the models in every output, by these references: those of several revisions of one model differ."""
        return model_names(self.model_refs)

    @property
    def subjects(self) -> tuple[str, ...]:
        """The names of what every model is measured on."""
        return ()

    @property
    def dataset_runs(self) -> tuple[Any, ...]:
        """The `SkillRun`s that this run is made of: `neg plan` foresees them."""
        return ()

    @property
    def worker_device(self) -> str | None:
        """Device of a worker; `None` is the first GPU, else the CPU.

        Ray shows every GPU to an actor that has none reserved: such an actor must not take one by itself. GPUs are
        chosen when the run starts, by `tasks.forecast.workers`.
        """
        return self.device or ("cpu" if self.backend == "ray" and not self.gpus else None)

    @property
    def placement(self) -> DeviceMap | None:
        """The places where a worker puts the parts of its model; `None` is one device."""
        given: Any = self.device_map  # checked above
        return given or ("auto" if (self.gpus or 0) > 1 else None)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `negcore.load_model` for the run's models, besides the model."""
        return {
            "dtype": self.dtype,
            "device": self.worker_device,
            "site": self.site,
            "router": self.router,
            "device_map": self.placement,
        }

    @property
    def resources(self) -> Resources:
        """The processes, cores and GPUs of the run's workers.

        A worker on a GPU writes a shard while it measures the next; on a CPU the one would take the other's cores.
        """
        return Resources(
            workers=self.workers or 1,
            cpus=self.cpus,
            gpus=self.gpus or 0.0,
            jobs_a_worker=1 if self.worker_device == "cpu" or self.backend == "local" else 2,
            job_timeout_s=self.job_timeout_s,
            address=self.ray_address,
            wait_for_nodes=self.wait_for_nodes,
            node_labels=tuple((name, value) for name, _, value in (one.partition("=") for one in self.node_label)),
        )

    def shared_with(self, base: "type[RunFile]") -> dict[str, Any]:
        """Return the values of the fields that another run with the same base takes over."""
        own = ("kind", "format", "out")
        return {name: getattr(self, name) for name in base.model_fields if name not in own}


def field_keys(model: type[BaseModel]) -> dict[str, str]:
    """Return the fields' descriptions, by the names that they have in a run file."""
    return {field.alias or name: field.description or "" for name, field in model.model_fields.items()}


def kind_of(run_class: type[RunFile]) -> str:
    """Return the kind that the run files of a class write."""
    return str(run_class.model_fields["kind"].default)


def write_run_file(run: RunFile) -> Path:
    """Write the run file into the run directory, so that the same command on DIR/run.yaml repeats it.

    Raises
    ------
    RunError
        If the directory cannot be written.
    """
    absolute = run.model_copy(update={"out": run.directory})
    values = absolute.model_dump(mode="json", exclude_none=True) | {"written_by": written_by()}
    path = run.directory / RUN_FILE
    try:
        with draft(path) as file:
            file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise RunError(f"run directory {str(run.directory)!r} cannot be written: {error.strerror or error}") from error
    return path
