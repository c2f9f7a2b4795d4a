"""Check and time the engine on a GPU, without Ray and Prefect: `make bench-gpu`.

Models have the shapes of real ones and random weights, as nothing is downloaded; the embedded model is real where it
is at hand (`--model`). Each check prints its figures when it is done, and all of them go into one JSON file, with card,
driver and versions. A check that fails is named with its error, the others go on, and the exit code is 1.

`--tiny` makes every model tiny and runs anywhere: it tries the script, not the machine.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))  # `support` is a module beside this one, as for the tests
from support import CONFIGS, LABELS, Row, by_turns, prompts_for, save_tiny_model, tiny_model, tiny_tokenizer

from negcore.measure.benchmark import plain_gradients
from negcore.measure.forward import common_prefix_length
from negcore.measure.kept import keeping
from negcore.measure.loading import checked, load_model
from negcore.measure.model_check import check_model
from negcore.measure.neurgrad import NeurGradBatch, away_from_zero, measure_negs, neurgrad
from negcore.measure.sweeps import draw_neurons, shift_grid, sweep
from negcore.model.attention import ATTENTION_NAME
from negcore.model.encoding import EncodedPrompts
from negcore.model.language_model import DTYPES, LanguageModel, describe_model, read_model, wrap_model
from negcore.store.identity import RunIdentity, StorageName
from negcore.store.levels import STORAGE_LEVELS
from negcore.store.publish import ShardPlace, publish_shard
from tasks.measure.negs import NegMeasurement

Figures = dict[str, Any]

_IN_A_ROW = 6
"""Shards that are measured and written one behind the other."""


class Setting(NamedTuple):
    """What the command line decides."""

    device: str
    tiny: bool
    model: str
    """Reference of a real model; empty if there is none."""


class Workload(NamedTuple):
    """Prompts of random tokens, some of them shared, and what they are called."""

    name: str
    prompts: EncodedPrompts
    n_shared: int

    @property
    def n_own(self) -> int:
        """Tokens that are run for single prompts."""
        return sum(len(tokens) - self.n_shared for tokens in self.prompts.ids)


# Models and prompts


@lru_cache(1)  # several checks in a row use it
def llama_7b(setting: Setting, dtype: str) -> LanguageModel:
    """A model of Llama-2-7B's shape with random weights, made on the device; not checked yet."""
    shape: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    shape |= {"num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 16384}
    if setting.tiny:
        shape |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
        shape |= {"vocab_size": 400}
    llama_7b.cache_clear()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape)
    with torch.device(setting.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return wrap_model(model, tiny_tokenizer(), name=f"llama-7b-shape-{dtype}", revision="random", site="paper")


def random_prompts(
    lm: LanguageModel, name: str, n_prompts: int, n_shared: int, own: tuple[int, int], n_options: int = 4
) -> Workload:
    """Prompts that begin with the same tokens, each with a number of own ones drawn from a range."""
    random, vocabulary = np.random.default_rng(0), lm.card.vocab_size
    shared = random.integers(vocabulary, size=n_shared).tolist()
    lengths = random.integers(own[0], own[1] + 1, size=n_prompts)
    ids = [
        [*shared, index % vocabulary, *random.integers(vocabulary, size=length - 1).tolist()]
        for index, length in enumerate(lengths)
    ]
    options = np.tile(random.choice(vocabulary, n_options, replace=False), (n_prompts, 1))
    prompts = EncodedPrompts(ids, options)
    return Workload(name, prompts, common_prefix_length(ids))


def some(prompts: EncodedPrompts, count: int) -> EncodedPrompts:
    return EncodedPrompts(prompts.ids[:count], prompts.label_ids_PO[:count])


def real_model(setting: Setting, dtype: str, device: str) -> LanguageModel:
    """The embedded model, or in a trial a tiny one; not checked."""
    if setting.model:
        return read_model(describe_model(setting.model), dtype=dtype, device=device, site="paper")  # type: ignore[arg-type]
    lm = tiny_model("llama", dtype=DTYPES[dtype])
    lm.model.to(device)
    return lm


def real_prompts(lm: LanguageModel, n_prompts: int) -> EncodedPrompts:
    """Questions of different lengths, as the model's tokenizer reads them."""
    from negcore.model.encoding import encode

    topics = ["capital", "sport", "science", "business", "weather", "history", "music", "food"]
    texts = [
        f"Question {index}: {' '.join(topics[(index + step) % 8] for step in range(3 + index % 9))}, which? Answer:"
        for index in range(n_prompts)
    ]
    return encode(lm.card, texts, LABELS[:4])


# Measures


class Timed(NamedTuple):
    seconds: float
    peak_bytes: int


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(setting: Setting, call: Callable[[], object], repeats: int = 3, *, warm: bool = True) -> Timed:
    """Time a call, after one that warms up; return its median and the most bytes that it held on the device."""
    is_cuda = setting.device.startswith("cuda")
    if warm:
        call()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        synchronize(setting.device)
        started = time.perf_counter()
        call()
        synchronize(setting.device)
        seconds.append(time.perf_counter() - started)
    return Timed(median(seconds), torch.cuda.max_memory_allocated() if is_cuda else 0)


def forward_limit(setting: Setting, lm: LanguageModel, work: Workload, budgets: Sequence[int]) -> dict[str, float]:
    """Time a plain forward pass (SDPA, no gradient) of every prompt's own tokens after the shared prefix's cache.

    Prompts of similar length run side by side, padded, as many as a budget of own tokens allows: a time a budget.
    """
    lm.model.set_attn_implementation("sdpa")
    try:
        prefix = DynamicCache()
        with torch.no_grad():
            lm.model(input_ids=ids_tensor([work.prompts.ids[0][: work.n_shared]], lm), past_key_values=prefix)
            return {
                str(budget): timed(setting, lambda budget=budget: _forward(lm, work, prefix, budget), 2).seconds
                for budget in budgets
            }
    finally:
        lm.model.set_attn_implementation(ATTENTION_NAME)


def ids_tensor(rows: Sequence[Sequence[int]], lm: LanguageModel) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=lm.device)


