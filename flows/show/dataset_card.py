"""The dataset card of a published run: README.md with what a reader needs, and the settings that the hub reads."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from flows.show.table import Cell, Number, Table, numbers, texts
from negcore.errors import RunError
from negcore.model.layer_shapes import experts_in_words, shapes_of
from negcore.targets import DEFAULT_TARGET
from negcore.texts import printable
from tasks.publish import Publication, PublishedData

NO_LICENCE = "unknown"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MIB = 2**20
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""Names that the hub has for numbers of rows."""
_SETTINGS = (
    *("kind", "seed", "limit", "eval_limit", "shots", "wording", "prompt_format", "split_policy", "unreadable"),
    *("answers", "site", "dtype", "storage", "nonfinite", "probe", "max_neurons", "tree_neurons", "cpus"),
)
"""Fields of a run file that decide results and name no place of a machine."""

_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "id": "name of the row, as in its dataset",
        "text_hash": "xxh3-128, in hex, of the prompt (UTF-8; with probe_at, a null character and the number of "
        "characters up to its end follow): whoever has the prompts can tell which is which",
        "group": "group of the row in its dataset, such as a language; may be empty",
        "gold": "index of the right option",
        "label_ids": "token id of each option's label, the first of an answer of several",
    }
)
_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "negs": "NEGs of all neurons, by NeurGrad",
        "sweeps": "NEGs of some neurons, measured by shifting each step by step",
        "estimates": "NEGs of some neurons by another estimator",
        "interventions": "answers while chosen neurons are shifted together",
        "causal": "answers while a probe's neurons are shifted together",
    }
)

_ABOUT = """\
The **neuron empirical gradient** (NEG) of a neuron says by how much the probability of an answer changes for each unit
by which the neuron's activation is shifted, at the token where the answer is to follow: probability per unit of
activation, positive where a shift away from zero makes the answer more probable. It is defined in Zhao, Jiang and
Yoshinaga, *Neuron Empirical Gradient: Discovering and Quantifying Neurons' Global Linear Controllability*, ACL 2025
([arXiv 2412.18053](https://arxiv.org/abs/2412.18053)). A row is a prompt of multiple choice, and its numbers are those
of every feed-forward neuron and every option."""

_READING = """\
The files below the folders `model=` are Arrow files (IPC), with a receipt for each under `_receipts`: its checksum, its
rows, and the settings that decided its numbers. The program that made them, neg-at-scale, reads and checks a copy:

```python
import negcore

negs = negcore.open_negs("FOLDER")  # a download of this dataset{inside}
```

```bash
neg verify FOLDER  # every file against its receipt and manifest.json
```

Without it, `datasets` reads them under the names of the table (some columns are wide: select those that you need), and
so does everything else that reads Arrow:

```python
import datasets, pyarrow.dataset

datasets.load_dataset("REPOSITORY", "{config}")
pyarrow.dataset.dataset("FOLDER/{place}", format="ipc").to_table(columns=["id", "gold"])
```

`manifest.json` holds the checksums of all files but this one. Tables of results are the files `.arrow` beside it,
fitted probes are in `probes`, and `checks` tells how each model passed its check at load. The texts of the prompts are
not here; neither are reports, which may quote them, nor run files, which name places of a machine."""

_CITATION = """\
```bibtex
@inproceedings{zhao-etal-2025-neuron,
  title = {Neuron Empirical Gradient: Discovering and Quantifying Neurons' Global Linear Controllability},
  author = {Zhao and Jiang and Yoshinaga},
  booktitle = {ACL},
  year = {2025},
  eprint = {2412.18053},
  archivePrefix = {arXiv}
}
```

If you use these numbers, cite that paper, this dataset, and the sources of model and data."""


def check_licence(licence: str) -> None:
    """Refuse a licence that the hub has no name for.

    Raises
    ------
    RunError
    """
    if not _LICENCE.fullmatch(licence):
        raise RunError(
            f"licence {licence!r} is no identifier of the hub's; give one such as cc-by-4.0, apache-2.0, mit or other"
        )


