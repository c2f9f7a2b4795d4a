"""Measure NEGs of a model whose weights wait on disk; print the most memory that this took and the weights' bytes.

`PYTHONPATH=. python tests/passing_memory.py --weights disk`, and `--weights here` for a model that is loaded whole.
Memory is the process's anonymous memory (`RssAnon`) above what it has once the libraries are there: pages of the
weights' files, which the system drops where memory is short, are not counted. The last line is JSON.
"""

import argparse
import json
import time

import numpy as np
import torch
from anonymous_memory import Peak, anonymous_bytes

from negcore import load_model, neurgrad
from negcore.model.language_model import describe_model
from negcore.model.skeleton import skeleton

_SETTLED = "Which of these is a town? A. Paris B. bread C. seven D. green Answer:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", choices=["disk", "here"], default="disk")
    parser.add_argument("--prompts", type=int, default=16)
    args = parser.parse_args()
    card = describe_model(args.model)
    shapes = skeleton(card.config, masked=card.arch.masked)
    prompts = [f"{number}. {_SETTLED}" for number in range(args.prompts)]
    before_bytes, peak = anonymous_bytes(), Peak()
    lm = load_model(card, device="cpu", device_map="disk" if args.weights == "disk" else None)
    started = time.perf_counter()
    negs = neurgrad(lm, prompts, [" A", " B", " C", " D"])
    figures = {
        "weights": args.weights,
        "weight_bytes": sum(4 * one.numel() for one in shapes.parameters()),
        "peak_bytes": peak.end() - before_bytes,
        "seconds": time.perf_counter() - started,
        "check_passed": lm.check is not None and lm.check.passed,
        "norm": float(np.linalg.norm(negs.negs_POLN)),
        "probs": negs.probs_PO[0].tolist(),
    }
    print(f"{figures['peak_bytes'] / 2**20:.0f} MiB at most, for weights of {figures['weight_bytes'] / 2**20:.0f} MiB")
    print(json.dumps(figures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