def _forward(lm: LanguageModel, work: Workload, prefix: Any, budget: int) -> None:
    own = sorted((tokens[work.n_shared :] for tokens in work.prompts.ids), key=len)
    while own:
        n_rows = next((n for n in range(1, len(own)) if (n + 1) * len(own[n]) > budget), len(own))
        rows, own = own[:n_rows], own[n_rows:]
        cache = DynamicCache()
        for index, layer in enumerate(prefix.layers):
            cache.update(layer.keys.expand(n_rows, -1, -1, -1), layer.values.expand(n_rows, -1, -1, -1), index)
        ids = ids_tensor(rows, lm)
        last = torch.tensor([len(row) - 1 for row in rows], device=lm.device)
        hidden = lm.model.model(input_ids=ids, past_key_values=cache).last_hidden_state
        lm.model.lm_head(hidden[torch.arange(n_rows, device=lm.device), last])


def relative(errors: Any, truth: Any) -> float:
    return float(np.linalg.norm(np.asarray(errors, np.float64)) / np.linalg.norm(np.asarray(truth, np.float64)))


def agreement(ours: NeurGradBatch, truth: NeurGradBatch) -> Figures:
    """Compare NEGs with true ones: relative norm of the errors, and the share of equal signs."""
    return {
        "negs": relative(ours.negs_POLN - truth.negs_POLN, truth.negs_POLN),
        "activations": relative(ours.activations_PLN - truth.activations_PLN, truth.activations_PLN),
        "probs": relative(ours.probs_PO - truth.probs_PO, truth.probs_PO),
        "same_sign": float((np.sign(ours.negs_POLN) == np.sign(truth.negs_POLN)).mean()),
    }


# Checks


def families(setting: Setting) -> Iterator[Figures]:
    """1: every family in float64 on the device against plain autograd on the CPU, in batches of 1, 2 and 7."""
    from negcore.model.encoding import encode

    for family in ["llama", "bert", "gpt2"] if setting.tiny else CONFIGS:
        lm = tiny_model(family)
        texts = prompts_for(lm)
        true_negs = []
        for text in texts:
            grads_OLN = plain_gradients(lm, text, LABELS[:3])
            true_negs.append(grads_OLN)
        truth_POLN = torch.stack(true_negs)
        reference = neurgrad(lm, texts, LABELS[:3])
        signs_PLN = away_from_zero(torch.from_numpy(reference.activations_PLN))
        negs_POLN = (truth_POLN * signs_PLN[:, None]).numpy()
        lm.model.to(setting.device)
        prompts = encode(lm.card, texts, LABELS[:3])
        try:
            checked(lm)
            worst = max(
                relative(neurgrad(lm, prompts, batch_size=size).negs_POLN - negs_POLN, negs_POLN) for size in (1, 2, 7)
            )
            swept = sweep(lm, some(EncodedPrompts(prompts.ids, prompts.label_ids_PO[:, :1]), 2), neurons=2)
            plain = sweep(
                lm, some(EncodedPrompts(prompts.ids, prompts.label_ids_PO[:, :1]), 2), neurons=2, method="hooks"
            )
            yield {
                "family": family,
                "passed": worst < 1e-5,  # normalisations of most models round to float32, each device in its way
                "negs": worst,
                "sweep": relative(swept.probs_PKS - plain.probs_PKS, plain.probs_PKS),
            }
        except Exception as error:
            yield {"family": family, "passed": False, "error": f"{type(error).__name__}: {error}"[:300]}
        finally:
            lm.model.to("cpu")  # tests share it


