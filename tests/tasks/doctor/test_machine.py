"""The checks of this machine, and all checks side by side."""

import socket
import subprocess
import sys
import time
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from negcore.errors import RunError
from negcore.findings import Finding
from tasks.doctor import examination, machine
from tasks.doctor.examination import examine


def only(findings):
    (finding,) = findings
    return finding


# Packages


def declaring(monkeypatch, *lines):
    monkeypatch.setattr(metadata, "requires", lambda project: list(lines))


def test_declared_packages_fit():
    first = next(machine.check_packages())
    assert first.judgement == "good", first
    assert "packages are as declared" in first.found


def test_missing_packages_and_other_versions_are_named(monkeypatch):
    declaring(monkeypatch, "numpy>=99", "no-such-package", 'pytest>=8; extra == "dev"', 'typer<0.1; extra == "run"')
    found = only(machine.check_packages())
    assert found.judgement == "bad"
    assert f"numpy is {metadata.version('numpy')}, needed: >=99" in found.found
    assert "no-such-package is missing" in found.found
    assert "typer is " in found.found and "pytest" not in found.found


def test_an_extra_that_is_not_installed_is_no_problem(monkeypatch):
    declaring(monkeypatch, "numpy", 'no-such-package; extra == "s3"')
    found = next(machine.check_packages())
    assert found.judgement == "good" and "for s3://, pip install 'neg-at-scale[s3]'" in found.found


def test_an_extra_of_a_wrong_version_is_told(monkeypatch):
    declaring(monkeypatch, "numpy", 's3fs<1; extra == "s3"')
    assert "s3fs is " in only(machine.check_packages()).found


def test_a_program_that_is_not_installed_does_not_know_its_needs():
    assert only(machine.check_packages("no-such-project")).judgement == "look"


def test_versions_that_were_not_tested_are_worth_a_look(monkeypatch, tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pinned\nnumpy==1.0\nsomething-else==2.0\n")
    monkeypatch.setattr(machine, "_CONSTRAINTS", constraints)
    _, other = machine.check_packages()
    assert other.judgement == "look" and f"numpy {metadata.version('numpy')} (==1.0)" in other.found


def test_the_constraints_of_a_checkout_are_found():
    assert Requirement("numpy") and "numpy==" in machine._CONSTRAINTS.read_text()


# Devices


def answering(monkeypatch, code):
    monkeypatch.setattr(machine, "_ASK_TORCH", code)
    return only(machine.check_devices())


@pytest.mark.slow
def test_torch_computes_here():
    findings = list(machine.check_devices())
    assert [finding.judgement for finding in findings] == ["good"] * len(findings) != []
    assert any("torch 2." in finding.found for finding in findings)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import no_such_torch", "No module named 'no_such_torch'"),
        ("import os; os.abort()", "exit code -6"),
        ("print('no JSON')", "exit code 0"),
        ("import sys; sys.stderr.write('libcudart.so: cannot open\\n'); sys.exit(1)", "libcudart.so: cannot open"),
    ],
)
def test_a_broken_torch_is_told_and_harms_nobody(monkeypatch, code, says):
    found = answering(monkeypatch, code)
    assert found.judgement == "bad" and says in found.found


def test_a_driver_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(machine, "DEVICE_S", 0.5)
    found = answering(monkeypatch, "import time; time.sleep(60)")
    assert found.judgement == "bad" and "within 0.5 s" in found.found


GPU = '{"name": "A100", "bytes": 42949672960, "problem": "%s"}'


def gpus(*problems):
    listed = ", ".join(GPU % problem for problem in problems)
    return f"""print('{{"version": "2.9.0", "mps": false, "gpus": [{listed}]}}')"""


def test_gpus_are_named_with_their_memory(monkeypatch):
    found = answering(monkeypatch, gpus("", ""))
    assert (found.judgement, found.found) == ("good", "A100, 40.0 GiB; A100, 40.0 GiB; torch 2.9.0")


def test_a_gpu_that_cannot_compute_is_bad(monkeypatch):
    monkeypatch.setattr(machine, "_ASK_TORCH", gpus("", "no kernel image"))
    bad, good = machine.check_devices()
    assert bad.judgement == "bad" and "A100 cannot compute: no kernel image" in bad.found
    assert good.judgement == "good"


def test_a_gpu_that_torch_does_not_see_is_worth_a_look(monkeypatch):
    monkeypatch.setattr(machine, "_has_nvidia_driver", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = answering(monkeypatch, gpus())
    assert found.judgement == "look" and "sees no GPU (CUDA_VISIBLE_DEVICES is '')" in found.found


# Memory, disk, models, ports


def test_little_memory_is_worth_a_look(monkeypatch):
    assert only(machine.check_memory()).what == "memory"
    monkeypatch.setattr(machine, "_available_bytes", lambda: 2**30)
    assert only(machine.check_memory()).judgement == "look"


def test_a_full_disk_and_one_that_cannot_be_written_are_told(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 2**20 if folder.name == "runs" else 2**40)
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("NEG_CACHE", str(file / "below"))
    few, cannot, rest = machine.check_disks()
    assert few.judgement == "look" and "1.0 MiB are free in" in few.found and "set --out" in few.advice
    assert cannot.judgement == "bad" and "cannot be written" in cannot.found and "NEG_CACHE" in cannot.advice
    assert rest.judgement == "good"


def test_models_of_the_cache_are_named(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    found = only(machine.check_models())
    assert found.judgement == "good" and "org/name (0.0 MiB)" in found.found


def test_no_model_at_all_is_worth_a_look(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda package: None)
    monkeypatch.setattr(machine, "_cached_models", list)
    found = only(machine.check_models())
    assert found.judgement == "look" and "pip install" in found.advice


def test_taken_ports_are_told(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        taken, free = server.getsockname()[1], probe.getsockname()[1]
        monkeypatch.setattr(machine, "_PORTS", {taken: "a Prefect server", free: "Ray's dashboard"})
        found = only(machine.check_ports())
        assert found.judgement == "look" and found.found.startswith(f"{taken} is taken")
        monkeypatch.setattr(machine, "_PORTS", {free: "Ray's dashboard"})
        assert only(machine.check_ports()).found.startswith(f"free: {free} ")


# Side by side


def test_findings_come_in_order_and_a_check_that_hangs_or_fails_stands_in_nobodys_way(monkeypatch):
    monkeypatch.setattr(examination, "LONGEST_S", 0.5)

    def hangs():
        yield Finding("slow", "good", "begun")
        time.sleep(60)

    def fails():
        raise OSError("broken\nin two lines")

    def refused():
        raise RunError("set HOME")

    def well():
        yield Finding("last", "good", "fine")

    began = time.monotonic()
    found = list(examine({"slow": hangs, "broken": fails, "refused": refused, "last": well}))
    assert time.monotonic() - began < 5
    assert [(one.what, one.judgement) for one in found] == [
        ("slow", "good"),
        ("slow", "look"),
        ("broken", "bad"),
        ("refused", "bad"),
        ("last", "good"),
    ]
    assert found[2].found == "OSError: broken"
    assert found[3].found == "set HOME"


def test_nothing_slow_is_imported_for_the_checks():
    code = "import sys, tasks.doctor.examination; print({'torch', 'ray', 'prefect'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
