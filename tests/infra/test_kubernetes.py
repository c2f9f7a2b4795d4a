"""The manifests for Kubernetes, as far as they can be tried without one.

Kubernetes' own kinds are held against its published schemas. KubeRay's are held against rules of ours, which say what
its versions 1.6 and 1.7 take of the fields that are used here. Where there is a `kubectl`, overlays are built with it.
"""

import copy
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils as schemas
from manifests import INFRA, documents, mappings, pinned, ray_options
from prefect.utilities.templating import apply_values
from support import REPOSITORY

from tasks.config.kinds import RUN_KINDS

KUBERNETES = INFRA / "kubernetes"
OVERLAYS = ("cpu", "gpu", "job", "job-gpu")
KUSTOMIZATIONS = sorted(INFRA.rglob("kustomization.yaml"))
SOURCES = [path for path in sorted(KUBERNETES.rglob("*.yaml")) if path.name not in ("kustomization.yaml", "run.yaml")]
SOURCES.append(INFRA / "monitoring" / "podmonitor.yaml")
OLDEST = "1.31"
"""Of Kubernetes, that the manifests are held against, beside the newest whose schemas are installed."""

Object = dict[str, Any]


@functools.cache
def objects() -> list[Object]:
    """Every object of the manifests as it is written; tests that change one copy it."""
    return [document for path in SOURCES for document in documents(path)]


def is_of_kuberay(one: Object) -> bool:
    return one["apiVersion"] == "ray.io/v1"


def clusters_of(objects: list[Object]) -> list[Object]:
    """The specification of every Ray cluster, that of a job among them."""
    return [one["spec"].get("rayClusterSpec", one["spec"]) for one in objects if is_of_kuberay(one)]


def groups_of(cluster: Object) -> list[Object]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def templates_of(objects: list[Object]) -> list[Object]:
    """Every pod template."""
    return [one["template"] for one in mappings(objects) if "containers" in one.get("template", {}).get("spec", {})] + [
        one["submitterPodTemplate"] for one in mappings(objects) if "submitterPodTemplate" in one
    ]


def containers_of(objects: list[Object]) -> list[Object]:
    return [container for template in templates_of(objects) for container in template["spec"]["containers"]]


