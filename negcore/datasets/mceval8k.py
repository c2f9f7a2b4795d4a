"""MCEval8K: its 22 datasets, whose specs are in `mceval8k.toml`, and where their files are found.

Zhao, Jiang and Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053); the files are theirs
(CC-BY-4.0), the wordings are ours.

Differs from the paper: every option has its own letter; codes such as `ADP` or `SBAR` are spelled out; and the gold
option of StereoSet, whose released index fields for stereotype and anti-stereotype are swapped, is the sentence that
repeats the stereotype.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from negcore.datasets.base import SPLITS
from negcore.datasets.files import read_json_array
from negcore.datasets.rows import Source, rows_of_records
from negcore.datasets.specs import Spec, read_specs
from negcore.errors import DatasetError
from negcore.hub import HubError, commit_of, file_of

HUB_REPOSITORY = "iszhaoxin/MCEval8K"
ROOT_VARIABLE = "NEG_MCEVAL8K"
PREFIX = "mceval8k/"
SPECS = {PREFIX + spec.name: spec for spec in read_specs(Path(__file__).with_name("mceval8k.toml"))}


def read_mceval8k(spec: Spec, root: Path | None) -> Source:
    """Read a dataset's files: from `root`, else the folder in NEG_MCEVAL8K, else the Hugging Face hub.

    Raises
    ------
    DatasetError
        If the test file is missing, a file is malformed, or the hub does not give it.
    """
    local = root or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else None)
    try:
        find = _in_folder(local) if local else _on_hub()
        paths = {split: _find_file(spec, split, find) for split in SPLITS}
    except HubError as error:
        advice = f"or give a local folder: root=, or the environment variable {ROOT_VARIABLE}"
        raise DatasetError(f"{PREFIX}{spec.name}: {error}; {advice}") from None
    if paths["test"] is None:
        where = f"folder {str(local)!r}" if local else f"Hugging Face dataset {HUB_REPOSITORY!r}"
        raise DatasetError(
            f"{PREFIX}{spec.name}: no {spec.genre}/{spec.name}/test.json in {where}; "
            "a root holds <genre>/<dataset>/{train,valid,test}.json"
        )
    records = {split: list(read_json_array(path)) for split, path in paths.items() if path}
    return rows_of_records(spec, records, {split: str(path) for split, path in paths.items()})


def _find_file(spec: Spec, split: str, find: Callable[[str], Path | None]) -> Path | None:
    candidates = (find(f"{spec.genre}/{folder}/{split}.json") for folder in spec.folders)
    return next((path for path in candidates if path), None)


def _in_folder(root: Path) -> Callable[[str], Path | None]:
    if not root.is_dir():
        raise DatasetError(f"MCEval8K root {str(root)!r} is not a folder; give the one that holds its genres")
    # What is there but no file, such as a dangling link, is refused where it is read.
    return lambda name: root / name if os.path.lexists(root / name) else None


def _on_hub() -> Callable[[str], Path | None]:
    commit = commit_of(HUB_REPOSITORY, kind="dataset")
    return lambda name: file_of(HUB_REPOSITORY, name, commit, kind="dataset")
