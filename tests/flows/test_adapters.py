"""Runs of a model with an adapter."""

import pytest
import torch
import transformers
from support import save_tiny_model
from typer.testing import CliRunner

from flows.cli.app import app
from negcore.store.reader import open_negs

peft = pytest.importorskip("peft")


def neg(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def test_a_run_with_an_adapter_is_its_own_and_knows_what_it_was_measured_with(tmp_path):
    base = save_tiny_model("llama", tmp_path / "base", n_positions=512)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    with torch.no_grad():
        for weight in wrapped.parameters():
            weight += 0.1 * weight.requires_grad
    wrapped.save_pretrained(tmp_path / "lora")
    options = ["--model", base, "--dataset", "mini/fact", "--limit", 6, "--shots", 0]
    options += ["--backend", "local", "--orchestrator", "none", "--out", tmp_path / "run"]
    assert neg("extract", *options)[0] == 0
    assert neg("extract", *options, "--adapter", tmp_path / "lora")[0] == 0
    plain, adapted = (
        open_negs(tmp_path / "run").select(model=name, dataset="mini/fact", split="test")
        for name in (str(base), f"{base}+{tmp_path / 'lora'}")
    )
    assert adapted.identity.model_revision.startswith(f"{plain.identity.model_revision}+xxh3:")
    assert not torch.equal(*(torch.from_numpy(one.neurons([(1, 7)])) for one in (plain, adapted)))
    code, output = neg("verify", tmp_path / "run")
    assert code == 0 and "base+lora" in output