@functools.cache
def built(folder: Path) -> list[Object]:
    """The objects of an overlay, made by kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl to build overlays with")
    ended = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return [document for document in yaml.safe_load_all(ended.stdout) if document is not None]


overlays = pytest.mark.parametrize("overlay", OVERLAYS)
ADDED = (KUBERNETES / "pool", INFRA / "monitoring")


# Kubernetes' schemas


def schema_errors(one: Object, version: str) -> list[str]:
    try:
        kubernetes_validate.validate(one, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


VERSIONS = (OLDEST, schemas.latest_version())


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_its_own_kinds(version):
    own = [one for one in objects() if one["apiVersion"].count(".") == 0 or ".k8s.io/" in one["apiVersion"]]
    assert {"PersistentVolumeClaim", "StatefulSet", "Deployment", "Service", "NetworkPolicy"} <= {
        one["kind"] for one in own
    }
    assert {one["metadata"]["name"]: schema_errors(one, version) for one in own if schema_errors(one, version)} == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_pods_of_ray(version):
    for template in templates_of([one for one in objects() if is_of_kuberay(one)]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        assert schema_errors(pod, version) == []


def test_the_schemas_know_a_mistake():
    claim = next(one for one in objects() if one["kind"] == "PersistentVolumeClaim")
    wrong = copy.deepcopy(claim)
    wrong["spec"]["accessMode"] = wrong["spec"].pop("accessModes")
    assert schema_errors(claim, OLDEST) == []
    assert len(schema_errors(wrong, OLDEST)) == 1


@pytest.mark.parametrize("folder", [*(KUBERNETES / name for name in OVERLAYS), *ADDED], ids=lambda folder: folder.name)
def test_kubernetes_takes_what_kubectl_builds(folder):
    own = [one for one in built(folder) if not is_of_kuberay(one) and one["kind"] != "PodMonitor"]
    assert [error for one in own for error in schema_errors(one, OLDEST)] == []
    assert all(one["metadata"].get("namespace") == "neg" for one in own if one["kind"] != "Namespace")


# KubeRay's kinds: fields of ray.io/v1 that exist in KubeRay 1.6 and 1.7 alike

FIELDS = {
    "RayCluster": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
        "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
    },
    "RayJob": {
        "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
        "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
        "preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode",
        "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
    },
    "head": {
        "enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template",
    },
    "group": {
        "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
        "replicas", "resources", "scaleStrategy", "suspend", "template",
    },
    "autoscaler": {
        "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext",
        "upscalingMode", "version", "volumeMounts",
    },
    "auth": {"enableK8sTokenAuth", "mode", "secretName"},
}  # fmt: skip
VALUES = {
    "version": {"v1", "v2"},
    "upscalingMode": {"Default", "Aggressive", "Conservative"},
    "mode": {"disabled", "token"},
}
_LABEL = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_LONGEST_NAME = {"RayCluster": 63, "RayJob": 47}


@functools.cache
def start_options() -> frozenset[str]:
    return frozenset(option.removeprefix("--") for option in ray_options(["start"])["start"])


def unknown(what: str, value: Object) -> list[str]:
    wrong = [f"{what} has no field {name}" for name in sorted(value.keys() - FIELDS[what])]
    return wrong + [
        f"{name} is {value[name]}" for name in VALUES.keys() & value.keys() if value[name] not in VALUES[name]
    ]


def group_complaints(group: Object, autoscaled: bool) -> list[str]:
    name, least, most, now = group["groupName"], group["minReplicas"], group["maxReplicas"], group["replicas"]
    found = unknown("group", group)
    if not least <= now <= most:
        found.append(f"{name}: {now} replicas are not from {least} to {most}")
    if not autoscaled and (least != most or now == 0):
        found.append(f"{name} would stay at {now} replicas: nothing grows it")
    return found


def cluster_complaints(cluster: Object) -> list[str]:
    """What KubeRay would refuse or ignore in the specification of a cluster, or what would keep it from growing."""
    autoscaled = cluster.get("enableInTreeAutoscaling") is True
    options = cluster.get("autoscalerOptions", {})
    found = [
        *unknown("RayCluster", cluster),
        *unknown("head", cluster["headGroupSpec"]),
        *unknown("autoscaler", options),
        *unknown("auth", cluster["authOptions"]),
    ]
    if options and not autoscaled:
        found.append("options for an autoscaler that is not there")
    for group in cluster["workerGroupSpecs"]:
        found += group_complaints(group, autoscaled)
    for group in groups_of(cluster):
        parameters, labels = group["rayStartParams"], group.get("labels", {})
        found += [f"ray start has no option {name}" for name in parameters.keys() - start_options()]
        found += [f"{name} is no text" for name, value in parameters.items() if not isinstance(value, str)]
        if "labels" in parameters or (
            {"num-cpus", "num-gpus", "resources"} & parameters.keys() and "resources" in group
        ):
            found.append("labels and resources are fields of the group")
        found += [f"label {key}={value}" for key, value in labels.items() if not _LABEL.fullmatch(key)]
        if autoscaled and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            found.append("the autoscaler restarts pods itself")
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    return found + [f"two groups {name}" for name in set(names) if names.count(name) > 1]


def complaints(one: Object) -> list[str]:
    """What KubeRay would refuse or ignore in an object."""
    name, kind, spec = one["metadata"]["name"], one["kind"], one["spec"]
    found = [] if _NAME.fullmatch(name) and len(name) <= _LONGEST_NAME[kind] else [f"the name {name}"]
    if kind == "RayJob":
        found += unknown("RayJob", spec)
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        if spec.get("submissionMode", "K8sJobMode") != "K8sJobMode" and "submitterPodTemplate" in spec:
            found.append("submitterPodTemplate is for K8sJobMode")
    return found + [complaint for cluster in clusters_of([one]) for complaint in cluster_complaints(cluster)]


def test_kuberay_takes_its_kinds():
    ours = [one for one in objects() if is_of_kuberay(one)]
    assert {one["kind"] for one in ours} == {"RayCluster", "RayJob"}
    assert [complaint for one in ours for complaint in complaints(one)] == []


@overlays
def test_kuberay_takes_what_kubectl_builds(overlay):
    (one,) = [one for one in built(KUBERNETES / overlay) if is_of_kuberay(one)]
    assert complaints(one) == []
    names = [group["groupName"] for group in clusters_of([one])[0]["workerGroupSpecs"]]
    assert names == {"cpu": ["cpu"], "gpu": ["cpu", "cuda"], "job": ["cpu"], "job-gpu": ["cuda"]}[overlay]


def the(kind: str) -> Object:
    (one,) = [copy.deepcopy(one) for one in objects() if one["kind"] == kind]
    return one


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("enableInTreeAutoscaling", False, "nothing grows it"),
        ("enableInTreeAutoscaling", None, "nothing grows it"),
        ("enableInTreeAutoscaler", True, "no field enableInTreeAutoscaler"),
        ("autoscalerOptions.upscalingMode", "default", "upscalingMode is default"),
        ("autoscalerOptions.version", 2, "version is 2"),
        ("authOptions.mode", "none", "mode is none"),
        ("authOptions.secret", "neg", "no field secret"),
        ("headGroupSpec.replicas", 1, "head has no field replicas"),
        ("headGroupSpec.rayStartParams.num-cpus", 0, "num-cpus is no text"),
        ("headGroupSpec.rayStartParams.cpus", "0", "no option cpus"),
        ("headGroupSpec.rayStartParams.labels", "a=b", "labels and resources"),
        ("workerGroupSpecs.0.minReplica", 0, "group has no field minReplica"),
        ("workerGroupSpecs.0.minReplicas", 17, "not from 17 to 16"),
        ("workerGroupSpecs.0.groupName", "cuda", "two groups cuda"),
        ("workerGroupSpecs.0.template.spec.restartPolicy", "Always", "restarts pods itself"),
    ],
)
def test_rules_for_kuberay_know_a_mistake(path, value, complaint):
    cluster = the("RayCluster")
    *folders, last = path.split(".")
    inner = cluster["spec"]
    for name in folders:
        inner = inner[int(name) if name.isdigit() else name]
    inner[last] = value
    assert any(complaint in found for found in complaints(cluster)), complaints(cluster)


def test_a_cluster_of_fixed_size_needs_no_autoscaler():
    spec = the("RayCluster")["spec"]
    del spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]
    for group in spec["workerGroupSpecs"]:
        group["replicas"] = group["minReplicas"] = group["maxReplicas"] = 2
    assert cluster_complaints(spec) == []


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_rays_autoscaler_finds_the_groups_with_their_sizes_and_labels(kind):
    (cluster,) = clusters_of([the(kind)])
    script = (
        "import json, sys; from ray.autoscaler._private.kuberay import autoscaling_config as kuberay\n"
        "config = kuberay._derive_autoscaling_config_from_ray_cr(json.load(sys.stdin))\n"
        "print(json.dumps([config['available_node_types'], config['idle_timeout_minutes']]))"
    )
    given = json.dumps({"metadata": {"name": "neg", "namespace": "neg"}, "spec": cluster})
    # In a process of its own: Ray must not be imported before the sessions that other tests open.
    ended = subprocess.run([sys.executable, "-c", script], input=given, capture_output=True, text=True, check=True)
    types, idle_minutes = json.loads(ended.stdout)
    assert idle_minutes == 5
    assert types.pop("headgroup")["max_workers"] == 0
    assert {name: (one["min_workers"], one["max_workers"]) for name, one in types.items()} == {
        "cpu": (0, 16),
        "cuda": (0, 16),
    }
    assert types["cpu"]["resources"] == {"CPU": 8, "memory": 32 * 2**30}
    assert types["cuda"]["resources"] == {"CPU": 8, "GPU": 1, "memory": 64 * 2**30}
    assert types["cuda"]["labels"] == {"ray.io/accelerator-type": "H100"}


def test_ray_has_the_version_of_the_constraints():
    assert {cluster["rayVersion"] for cluster in clusters_of(objects())} == {pinned()["ray"]}


# Kustomize


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_what_a_kustomization_names_is_there(path):
    (one,) = documents(path)
    named = [*one.get("resources", ()), *one.get("components", ())]
    named += [name for maps in one.get("configMapGenerator", ()) for name in maps["files"]]
    for name in named:
        found = path.parent / name
        assert found.is_file() or (found / "kustomization.yaml").is_file(), name
    listed = {name for name in named if name.endswith(".yaml")}
    others = {"kustomization.yaml", "prometheus.yaml"}  # the second is Prometheus' own
    assert listed == {file.name for file in path.parent.glob("*.yaml")} - others


def resolve(value: Any, path: list[str]) -> list[Any]:
    """What Kustomize's path of a field leads to; nothing if a step is not there."""
    if not path:
        return [value]
    step, *rest = path
    if wanted := re.fullmatch(r"\[(\w+)=([\w-]+)\]", step):
        key, name = wanted.groups()
        return [found for one in value if one.get(key) == name for found in resolve(one, rest)]
    step = step.strip("[]")
    return resolve(value[step], rest) if step in value else []


