"""Train a series of revisions for real, and print how accuracies and skill neurons move over it.

Run it from the repository: `python -m tests.train_series FOLDER` fine-tunes SmolLM2-135M for 16 steps on those training
rows of `mini/linguistic` that a run with `--limit 60` leaves, and saves folders of weights at steps 0, 2, 4, 8 and 16
(2.7 GB, a few minutes of a core); another model can be named behind it. `python -m tests.train_series --compare RUN`,
of a campaign with these folders and stage `mceval8k`, prints a row for each dataset and revision.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.nn.functional import cross_entropy

from negcore.analysis.shared_neurons import rank_with_random_ties
from negcore.arrays import Ints
from negcore.datasets import PromptSettings, load_dataset
from negcore.measure.loading import load_model
from negcore.measure.votes import Vote
from negcore.model.encoding import encode
from negcore.model.language_model import LanguageModel
from negcore.probing.rankings import rank_layers
from negcore.store.reader import NegSplit
from tasks.run_negs import stored_splits
from tasks.rundir.tables import read_arrow

_DATASET = "mini/linguistic"
_LIMIT = 60
"""Rows of each split that the campaign measures; no row of these is trained on."""
_SAVED = (0, 2, 4, 8, 16)
_BATCH = 8
_RATE = 5e-5
_TOP = 256
"""Neurons of a revision that count as skill neurons."""
_PROBES = ("lm", "polar", "magn")
_HEAD = (
    "| dataset | revision | LM-Prob | p of the right option | Polar | Magn | skill neurons as before | as last "
    "| order as before | as last | in test rows |"
)


def train(folder: Path, model: str = "smollm2-135m") -> None:
    """Save the revisions of a model, and print the loss of each step."""
    torch.manual_seed(0)
    lm = load_model(model)
    ids, label_ids_P = _rows(lm)
    random = np.random.default_rng(0)
    lm.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=_RATE)
    for step in range(max(_SAVED) + 1):
        if step in _SAVED:
            lm.model.save_pretrained(folder / f"step-{step:02}")
            lm.tokenizer.save_pretrained(folder / f"step-{step:02}")
        if step == max(_SAVED):
            break
        chosen = random.choice(len(ids), _BATCH, replace=False)
        loss = torch.stack([_loss(lm, ids[row], label_ids_P[row]) for row in chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f} nats", flush=True)


def _rows(lm: LanguageModel) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of the rows to train on, and those of their answers."""
    whole, measured = (
        load_dataset(_DATASET, lm.tokenizer, settings=PromptSettings(limit=limit)).splits["train"]
        for limit in (None, _LIMIT)
    )
    kept = {row.id for row in measured}
    rows = [row for row in whole if row.id not in kept]
    encoded = encode(lm.card, [row.prompt for row in rows], [row.labels for row in rows])
    answers = encoded.label_ids_PO[np.arange(len(rows)), [row.answer for row in rows]]
    return [list(map(int, row)) for row in encoded.ids], answers.tolist()


def _loss(lm: LanguageModel, ids: list[int], label: int) -> torch.Tensor:
    logits = lm.model(input_ids=torch.tensor([ids])).logits[:, -1]
    return cross_entropy(logits, torch.tensor([label]))


def compare(campaign: Path) -> None:
    """Print a row for each dataset and revision of a finished campaign, as a Markdown table."""
    print(f"{_HEAD}\n{'|---' * (_HEAD.count('|') - 1)}|")
    runs = sorted(path.parent for path in campaign.glob("*/mceval8k/accuracy.arrow"))
    splits = [{part: _by_dataset(run, part) for part in ("train", "test")} for run in runs]
    for dataset in splits[0]["test"]:
        scores, of_test = ([_scores(of_run[part][dataset]) for of_run in splits] for part in ("train", "test"))
        tops = [_skill_neurons(scores_M, str(at)) for at, scores_M in enumerate(scores)]
        for at, run in enumerate(runs):
            test = splits[at]["test"][dataset]
            p_P = test.probs_PO[np.arange(test.n_rows), test.gold_P]
            lm, *probes = _accuracies(run, dataset)
            others = (at - 1, len(runs) - 1)
            shared = [len(tops[at] & tops[other]) / _TOP if other >= 0 else np.nan for other in others]
            orders = [spearmanr(scores[at], scores[other]).statistic if other >= 0 else np.nan for other in others]
            same = spearmanr(scores[at], of_test[at]).statistic
            numbers = (lm, p_P.mean(), *probes, *shared, *orders, same)
            shown = " | ".join("-" if np.isnan(number) else f"{number:.3f}" for number in numbers)
            print(f"| {dataset} | {run.parent.name} | {shown} |")


def _by_dataset(run: Path, part: str) -> dict[str, NegSplit]:
    return {stored.place.dataset: stored.open() for stored in stored_splits(run, (part,))}


def _scores(split: NegSplit) -> Ints:
    """Return Magn's scores of all neurons."""
    vote = Vote("magn", "neg")
    return rank_layers(split, range(split.n_layers), [vote], act=False).votes_M[vote]


def _skill_neurons(scores_M: Ints, name: str) -> set[int]:
    """Return the best neurons; those of equal score in an order of the revision's own."""
    return set(rank_with_random_ties({name: scores_M}, seed=0)[name].order_K[:_TOP].tolist())


def _accuracies(run: Path, dataset: str) -> list[float]:
    rows = [row for row in read_arrow(run / "accuracy.arrow").to_pylist() if not row["group"]]
    found = {row["probe"]: row["accuracy"] for row in rows if row["dataset"] == dataset}
    return [found[probe] for probe in _PROBES]


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        compare(Path(sys.argv[2]))
    else:
        train(Path(sys.argv[1]), *sys.argv[2:])
