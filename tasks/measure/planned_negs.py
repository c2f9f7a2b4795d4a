"""NEGs as a plan knows them: whose they are, and what their rows are, is compared before they are probed."""

from pathlib import Path

from negcore.errors import ShardError
from negcore.store.identity import RunIdentity, difference, prompt_hash
from negcore.store.publish import ShardPlace
from negcore.store.reader import NegSplit, open_negs
from negcore.texts import row_text
from tasks.measure.shard_set import ShardSet

_MAY_DIFFER = ("dataset_fingerprint", "storage", "neurons")
"""Settings that change which rows and numbers are there, and none of them."""


def planned_negs(root: Path, planned: ShardSet) -> NegSplit:
    """Open the NEGs of a planned split. Fewer or other rows of its dataset may be stored than are planned.

    Raises
    ------
    ShardError
        If they are incomplete, damaged, or another run's, or say something else of a row than the dataset does.
    """
    split = open_negs(root).at(planned.place)
    check_run(root, planned.place, _probed(planned.identity), _probed(split.identity))
    _check_rows(root, planned, split)
    return split


def check_run(root: Path, place: ShardPlace, here: dict[str, object], there: dict[str, object]) -> None:
    """Refuse NEGs of other settings.

    Raises
    ------
    ShardError
    """
    differing = difference(here, there)
    if differing:
        raise ShardError(
            f"{where(root, place)} are another run's (this run here, that one there: {differing}): name that run's "
            "settings or another directory"
        )


def where(root: Path, place: ShardPlace) -> str:
    """Name the NEGs of a place, for people."""
    return f"the NEGs of {place.dataset!r} in {str(root)!r}"


def _probed(identity: RunIdentity) -> dict[str, object]:
    return {name: value for name, value in identity.comparable().items() if name not in _MAY_DIFFER}


def _check_rows(root: Path, planned: ShardSet, split: NegSplit) -> None:
    """Compare the stored rows with those of the dataset that have their id and their text."""
    examples = {example.id: example for example in planned.examples}
    stored = zip(split.ids, split.text_hashes, split.groups, split.gold_P.tolist(), strict=True)
    for id_, prompt, group, gold in stored:
        example = examples.get(id_)
        if example is None or prompt_hash(example) != prompt:
            continue
        if (example.group, example.answer) != (group, gold):
            raise ShardError(
                f"{where(root, planned.place)}: the stored row {row_text(id_)} has group {row_text(group)} and right "
                f"answer {gold}, the dataset's {row_text(example.group)} and {example.answer}: write to another "
                "directory, or delete that one"
            )