def steps_of(path: str) -> list[str]:
    return re.findall(r"\[[^]]*\]|[^.\[\]]+", path)


def test_every_setting_leads_to_fields_and_is_what_stands_there():
    settings = documents(KUBERNETES / "settings" / "settings.yaml")[0]["data"]
    (component,) = documents(KUBERNETES / "settings" / "kustomization.yaml")
    used = set()
    for replacement in component["replacements"]:
        key = replacement["source"]["fieldPath"].removeprefix("data.")
        used.add(key)
        for target in replacement["targets"]:
            chosen = [one for one in objects() if one["kind"] == target["select"]["kind"]]
            for path in target["fieldPaths"]:
                found = [value for one in chosen for value in resolve(one, steps_of(path))]
                assert [str(value) for value in found] == [settings[key]], (key, path)
    assert used == set(settings)


def test_every_patch_has_a_target():
    for path in KUSTOMIZATIONS:
        for patch in documents(path)[0].get("patches", ()):
            (target,) = [one for one in objects() if one["kind"] == patch["target"]["kind"]]
            assert target["metadata"]["name"] == patch["target"]["name"]
            for operation in yaml.safe_load(patch["patch"]):
                value: Any = target
                for step in operation["path"].strip("/").split("/"):
                    value = value[int(step) if step.isdigit() else step]
                assert value == operation.get("value", value)


