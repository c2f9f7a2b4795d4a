"""What a run will need is foreseen, and what will not fit is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support import CONFIGS, CORE, SHARED, save_tiny_model, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from flows.cli.app import app
from flows.pipeline import run_extract
from flows.show.forecast_tables import forecast_lines
from negcore.errors import RunError
from negcore.model.encoding import EncodedPrompts
from tasks.config.dataset_runs import EvaluationRun, SkillRun
from tasks.config.linearity_run import LinearityRun
from tasks.config.reading import read_run_file
from tasks.config.run_file import write_run_file
from tasks.forecast import needs as forecasting
from tasks.forecast import shard_size
from tasks.forecast.capacity import check_disk, requirements
from tasks.forecast.needs import ParameterCounts, Rate, count_parameters, forecast, measured_rate, skill_runs
from tasks.forecast.shard_size import shard_bytes
from tasks.machine import free_bytes
from tasks.plan import plan
from tasks.steps import PlainSteps

MCEVAL8K = SHARED / "mceval8k"
needs_mceval8k = pytest.mark.skipif(not MCEVAL8K.is_dir(), reason="MCEval8K is not beside the repository")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that reads prompts of a byte a token."""
    config, positions = CONFIGS["llama"], 4096
    tokenizer = tiny_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "llama", {**config, "max_position_embeddings": positions})
        patch.setattr(tokenizer, "model_max_length", positions)
        return str(save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    rows = [
        {"prompt": f"Question: {'the best ' * (i % 5)}{i} Answer:", "labels": [" A", " B", " C"], "answer": i % 3}
        for i in range(60)
    ]
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture
def run(model, questions, tmp_path):
    values = {"model": [model], "dataset": [questions], "backend": "local", "shard_rows": 8}
    return read_run_file(SkillRun, None, values | {"out": tmp_path / "run"})


def neg(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


# Rows and bytes


def test_rows_shards_and_bytes_are_those_of_the_run_itself(run):
    planned = [(run, plan(run))]
    ((dataset,),) = [of_model.datasets for of_model in forecast(planned)]
    made = run_extract(run, PlainSteps()).extracted
    assert dataset.n_rows == sum(split.n_rows for split in made)
    assert dataset.n_shards == sum(split.n_computed for split in made)
    assert dataset.n_bytes == sum(split.n_bytes for split in made)


@needs_mceval8k
@pytest.mark.parametrize("name", ["agnews", "mlama"])
def test_bytes_of_a_real_dataset_are_foreseen_shard_by_shard(run, name):
    values = {"dataset": (f"mceval8k/{name}",), "mceval8k": MCEVAL8K, "limit": 12, "shots": 1}
    run = run.model_copy(update=values)
    run_extract(run, PlainSteps())
    for dataset in plan(run)[0].datasets:
        for split in dataset.splits:
            files = sorted(split.place.path(run.directory).glob("*.arrow"))
            assert shard_bytes(split) == [file.stat().st_size for file in files]


def test_what_is_there_already_is_not_counted_again(run):
    planned = [(run, plan(run))]
    run_extract(run, PlainSteps())
    lost = next(run.directory.rglob("split=train/_receipts/part-00001.json"))
    lost.unlink()
    (left,) = [dataset for of_model in forecast(planned) for dataset in of_model.datasets]
    assert left.n_bytes_left == lost.parents[1].joinpath("part-00001.arrow").stat().st_size
    assert left.n_bytes_left < left.n_bytes
    assert left.operations > 0


def test_other_settings_count_nothing_of_what_is_there(run):
    run_extract(run, PlainSteps())
    other = run.model_copy(update={"site": "act"})
    (one,) = [dataset for of_model in forecast([(other, plan(other))]) for dataset in of_model.datasets]
    assert one.n_bytes_left == one.n_bytes


# Memory and operations


@pytest.mark.parametrize("family", CORE)
def test_parameters_are_counted_without_weights(family):
    lm = tiny_model(family)
    size = count_parameters(lm.card)
    assert size.n_all == sum(one.numel() for one in lm.model.parameters())
    assert size.n_in_layers == sum(one.numel() for one in lm.model.get_submodule(lm.arch.layers).parameters())
    assert size.n_in_head == lm.model.get_output_embeddings().weight.numel()


def test_operations_of_two_prompts_that_fit_on_paper():
    # Tokens 1 2 run once a worker; token 4 once; then the last tokens: forward and a gradient for each of 2 options.
    causal = SimpleNamespace(arch=SimpleNamespace(whole=False))
    size = ParameterCounts(n_all=999, n_in_layers=10, n_in_head=100)
    prompts = EncodedPrompts([[1, 2, 3], [1, 2, 4, 5]], np.zeros((2, 2), np.int64))
    assert forecasting._operations(causal, size, prompts, range(2), 2) == 2 * 10 * (1 + 2 * 3) + 2 * 100 * 2 * 3
    masked = SimpleNamespace(arch=SimpleNamespace(whole=True))
    assert forecasting._operations(masked, size, prompts, range(2), 0) == 2 * 3 * (10 * 7 + 100 * 2)
    # Token 1 runs once a worker. Options of 1 and 2 tokens follow token 2 (and 4, 5), from which the graph leads on.
    tokens_PO = [[[6], [7, 8]], [[6], [7, 8]]]
    spans = replace(prompts, probed_P=np.array([1, 1]), label_tokens_PO=tokens_PO)
    assert forecasting._operations(causal, size, spans, [0], 1) == 2 * (10 * 2 * (2 + 3) + 100 * 2 * 3)
    assert forecasting._operations(causal, size, spans, [1], 0) == 2 * (10 * (1 + 2 * (3 + 4)) + 100 * 2 * 3)
    assert forecasting._operations(masked, size, spans, [1], 0) == 2 * (10 * 2 * (4 + 5) + 100 * 2 * 3)


def test_the_forest_is_counted_where_one_is_to_grow(run):
    assert forecast([(run, plan(run))])[0].forest_bytes == 0
    run = run.model_copy(update={"probe": ("tree",), "tree_neurons": 50})
    n_train = len(plan(run)[0].datasets[0].dataset.splits["train"])
    assert forecast([(run, plan(run))])[0].forest_bytes == 5 * n_train * 50


def test_memory_grows_with_workers_but_not_beyond_the_cores(run, monkeypatch):
    monkeypatch.setattr("tasks.forecast.capacity.cores", lambda: 4)
    models = forecast([(run, plan(run))])

    def memory(**changes):
        return requirements(run.model_copy(update={"backend": "ray", **changes}), models)[1].needed_bytes

    assert memory(workers=3) == 3 * memory(workers=1)
    assert memory(workers=9) == memory(workers=4) == 2 * memory(workers=9, cpus=2)


def test_a_model_on_a_gpu_takes_its_memory_and_shares_it_with_others_there(run):
    run = run.model_copy(update={"backend": "ray", "gpus": 0.5, "workers": 1})
    models = forecast([(run, plan(run))])
    _, memory, gpu = requirements(run, models)
    assert gpu.needed_bytes == 2 * models[0].device_bytes
    assert memory.needed_bytes == models[0].host_bytes


def test_the_memory_of_a_cluster_is_not_known_here(run):
    far = run.model_copy(update={"backend": "ray", "ray_address": "head:6379"})
    _, memory = requirements(far, forecast([(run, plan(run))]))
    assert memory.there_bytes is None
    assert memory.fits


def test_a_rate_is_measured_with_the_model_itself(run):
    assert measured_rate(run, plan(run)[0]).operations_s > 0


def test_weights_that_pass_are_read_twice_a_batch_and_take_their_time(run):
    passing = run.model_copy(update={"device_map": "disk"})
    (model,) = forecast([(passing, plan(passing))])
    (whole,) = forecast([(run, plan(run))])
    n_batches = sum(one.n_batches for one in model.datasets)
    assert n_batches and 0 < model.passing_bytes < model.model_bytes and whole.passing_bytes == 0
    assert model.read_bytes(n_batches) == 2 * n_batches * model.passing_bytes
    assert model.resident_bytes < whole.resident_bytes == whole.model_bytes
    assert Rate(1e9).seconds(1e9, 0) == 1 and Rate(1e9).seconds(1e9, 8) is None
    assert Rate(1e9, 4.0).seconds(1e9, 8) == 3
    lines = "\n".join(forecast_lines([model], {model.name: Rate(1e9)}, []))
    assert "of weights on disk: model.layers.0-2" in lines and "--weights-gbs" in lines


def test_a_model_over_several_gpus_needs_what_the_fullest_holds(run):
    spread = run.model_copy(update={"gpus": 2.0})
    (model,) = forecast([(spread, plan(spread))])
    assert set(model.place_bytes) == {0, 1} and model.passing_bytes == 0
    assert model.model_bytes / 2 <= model.resident_bytes < model.model_bytes
    assert "of weights on GPU 1: model." in "\n".join(forecast_lines([model], {}, []))


# Refusals


def test_shards_that_do_not_fit_the_disk_are_refused_before_anything_is_computed(run, monkeypatch):
    planned = [(run, plan(run))]
    needed = sum(sum(shard_bytes(split)) for split in plan(run)[0].datasets[0].splits)
    monkeypatch.setattr("tasks.forecast.capacity.free_bytes", lambda directory: needed)
    check_disk(planned)
    monkeypatch.setattr("tasks.forecast.capacity.free_bytes", lambda directory: needed - 1)
    with pytest.raises(RunError, match=r"does not fit: .* of disk space for shards in .* are needed, .*: use another"):
        run_extract(run, PlainSteps())
    assert not list(run.directory.rglob("*.arrow"))


def test_a_run_that_has_almost_ended_still_fits_a_full_disk(run, monkeypatch):
    run_extract(run, PlainSteps())
    monkeypatch.setattr("tasks.forecast.capacity.free_bytes", lambda directory: 0)
    check_disk([(run, plan(run))])


def test_the_bytes_of_each_missing_shard_are_reckoned_once(run, monkeypatch):
    planned, reckoned = [(run, plan(run))], []
    body_bytes = shard_size._body_bytes
    monkeypatch.setattr(shard_size, "_body_bytes", lambda *args: reckoned.append(1) or body_bytes(*args))
    check_disk(planned)
    assert len(reckoned) == sum(len(split.shards) for split in planned[0][1][0].datasets[0].splits) > 2
    run_extract(run, PlainSteps())
    reckoned.clear()
    check_disk(planned)
    assert reckoned == []


def test_free_space_is_that_of_the_disk_a_directory_will_be_on(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_only_runs_on_datasets_are_foreseen():
    with pytest.raises(RunError, match="no linearity studies"):
        skill_runs(LinearityRun(model=("m",)))


# The command


def test_the_command_takes_the_pipelines_options_and_writes_nothing(run, model, questions):
    options = ["--model", model, "--dataset", questions, "--backend", "local", "--out", run.directory]
    foreseen = neg("plan", *options, "--gflops", 2)
    assert foreseen.exit_code == 0, foreseen.output
    assert "2 GFLOP/s a worker" in foreseen.stdout
    assert "main memory: " in foreseen.stdout
    assert not run.directory.exists()
    assert "unknown: measure it with --calibrate" in neg("plan", *options).stdout


def test_the_command_takes_the_run_file_of_an_evaluation(model, questions, tmp_path):
    write_run_file(EvaluationRun(model=(model,), dataset=(questions,), out=tmp_path, backend="local"))
    foreseen = neg("plan", tmp_path)
    assert foreseen.exit_code == 0, foreseen.output
    lines = [line for line in foreseen.stdout.splitlines() if line.startswith("local/questions")]
    zero_shot, one_shot = (line.split()[-8:] for line in lines)  # behind the name, which may be folded
    assert zero_shot != one_shot  # demonstrations make prompts longer


def test_what_cannot_be_used_is_named_and_the_exit_code_is_the_runs(model, questions, tmp_path):
    absent = (tmp_path / "absent.jsonl").as_posix()
    write_run_file(EvaluationRun(model=(model,), dataset=(questions, absent), out=tmp_path, backend="local"))
    foreseen = neg("plan", tmp_path)
    assert foreseen.exit_code == 1
    assert "left out: " in foreseen.stdout and "absent.jsonl" in foreseen.stdout


def test_what_does_not_fit_is_refused_after_it_was_shown(run, monkeypatch):
    write_run_file(run)
    monkeypatch.setattr("tasks.forecast.capacity.memory_bytes", lambda: 1000)
    refused = neg("plan", run.directory)
    assert "main memory: " in refused.stdout
    with pytest.raises(RunError, match="does not fit: .* of main memory are needed, 0.0 MiB are there: use fewer"):
        raise refused.exception
