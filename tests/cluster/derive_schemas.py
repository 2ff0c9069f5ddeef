"""Derives `schemas/kuberay.json` from KubeRay's CRDs: `python derive_schemas.py FOLDER`.

FOLDER holds rayclusters.yaml, rayjobs.yaml and raycronjobs.yaml (helm-chart/kuberay-operator/crds
in KubeRay's repository; ours are those of 1.7). Kept is version v1 without descriptions, `status`
and the rules in CEL, which jsonschema cannot evaluate; a sub-schema that occurs twice is written
once. The API server drops without a word what a schema does not name; here it is refused.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

CRDS = ("rayclusters", "rayjobs", "raycronjobs")
DROPPED = {
    "description",
    "default",
    "format",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
    "x-kubernetes-validations",
}
SHORT = 60  # characters that are not worth a reference


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as a JSON schema that refuses unknown fields."""
    kept = {key: value for key, value in schema.items() if key not in DROPPED}
    if kept.pop("nullable", False):
        kept["type"] = [kept["type"], "null"]
    if "properties" in kept:
        kept["properties"] = {name: strict(field) for name, field in kept["properties"].items()}
    if "items" in kept:
        kept["items"] = strict(kept["items"])
    if isinstance(kept.get("additionalProperties"), dict):
        kept["additionalProperties"] = strict(kept["additionalProperties"])
    open_ended = kept.pop("x-kubernetes-preserve-unknown-fields", False)
    if kept.get("type") == "object" and not open_ended:
        kept.setdefault("additionalProperties", False)
    return kept


def children(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The sub-schemas one level down."""
    found = [*schema.get("properties", {}).values(), schema.get("items")]
    return [child for child in [*found, schema.get("additionalProperties")] if child]


def count(schema: dict[str, Any], seen: Counter[str]) -> None:
    """Count how often each sub-schema occurs, not descending into repeated ones."""
    text = json.dumps(schema, sort_keys=True)
    seen[text] += 1
    if seen[text] == 1:
        for child in children(schema):
            count(child, seen)


def share(schema: dict[str, Any], seen: Counter[str], shared: dict[str, Any]) -> dict[str, Any]:
    """`schema` with a reference in the place of each sub-schema that occurs more than once."""
    text = json.dumps(schema, sort_keys=True)
    if seen[text] == 1 or len(text) < SHORT:
        return shared_below(schema, seen, shared)
    if text not in shared:
        shared[text] = {}  # takes its number before what is inside it
        shared[text] = {"as": str(len(shared)), "is": shared_below(schema, seen, shared)}
    return {"$ref": f"#/$defs/{shared[text]['as']}"}


def shared_below(
    schema: dict[str, Any], seen: Counter[str], shared: dict[str, Any]
) -> dict[str, Any]:
    """`schema` itself, with references below it."""
    result = dict(schema)
    if "properties" in schema:
        fields = schema["properties"].items()
        result["properties"] = {name: share(field, seen, shared) for name, field in fields}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = share(schema[key], seen, shared)
    return result


def derive(folder: Path) -> dict[str, Any]:
    """One JSON schema with a definition per kind, and what they share."""
    kinds = {}
    for name in CRDS:
        crd = yaml.safe_load((folder / f"{name}.yaml").read_text())["spec"]
        v1 = next(version for version in crd["versions"] if version["name"] == "v1")
        kind = strict(v1["schema"]["openAPIV3Schema"])
        del kind["properties"]["status"]
        kind["properties"]["metadata"] = {"type": "object"}
        kinds[crd["names"]["kind"]] = kind
    seen: Counter[str] = Counter()
    for kind in kinds.values():
        count(kind, seen)
    shared: dict[str, Any] = {}
    definitions = {name: shared_below(kind, seen, shared) for name, kind in kinds.items()}
    return definitions | {entry["as"]: entry["is"] for entry in shared.values()}


def main() -> None:
    """Write the file, a definition a line."""
    definitions = derive(Path(sys.argv[1]))
    lines = [
        f"{json.dumps(name)}:{json.dumps(schema, sort_keys=True, separators=(',', ':'))}"
        for name, schema in definitions.items()
    ]
    target = Path(__file__).parent / "schemas" / "kuberay.json"
    target.write_text('{"$defs":{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