CHANGED = {
    "storage-class": "fast",
    "storage": "7Ti",
    "cpu-nodes": "31",
    "cpu-node-cpus": "33",
    "cpu-node-memory": "35Gi",
    "cuda-nodes": "37",
    "cuda-node-cpus": "39",
    "cuda-node-memory": "41Gi",
    "cuda-node-gpus": "43",
    "cuda-node-kind": "L4",
}


@pytest.fixture
def changed(tmp_path) -> Path:
    """A copy of the manifests with other settings and images."""
    shutil.copytree(INFRA, tmp_path / "infra")
    folder = tmp_path / "infra" / "kubernetes" / "settings"
    settings = documents(folder / "settings.yaml")[0]
    assert settings["data"].keys() == CHANGED.keys()
    settings["data"] = CHANGED
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    text = (folder / "kustomization.yaml").read_text()
    text = text.replace("newName: neg-at-scale", "newName: registry.example/neg").replace("newTag: c", "newTag: v1-c")
    (folder / "kustomization.yaml").write_text(text)
    return folder.parent


@overlays
def test_images_and_sizes_are_changed_in_one_place(overlay, changed):
    before, after = built(KUBERNETES / overlay), built(changed / overlay)
    images = {container["image"] for container in containers_of(after)} - {"postgres:17.6"}
    cuda = {"registry.example/neg:v1-cuda"} if "gpu" in overlay else set()
    assert images == {"registry.example/neg:v1-cpu"} | cuda
    (claim,) = [one["spec"] for one in after if one["kind"] == "PersistentVolumeClaim"]
    assert claim["storageClassName"] == "fast"
    assert claim["resources"]["requests"]["storage"] == "7Ti"
    (cluster,) = clusters_of(after)
    for group in cluster["workerGroupSpecs"]:
        size = {key.removeprefix(f"{group['groupName']}-"): value for key, value in CHANGED.items()}
        (container,) = group["template"]["spec"]["containers"]
        amounts = {"cpu": size["node-cpus"], "memory": size["node-memory"]}
        if group["groupName"] == "cuda":
            amounts["nvidia.com/gpu"] = size["node-gpus"]
            assert group["labels"] == {"ray.io/accelerator-type": "L4"}
        assert container["resources"] == {"requests": amounts, "limits": amounts}
        assert group["maxReplicas"] == int(size["nodes"])
    assert complaints(next(one for one in after if is_of_kuberay(one))) == []
    assert [one["metadata"]["name"] for one in after] == [one["metadata"]["name"] for one in before]


# Locked doors


