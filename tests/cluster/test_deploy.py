"""The deploy files: valid, consistent, without rights or secrets that nobody needs."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
from packaging.requirements import Requirement

from tests.cluster.kubernetes_schemas import SPECS, check
from tests.cluster.manifests import (
    DEPLOY,
    MANIFESTS,
    RAY_UP,
    ROOT,
    Json,
    at,
    clusters,
    dockerfile,
    pods,
    walk,
)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_valid(name: str) -> None:
    check(MANIFESTS[name])


def test_all_kinds_are_there() -> None:
    kinds = {manifest["kind"] for manifest in MANIFESTS.values()}
    wanted = {kind for _, kind in SPECS} | {"ConfigMap", "RayCluster", "RayJob", "RayCronJob"}
    assert kinds == wanted


POD_STEPS = {
    "raycluster/RayCluster/prunefront": ["spec", "workerGroupSpecs", 0, "template", "spec"],
    "rayjob/RayJob/sweep": ["spec", "rayClusterSpec", "headGroupSpec", "template", "spec"],
    "raycronjob/RayCronJob/weekly": ["spec", "jobTemplate", "submitterPodTemplate", "spec"],
    "mlflow/Deployment/mlflow": ["spec", "template", "spec"],
    "due/CronJob/due": ["spec", "jobTemplate", "spec", "template", "spec"],
}


@pytest.mark.parametrize("name", POD_STEPS)
@pytest.mark.parametrize(
    ("steps", "key", "wrong"),
    [
        ((), "terminationGracePeriodSecond", 45),  # a typo
        ((), "terminationGracePeriodSeconds", "45"),  # a wrong type
        (("securityContext",), "runAsNonroot", True),
        (("containers", 0), "volumeMount", []),
        (("containers", 0, "resources"), "limit", {}),
        (("containers", 0, "env", 0), "valuesFrom", {}),
        (("containers", 0, "env", 0), "value", True),  # a boolean that lacks its quotes
    ],
)
def test_mistake_in_a_pod_is_found(
    name: str, steps: tuple[str | int, ...], key: str, wrong: object
) -> None:
    manifest = copy.deepcopy(MANIFESTS[name])
    at(manifest, *POD_STEPS[name], *steps)[key] = wrong
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


@pytest.mark.parametrize(
    ("name", "steps", "key", "wrong"),
    [
        ("raycluster/RayCluster/prunefront", ("spec",), "authOption", {"mode": "token"}),
        ("raycluster/RayCluster/prunefront", ("spec", "authOptions"), "mode", "tokens"),
        ("raycluster/RayCluster/prunefront", ("spec", "autoscalerOptions"), "version", "v3"),
        ("raycluster/RayCluster/prunefront", ("spec", "workerGroupSpecs", 0), "minReplicas", "0"),
        ("rayjob/RayJob/sweep", ("spec",), "backOffLimit", 3),
        ("raycronjob/RayCronJob/weekly", ("spec",), "concurrencyPolicy", "Forbid"),
        ("due/CronJob/due", ("spec",), "concurrencyPolicy", "forbid"),
        ("storage/PersistentVolumeClaim/prunefront-shared", ("spec",), "storageClass", "shared"),
        ("mlflow/Service/mlflow", ("spec", "ports", 0), "targetport", 5000),
        ("network-policy/NetworkPolicy/mlflow", ("spec", "ingress", 0), "form", []),
        ("network-policy/NetworkPolicy/mlflow", ("metadata",), "namespaces", "other"),
    ],
)
def test_mistake_elsewhere_is_found(
    name: str, steps: tuple[str | int, ...], key: str, wrong: object
) -> None:
    manifest = copy.deepcopy(MANIFESTS[name])
    at(manifest, *steps)[key] = wrong
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_missing_template_is_found() -> None:
    manifest = copy.deepcopy(MANIFESTS["raycluster/RayCluster/prunefront"])
    del manifest["spec"]["headGroupSpec"]["template"]
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_schemas_stay_small() -> None:
    assert (Path(__file__).parent / "schemas" / "kuberay.json").stat().st_size < 50_000


def test_same_cluster_in_all_files() -> None:
    alone, job, cron = clusters().values()
    assert alone == job == cron
    assert {
        k: v for k, v in MANIFESTS["rayjob/RayJob/sweep"]["spec"].items() if k != "entrypoint"
    } == {
        k: v
        for k, v in MANIFESTS["raycronjob/RayCronJob/weekly"]["spec"]["jobTemplate"].items()
        if k != "entrypoint"
    }


def test_volumes_and_mounts_match() -> None:
    for name, manifest in MANIFESTS.items():
        for pod in pods(manifest):
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            mounts = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", [])}
            assert volumes == mounts, name


def test_what_a_manifest_names_is_defined() -> None:
    claims = {
        m["metadata"]["name"] for m in MANIFESTS.values() if m["kind"] == "PersistentVolumeClaim"
    }
    maps = {m["metadata"]["name"] for m in MANIFESTS.values() if m["kind"] == "ConfigMap"}
    told = "".join(path.read_text() for path in (DEPLOY / "kubernetes").glob("*.yaml"))
    for item in (item for item in walk(list(MANIFESTS.values())) if isinstance(item, dict)):
        if "claimName" in item:
            assert item["claimName"] in claims
        if "configMap" in item and item["configMap"]["name"] not in maps:
            assert f"kubectl create configmap {item['configMap']['name']} " in told
        if "secretKeyRef" in item:
            secret, key = item["secretKeyRef"]["name"], item["secretKeyRef"]["key"]
            made = re.search(
                rf"create secret generic {secret} (?:\\\n)?(?:.|\n)*?--from-literal={key}=", told
            )
            assert made, f"{secret}/{key}"


@pytest.mark.parametrize("name", [name for name in MANIFESTS if pods(MANIFESTS[name])])
def test_pods_have_few_rights(name: str) -> None:
    for pod in pods(MANIFESTS[name]):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        head = any(container["name"] == "ray-head" for container in pod["containers"])
        assert head or pod["automountServiceAccountToken"] is False  # the autoscaler needs one
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in security
            assert "memory" in container["resources"]["limits"]
            names = [variable["name"] for variable in container["env"]]
            assert len(names) == len(set(names))


SECRET = re.compile(r"(?i)(token|password|passwd|secret|api_?key)")
HARMLESS = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}


def secrets_in(manifest: Json) -> list[str]:
    """Variables whose names speak of secrets and that have a value, and objects that hold some."""
    found = [manifest["kind"]] if manifest["kind"] == "Secret" else []
    for item in (item for item in walk(manifest) if isinstance(item, dict)):
        name = item.get("name")
        if (
            isinstance(name, str)
            and SECRET.search(name)
            and name not in HARMLESS
            and "value" in item
        ):
            found.append(name)
    return found


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_secret_is_in_a_manifest(name: str) -> None:
    assert secrets_in(MANIFESTS[name]) == []


def test_a_secret_in_a_manifest_would_be_found() -> None:
    manifest = copy.deepcopy(MANIFESTS["due/CronJob/due"])
    container = pods(manifest)[0]["containers"][0]
    container["env"].append({"name": "RAY_AUTH_TOKEN", "value": "0123456789abcdef"})
    assert secrets_in(manifest) == ["RAY_AUTH_TOKEN"]


def test_no_secret_is_in_the_other_files() -> None:
    assigned = re.compile(r"\b(\w*(?:TOKEN|PASSWORD|SECRET_KEY))=(?!\$)(\S+)")
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix != ".yaml":
            lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
            assert not assigned.findall("\n".join(lines)), path
    commands = "\n".join(text for text in walk(RAY_UP) if isinstance(text, str))
    assert not assigned.findall(commands)


def images() -> set[str]:
    found = [
        i["image"] for i in walk(list(MANIFESTS.values())) if isinstance(i, dict) and "image" in i
    ]
    return {*found, RAY_UP["docker"]["image"]}


def test_image_has_the_projects_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert images() == {f"{project['name']}:{project['version']}"}
    assert f"-t {project['name']}:{project['version']} " in (DEPLOY / "Dockerfile").read_text()


def test_image_has_the_ray_and_mlflow_that_the_project_wants() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {r.name: r for r in map(Requirement, project["dependencies"] + extras["search"])}
    for requirement in map(Requirement, extras["cluster"]):  # the same, where both name it
        same = wanted.get(requirement.name, requirement)
        assert same.specifier == requirement.specifier
    pinned = dict(re.findall(r"^ARG (\w+)_VERSION=(\S+)$", dockerfile(), re.MULTILINE))
    assert set(pinned) == {"RAY", "MLFLOW"}
    assert wanted["ray"].specifier.contains(pinned["RAY"])
    assert wanted["mlflow"].specifier.contains(pinned["MLFLOW"])
    assert Requirement("mlflow>=3.17.2").specifier.contains(pinned["MLFLOW"])
    installed = re.findall(r'"(ray|mlflow)\[(\w+(?:,\w+)*)\]==\$\{(\w+)_VERSION\}"', dockerfile())
    assert {name: name.upper() for name in pinned} == {n.upper(): v for n, _, v in installed}
    extras = {name: set(extra.split(",")) for name, extra, _ in installed}
    assert extras["ray"] == wanted["ray"].extras
    assert extras["mlflow"] == {
        "auth"
    }  # `mlflow server --app-name=basic-auth` does not start without
    for spec in clusters().values():
        assert spec["rayVersion"] == pinned["RAY"]
    python = re.search(r"^FROM python:(\d+\.\d+)-slim$", dockerfile(), re.MULTILINE)
    assert python
    assert Requirement(f"x{project['requires-python']}").specifier.contains(python[1])


def test_image_copies_what_is_there_and_does_not_run_as_root() -> None:
    text = dockerfile()
    copied = [
        source for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for source in line.split()
    ]
    kept = {
        line[1:]
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert set(copied) == kept
    for source in copied:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        pattern.rstrip("*")
        for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    assert packages | {project["project"]["readme"], *project["project"]["license-files"]} <= kept
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["1000"]
    assert re.search(r"^ENV HOME=/home/prunefront ", text, re.MULTILINE)
    assert "RAY_AUTH_MODE=token" in text
    # wget: KubeRay's probes; the others: `ray up`.
    assert {"wget", "rsync", "openssh-client"} <= set(text.split())