def dataset_card(publication: Publication, licence: str | None) -> str:
    """Return the text of README.md: the same for the same run.

    Parameters
    ----------
    licence : str, optional
        Identifier, as the hub names it. Without one the card says that none was chosen.
    """
    front = yaml.safe_dump(_front(publication, licence), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n\n".join(_body(publication, licence)) + "\n"


def _front(publication: Publication, licence: str | None) -> dict[str, Any]:
    n_rows = sum(one.n_rows for one in publication.shards.values())
    size = next((name for most, name in _SIZES if n_rows < most), "n>1M")
    names = config_names(publication)
    return {
        "license": licence or NO_LICENCE,
        "pretty_name": _title(publication),
        "size_categories": [size],
        "tags": ["neuron-empirical-gradient", "interpretability", "neg-at-scale", "arrow"],
        "configs": [_config(name, one, index == 0) for index, (name, one) in enumerate(names.items())],
    }


def _config(name: str, one: PublishedData, is_default: bool) -> dict[str, Any]:
    splits = _distinct(re.sub(r"\W", "_", part.name) for part in one.parts)
    files = [{"split": split, "path": f"{part.place}/*.arrow"} for split, part in zip(splits, one.parts, strict=True)]
    return {"config_name": name, **({"default": True} if is_default else {}), "data_files": files}


def config_names(publication: Publication) -> dict[str, PublishedData]:
    """Return the data by a name that the hub's library takes."""
    several = len({one.kind for one in publication.data}) > 1
    told = (
        " ".join(filter(None, [one.condition, one.kind if several else "", _called(one.model), one.dataset]))
        for one in publication.data
    )
    names = _distinct(re.sub(r"[^\w.-]+", "-", name).strip("-") or "data" for name in told)
    return dict(zip(names, publication.data, strict=True))


def _distinct(names: Iterator[str]) -> list[str]:
    """Return names of which none is like another, without regard to case."""
    taken: list[str] = []
    for name in names:
        number, new = 1, name
        while new.lower() in {one.lower() for one in taken}:
            number += 1
            new = f"{name}-{number}" if "-" in name else f"{name}_{number}"
        taken.append(new)
    return taken


def _title(publication: Publication) -> str:
    models = list(dict.fromkeys(_called(one.model) for one in publication.data))
    datasets = list(dict.fromkeys(one.dataset for one in publication.data))
    return printable(f"Neuron empirical gradients of {_listed(models)} on {_listed(datasets)}")


def _called(model: str) -> str:
    """Return the name of a model; one that is named by a path of a machine is called by its last part."""
    return Path(model).name if model.startswith(("/", "~", "./", "../")) else model


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _body(publication: Publication, licence: str | None) -> Iterator[str]:
    yield f"# {_plain(_title(publication))}"
    yield _ABOUT
    for table in (_models(publication), _data(publication), _prompts(publication), *_columns(publication)):
        yield table.markdown
    name, first = next(iter(config_names(publication).items()))
    yield "## Reading it"
    inside = f"; for NEGs give FOLDER/{first.condition}" if first.condition else ""
    yield _READING.format(config=name, place=first.parts[0].place, inside=inside)
    yield "## How it was made"
    yield "Settings of the run, as in its run file:"
    yield f"```yaml\n{_settings(publication)}```"
    yield "Versions: " + ", ".join(f"{package} {version}" for package, version in publication.versions.items()) + "."
    yield "## Licence"
    yield _licence(licence)
    yield "## Citation"
    yield _CITATION


def _licence(licence: str | None) -> str:
    derived = (
        "The numbers were made by a model from the data named above; check what the licences of both say of what is "
        "derived from them."
    )
    if licence is None:
        return f"**No licence was chosen yet**: whoever publishes this has to, at the top of this file. {derived}"
    return f"`{licence}`, chosen by whoever published this. {derived}"


def _models(publication: Publication) -> Table:
    have_experts = any(one.identity.get("experts") for one in publication.data)
    columns = [
        *texts("model", "revision", "site", "number type"),
        *numbers("layers", "neurons a layer"),
        *texts(*["experts"] * have_experts, "storage", "target"),
    ]
    rows = [
        (
            one.model,
            str(one.identity.get("model_revision", "")),
            str(one.identity.get("site", "")),
            str(one.identity.get("dtype", "")),
            str(one.identity.get("n_layers", "")),
            str(one.identity.get("n_neurons", "")),
            *[_experts(one.identity.get("experts"))] * have_experts,
            str(one.identity.get("storage", "values")),
            str(one.identity.get("target", DEFAULT_TARGET)),
        )
        for one in publication.data
    ]
    caption = (
        "Site: the vector with a coordinate for every neuron: up, the up projection's output; act, the input of the "
        "down projection; gate, the gate's output. Neurons and layers are numbered from 0. A revision that begins "
        "with xxh3: is a digest of local files. Target: the number of an option whose slope NEGs are, in place of the "
        "probability where it names another."
    )
    if have_experts:
        caption += (
            " Of a mixture of experts, a row has the neurons of the experts that it was routed to in each layer, and "
            "those of every row; unit u of expert e of U units has the number e * U + u, and those of every row follow."
        )
    return Table("models", "Models", columns, [list(map(list, dict.fromkeys(rows)))], caption)


def _experts(experts: Mapping[str, Any] | None) -> str:
    """Return the experts of an identity in words, and what becomes of the router under a shift."""
    shapes = shapes_of(experts)
    return "" if experts is None or shapes is None else f"{experts_in_words(shapes)}; router: {experts['router']}"


def _data(publication: Publication) -> Table:
    columns = [*texts("name", "what", "model", "dataset", "rows"), *numbers("left out", "files", "MiB")]
    columns += texts("fingerprint")
    rows = [_row(name, one) for name, one in config_names(publication).items()]
    caption = (
        "Left out: rows that could not be computed; receipts name them. Fingerprint: of the rows that the dataset was "
        "made from. Datasets mini/ ship with the program."
    )
    return Table("data", "Data", columns, [rows], caption)


def _row(name: str, one: PublishedData) -> list[Cell]:
    held = [part.shards for part in one.parts]
    rows = ", ".join(f"{part.name}: {part.shards.n_rows}" for part in one.parts)
    return [
        name,
        _KINDS.get(one.kind, one.kind),
        one.model,
        one.dataset,
        rows,
        Number(sum(shards.n_set_aside for shards in held)),
        Number(sum(shards.n_shards for shards in held)),
        Number(sum(shards.n_bytes for shards in held) / _MIB, "{:.1f}".format),
        str(one.identity.get("dataset_fingerprint", "")),
    ]


def _prompts(publication: Publication) -> Table:
    """Return the settings of prompts and measurements, those that are alike in one row."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, one in config_names(publication).items():
        settings = _words(one.identity.get("prompt") or {}), _words(one.identity.get("study") or {})
        alike.setdefault(settings, []).append(name)
    columns = texts("names", "prompt settings", "settings of the measurement")
    rows: list[list[Cell]] = [
        ["all" if len(alike) == 1 else ", ".join(names), *settings] for settings, names in alike.items()
    ]
    return Table("prompts", "How the model was asked", columns, [rows])


def _words(settings: Mapping[str, Any]) -> str:
    known = ((key, value) for key, value in settings.items() if value is not None)
    return ", ".join(f"{key} {_short(value)}" for key, value in known)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _columns(publication: Publication) -> Iterator[Table]:
    """Return a table for each measurement and form of its columns; counts of options may differ within."""
    known: dict[tuple[str, tuple[str, ...]], PublishedData] = {}
    for one in publication.data:
        known.setdefault((one.kind, tuple(column.name for column in one.columns)), one)
    for number, ((kind, _), one) in enumerate(known.items()):
        rows: list[list[Cell]] = [
            [column.name, column.type, column.meaning or _MEANINGS.get(column.name, "")] for column in one.columns
        ]
        caption = (
            f"Types are those of {one.dataset}; numbers of options differ. LL: number of the layer, with two digits."
        )
        yield Table(f"columns-{number}", f"Columns of {kind}", texts("column", "type", "meaning"), [rows], caption)


def _settings(publication: Publication) -> str:
    values = publication.run.model_dump(mode="json", exclude_none=True)
    shown = {
        key: values[key] for key in _SETTINGS if key in values and isinstance(values[key], (str, int, float, list))
    }
    models = dict.fromkeys((one.model, str(one.identity.get("model_revision", ""))) for one in publication.data)
    named = {  # of several revisions of one model, the name holds what they were called by
        "model": [f"{name.partition('@')[0]}@{revision}" if ":" not in revision else name for name, revision in models],
        "dataset": list(dict.fromkeys(one.dataset for one in publication.data)),
    }
    return yaml.safe_dump(named | shown, sort_keys=False, allow_unicode=True)


def _plain(text: str) -> str:
    """Return a name as Markdown that shows it as it is."""
    return re.sub(r"([\\|<>*_`\[\]#])", r"\\\1", text)
