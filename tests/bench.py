"""Time the engine and the shards beside their plain twins on this machine's CPU: `make bench`.

Both sides run in turns in one process, and the medians' ratio is what counts. Prompts are random tokens in the lengths
of datasets. `--only` chooses rows by a part of their name.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from support import Row, identity_of, negs_place, write_negs
from transformers import DynamicCache

from negcore import open_negs
from negcore.measure.benchmark import plain_gradients
from negcore.measure.forward import common_prefix_length
from negcore.measure.loading import load_model
from negcore.measure.neurgrad import neurgrad
from negcore.measure.sweeps import draw_neurons, shift_grid, sweep
from negcore.measure.virtual_tokens import Method
from negcore.model.attention import ATTENTION_NAME
from negcore.model.encoding import EncodedPrompts
from negcore.model.language_model import LanguageModel
from negcore.model.past import Prefixes
from negcore.store.integrity import forget_checks

LABELS = [" A", " B", " C", " D"]


class Sides(NamedTuple):
    """Two ways to do one thing."""

    name: str
    unit: str
    n_units: int
    ours: Callable[[], object]
    plain: Callable[[], object]
    goal: float | None = None
    """Most that ours may take of the other's time."""


def prompts(n_prompts: int, n_shared: int, n_own: int) -> EncodedPrompts:
    """Random tokens: some that all prompts share, and own ones, a fifth more or fewer from prompt to prompt."""
    random = np.random.default_rng(0)
    shared = random.integers(1000, 40000, n_shared).tolist()
    lengths = n_own + random.integers(-n_own // 5, n_own // 5 + 1, n_prompts)
    ids = [[*shared, index, *random.integers(1000, 40000, length - 1).tolist()] for index, length in enumerate(lengths)]
    return EncodedPrompts(ids, np.tile([330, 389, 340, 422], (n_prompts, 1)))


class Forward:
    """A forward pass (SDPA, no gradient) of each prompt's own tokens after a copy of the shared prefix's cache."""

    def __init__(self, lm: LanguageModel, encoded: EncodedPrompts, *, whole: bool = False) -> None:
        self._lm, self._ids = lm, encoded.ids
        self._n_shared = 0 if whole else common_prefix_length(encoded.ids)
        self._prefix = DynamicCache()
        if self._n_shared:
            self._sdpa(lambda: self._run(self._ids[0][: self._n_shared], self._prefix))

    def __call__(self) -> None:
        self._sdpa(self._all)

    def _all(self) -> None:
        for tokens in self._ids:
            cache = DynamicCache()
            for layer, one in enumerate(self._prefix.layers):
                cache.update(one.keys.clone(), one.values.clone(), layer)
            self._run(tokens[self._n_shared :], cache)

    def _run(self, tokens: Sequence[int], cache: Any) -> None:
        with torch.no_grad():
            self._lm.model(input_ids=torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)

    def _sdpa(self, work: Callable[[], None]) -> None:
        self._lm.model.set_attn_implementation("sdpa")
        try:
            work()
        finally:
            self._lm.model.set_attn_implementation(ATTENTION_NAME)


def engine_rows(lm: LanguageModel) -> list[Sides]:
    """NEGs of all neurons for four options, and sweeps."""
    rows = []
    for name, goal, shape in (
        ("agnews, one-shot", 1.00, (24, 321, 86)),
        ("agnews, zero-shot", 0.85, (24, 16, 86)),
        ("imdb, zero-shot", 1.10, (8, 15, 290)),
        ("agnews, one-shot, a shard of 8", 1.15, (8, 321, 86)),
    ):
        encoded = prompts(*shape)
        title = f"NEG, {name}: forward pass of own tokens"
        ours = partial(neurgrad, lm, encoded)
        rows.append(Sides(title, "s a prompt", shape[0], ours, Forward(lm, encoded), goal))
    few = prompts(4, 321, 86)
    text = "Question: which answer fits? A. one B. two C. three D. four. Answer:"
    chosen, shifts = draw_neurons(lm.n_layers, lm.layer_width, 16), shift_grid(2)

    def swept(method: Method) -> object:
        return sweep(lm, [text], LABELS[0], neurons=chosen, shifts=shifts, method=method)

    whole, each = Forward(lm, few, whole=True), partial(plain_gradients, lm, text, LABELS)
    return [
        *rows,
        Sides("NEG, one-shot: forward pass of whole prompts", "s a prompt", 4, partial(neurgrad, lm, few), whole),
        Sides("NEG, 20 tokens: autograd for each option", "s", 1, partial(neurgrad, lm, [text], LABELS), each),
        Sides("sweep: passes of whole prompts", "s a neuron", 16, partial(swept, "auto"), partial(swept, "hooks")),
    ]


def store_rows(folder: Path) -> list[Sides]:
    """Shards of 32 rows of SmolLM2's shape with four options, against plain files of as many bytes."""
    random, n_rows, shape = np.random.default_rng(0), 32, (30, 1536)
    columns = {
        "negs_POLN": random.standard_normal((n_rows, 4, *shape), np.float32),
        "activations_PLN": random.standard_normal((n_rows, *shape), np.float32),
        "probs_PO": np.full((n_rows, 4), 0.25, np.float32),
        "label_ids_PO": np.tile(np.arange(4), (n_rows, 1)),
    }
    examples = [Row(str(row), answer=row % 4) for row in range(n_rows)]
    place, identity = negs_place("random", "random", "train"), identity_of(*shape)

    def publish() -> None:
        write_negs(folder / "run", place, 0, 1, identity=identity, examples=examples, **columns)

    publish()
    n_bytes = next((folder / "run").rglob("*.arrow")).stat().st_size
    content, plain_file = random.bytes(n_bytes), folder / "plain"

    def write() -> None:
        with plain_file.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())

    def read_shard() -> None:
        forget_checks()
        open_negs(folder / "run").at(place).layer(3).sum()

    def read() -> None:
        np.frombuffer(plain_file.read_bytes(), np.uint8).sum()

    write()
    mebibytes = n_bytes // 2**20
    return [
        Sides(f"shard of {mebibytes} MiB written: plain file, synced", "s", 1, publish, write),
        Sides("shard checked, one layer read: plain file read whole", "s", 1, read_shard, read),
    ]


