"""Compare estimated with measured NEGs at a subject's last token and at a prompt's last token, for whole answers.

`PYTHONPATH=. python tests/compare_places.py` prints the first table of docs/worth.md on them; with `--layers`, which
sweeps nothing, the second.
"""

import sys
import time

import numpy as np

from negcore import load_model, neurgrad, sweep
from negcore.measure.sweeps import draw_neurons
from negcore.model.encoding import encode

FACTS = [
    ("Statue of Liberty", "The Statue of Liberty stands in the city of", " New York"),
    ("Golden Gate Bridge", "The Golden Gate Bridge stands in the city of", " San Francisco"),
    ("Kilimanjaro", "Mount Kilimanjaro is a mountain in the country of", " Tanzania"),
    ("Charles Dickens", "The novelist Charles Dickens wrote the book", " Oliver Twist"),
    ("Romeo and Juliet", "The author of Romeo and Juliet is", " William Shakespeare"),
    ("Marie Curie", "The scientist Marie Curie discovered polonium and", " radium"),
]
MODELS = {"smollm2-135m": 2, "gemma3-270m": 3}
"""Swept neurons of each layer."""
NODES = 5


def encoded_facts(lm, place):
    """Encode the facts with neurons to be read at one place."""
    prompts, labels = [prompt for _, prompt, _ in FACTS], [[label] for *_, label in FACTS]
    named = [subject for subject, *_ in FACTS] if place == "subject" else None
    return encode(lm.card, prompts, labels, probe_at=named, answers="sequence")


def by_layers(ref, places):
    """Yield rows with the mean |NEG| of all neurons, estimated, in fifths of the layers."""
    lm = load_model(ref)
    for place in places:
        sizes_L = np.abs(neurgrad(lm, encoded_facts(lm, place)).negs_POLN.astype(np.float64)).mean(axis=(0, 1, 3))
        yield [
            f"{ref}, {place}",
            *(f"{part.mean():.1e}" for part in np.array_split(sizes_L[:-1], 5)),
            f"{sizes_L[-1]:.1e}",
        ]


def compare(ref, a_layer, places):
    """Yield the rows of a model's table."""
    lm = load_model(ref)
    neurons_K2 = draw_neurons(lm.layer_shapes, a_layer * lm.n_layers)
    layers_K, chosen_K = neurons_K2.T
    for place in places:
        encoded = encoded_facts(lm, place)
        started = time.perf_counter()
        estimated = neurgrad(lm, encoded)
        seconds = time.perf_counter() - started
        estimated_PK = estimated.negs_POLN[:, 0, layers_K, chosen_K].astype(np.float64)
        started = time.perf_counter()
        swept = sweep(lm, encoded, neurons=neurons_K2, nodes=NODES)
        measured_PK = swept.negs_PK
        r_P = [np.corrcoef(*pair)[0, 1] for pair in zip(estimated_PK, measured_PK, strict=True)]
        moves_PK = measured_PK != 0
        yield [
            f"{ref}, {place}",
            f"{np.mean([len(tokens) for (tokens,) in encoded.label_tokens_PO]):.1f}",
            f"{np.exp(np.log(estimated.probs_PO.astype(np.float64)).mean()):.1e}",
            f"{np.mean(r_P):.4f} ({min(r_P):.4f})",
            f"{(np.sign(estimated_PK) == np.sign(measured_PK))[moves_PK].mean():.3f}",
            f"{swept.linear_PK[moves_PK].mean():.3f}",
            f"{1 - moves_PK.mean():.3f}",
            f"{np.median(np.abs(measured_PK[moves_PK])):.1e}",
            f"{seconds / len(FACTS):.2f}",
            f"{(time.perf_counter() - started) / len(FACTS):.1f}",
        ]


def main(*asked):
    """Print a table."""
    refs = [ref for ref in asked if ref != "--layers"] or MODELS
    if "--layers" in asked:
        titles = ["model, place", *(f"{number}. fifth" for number in range(1, 6)), "last layer"]
        rows = (row for ref in refs for row in by_layers(ref, ("subject", "last")))
    else:
        titles = ["model, place", "tokens", "p", "r (least)", "same sign", "linear", "no effect", "median"]
        titles += ["s estimated", "s swept"]
        rows = (row for ref in refs for row in compare(ref, MODELS[ref], ("subject", "last")))
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
