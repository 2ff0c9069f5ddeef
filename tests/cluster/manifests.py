"""The deploy files, read, for the tests of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from tests.processes import ROOT

DEPLOY = ROOT / "cluster" / "deploy"
MANIFESTS = {
    f"{path.stem}/{manifest['kind']}/{manifest['metadata']['name']}": manifest
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
}
RAY_UP = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
Json = dict[str, Any]


def clusters() -> dict[str, Json]:
    """The RayCluster's spec in each file that has one."""
    return {
        "raycluster": MANIFESTS["raycluster/RayCluster/prunefront"]["spec"],
        "rayjob": MANIFESTS["rayjob/RayJob/sweep"]["spec"]["rayClusterSpec"],
        "raycronjob": MANIFESTS["raycronjob/RayCronJob/weekly"]["spec"]["jobTemplate"][
            "rayClusterSpec"
        ],
    }


def walk(value: Any) -> Iterator[Any]:
    """A value and all that is in it."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from walk(item)


def at(value: Any, *steps: str | int) -> Any:
    for step in steps:
        value = value[step]
    return value


def pods(manifest: Json) -> list[Json]:
    """The pod specs in a manifest."""
    return [item for item in walk(manifest) if isinstance(item, dict) and "containers" in item]


def env(container: Json) -> dict[str, Any]:
    """Each variable's value, or the name of the secret that it comes from."""
    return {
        variable["name"]: variable.get("value")
        or variable["valueFrom"]["secretKeyRef"]["name"]
        + "/"
        + variable["valueFrom"]["secretKeyRef"]["key"]
        for variable in container.get("env", [])
    }


def flags(command: list[str]) -> dict[str, str]:
    return dict(part[2:].split("=", 1) for part in command if part.startswith("--") and "=" in part)


def mlflow_commands() -> dict[str, list[str]]:
    """`mlflow server` in every file that runs it."""
    found = {
        f"{name}/{container['name']}": container["command"]
        for name, manifest in MANIFESTS.items()
        for pod in pods(manifest)
        for container in pod["containers"]
        if container.get("command", [])[:2] == ["mlflow", "server"]
    }
    for index, command in enumerate(RAY_UP["head_start_ray_commands"]):
        if "mlflow server " in command:
            server = command[command.index("mlflow server ") :].partition(" > ")[0]
            found[f"ray-up/{index}"] = shlex.split(server)
    return found


def dockerfile() -> str:
    """The Dockerfile, lines that are continued joined."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", "")