def real_numbers(setting: Setting) -> Iterator[Figures]:
    """2: the embedded model in float32 and bfloat16 on the device against float64 on the CPU, 20 prompts."""
    exact = real_model(setting, "float64", "cpu")
    prompts = real_prompts(exact, 20)
    truth = neurgrad(exact, prompts)
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        lm = real_model(setting, dtype, setting.device)
        yield {"dtype": dtype, **agreement(neurgrad(lm, prompts), truth)}


def one_shot(setting: Setting) -> Iterator[Figures]:
    """3: 256 prompts of 461 shared and 86 own tokens, four options, in the shape of a 7B model."""
    lm = llama_7b(setting, "bfloat16")
    n_prompts = 16 if setting.tiny else 256
    yield from _beside_forward(setting, lm, random_prompts(lm, "one-shot", n_prompts, 461, (86, 86)))


def zero_shot(setting: Setting) -> Iterator[Figures]:
    """4: 128 prompts of 50 to 600 tokens that share nothing."""
    lm = llama_7b(setting, "bfloat16")
    n_prompts = 8 if setting.tiny else 128
    yield from _beside_forward(setting, lm, random_prompts(lm, "zero-shot", n_prompts, 1, (49, 599)))


def _beside_forward(setting: Setting, lm: LanguageModel, work: Workload) -> Iterator[Figures]:
    yield {"check": {one.name: one.difference for one in check_model(lm).comparisons}}
    ours = timed(setting, lambda: neurgrad(lm, work.prompts), 1)
    budgets = [256, 1024] if setting.tiny else [2048, 4096, 8192]
    limits = forward_limit(setting, lm, work, budgets)
    n_prompts, best = len(work.prompts.ids), min(limits.values())
    yield {
        "what": work.name,
        "prompts": n_prompts,
        "own_tokens": work.n_own,
        "seconds": ours.seconds,
        "prompts_per_s": n_prompts / ours.seconds,
        "own_tokens_per_s": work.n_own / ours.seconds,
        "forward_s": limits,
        "share_of_forward": best / ours.seconds,
        "peak_gib": ours.peak_bytes / 2**30,
        "weights_gib": sum(weights.nbytes for weights in lm.model.parameters()) / 2**30,
    }


def profiled(setting: Setting) -> Iterator[Figures]:
    """5: where the time of check 3 goes, by kind of kernel, and how long the device does nothing."""
    lm = llama_7b(setting, "bfloat16")
    n_prompts = 8 if setting.tiny else 128
    one_shot, zero_shot = (
        random_prompts(lm, "one-shot", n_prompts, 461, (86, 86)),
        random_prompts(lm, "zero-shot", n_prompts, 1, (49, 599)),
    )
    for work in (one_shot, zero_shot):
        yield _profile(setting, lm, work)


def _profile(setting: Setting, lm: LanguageModel, work: Workload) -> Figures:
    neurgrad(lm, work.prompts)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * setting.device.startswith("cuda")
    synchronize(setting.device)
    with profile(activities=activities) as recorded:
        started = time.perf_counter()
        neurgrad(lm, work.prompts)
        synchronize(setting.device)
        seconds = time.perf_counter() - started
    return {"what": work.name, "prompts": len(work.prompts.ids), "seconds": seconds, **_kernel_shares(recorded)}


_KINDS = {
    "matrix products": ("gemm", "cutlass", "nvjet", "splitk", "gemv"),
    "attention": ("flash", "fmha", "attention", "softmax"),
    "copies to the host": ("dtoh",),
    "copies to the device": ("htod",),
    "copies on the device": ("dtod", "copy", "cat"),
}


