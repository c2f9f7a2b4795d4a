"""A model that cannot be used ends no run of several."""

import json
import logging

import pytest
from support import save_tiny_model, write_questions

from flows.linearity import run_linearity
from flows.pipeline import run_pipeline
from negcore.errors import ModelError, NegError
from tasks.config.dataset_runs import SkillRun
from tasks.config.linearity_run import LinearityRun
from tasks.model_plans import plan_models
from tasks.steps import PlainSteps

SMALL = {"prompts": 2, "neurons": 6, "points": 2, "largest_set": 2, "draws": 1, "bootstrap": 20}


def refuse_all_but(*good):
    def plan(ref):
        if ref not in good:
            raise NegError(f"{ref} is no good")
        return ref

    return plan


def test_the_models_that_can_be_used_are_planned_in_order_and_the_others_named(caplog):
    with caplog.at_level(logging.WARNING):
        found = plan_models(["a", "b", "c", "a"], refuse_all_but("a", "c"))
    assert (list(found), found.problems) == (["a", "c"], ("b: b is no good",))
    assert caplog.messages == ["left out: b: b is no good"]


def test_the_first_error_is_raised_if_no_model_can_be_used():
    with pytest.raises(NegError, match="^a is no good$"):
        plan_models(["a", "b"], refuse_all_but())


def test_errors_that_are_no_users_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        plan_models(["a", "b"], lambda ref: 1 // (ref == "a") and ref)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model that is whole, and one with the tokenizer of a later version."""
    folder = tmp_path_factory.mktemp("models")
    good, bad = (save_tiny_model("llama", folder / name, n_positions=4096) for name in ("good", "bad"))
    tokenizer = json.loads((bad / "tokenizer.json").read_text())
    (bad / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "New"}}))
    return str(bad), str(good)


def test_a_pipeline_measures_the_other_models_and_names_the_one_that_cannot_be_read(models, tmp_path):
    run = SkillRun(model=models, dataset=write_questions(tmp_path), backend="local", out=tmp_path / "run", limit=6)
    results = run_pipeline(run, PlainSteps())
    (problem,) = results.problems
    assert problem.startswith(f"{models[0]}: model {models[0]!r} could not be read: its tokenizer: ")
    assert {row.model for row in results.scores} == {models[1]}
    with pytest.raises(ModelError, match="could not be read: its tokenizer"):
        run_pipeline(run.model_copy(update={"model": models[:1]}), PlainSteps())


def test_a_linearity_study_does_so_too(models, tmp_path):
    facts = tmp_path / "facts.jsonl"
    rows = [{"uuid": f"u{i}", "prompt": f"Answer {i}:", "tpl": "t", "answer": "ABC"[i]} for i in range(3)]
    facts.write_text("\n".join(map(json.dumps, rows)))
    run = LinearityRun(model=models, facts=str(facts), backend="local", out=tmp_path / "run", **SMALL)
    results = run_linearity(run, PlainSteps())
    assert [problem.split(":")[0] for problem in results.problems] == [models[0]]
    assert [findings.model for findings in results.findings] == [models[1]]
