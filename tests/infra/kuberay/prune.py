"""Cuts KubeRay's resource definitions down to what the tests hold manifests against.

Pod templates, which make nearly all of them, are left out: the tests read those with Kubernetes' own schema.

    python tests/infra/kuberay/prune.py ../shared/schemas/kuberay
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def pruned(schema: Any) -> Any:
    """The schema without pod templates; objects know all of their fields."""
    if not isinstance(schema, dict):
        return schema
    fields = schema.get("properties")
    if fields is None:
        return {name: pruned(part) for name, part in schema.items()}
    if "containers" in fields.get("spec", {}).get("properties", {}):
        return {"type": "object", "required": ["spec"]}
    kept = {name: part for name, part in schema.items() if name != "properties"}
    return kept | {
        "properties": {name: pruned(part) for name, part in fields.items()},
        "additionalProperties": schema.get("x-kubernetes-preserve-unknown-fields", False),
    }


def main(folder: Path) -> None:
    """Writes the schemas of the served v1 beside this file."""
    found = {}
    for path in sorted(folder.glob("ray.io_*.yaml")):
        definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        (version,) = (item for item in definition["spec"]["versions"] if item["name"] == "v1")
        spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
        found[definition["spec"]["names"]["kind"]] = pruned(spec)
    target = Path(__file__).with_name("specs.json")
    target.write_text(json.dumps(found, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
