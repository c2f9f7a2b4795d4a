"""Six small datasets, one for each genre of MCEval8K, and a set of facts, that need no download.

Their specs are in `mini.toml`. Their rows ship in `mini_rows/`, so that a fingerprint never changes. They were
generated from templates and from the Unicode Common Locale Data Repository. They are for trying the software out, not
for conclusions about models.
"""

from pathlib import Path

from negcore.datasets.files import read_json_lines
from negcore.datasets.rows import Source, rows_of_records
from negcore.datasets.specs import read_specs
from negcore.datasets.splits import split_rows

MINI_ROWS = Path(__file__).with_name("mini_rows")
"""Folder with the rows of every mini dataset, one JSONL file each."""

MINI_SPECS = {f"mini/{spec.genre}": spec for spec in read_specs(Path(__file__).with_name("mini.toml"))}


def read_mini(name: str) -> Source:
    """Read the rows of a mini dataset and cut them 60/20/20 in a fixed way."""
    spec = MINI_SPECS[name]
    records = [record for _, record in read_json_lines(MINI_ROWS / f"{spec.genre}.jsonl")]
    source = rows_of_records(spec, {"all": records}, {"all": name})
    rows = {split: list(part) for split, part in split_rows(source.rows["all"], name).items()}
    return Source(spec.genre, rows, dict.fromkeys(rows, 0), spec.wordings)
