import numpy as np
import pytest
import torch
from support import LABELS, PROMPTS, prompts_for, tiny_model

from negcore.measure import estimators, interventions
from negcore.measure.estimators import ESTIMATORS, WITH_REFERENCES, estimate
from negcore.measure.forward import ProbedBatch
from negcore.measure.interventions import intervene, random_sets
from negcore.measure.memory import BatchLimit, is_out_of_memory
from negcore.measure.sweeps import sweep
from negcore.measure.virtual_tokens import HookedPrompt, VirtualPrompt

OPTIONS = LABELS[:3]
SHIFTS = [-1.0, 1.0]


def scarce(function, n_items, most, tried):
    """The function with memory for so many items only; `tried` collects how many it was asked for."""

    def limited(*args, **kwargs):
        tried.append(n_items(*args, **kwargs))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return function(*args, **kwargs)

    return limited


def assert_same(actual, expected):
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)


def test_parts_are_halved_where_memory_runs_out_and_stay_so(caplog):
    tried = []
    limit = BatchLimit("things")
    part = scarce(lambda items: items, len, 3, tried)
    assert limit.compute(10, 8, part) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert limit.compute(3, 8, part) == [[0, 1], [2]]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: batches were halved until they fit, to 2 things"
    ]


def test_finished_parts_are_not_computed_again():
    full_at = 4

    def part(items):
        if items[0] >= full_at and len(items) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return items

    assert BatchLimit("things").compute(7, 2, part) == [[0, 1], [2, 3], [4], [5], [6]]
    assert BatchLimit("things").compute(0, 2, part) == []


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("CUDA out of memory")])
def test_other_errors_are_raised_at_once(error):
    tried = []

    def part(items):
        tried.append(len(items))
        raise error

    with pytest.raises(type(error), match=str(error)):
        BatchLimit("things").compute(8, 8, part)
    assert tried == [8]


def test_an_item_for_which_memory_does_not_suffice_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        BatchLimit("things").compute(8, 8, scarce(len, len, 0, []))


def test_a_lack_of_host_memory_is_known_by_what_pytorch_says_of_it():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50)
    assert is_out_of_memory(refused.value)


@pytest.mark.parametrize(("family", "kind"), [("llama", VirtualPrompt), ("bert", HookedPrompt)])
def test_a_sweep_halves_its_rows(family, kind, monkeypatch):
    lm = tiny_model(family)
    prompts = prompts_for(lm)[:2]
    whole = sweep(lm, prompts, " A", neurons=4, shifts=SHIFTS)
    tried = []
    n_rows = lambda self, shifts: len(shifts.layers_R)  # noqa: E731
    monkeypatch.setattr(kind, "_measure", scarce(kind._measure, n_rows, 6, tried))
    scarcely = sweep(lm, prompts, " A", neurons=4, shifts=SHIFTS)
    assert tried == [24, 12, 6, 6, 6, 6, *[6] * 4]  # the second prompt begins with what fitted the first
    assert_same(scarcely.probs_PKS, whole.probs_PKS)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_intervention_halves_its_rows(family, monkeypatch):
    lm = tiny_model(family)
    prompts, sets = prompts_for(lm)[:2], random_sets(lm, [1, 2, 4, 8, 16])
    whole = intervene(lm, prompts, " A", sets=sets, shifts=SHIFTS)
    tried = []
    n_rows = lambda batch, tokens, rows, *rest: len(rows)  # noqa: E731
    monkeypatch.setattr(interventions, "_shifted", scarce(interventions._shifted, n_rows, 2, tried))
    scarcely = intervene(lm, prompts, " A", sets=sets, shifts=SHIFTS)
    assert tried == [10, 5, *[2] * 5, *[2] * 5]  # 5 sets under 2 shifts: the second prompt keeps what the first learnt
    assert_same(scarcely.probs_PDM, whole.probs_PDM)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_halves_its_batches(name, monkeypatch):
    lm = tiny_model("gpt2")
    question = {"answers": [0, 1, 2, 0], "estimator": name, "neurons": 5}
    question |= {"references": PROMPTS[1:5]} if name in WITH_REFERENCES else {}
    whole = estimate(lm, PROMPTS[:4], OPTIONS, **question)
    tried = []
    n_rows = lambda batch, shifts=None: len(batch.rows)  # noqa: E731
    monkeypatch.setattr(ProbedBatch, "predict", scarce(ProbedBatch.predict, n_rows, 3, tried))
    n_streams = lambda lm, hidden_RH: len(hidden_RH)  # noqa: E731
    monkeypatch.setattr(estimators, "unembed", scarce(estimators.unembed, n_streams, 3, tried))
    n_shifts = lambda self, shifts: len(shifts.layers_R)  # noqa: E731
    monkeypatch.setattr(VirtualPrompt, "_measure", scarce(VirtualPrompt._measure, n_shifts, 3, tried))
    scarcely = estimate(lm, PROMPTS[:4], OPTIONS, **question)
    assert max(tried) > 3 and max(tried[-2:]) <= 3
    assert_same(scarcely, whole)
