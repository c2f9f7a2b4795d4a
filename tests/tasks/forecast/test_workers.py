"""Workers fit the machine, or the cluster, and a line says why; values that are given stay."""

import sys
from types import SimpleNamespace

import pytest

from negcore.model.check import ModelCheck
from tasks.config.dataset_runs import SkillRun
from tasks.config.reading import read_run_file
from tasks.config.run_file import write_run_file
from tasks.forecast.needs import WorkerNeeds
from tasks.forecast.workers import choose_workers, device_warnings
from tasks.rank import ranking_workers
from tasks.rundir.checks import note_check

GIB = 2**30
NEEDS = WorkerNeeds(device_bytes=3 * GIB, host_bytes=GIB, driver_bytes=2 * GIB)


def run(**values):
    return SkillRun(model=("m",), dataset=("mini/fact",), **values)


@pytest.fixture(autouse=True)
def no_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def machine(monkeypatch):
    """Make this machine another one."""

    def become(cores=16, gpus=0, memory=64):
        monkeypatch.setattr("tasks.machine.cores", lambda: cores)
        monkeypatch.setattr("tasks.machine.memory_bytes", lambda: memory * GIB)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)

    return become


@pytest.fixture
def cluster(monkeypatch):
    """Make nodes that Ray tells of, each with cores, GPUs, GiB and labels; the run has joined them."""

    def become(*nodes):
        told = [
            {"Alive": True, "Resources": {"CPU": cpu, "GPU": gpu, "memory": gib * GIB}, "Labels": labels}
            for cpu, gpu, gib, labels in nodes
        ]
        dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0, "memory": 999.0 * GIB}, "Labels": {}}
        # Never imported: Ray reads its settings then, for all tests of this process.
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: [*told, dead]))
        return {"ray_address": "head:6379"}

    return become


def choose(a_run, needs=NEEDS):
    return choose_workers(a_run, lambda gpus: [needs])


def chosen(a_run, needs=NEEDS):
    fields = choose(a_run, needs).fields
    return fields["workers"], fields["gpus"]


def test_cores_decide_where_memory_suffices_and_memory_where_it_does_not(machine):
    machine(cores=2, memory=24)
    choice = choose(run())
    assert choice.fields == {"workers": 2, "gpus": 0}
    assert (
        choice.line == "2 workers of 1 core each: 2 cores, 24.0 GiB of main memory; a worker takes about 4.0 GiB of it"
    )
    machine(cores=16, memory=24)  # 2 GiB of it are the forest's
    assert chosen(run()) == (5, 0)
    assert chosen(run(cpus=8)) == (2, 0)


def test_there_is_one_worker_even_where_there_is_no_room_and_the_line_says_so(machine):
    machine(cores=2, memory=1)
    choice = choose(run())
    assert choice.fields["workers"] == 1
    assert choice.line.endswith("; room for 0 now")


def test_each_gpu_gets_a_worker_and_only_main_memory_beside_the_model_counts(machine):
    machine(cores=16, gpus=4, memory=7)
    choice = choose(run())
    assert choice.fields == {"workers": 4, "gpus": 1.0}
    who, there = "4 workers of 1 core and a GPU each", "4 GPUs, 16 cores, 7.0 GiB of main memory"
    assert choice.line == f"{who}: {there}; a worker takes about 1.0 GiB of it"
    assert choice.device == "cuda"
    assert chosen(run(cpus=8)) == (2, 1.0)  # for want of cores


def test_main_memory_does_not_hold_a_model_on_a_gpu_that_is_named(machine):
    machine(gpus=4)
    assert "takes about 1.0 GiB" in choose(run(device="cuda:1")).line
    assert "takes about 4.0 GiB" in choose(run(device="mps")).line
    assert "takes about 1.0 GiB" in choose(run(device_map="disk")).line
    assert "takes about 4.0 GiB" in choose(run(device_map="cpu")).line


def test_a_run_without_a_usable_model_has_no_needs(machine):
    machine(cores=2)
    assert choose_workers(run(), lambda gpus: []).line == "2 workers of 1 core each: 2 cores, 64.0 GiB of main memory"


def test_needs_are_asked_for_with_the_share_of_a_gpu_that_is_chosen(machine):
    asked = []
    for gpus in (2, 0):
        machine(gpus=gpus)
        choose_workers(run(), lambda share: asked.append(share) or [NEEDS])
    assert asked == [1.0, 0.0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"workers": 7}, (7, 1.0)),
        ({"gpus": 0}, (15, 0)),
        ({"gpus": 0.5}, (8, 0.5)),
        ({"gpus": 0.3, "workers": 1}, (1, 0.3)),
        ({"device": "cpu"}, (15, 0)),
        ({"device": "cuda"}, (4, 1.0)),
        ({"device": "cuda:1"}, (1, 0)),
        ({"device": "cuda:1", "workers": 2}, (2, 0)),
        ({"gpus": 2}, (2, 2)),
        ({"gpus": 3}, (1, 3)),
        ({"device_map": {"": "cuda:1"}}, (1, 0)),
    ],
)
def test_a_given_value_always_wins(machine, given, expected):
    machine(cores=16, gpus=4)
    a_run = run(**given)
    assert chosen(a_run) == expected
    fitted = a_run.model_copy(update=choose(a_run).fields)
    assert {name: getattr(fitted, name) for name in given} == given


