"""Six small datasets, one for each genre of MCEval8K, and a set of facts, that need no download.

Their specs are in `mini.toml`. Their rows ship in `mini_rows/`, so that a fingerprint never changes; the facts were
made from the Unicode Common Locale Data Repository. They are for trying the software out, not for conclusions about
models.

Beside its content a row names its `split`, its `unit` and, where sentences are alike, its `template`. The rows of a
unit are made of words that no other unit asks about, and stand in one split. Within a unit every answer is gold equally
often, together with every template, language, premise, note and so on: no part of a prompt alone tells the answer.
"""

from pathlib import Path

from negcore.datasets.base import SPLITS
from negcore.datasets.files import Record, read_json_lines
from negcore.datasets.rows import Source, rows_of_records
from negcore.datasets.specs import read_specs
from negcore.errors import DatasetError
from negcore.texts import quoted

MINI_ROWS = Path(__file__).with_name("mini_rows")
"""Folder with the rows of every mini dataset, one JSONL file each."""

MINI_SPECS = {f"mini/{spec.genre}": spec for spec in read_specs(Path(__file__).with_name("mini.toml"))}


def read_mini(name: str) -> Source:
    """Read the rows of a mini dataset in the splits that they name.

    Raises
    ------
    DatasetError
        If a row is malformed or names no split.
    """
    spec = MINI_SPECS[name]
    path = MINI_ROWS / f"{spec.genre}.jsonl"
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for number, record in read_json_lines(path):
        if (split := record.get("split")) not in SPLITS:
            raise DatasetError(f"{path}:{number}: split is {quoted(split)}; allowed: {', '.join(map(repr, SPLITS))}")
        records[split].append(record)
    return rows_of_records(spec, records, {split: f"{name}, {split}" for split in SPLITS})
