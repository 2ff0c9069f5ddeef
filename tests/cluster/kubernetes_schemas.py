"""Schemas of what the manifests hold; most of Kubernetes' own are inside KubeRay's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema

from tests.cluster.manifests import (
    Json,
)

KUBERAY = json.loads((Path(__file__).parent / "schemas" / "kuberay.json").read_text())["$defs"]


def resolved(schema: Json) -> Json:
    return KUBERAY[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def within(schema: Json, *steps: str) -> Json:
    """The sub-schema at `steps`, which are names of properties, or "[]" for an array's items."""
    for step in steps:
        schema = resolved(schema)
        schema = schema["items"] if step == "[]" else schema["properties"][step]
    return schema


# KubeRay's schemas hold most of Kubernetes' own.
CLUSTER = within(KUBERAY["RayCluster"], "spec")
HEAD = within(CLUSTER, "headGroupSpec")
PODS = within(HEAD, "template")
RULES = within(CLUSTER, "networkPolicy", "head", "ingressRules")
SELECTOR = within(RULES, "[]", "from", "[]", "podSelector")
CLAIM = within(PODS, "spec", "volumes", "[]", "ephemeral", "volumeClaimTemplate", "spec")
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}


def record(required: str, **properties: Json) -> Json:
    """A schema of an object that has `required` and nothing besides `properties`."""
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


JOB = record(
    "template",
    template=PODS,
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    ttlSecondsAfterFinished=COUNT,
)


CRON_JOB = record(
    "schedule jobTemplate",
    schedule={"type": "string", "pattern": r"^\S+( \S+){4}$"},
    concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
    startingDeadlineSeconds={"type": "integer", "minimum": 10},
    successfulJobsHistoryLimit=COUNT,
    failedJobsHistoryLimit=COUNT,
    jobTemplate=record("spec", spec=JOB, metadata={"type": "object"}),
)


DEPLOYMENT = record(
    "selector template",
    replicas=COUNT,
    strategy=record("type", type={"enum": ["Recreate", "RollingUpdate"]}),
    selector=SELECTOR,
    template=PODS,
)


NETWORK_POLICY = record(
    "podSelector",
    podSelector=SELECTOR,
    policyTypes={"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
    ingress=RULES,
)


SPECS = {
    ("v1", "PersistentVolumeClaim"): CLAIM,
    ("v1", "Service"): within(HEAD, "headService", "spec"),
    ("apps/v1", "Deployment"): DEPLOYMENT,
    ("batch/v1", "Job"): JOB,
    ("batch/v1", "CronJob"): CRON_JOB,
    ("networking.k8s.io/v1", "NetworkPolicy"): NETWORK_POLICY,
}


METADATA = record(
    "name", name={"type": "string", "pattern": "^[a-z0-9.-]+$"}, labels=TEXTS, annotations=TEXTS
)


def schema_of(manifest: Json) -> Json:
    """The whole schema of a manifest.

    Raises:
        KeyError: If there is no such kind in that API.
    """
    kind = manifest["kind"]
    if manifest["apiVersion"] == "ray.io/v1":
        schema = copy.deepcopy(KUBERAY[kind])
        schema["properties"]["metadata"] = METADATA
        return schema | {"$defs": KUBERAY}
    fields = {"apiVersion": {}, "kind": {}, "metadata": METADATA}
    if (manifest["apiVersion"], kind) == ("v1", "ConfigMap"):
        return record("metadata data", **fields, data=TEXTS)
    spec = SPECS[manifest["apiVersion"], kind]
    return record("metadata spec", **fields, spec=spec) | {"$defs": KUBERAY}


def check(manifest: Json) -> None:
    jsonschema.Draft202012Validator(schema_of(manifest)).validate(manifest)