def compared(sides: Sides, repeats: int) -> dict[str, Any]:
    """Time both sides in turns, after a first call of each."""

    def seconds(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) / sides.n_units

    seconds(sides.ours), seconds(sides.plain)
    pairs = [(seconds(sides.ours), seconds(sides.plain)) for _ in range(repeats)]
    ours, plain = (median(times) for times in zip(*pairs, strict=True))
    ratios = [one / other for one, other in pairs]
    return {"name": sides.name, "unit": sides.unit, "ours": ours, "plain": plain, "ratio": ours / plain,
            "ratios": ratios, "goal": sides.goal}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, results = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        console.print("loading smollm2-135m")
        lm = replace(load_model("smollm2-135m", device="cpu"), prefixes=Prefixes())
        rows = [*engine_rows(lm), *store_rows(Path(folder))]
        chosen = [sides for sides in rows if args.only in sides.name]
        for number, sides in enumerate(chosen, start=1):
            console.print(f"{number} of {len(chosen)}: {sides.name}")
            results.append(compared(sides, args.repeats))
    machine = {"cpu": platform.processor() or platform.machine(), "threads": args.threads,
               "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
    args.out.write_text(json.dumps({"machine": machine, "rows": results}, indent=1))
    table = Table("what, against what", "unit", "ours", "other", "ours / other", "goal", title=json.dumps(machine))
    for row in results:
        ours, plain, ratio = (f"{row[name]:.3g}" for name in ("ours", "plain", "ratio"))
        goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
        table.add_row(row["name"], row["unit"], ours, plain, ratio, goal)
    console.print(table)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    transformers.logging.set_verbosity_error()
    main()
