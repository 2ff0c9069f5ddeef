"""Ray in the deploy files: closed, and fit for workers that are taken away."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.manifests import (
    MANIFESTS,
    RAY_UP,
    clusters,
    env,
    walk,
)


@pytest.mark.parametrize("name", clusters())
def test_ray_asks_for_the_token(name: str) -> None:
    spec = clusters()[name]
    assert spec["authOptions"] == {"mode": "token", "secretName": "prunefront-ray"}


def test_clients_of_ray_have_the_token_and_may_pass() -> None:
    job = MANIFESTS["rayjob/RayJob/sweep"]["spec"]["submitterPodTemplate"]
    due = MANIFESTS["due/CronJob/due"]["spec"]["jobTemplate"]["spec"]["template"]
    for template in (job, due):
        variables = env(template["spec"]["containers"][0])
        assert variables["RAY_AUTH_MODE"] == "token"
        assert variables["RAY_AUTH_TOKEN"] == "prunefront-ray/auth_token"
        assert template["metadata"]["labels"]["prunefront/ray-client"] == "true"


def test_network_policy_closes_all_but_what_is_needed() -> None:
    policies = {
        manifest["metadata"]["name"]: manifest["spec"]
        for manifest in MANIFESTS.values()
        if manifest["kind"] == "NetworkPolicy"
    }
    assert policies.pop("deny-ingress") == {"podSelector": {}, "policyTypes": ["Ingress"]}
    assert all(rule.get("from") for p in policies.values() for rule in p["ingress"])
    nodes = policies.pop("ray-nodes")
    assert [rule["from"] for rule in nodes["ingress"]] == [[{"podSelector": nodes["podSelector"]}]]
    opened = {
        name: [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
        for name, policy in policies.items()
    }
    assert opened == {"ray-jobs": [8265], "mlflow": [5000]}
    mlflow = MANIFESTS["mlflow/Deployment/mlflow"]["spec"]["template"]["metadata"]["labels"]
    assert policies["mlflow"]["podSelector"]["matchLabels"].items() <= mlflow.items()
    # What listens on all addresses is behind them, and no port is opened on nodes.
    for manifest in MANIFESTS.values():
        for item in (item for item in walk(manifest) if isinstance(item, dict)):
            assert not {"hostPort", "hostNetwork", "nodePort", "externalIPs"} & item.keys()
            assert item.get("serviceType", "ClusterIP") == "ClusterIP"


def test_ray_up_passes_rays_own_checks() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(RAY_UP, schema)
    validate_config(prepare_config(copy.deepcopy(RAY_UP)))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(RAY_UP | {"idle_timeout_minute": 10}, schema)


def test_ray_up_is_closed() -> None:
    options = RAY_UP["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    folder = next(iter(RAY_UP["file_mounts"]))
    assert f"-e RAY_AUTH_TOKEN_PATH={folder}/ray-token" in options
    starts = [c for c in RAY_UP["head_start_ray_commands"] if "ray start --head" in c]
    assert len(starts) == 1
    assert "--dashboard-host=127.0.0.1" in starts[0]
    types = RAY_UP["available_node_types"]
    for kind in types.values():
        assert kind["node_config"]["SecurityGroupIds"]  # otherwise Ray opens SSH to the world
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_ray_up_has_workers_on_spot_and_the_head_on_demand() -> None:
    types = RAY_UP["available_node_types"]
    head = types[RAY_UP["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"]["CPU"] == 0
    assert types["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert types["gpu"]["min_workers"] == 0 < types["gpu"]["max_workers"] <= RAY_UP["max_workers"]
    assert types["gpu"]["resources"]["GPU"] >= 1


@pytest.mark.parametrize("name", clusters())
def test_workers_may_be_preempted_and_the_head_not(name: str) -> None:
    spec = clusters()[name]
    assert spec["enableInTreeAutoscaling"]
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    resources = head["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    affinity = head["template"]["spec"]["affinity"]["nodeAffinity"]
    terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert len(terms) == 1  # terms are alternatives, expressions in one hold together
    refused = {e["key"]: e["values"] for e in terms[0]["matchExpressions"]}
    for worker in spec["workerGroupSpecs"]:
        pod = worker["template"]["spec"]
        assert worker["minReplicas"] == 0 < worker["maxReplicas"]
        assert pod["terminationGracePeriodSeconds"] >= 30
        assert int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1
        assert any(t["key"] == "nvidia.com/gpu" for t in pod["tolerations"])
        wishes = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        spots = {e["key"]: e["values"] for w in wishes for e in w["preference"]["matchExpressions"]}
        assert spots == refused


@pytest.mark.parametrize("name", clusters())
def test_all_ray_nodes_share_storage_and_have_shared_memory(name: str) -> None:
    spec = clusters()[name]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        claim = volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"]
        assert MANIFESTS[f"storage/PersistentVolumeClaim/{claim}"]["spec"]["accessModes"] == [
            "ReadWriteMany"
        ]
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_drain_of_workers_fits_into_the_grace_period() -> None:
    for spec in clusters().values():
        pod = spec["workerGroupSpecs"][0]["template"]["spec"]
        drain = int(env(pod["containers"][0])["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 30 <= drain <= pod["terminationGracePeriodSeconds"] - 10


def arguments_that_arrive(entrypoint: str, tmp_path: Path) -> list[str]:
    """What a RayJob's entrypoint is called with, after the shells on its way.

    KubeRay pastes it into a command for bash; `ray job submit` joins its arguments again by
    list2cmdline; the head hands that to a shell.
    """
    show = tmp_path / "python"
    show.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    show.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    split = [
        sys.executable,
        "-c",
        "import subprocess, sys; print(subprocess.list2cmdline(sys.argv[1:]))",
    ]
    submitted = subprocess.run(
        ["/bin/bash", "-ce", "--", f"{shlex.join(split)} {entrypoint} ;"],
        env=path,
        capture_output=True,
        text=True,
        check=True,
    )
    ran = subprocess.run(
        submitted.stdout.strip(), shell=True, env=path, capture_output=True, text=True, check=True
    )
    return list(json.loads(ran.stdout))


@pytest.mark.parametrize(
    ("entrypoint", "more"),
    [
        (MANIFESTS["rayjob/RayJob/sweep"]["spec"]["entrypoint"], []),
        (
            MANIFESTS["raycronjob/RayCronJob/weekly"]["spec"]["jobTemplate"]["entrypoint"],
            [r'name="weekly-20\d\d-W\d\d"'],
        ),
    ],
)
def test_entrypoint_survives_the_shells(entrypoint: str, more: list[str], tmp_path: Path) -> None:
    arrived = arguments_that_arrive(entrypoint, tmp_path)
    fixed = ["-m", "search", "run", "/sweeps/sweep.toml", "--set"]
    most = clusters()["rayjob"]["workerGroupSpecs"][0]["maxReplicas"]
    sets = ['storage="/shared/results"', 'tracking="http://mlflow:5000"', f"concurrency={most}"]
    assert arrived[:8] == fixed + sets
    assert len(arrived[8:]) == len(more)
    assert all(re.fullmatch(p, a) for p, a in zip(more, arrived[8:], strict=True))
    for override in arrived[5:]:
        tomllib.loads(override)


@pytest.mark.parametrize("name", ["rayjob/RayJob/sweep", "raycronjob/RayCronJob/weekly"])
def test_jobs_are_tried_again(name: str) -> None:
    spec = MANIFESTS[name]["spec"]
    spec = spec.get("jobTemplate", spec)
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"]
