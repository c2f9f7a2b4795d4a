"""Rows of what is stored: shards beside plain files; rankings and probes of a model as large as Llama-2-7B."""

import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from bench_rows import Goal, Item, Row, Setting, Work, compared, seconds
from pool_bench import in_own_process, peak_bytes
from sklearn.ensemble import RandomForestClassifier
from support import Row as StoredRow
from support import identity_of, negs_place, write_negs

from negcore import open_negs
from negcore.measure.votes import Ranking, Vote
from negcore.probing.fitted import fit_forest, fit_vote, forest_features
from negcore.probing.rankings import rank_layers
from negcore.store.integrity import forget_checks
from negcore.store.publish import Receipt, shard_path
from negcore.store.reader import NegSplit, Shard

PLACE = negs_place("random", "random", "train")
SHARD_ROWS, N_OPTIONS = 32, 4
VOTES = (Vote("polar", "neg"), Vote("magn", "neg"))
TREE_NEURONS = 2**13
MOST_KEPT = 2**14


def a_shard(root: Path, index: int, n_shards: int, shape: tuple[int, int]) -> Callable[[], Receipt]:
    """Return what publishes a shard of random numbers for a model of so many layers and neurons a layer."""
    random = np.random.default_rng(index)
    return partial(
        write_negs,
        root,
        PLACE,
        index,
        n_shards,
        identity=identity_of(*shape, model="random"),
        examples=[StoredRow(f"{index}/{row}", answer=row % N_OPTIONS) for row in range(SHARD_ROWS)],
        label_ids_PO=np.tile(np.arange(N_OPTIONS), (SHARD_ROWS, 1)),
        negs_POLN=random.standard_normal((SHARD_ROWS, N_OPTIONS, *shape), np.float32),
        activations_PLN=random.standard_normal((SHARD_ROWS, *shape), np.float32),
        probs_PO=np.full((SHARD_ROWS, N_OPTIONS), 0.25, np.float32),
    )


# Shards


def shards(setting: Setting) -> Iterator[Item]:
    """Compare shards of 32 rows of SmolLM2's shape with plain files of as many bytes."""
    shape = (2, 16) if setting.tiny else (30, 1536)
    root, plain_file = setting.folder / "shards", setting.folder / "plain"

    def written() -> tuple[Work, Work]:
        publish = a_shard(root, 0, 1, shape)
        publish()
        content = shard_path(PLACE.path(root), 0).read_bytes()

        def write() -> None:
            with plain_file.open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())

        return publish, write

    def read() -> tuple[Work, Work]:
        _, write = written()
        write()

        def read_shard() -> None:
            forget_checks()
            open_negs(root).at(PLACE).layer(1).sum()

        return read_shard, lambda: np.frombuffer(plain_file.read_bytes(), np.uint8).sum()

    yield compared(setting, "shard written", "plain file written and synced", "s", written)
    yield compared(setting, "shard checked, one layer read", "plain file read whole", "s", read)


# Rankings and probes


class Repeated(NegSplit):
    """A split whose shards come again and again, as if they were as many rows as a dataset has."""

    n_rounds = 1

    def repeat(self, n_rounds: int) -> None:
        """Have every shard come so many times."""
        self._n_own, self.n_rounds = self.n_rows, n_rounds
        self.n_rows *= n_rounds
        self.ids *= n_rounds
        self.gold_P = np.tile(self.gold_P, n_rounds)

    def shards(self) -> Iterator[Shard]:
        for round_ in range(self.n_rounds):
            for shard in super().shards():
                start = round_ * getattr(self, "_n_own", 0)
                rows = slice(shard.rows.start + start, shard.rows.stop + start)
                yield Shard(shard.path, shard.batch, rows, self)


class Large:
    """Rankings and probes of a large model, whose shards lie in memory: four are written, and come again and again."""

    def __init__(self, folder: Path, *, tiny: bool) -> None:
        self._shape, n_written, n_rounds = ((2, 16), 2, 2) if tiny else ((32, 11008), 4, 47)
        for index in range(n_written):
            a_shard(folder / "large", index, n_written, self._shape)()
        self._split = Repeated(PLACE.path(folder / "large"), verify=True)
        self._split.repeat(n_rounds)
        n_neurons = self._shape[0] * self._shape[1]
        self._what = f"{self._split.n_rows:,} rows x {n_neurons:,} neurons"
        self._most_kept, self._n_trees_read = min(n_neurons, MOST_KEPT), min(n_neurons, TREE_NEURONS)

    def rows(self) -> Iterator[Row]:
        """Measure everything once."""
        yield self._row("ranking by two votes", self._rank, "sum of the same NEGs", self._sum)
        yield self._row(
            f"best number of {self._most_kept:,} neurons", self._vote, "the same neurons' NEGs alone", self._gather
        )
        name, features = f"forest on {self._n_trees_read:,} neurons", forest_features(self._split, self._order_K)
        yield self._row(name, self._forest, "scikit-learn on their table", lambda: self._plain_forest(features))
        yield Row(f"memory for all that, {self._what}", "GiB", peak_bytes() / 2**30, goal=Goal(8, "ours"))

    def _row(self, name: str, ours: Work, against: str, other: Work) -> Row:
        our_s, other_s = seconds(ours), seconds(other)
        return Row(f"{name}, {self._what}", "s", our_s, against, other_s, [our_s / other_s])

    def _rank(self) -> None:
        rank_layers(self._split, range(self._shape[0]), VOTES, act=False)

    def _sum(self) -> None:
        for shard in self._split.shards():
            for layer in range(self._shape[0]):
                shard.negs_PON(layer).sum()

    @cached_property
    def _scores_M(self) -> np.ndarray:
        """Scores that need no ranking of real ones: numbers of random neurons tell nothing."""
        return np.random.default_rng(0).permutation(self._shape[0] * self._shape[1])

    @property
    def _order_K(self) -> np.ndarray:
        return Ranking.from_scores(self._scores_M).top(self._n_trees_read).order_K

    def _vote(self) -> None:
        fit_vote(VOTES[1], self._scores_M, self._split, max_neurons=self._most_kept)

    def _gather(self) -> None:
        kept_K = Ranking.from_scores(self._scores_M).top(self._most_kept).order_K
        for shard in self._split.shards():
            shard.negs(kept_K).sum()

    def _forest(self) -> None:
        fit_forest(self._split, self._order_K, seed=0)

    def _plain_forest(self, features_PK: np.ndarray) -> None:
        RandomForestClassifier(random_state=0).fit(features_PK, self._split.gold_P)


def _large_rows(folder: Path, tiny: bool) -> list[Row]:
    return list(Large(folder, tiny=tiny).rows())


def probes(setting: Setting) -> Iterator[Item]:
    """Rank and probe a large model's neurons on one core, each once."""
    work = partial(in_own_process, _large_rows, setting.folder, setting.tiny)
    yield Item("ranking, votes and forest of a large model", work)
