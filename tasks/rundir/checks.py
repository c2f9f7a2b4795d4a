"""Findings of the check at load, noted in the run directory by the workers that loaded the models."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from negcore.model.check import ModelCheck
from negcore.model.language_model import LanguageModel
from negcore.store.files import draft, parse_json, read_all

CHECKS_FOLDER = "checks"


@dataclass(frozen=True)
class NotedCheck:
    """The check of a model, and what it was of."""

    model: str
    site: str
    dtype: str
    device: str
    check: ModelCheck


def note_check(root: Path, name: str, lm: LanguageModel) -> None:
    """Note the check of a model, by its name in the run; of several workers' notes, the last stays."""
    assert lm.check is not None
    about = {"model": name, "site": lm.site, "dtype": lm.dtype, "device": lm.device.type}
    with draft(root / CHECKS_FOLDER / f"{quote(name, safe='')}.json") as file:
        file.write_text(json.dumps(about | {"check": lm.check.as_json()}, indent=1), encoding="ascii")


def read_checks(root: Path) -> Iterator[NotedCheck]:
    """Return the noted checks by name of the model; runs of earlier versions have none, and damaged ones are none."""
    for content in read_all(root, f"{CHECKS_FOLDER}/*.json").values():
        try:
            values = parse_json(content)
            yield NotedCheck(**values | {"check": ModelCheck.of_json(values["check"])})
        except (ValueError, TypeError, KeyError):
            continue