def test_the_line_says_what_was_given_what_is_left_alone_and_what_has_no_room(machine):
    machine(cores=4, gpus=1)
    assert "9 workers of 1 core each, as set: " in choose(run(workers=9, gpus=0)).line
    assert choose(run(workers=9, gpus=0)).line.endswith("; 1 GPU left alone (--gpus 1 uses them); room for 4 now")
    assert "left alone" not in choose(run(device="cuda:0")).line
    assert choose(run(workers=2)).line.endswith("; room for 1 now")
    assert choose(run(workers=2, gpus=0)).line.endswith("; room for 4 (--workers)")
    assert "room for" not in choose(run(workers=1)).line


def test_a_run_in_this_process_has_one_worker_and_leaves_its_file_as_it_is(machine):
    machine(cores=4, gpus=2)
    choice = choose(run(backend="local"))
    assert (choice.fields, choice.device) == ({}, "cuda")
    assert choice.line.startswith("1 worker in this process, on the first GPU, 1 core: 2 GPUs")
    assert choose(run(backend="local", device="cpu")).line.startswith("1 worker in this process, on cpu, ")


def test_nodes_of_a_cluster_are_filled_one_by_one(machine, cluster):
    machine(cores=2, gpus=8)  # the driver's machine does not count
    joined = cluster((8.0, 0, 13.0, {}), (3.0, 0, 100.0, {}), (0, 0, 100.0, {}))
    choice = choose(run(**joined))
    assert choice.fields == {"workers": 3 + 3, "gpus": 0}
    assert choice.line.startswith("6 workers of 1 core each: 11 cores, 213.0 GiB of main memory on 3 nodes; ")


def test_gpus_of_a_cluster_count_where_nodes_have_the_labels(machine, cluster):
    machine(gpus=0)
    fast = {"kind": "fast"}
    joined = cluster((8.0, 2.0, 64.0, fast), (8.0, 4.0, 64.0, {}), (8.0, 0, 64.0, {}))
    assert chosen(run(**joined)) == (6, 1.0)
    assert chosen(run(**joined, node_label="kind=fast")) == (2, 1.0)
    assert chosen(run(**joined, gpus=0)) == (3 * 8, 0)


def test_gpus_without_cores_for_a_worker_are_not_chosen(machine, cluster):
    machine(gpus=0)
    assert chosen(run(**cluster((0, 2.0, 64.0, {}), (8.0, 0, 64.0, {})))) == (8, 0)


def test_a_cluster_that_grows_is_asked_for_more_than_it_has(machine, cluster):
    machine(cores=6, gpus=0)
    choice = choose(run(**cluster(), wait_for_nodes=True))
    assert choice.fields == {"workers": 6, "gpus": 0}
    assert choice.line.endswith("; room for 0 now, the cluster may grow")
    assert chosen(run(wait_for_nodes=True)) == (6, 0)  # on one machine there is nothing to wait for


def test_the_run_file_repeats_the_choice(machine, tmp_path):
    machine(cores=16, gpus=4)
    a_run = run(out=tmp_path)
    write_run_file(a_run.model_copy(update=choose(a_run).fields))
    machine(cores=2, gpus=0)
    again = read_run_file(SkillRun, tmp_path, {})
    assert chosen(again) == (4, 1.0)
    assert again.worker_device is None  # the first GPU that the actor sees
    assert "as set: 2 cores" in choose(again).line


def test_unfitted_actors_never_take_a_gpu_by_themselves():
    assert run().worker_device == "cpu"
    assert run().resources.gpus == 0


def test_a_run_that_goes_on_elsewhere_says_so(machine, tmp_path):
    card = SimpleNamespace(name="org/m")
    device = SimpleNamespace(type="cpu")
    lm = SimpleNamespace(card=card, site="up", dtype="float32", device=device, check=ModelCheck.expected("float32"))
    note_check(tmp_path, lm.card.name, lm)
    machine(gpus=1)
    (line,) = device_warnings(choose(run()), [tmp_path])
    assert "began on cpu, and what is missing is measured on cuda: last digits may differ" in line
    assert device_warnings(choose(run(gpus=0)), [tmp_path]) == []
    assert device_warnings(choose(run()), [tmp_path / "new"]) == []


def test_rankings_use_the_cores_that_few_gpus_leave(monkeypatch):
    monkeypatch.setattr("tasks.rank.cores", lambda: 16)
    assert ranking_workers(run(workers=1, gpus=1.0)) == 16
    assert ranking_workers(run(workers=3, gpus=0.0)) == 3
    assert ranking_workers(run(backend="local")) == 16
