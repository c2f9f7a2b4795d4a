"""Prompt wordings in a run file: the name of a known one, one of the user's own, or one for each dataset."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from negcore.datasets.base import Wording
from negcore.errors import DatasetError


class OwnWording(BaseModel):
    """A wording that is written in the run file. Its templates may name only the fields of a row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(description="Template of the row's fields, such as 'Review: {text}'.")
    instruction: str = Field("", description="First block, the same in every prompt.")
    option: str = Field("{letter}. {text}", description="Template of one option.")
    separator: str = Field("\n", description="Between options.")
    cue: str = Field("Answer:", description="Last line; the label follows it.")

    @model_validator(mode="after")
    def _check(self) -> "OwnWording":
        self.wording()
        return self

    def wording(self) -> Wording:
        """Return the wording, checked."""
        return Wording(name="own", **self.model_dump())


def _form(value: Any) -> str | None:
    if isinstance(value, (str, OwnWording)):
        return "name" if isinstance(value, str) else "own"
    if not isinstance(value, Mapping):
        return None
    return "own" if value.keys() & OwnWording.model_fields.keys() else "datasets"


_Single = Annotated[str, Tag("name")] | Annotated[OwnWording, Tag("own")]
SingleWording = Annotated[_Single, Discriminator(_form)]
WordingChoice = Annotated[_Single | Annotated[dict[str, SingleWording], Tag("datasets")], Discriminator(_form)]


def wording_for(choice: str | OwnWording | Mapping[str, str | OwnWording], dataset: str) -> str | OwnWording:
    """Return the wording of one dataset; a dataset that a mapping does not name has the default wording."""
    return choice.get(dataset, "default") if isinstance(choice, Mapping) else choice


def check_wordings(choice: str | OwnWording | Mapping[str, str | OwnWording], datasets: Sequence[str]) -> None:
    """Refuse a mapping that names other datasets than the run's.

    Raises
    ------
    DatasetError
    """
    unknown = [name for name in choice if name not in datasets] if isinstance(choice, Mapping) else []
    if unknown:
        raise DatasetError(
            f"wording names dataset {unknown[0]!r}, which is not in this run; allowed: {', '.join(datasets)}"
        )
