"""Write the documents that are made from other files.

These are run-files.md from the run file classes, the families in README.md from their rows, benchmarks.md from
bench.json, and way.svg from way.dot.

Run it from the repository: `make docs`. The picture needs graphviz (`apt-get install graphviz`).
"""

import json
import subprocess
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from bench_tables import document
from pydantic import BaseModel

from negcore.model.architectures import ARCHITECTURES
from tasks.config.kinds import RUN_KINDS
from tasks.config.run_file import RunFile
from tasks.config.wordings import OwnWording

DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
PICTURE = DOCS / "pictures" / "way.dot"
FAMILIES_BEGIN = "<!-- families: written by `make docs` -->"
FAMILIES_END = "<!-- end of families -->"

HEAD = """# Run files

<!-- Written by `make docs` from the classes in tasks/config: edit those, not this file. -->

A run file is YAML and holds what a run depends on. Its `kind` is the command that it is for, its `format` the version
of its form. A field that takes a list also takes a single value: `model: x` means `model: [x]`. Unknown fields are
errors, and all mistakes in a file are told at once. There is an example of every kind in [run-files/](run-files/).

The other fields are also options of the command line (`shard_rows` is `--shard-rows`), but for mappings; options win
over the file. A run directory holds the file that made it, so `neg COMMAND DIR` repeats the run and computes only what
is missing, wherever the directory has been moved or copied to: it says so, and leaves the directory under `out` as it
is. A file of your own keeps its `out`, wherever it lies. In the directory's file the run also notes, under
`written_by`, the command, the directory in which it was started, the version and the git revision.

Relative paths of models and data are relative to the directory in which the command is started. A file that is read
from elsewhere is refused if they are where it was written (or, for a file of your own, beside it) and not here; the
message names both places. A key that occurs twice, `010` (8 in YAML) and `yes` for a number are refused.

*Decides numbers* says whether a field is part of the name that a run gets by default. Runs that differ only in the
other fields give the same numbers and may share a directory.
"""


def run_files() -> str:
    """Return the text of run-files.md."""
    commands: dict[type[RunFile], list[str]] = {}
    for name, kind in RUN_KINDS.items():
        commands.setdefault(kind.run_class, []).append(f"neg {name}")
    sections = [HEAD, _section("Fields of every run", RunFile, list(RunFile.model_fields))]
    for run_class, names in commands.items():
        own = [name for name in run_class.model_fields if name not in RunFile.model_fields]
        sections.append(_section(", ".join(names), run_class, own))
    sections.append(_section("A wording of your own", OwnWording, list(OwnWording.model_fields)))
    return "\n".join(sections)


def readme() -> str:
    """Return the text of README.md with the families of now."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(FAMILIES_BEGIN)
    return f"{before}{FAMILIES_BEGIN}\n{_families()}\n{FAMILIES_END}{rest.partition(FAMILIES_END)[2]}"


def _families() -> str:
    next_token = sorted(name for name, arch in ARCHITECTURES.items() if not arch.masked)
    masked = sorted(name for name, arch in ARCHITECTURES.items() if arch.masked)
    sentences = (
        f"{len(ARCHITECTURES)} types are known by name. Of the next token: {', '.join(next_token)}. "
        f"Of a masked token: {', '.join(masked)}."
    )
    return textwrap.fill(sentences, 120, break_on_hyphens=False)


def picture() -> str:
    """Return the SVG that graphviz draws, with the digest of what it was drawn from."""
    drawn = subprocess.run(["dot", "-Tsvg", PICTURE], capture_output=True, text=True, check=True).stdout
    return drawn.rstrip() + f"\n<!-- drawn from {source_digest()} -->\n"


def source_digest() -> str:
    """Return the digest of the picture's source."""
    return xxhash.xxh3_128_hexdigest(PICTURE.read_bytes())


def _section(title: str, model: type[BaseModel], names: Sequence[str]) -> str:
    science = getattr(model, "not_science", None)
    head = ["field", "value", "default", *(["decides numbers"] if science else []), "meaning"]
    rows = [head, ["---"] * len(head), *(_row(model, name, science) for name in names)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## {title}\n\n{(model.__doc__ or '').splitlines()[0]}\n\n{table}\n"


def _row(model: type[BaseModel], name: str, not_science: Collection[str] | None) -> list[str]:
    field = model.model_fields[name]
    key = field.alias or name
    schema = model.model_json_schema()["properties"][key]
    default = "needed" if field.is_required() else _default(schema)
    science = [] if not_science is None else ["no" if name in not_science else "yes"]
    return [f"`{key}`", _values(schema), default, *science, (field.description or "").replace("|", "\\|")]


def _default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    if isinstance(default, list):
        default = default if len(default) < 12 else "all"
    return "" if default is None else f"`{str(default)}`".replace("'", "").replace("\n", "\\n")


def _values(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema or "oneOf" in schema:
        choices = [_values(one) for one in schema.get("anyOf", schema.get("oneOf")) if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(choices))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return "your own wording"
    if schema.get("type") == "array":
        return f"list of {_values(schema['items'])}"
    name = {"integer": "whole number", "number": "number", "boolean": "true or false", "object": "mapping"}
    return name.get(schema.get("type", ""), "text") + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to"}
    bounds = [f"{word} {schema[key]:g}" for key, word in words.items() if key in schema]
    return f" {' '.join(bounds)}" if bounds else ""


def benchmarks() -> str:
    """Return the text of benchmarks.md."""
    return document(json.loads((DOCS / "bench.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    (DOCS / "run-files.md").write_text(run_files(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    (DOCS / "benchmarks.md").write_text(benchmarks(), encoding="utf-8")
    PICTURE.with_suffix(".svg").write_text(picture(), encoding="utf-8")
