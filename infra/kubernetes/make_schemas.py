"""Make JSON Schemas of KubeRay's custom resource definitions, for checking manifests without a cluster.

    python infra/kubernetes/make_schemas.py FOLDER_OF_CRDS

``FOLDER_OF_CRDS`` is ``ray-operator/config/crd/bases`` of the KubeRay release that the manifests are for. Of each kind
the version ``v1`` is taken; objects that list their properties are closed, so that a misspelled key is an error (the
API server would drop it in silence); parts that come several times are written once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KINDS = ("RayCluster", "RayJob", "RayService")
VERSION = "v1"
SHARED = 400
"""Characters from which a part that comes several times is written once."""


def closed(node: Any) -> Any:
    """Return a schema without descriptions whose objects take no unknown keys."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {}
    for key, value in node.items():
        if key == "properties":
            made[key] = {name: closed(part) for name, part in value.items()}
        elif key != "description" and not key.startswith("x-kubernetes-"):
            made[key] = closed(value)
    if "properties" in made and "additionalProperties" not in made:
        made["additionalProperties"] = bool(node.get("x-kubernetes-preserve-unknown-fields"))
    return made


def shared(schema: dict[str, Any]) -> dict[str, Any]:
    """Write parts that come several times once, under ``$defs``."""
    seen: Counter[str] = Counter()
    _count(schema, seen)
    names: dict[str, str] = {}
    parts: dict[str, Any] = {}

    def put(node: Any, *, top: bool = False) -> Any:
        if isinstance(node, list):
            return [put(item) for item in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if top or seen[text] < 2:
            return {key: put(value) for key, value in node.items()}
        if text not in names:
            names[text] = f"part{len(names)}"
            parts[names[text]] = put(node, top=True)
        return {"$ref": f"#/$defs/{names[text]}"}

    made: dict[str, Any] = put(schema, top=True)
    return made | {"$defs": parts}


def _count(node: Any, seen: Counter[str]) -> None:
    if isinstance(node, list):
        for item in node:
            _count(item, seen)
    elif isinstance(node, dict):
        text = json.dumps(node, sort_keys=True)
        if len(text) >= SHARED and "type" in node:
            seen[text] += 1
        if seen[text] < 2:
            for value in node.values():
                _count(value, seen)


def main(folder: Path) -> None:
    """Write a schema for each kind beside this file."""
    for path in sorted(folder.glob("ray.io_*.yaml")):
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = definition["spec"]["names"]["kind"]
        if kind not in KINDS:
            continue
        (version,) = (one for one in definition["spec"]["versions"] if one["name"] == VERSION)
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        schema["properties"]["apiVersion"] = {"const": f"ray.io/{VERSION}"}
        schema["properties"]["kind"] = {"const": kind}
        schema["required"] = sorted({*schema.get("required", []), "apiVersion", "kind", "metadata", "spec"})
        target = Path(__file__).parent / "schemas" / f"{kind.lower()}.json"
        target.write_text(json.dumps(shared(schema), sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8")
        print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
