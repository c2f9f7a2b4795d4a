"""Faults of finished files: damaged, foreign, or in a wrong place. The same command is to find them and mend them."""

import copy
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from fault_bench import LOCAL, Bench, Outcome, Run, finished
from support import save_tiny_model

from negcore.errors import ShardError
from negcore.store.identity import RunIdentity
from negcore.store.integrity import mapped_batch, metadata_of
from negcore.store.publish import ShardPlace, publish_shard, receipt_path, receipts
from negcore.store.reader import open_negs
from tasks.rundir.layout import ShardFolder, shard_folders
from tasks.rundir.verify import verify

_LOOKED_AT = 100
"""Damaged files that `neg verify` and `open_negs` are shown, one at a time, before runs find them."""
_ROUNDS = 4


def cuts(bench: Bench) -> Outcome:
    # The last byte stays off the list: a receipt without its closing newline says the same.
    return _damages(bench, "cuts", lambda content: content[: bench.random.randrange(len(content) - 1)])


def flips(bench: Bench) -> Outcome:
    def flipped(content: bytes) -> bytes:
        place = bench.random.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << bench.random.randrange(8)]) + content[place + 1 :]

    return _damages(bench, "flips", flipped)


def _damages(bench: Bench, name: str, damage: Callable[[bytes], bytes]) -> Outcome:
    """Damage most shards or their receipts, again and again: every time, the same command mends all of them.

    Before, 100 files are damaged one at a time: readers and `neg verify` must refuse each by name.
    """
    run = _copied(bench, name)
    files = [run.directory / name for name in sorted(bench.reference)]
    folders = {folder.path: folder for folder in shard_folders(run.directory)}
    refused = 0
    for file in bench.random.choices(files, k=_LOOKED_AT):
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        refused += _is_refused(folders, file)
        file.write_bytes(whole)
    total = Outcome(0, 0)
    for _ in range(_ROUNDS):
        shards = bench.random.sample(sorted(finished(run.directory)), 50)
        damaged = [bench.random.choice((shard, _receipt_of(shard))) for shard in shards]
        total += _mended(run, shards, lambda damaged=damaged: [_change(file, damage) for file in damaged])
    return total if refused == _LOOKED_AT else Outcome(total.tried, 0, total.rows_lost, total.redone)


def foreign_shards(bench: Bench) -> Outcome:
    """Another model's shards under this one's receipts, then with their own receipts, which a run refuses."""
    other = copy.copy(bench)
    other.model = save_tiny_model("mistral", bench.home / "tiny-mistral")
    theirs = Run(other, bench.home / "other-model", *LOCAL)
    assert theirs.finish() == 0, theirs.said
    run = _copied(bench, "foreign")
    pairs = list(zip(sorted(finished(run.directory)), sorted(finished(theirs.directory)), strict=True))
    mended = _mended(run, [own for own, _ in pairs], lambda: [shutil.copy(other, own) for own, other in pairs])
    for own, other_shard in pairs:
        shutil.copy(other_shard, own)
        shutil.copy(_receipt_of(other_shard), _receipt_of(own))
    is_refused = run.finish() == 1 and run.says("shards of another run")
    return mended + Outcome(1, int(is_refused))


def swapped_shards(bench: Bench) -> Outcome:
    """Shards of a split in each other's place, then train and test, without their receipts and with them."""
    run = _copied(bench, "swapped")
    train, test = (sorted(run.directory.glob(f"negs/*/*/split={split}/*.arrow")) for split in ("train", "test"))
    neighbours = list(zip(train[::2], train[1::2], strict=True))
    splits = list(zip(train, test, strict=True))
    with_receipts = [pair for one, other in splits for pair in ((one, other), (_receipt_of(one), _receipt_of(other)))]
    total = _mended(run, train, lambda: _swap(neighbours))
    total += _mended(run, [*train, *test], lambda: _swap(splits))
    return total + _mended(run, [*train, *test], lambda: _swap(with_receipts))


def wrong_answers(bench: Bench) -> Outcome:
    """Right answers of other options, in shards that were forged together with their receipts."""
    run = _copied(bench, "answers")
    shards = bench.random.sample(sorted(finished(run.directory)), 20)
    return _mended(run, shards, lambda: [_forge(run.directory, shard) for shard in shards])


def _copied(bench: Bench, name: str) -> Run:
    run = Run(bench, bench.home / name, *LOCAL)
    shutil.copytree(bench.home / "reference", run.directory)
    return run


def _mended(run: Run, shards: Iterable[Path], damage: Callable[[], object]) -> Outcome:
    """Damage shards, start the same command, and expect it to say how many it computed again, and no others."""
    run.look()
    damage()
    for shard in (shards := list(shards)):
        run.forget(shard)
    ok = run.finish() == 0 and run.says(f"{len(shards)} damaged shards computed again")
    return run.outcome(len(shards), ok=ok)


def _is_refused(folders: Mapping[Path, ShardFolder], file: Path) -> bool:
    """Tell whether `neg verify` names the shard, and would have it computed again, and a reader refuses the file."""
    folder = folders[file.parent.parent if file.suffix == ".json" else file.parent]
    (verified,) = verify([folder], lambda n_bytes: None)
    named = f"shard {int(file.stem.removeprefix('part-'))}: "
    is_found = any(fault.recompute and fault.what.startswith(named) for fault in verified.faults)
    try:
        open_negs(folder.path).select()
    except ShardError as error:
        return is_found and file.name in str(error)
    return False


def _change(file: Path, damage: Callable[[bytes], bytes]) -> None:
    file.write_bytes(damage(file.read_bytes()))


def _receipt_of(shard: Path) -> Path:
    return shard.parent / "_receipts" / f"{shard.stem}.json"


def _swap(pairs: Iterable[tuple[Path, Path]]) -> None:
    for one, other in pairs:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)


def _forge(root: Path, shard: Path) -> None:
    (receipt,) = [one for one in receipts(shard.parent) if receipt_path(shard.parent, one.index) == _receipt_of(shard)]
    batch = mapped_batch(shard)
    gold = np.array((batch.column("gold").to_numpy() + 1) % 3, np.int16)
    forged = batch.set_column(batch.schema.get_field_index("gold"), batch.schema.field("gold"), pa.array(gold))
    said = metadata_of(batch.schema)
    about = {name: said[name] for name in ("axes", "n_options", "check")}
    identity = RunIdentity(**receipt.identity, versions=receipt.versions)
    place = ShardPlace.of_path(shard.parent)
    publish_shard(root, place, receipt.index, receipt.n_shards, identity=identity, batch=forged, about=about)