def _kernel_shares(recorded: Any) -> Figures:
    """Sum the times of kernels by kind, in seconds, and those in which none ran between the first and the last."""
    spans, kinds, names = [], dict.fromkeys([*_KINDS, "other"], 0.0), {}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            start, end = event.time_range.start, event.time_range.end
            spans.append((start, end))
            name = event.name.lower()
            kind = next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "other")
            kinds[kind] += (end - start) / 1e6
            names[event.name[:90]] = names.get(event.name[:90], 0.0) + (end - start) / 1e6
    busy, reached = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    longest = sorted(names.items(), key=lambda item: -item[1])[:25]
    return {"busy_s": busy / 1e6, "kernels": len(spans), "kinds_s": kinds, "longest_s": dict(longest)}


def sweeps(setting: Setting) -> Iterator[Figures]:
    """6: a sweep of 512 neurons of 4 prompts in float32, against passes of whole prompts."""
    lm = llama_7b(setting, "float32")
    work = random_prompts(lm, "sweep", 4, 16, (60, 86), n_options=1)
    n_neurons, n_plain = (32, 4) if setting.tiny else (512, 4)
    chosen = draw_neurons(lm.layer_shapes, n_neurons)
    shifts = shift_grid(2)
    fast = timed(setting, lambda: sweep(lm, work.prompts, neurons=chosen, shifts=shifts), 1, warm=False)
    plain = timed(
        setting,
        lambda: sweep(lm, work.prompts, neurons=chosen[:: n_neurons // n_plain], shifts=shifts, method="hooks"),
        1,
    )
    yield {
        "neurons": n_neurons,
        "seconds": fast.seconds,
        "neurons_per_s": 4 * n_neurons / fast.seconds,
        "neurons_per_s_plain": 4 * n_plain / plain.seconds,
        "ratio": plain.seconds / n_plain / (fast.seconds / n_neurons),
        "peak_gib": fast.peak_bytes / 2**30,
    }


def batches(setting: Setting) -> Iterator[Figures]:
    """7: NEGs in batches of 1, 4, 16 and 64, against batches of one in the same type."""
    for dtype in ("float32", "bfloat16"):
        lm = real_model(setting, dtype, setting.device)
        prompts = real_prompts(lm, 64)
        alone = neurgrad(lm, prompts, batch_size=1)
        for size in (4, 16, 64):
            yield {"dtype": dtype, "batch": size, **agreement(neurgrad(lm, prompts, batch_size=size), alone)}


def long_prompt(setting: Setting) -> Iterator[Figures]:
    """8: one prompt of 8,000 tokens."""
    lm = llama_7b(setting, "bfloat16")
    work = random_prompts(lm, "long", 1, 0, (200, 200) if setting.tiny else (8000, 8000))
    ours = timed(setting, lambda: neurgrad(lm, work.prompts), 1)
    yield {"tokens": len(work.prompts.ids[0]), "seconds": ours.seconds, "peak_gib": ours.peak_bytes / 2**30}


def shards(setting: Setting) -> Iterator[Figures]:
    """10: shards of 64 prompts, measured and published as a worker does it, by storage level: one, and six in a row."""
    lm = llama_7b(setting, "bfloat16")
    n_rows = 8 if setting.tiny else 64
    work = random_prompts(lm, "one-shot", n_rows, 461, (86, 86))
    for storage in STORAGE_LEVELS:
        one_shard = partial(_shard, lm, work, storage, Lock())
        seconds: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder, _idle(setting) as idle:
            n_bytes = one_shard(folder, seconds, 0)
        total = sum(seconds.values())
        yield {"storage": storage, "rows": n_rows, "bytes": n_bytes, **seconds,
               "bytes_per_s": n_bytes / total, "idle_share": 1 - idle["busy_s"] / total}  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, _idle(setting) as idle, ThreadPoolExecutor(2) as threads:
            started = time.perf_counter()
            assert sum(threads.map(partial(one_shard, folder, {}), range(_IN_A_ROW))) == _IN_A_ROW * n_bytes
            total = time.perf_counter() - started
        yield {"storage": storage, "shards": _IN_A_ROW, "seconds": total, "idle_share": 1 - idle["busy_s"] / total}


def _shard(
    lm: LanguageModel,
    work: Workload,
    storage: StorageName,
    device: Lock,
    folder: str,
    seconds: dict[str, float],
    index: int,
) -> int:
    """Measure a shard, with the device for itself, and publish it; note the times and return its bytes."""
    examples = [Row(str(row), answer=row % 4) for row in range(len(work.prompts.ids))]
    measurement = NegMeasurement(lm.n_layers, lm.layer_width, storage)
    keep = keeping(lm, storage, np.array([row.answer for row in examples]))
    identity = RunIdentity(
        model="m", model_revision="r", tokenizer_hash="t", site="up", dtype="bfloat16", prompt={},
        n_layers=lm.n_layers, n_neurons=lm.layer_width, dataset_fingerprint="f", storage=storage,
    )  # fmt: skip
    with device, _noted(seconds, "measure_s"):
        measured = measure_negs(lm, work.prompts, keep, dtype=torch.float32)
    columns = {**measured, "label_ids_PO": work.prompts.label_ids_PO}
    with _noted(seconds, "nonfinite_s"):
        measurement.nonfinite(columns)
    with _noted(seconds, "columns_s"):
        record = measurement.record_batch(examples, columns)
    with _noted(seconds, "publish_s"):
        place, about = ShardPlace("negs", "m", "d", "train"), measurement.about(4)
        receipt = publish_shard(folder, place, index, _IN_A_ROW, identity=identity, batch=record, about=about)
    return receipt.n_bytes


@contextmanager
def _noted(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


@contextmanager
def _idle(setting: Setting) -> Iterator[Figures]:
    """Fill in how long the device was busy inside."""
    found: Figures = {"busy_s": 0.0}
    if not setting.device.startswith("cuda"):
        yield found
        return
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        yield found
        torch.cuda.synchronize()
    found["busy_s"] = _kernel_shares(recorded)["busy_s"]


def several_devices(setting: Setting) -> Iterator[Figures]:
    """10: tiny models with their blocks on the device and the processor by turns, against those on the device alone."""
    first, second = ("cpu", "disk") if setting.device == "cpu" else (f"{setting.device}:0", "cpu")
    for family in ("llama", "gemma3_text", "gpt2", "bert", "mixtral"):
        with tempfile.TemporaryDirectory() as folder:
            ref = str(save_tiny_model(family, Path(folder) / "tiny"))
            one = load_model(ref, device=setting.device)
            several = load_model(ref, device_map=by_turns(ref, first, second))
            texts = prompts_for(one)
            truth, ours = (neurgrad(lm, texts, LABELS).negs_POLN for lm in (one, several))
            figures: Figures = {"family": family, "negs": relative(ours - truth, truth)}
            if not one.has_experts:
                both = (sweep(lm, texts[:2], [" A"] * 2, neurons=[(1, 3)]).probs_PKS for lm in (several, one))
                swept, expected = both
                figures["sweep"] = relative(swept - expected, expected)
            yield figures | {"passed": max(figures["negs"], figures.get("sweep", 0)) < 1e-4}


CHECKS: dict[str, Callable[[Setting], Iterator[Figures]]] = {
    "families": families,
    "numbers": real_numbers,
    "one-shot": one_shot,
    "zero-shot": zero_shot,
    "profile": profiled,
    "sweeps": sweeps,
    "batches": batches,
    "long": long_prompt,
    "shards": shards,
    "devices": several_devices,
}


def machine(setting: Setting) -> Figures:
    """Card, driver and versions."""
    about = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if setting.device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        about["card"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        about["cuda"] = str(torch.version.cuda)
    return about


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(CHECKS), help="a check; may be given several times")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="", help="reference of a real model, such as smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"), help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="tiny models: tries the script, not the machine")
    args = parser.parse_args()
    setting = Setting(args.device, args.tiny, args.model)
    results: Figures = {"machine": machine(setting)}
    print(json.dumps(results["machine"]), flush=True)
    failed = False
    for name in args.only or CHECKS:
        started = time.perf_counter()
        rows: list[Figures] = []
        try:
            for row in CHECKS[name](setting):
                rows.append(row)
                failed |= row.get("passed") is False
                print(name, json.dumps(row), flush=True)
        except Exception as error:
            failed = True
            traceback.print_exc(limit=-4)
            rows.append({"error": f"{type(error).__name__}: {error}"[:500]})
        results[name] = {"seconds": time.perf_counter() - started, "rows": rows}
        print(f"{name}: {results[name]['seconds']:.1f} s", flush=True)
        args.out.write_text(json.dumps(results, indent=1))
    return int(failed)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.exit(main())