def test_ray_takes_its_token_from_the_secret():
    for cluster in clusters_of(objects()):
        assert cluster["authOptions"] == {"mode": "token", "secretName": "neg"}


def test_every_secret_is_named_and_none_is_there():
    assert not any(one["kind"] == "Secret" for one in objects())
    readme = (INFRA / "README.md").read_text()
    made = set(re.findall(r"--from-file=([a-z_-]+)=", readme))
    used = {"auth_token"}  # KubeRay's name
    for one in mappings(objects()):
        if "secretName" in one and "items" in one:
            assert one["secretName"] == "neg"
            used |= {item["key"] for item in one["items"]}
    assert used == made
    files = {value for one in mappings(objects()) if str(value := one.get("value", "")).startswith("/run/secrets/")}
    assert {Path(file).name for file in files} <= made


def test_pods_keep_to_the_restricted_profile_that_their_namespace_asks_for():
    assert the("Namespace")["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    for template in templates_of(objects()):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] >= 999
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & template["spec"].keys()
        kinds = [key for volume in template["spec"]["volumes"] for key in volume if key != "name"]
        assert set(kinds) <= {"persistentVolumeClaim", "emptyDir", "secret", "configMap"}
    autoscalers = [cluster["autoscalerOptions"] for cluster in clusters_of(objects())]
    assert len(containers_of(objects())) == 11
    for container in [*containers_of(objects()), *autoscalers]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


def test_only_who_talks_to_kubernetes_has_its_token():
    with_token = [
        template["spec"]["containers"][0]["name"]
        for template in templates_of(objects())
        if template["spec"].get("automountServiceAccountToken") is not False
    ]
    assert set(with_token) == {"ray-head", "prefect-kubernetes"}  # KubeRay's autoscaler; the worker that makes Jobs


def test_what_containers_mount_is_there_and_what_they_write_to_can_be_written():
    for template in templates_of(objects()):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        claims = {"database"}  # of the StatefulSet
        for container in template["spec"]["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes.keys() | claims
            assert "emptyDir" in volumes[mounts["/tmp"]]
            if container["image"].startswith("neg-at-scale"):
                assert "emptyDir" in volumes[mounts["/home/neg"]]
    for cluster in clusters_of(objects()):
        mounts = cluster["autoscalerOptions"]["volumeMounts"]
        assert mounts == [{"name": "home", "mountPath": "/home/neg"}, {"name": "tmp", "mountPath": "/tmp"}]
    image = (INFRA / "Dockerfile").read_text()
    written = set(re.findall(r"(?:PREFECT_HOME|PREFECT_UI_STATIC_DIRECTORY|HF_HOME)=(\S+)", image))
    assert len(written) == 3
    assert all(path.startswith(("/home/neg/", "/data/")) for path in written)


def pod_labels() -> list[dict[str, str]]:
    return [template["metadata"]["labels"] for template in templates_of(objects())]


def test_network_policies_and_services_choose_pods_that_exist():
    policies = [one["spec"] for one in objects() if one["kind"] == "NetworkPolicy"]
    selectors = [one["podSelector"].get("matchLabels") for one in mappings(policies) if "podSelector" in one]
    selectors += [one["spec"]["selector"] for one in objects() if one["kind"] == "Service"]
    of_others = {"app.kubernetes.io/name": "kuberay-operator"}
    assert {} in [policy["podSelector"] for policy in policies], "what is not allowed is refused"
    for selector in selectors:
        if selector not in (None, of_others):
            assert any(selector.items() <= labels.items() for labels in pod_labels()), selector


# The parts fit together


def test_drivers_nodes_offer_no_cpus_to_actors():
    for cluster in clusters_of(objects()):
        parameters = cluster["headGroupSpec"]["rayStartParams"]
        assert (parameters["num-cpus"], parameters["num-gpus"]) == ("0", "0")


def test_a_worker_that_is_to_end_has_time_for_what_it_does():
    for cluster in clusters_of(objects()):
        for group in cluster["workerGroupSpecs"]:
            spec = group["template"]["spec"]
            (seconds,) = [float(one["value"]) for one in spec["containers"][0]["env"] if "DRAIN" in one["name"]]
            assert seconds + 10 <= spec["terminationGracePeriodSeconds"]


def test_addresses_are_those_of_services():
    services = {one["metadata"]["name"]: one["spec"]["ports"] for one in objects() if one["kind"] == "Service"}
    services["neg-head-svc"] = [{"port": 6379}]  # KubeRay's, for the cluster `neg`
    assert the("RayCluster")["metadata"]["name"] == "neg"
    values = [one["value"] for one in mappings(objects()) if one.get("name") in ("RAY_ADDRESS", "PREFECT_API_URL")]
    assert len(values) == 3
    for value in values:
        host, port = re.search(r"([a-z-]+):(\d+)", value.removeprefix("http://")).groups()
        assert int(port) in [one["port"] for one in services[host]]
    hosts = {one["value"] for one in mappings(objects()) if one.get("name") == "PREFECT_SERVER_DATABASE_HOST"}
    assert hosts <= services.keys()


@pytest.mark.parametrize("overlay", ["job", "job-gpu"])
def test_a_jobs_run_file_fits_the_nodes_it_gets(overlay):
    command = the("RayJob")["spec"]["entrypoint"].split()
    assert command[0] == "neg"
    assert Path(command[2]).name == "run.yaml"
    run = RUN_KINDS[command[1]].run_class.model_validate(
        yaml.safe_load((KUBERNETES / overlay / "run.yaml").read_text())
    )
    settings = documents(KUBERNETES / "settings" / "settings.yaml")[0]["data"]
    group = "cuda" if overlay == "job-gpu" else "cpu"
    a_node = int(settings[f"{group}-node-cpus"]) // run.cpus
    if run.gpus:
        a_node = min(a_node, int(settings[f"{group}-node-gpus"]) // run.gpus)
    assert 0 < run.workers <= a_node * int(settings[f"{group}-nodes"])
    assert str(run.out).startswith("/data/")
    assert run.wait_for_nodes, "groups start at 0 nodes"


@pytest.mark.parametrize("variables", [{}, {"gpus": "2", "image": "registry.example/neg:cuda", "env": {"A": "b"}}])
def test_a_job_of_the_kubernetes_pool_is_one_that_kubernetes_takes(variables):
    template = json.loads((KUBERNETES / "pool" / "job-template.json").read_text())
    properties = template["variables"]["properties"]
    of_prefect = {"command": "prefect flow-run execute", "name": "quick-fox", "job_watch_timeout_seconds": 60}
    values = {name: one["default"] for name, one in properties.items() if "default" in one} | of_prefect | variables
    assert values.keys() == properties.keys()
    job = apply_values(template["job_configuration"], values)["job_manifest"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == values["image"]
    # The worker does this itself before it makes the Job.
    container["args"] = container["args"].split()
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    assert schema_errors(job, OLDEST) == []
    assert container["resources"]["limits"]["nvidia.com/gpu"] == values["gpus"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    claims = [one["persistentVolumeClaim"]["claimName"] for one in mappings(job) if "persistentVolumeClaim" in one]
    assert claims == [the("PersistentVolumeClaim")["metadata"]["name"]]
    labels = job["spec"]["template"]["metadata"]["labels"]
    policies = [one for one in objects() if one["kind"] == "NetworkPolicy"]
    assert labels in [one["matchLabels"] for one in mappings(policies) if "matchLabels" in one]


def test_the_worker_of_the_kubernetes_pool_may_do_no_more_than_make_jobs_here():
    (role,) = [one["rules"] for one in objects() if one["kind"] == "Role"]
    allowed = {(resource, verb) for rule in role for resource in rule["resources"] for verb in rule["verbs"]}
    jobs = {("jobs", verb) for verb in ("get", "list", "watch", "create", "delete")}
    assert allowed == jobs | {("pods", "get"), ("pods", "list"), ("pods", "watch"), ("pods/log", "get")}
    binding = the("RoleBinding")
    account = the("ServiceAccount")["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert [one for one in mappings(objects()) if one.get("serviceAccountName") == account]
    assert not any(one["kind"].startswith("Cluster") for one in objects())


def test_the_readme_has_the_command_for_every_overlay():
    readme = (INFRA / "README.md").read_text()
    folders = {path.parent for path in KUSTOMIZATIONS if documents(path)[0]["kind"] == "Kustomization"}
    applied = {REPOSITORY / name for name in re.findall(r"kubectl apply -k (\S+)", readme)}
    used = {
        (folder / name).resolve()
        for folder in folders
        for name in documents(folder / "kustomization.yaml")[0]["resources"]
    }
    assert applied == folders - used
