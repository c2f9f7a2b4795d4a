"""The run file of campaigns: several models, each taken through several studies."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from negcore.model.references import folder_name
from negcore.store.files import shortened
from negcore.store.identity import content_digest
from tasks.config.kinds import studies
from tasks.config.problems import problem_lines
from tasks.config.run_file import RunFile, Several

_OF_WHOLE_CAMPAIGN = RunFile.model_fields.keys() - {"nonfinite"}
"""Fields that no study may set for itself."""

_RESERVED_FOLDERS = frozenset({"", "..", "campaign", "prefect"})
"""Names that no model's folder may have: those of other things in a campaign's directory, and of the one above."""


def _study(value: Any) -> str:
    if not isinstance(value, str) or value not in studies():
        raise ValueError(f"choose from {', '.join(studies())}")
    return str(value)


def _study_key(value: str) -> str:
    if value not in studies():
        raise PydanticCustomError("extra_forbidden", "no study of this name")
    return value


Study = Annotated[str, BeforeValidator(_study)]
StudyFields = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
"""Fields of a study's own run, by name; in YAML also nothing behind the colon."""


class CampaignStep(NamedTuple):
    """One study of one model."""

    model: str
    folder: str
    """Folder of the model's runs, below the campaign's directory: no other of its models has this name."""
    study: str
    run: RunFile


class CampaignRun(RunFile):
    """Take several models through several studies, and compare them.

    Example: `neg campaign campaign.yaml --model smollm2-135m --model org/other`

    The file names models and studies (its key `stage`), and holds the options of every study as a mapping, such as

        model: [smollm2-135m, org/other]

        stage: [mceval8k, linearity]

        mceval8k: {dataset: [mceval8k/agnews, mceval8k/paws], limit: 200, shots: [0]}

        linearity: {prompts: 10, neurons: 60}

    The runs are in DIR/MODEL/STUDY, the comparison in DIR/campaign: accuracy by genre, the best probe beside LM-Prob,
    linearity, layer profiles and, of revisions of one model, NEGs over training. A model that cannot be loaded or
    measured is named there and at the end, all others go on; the exit code is then 1. `neg campaign DIR` repeats the
    campaign and computes only what is missing.
    """

    model_config = ConfigDict(extra="allow")

    kind: Literal["campaign"] = "campaign"
    stage: Several[Study] = Field(
        ("mceval8k", "linearity"),
        description="Study that is made of every model: mceval8k, linearity, skills. Repeatable.",
    )
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_study_key)], StudyFields]

    @model_validator(mode="before")
    @classmethod
    def _name_every_study(cls, values: Any) -> Any:
        return {study: {} for study in studies()} | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_studies(self) -> Self:
        lines: list[str] = []
        for study, fields in self._fields.items():
            try:
                if study in self.stage or fields:
                    self._study_run(study, self.model[0], None)
            except ValidationError as error:
                lines += [f"{study}: {line}" for line in problem_lines(studies()[study], error)]
            except ValueError as error:
                lines.append(f"{error}")
        if lines:
            raise ValueError("\n".join(lines))
        return self

    @classmethod
    def key_descriptions(cls) -> dict[str, str]:
        return super().key_descriptions() | {study: f"Options of `neg {study}`, as a mapping." for study in studies()}

    @property
    def name(self) -> str:
        names = [self._study_run(study, model, None).name for model in self.folders for study in self.stage]
        return f"campaign-{content_digest(names)[:8]}"

    @property
    def subjects(self) -> tuple[str, ...]:
        return self.stage

    @property
    def folders(self) -> dict[str, str]:
        """The folder of each model's runs: the last part of its name, and a digest behind it where that is taken."""
        folders: dict[str, str] = {}
        for model in dict.fromkeys(self.model):
            folder = folder_name(model)
            taken = {name.casefold() for name in (*_RESERVED_FOLDERS, *folders.values())}
            is_taken = folder.casefold() in taken
            folders[model] = f"{shortened(folder)}-{content_digest(model)[:8]}" if is_taken else folder
        return folders

    @property
    def steps(self) -> tuple[CampaignStep, ...]:
        """Every study of every model, each a run in a directory of its own, in the order they are carried out."""
        return tuple(
            CampaignStep(model, folder, study, self._study_run(study, model, self.directory / folder / study))
            for model, folder in self.folders.items()
            for study in dict.fromkeys(self.stage)
        )

    @property
    def _fields(self) -> dict[str, dict[str, Any]]:
        """The fields of every study, by its name."""
        return self.model_extra or {}

    def _study_run(self, study: str, model: str, out: Path | None) -> RunFile:
        fields = self._fields[study]
        for name in fields:
            if name in _OF_WHOLE_CAMPAIGN:
                raise ValueError(f"{study}: {name!r} holds for the whole campaign: give it beside {study!r}, not in it")
        return studies()[study].model_validate(self.shared_with(RunFile) | fields | {"model": (model,), "out": out})
