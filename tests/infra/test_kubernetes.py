"""The manifests of infra/k8s, read offline: KubeRay's schema, Kubernetes' schemas, and what the texts promise."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.config import JobConfig

ROOT = Path(__file__).parents[2]
K8S = ROOT / "infra" / "k8s"
WAYS = ["raycluster", "schedule", "rayjob", "raycronjob", "cronjob"]
KUBERNETES = "1.34"
RAY_LABEL = {"fixative.io/ray": "true"}


@cache
def documents() -> dict[str, dict[str, Any]]:
    """Every manifest by kind and name, those of Ray with what kustomize puts into them."""
    paths = [path for path in K8S.rglob("*.yaml") if path.name not in ("kustomization.yaml", "job.yaml")]
    found = {
        f"{item['kind']}/{item['metadata']['name']}": item
        for path in paths
        for item in yaml.safe_load_all(path.read_text())
    }
    cluster = found["RayCluster/fixative"]["spec"]
    job, cron = found["RayJob/fixative-protect"]["spec"], found["RayCronJob/fixative-protect"]["spec"]
    job["rayClusterSpec"] = cluster
    cron["jobTemplate"] = job
    return found


def pod_templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that is asked for."""
    found = documents()
    cluster = found["RayCluster/fixative"]["spec"]
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    yield "prefect-worker", found["Deployment/fixative-prefect-worker"]["spec"]["template"]
    yield "cronjob", found["CronJob/fixative-protect"]["spec"]["jobTemplate"]["spec"]["template"]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayCronJob"])
def test_ray_resources_are_what_kuberay_knows(kind: str) -> None:
    schema = json.loads(Path(__file__).with_name("kuberay").joinpath("specs.json").read_text())[kind]
    specs = [item["spec"] for item in documents().values() if item["kind"] == kind]
    assert specs
    for spec in specs:
        errors = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(spec)]
        assert errors == []
    unknown = {**specs[0], "workerGroupSpecz": []}
    assert any(Draft202012Validator(schema).iter_errors(unknown)), "the schema would let a typing error through"


def test_all_else_is_what_kubernetes_knows() -> None:
    plain = [item for item in documents().values() if not item["apiVersion"].startswith("ray.io/")]
    assert {item["kind"] for item in plain} == {"Namespace", "ServiceAccount", "NetworkPolicy", "Deployment", "CronJob"}
    pods = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        for name, template in pod_templates()
    ]
    for item in [*plain, *pods]:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize, is not installed")
@pytest.mark.parametrize("way", WAYS)
def test_kustomize_builds_what_is_tested_here(way: str) -> None:
    command = ["kubectl", "kustomize", str(K8S / way)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = {f"{item['kind']}/{item['metadata']['name']}": item for item in yaml.safe_load_all(built)}
    (main,) = {
        "raycluster": ["RayCluster/fixative"],
        "schedule": ["Deployment/fixative-prefect-worker"],
        "rayjob": ["RayJob/fixative-protect"],
        "raycronjob": ["RayCronJob/fixative-protect"],
        "cronjob": ["CronJob/fixative-protect"],
    }[way]
    image = re.compile(r"registry\.example\.com/fixative:[\w.-]+")
    assert len(image.findall(built)) == {"schedule": 3, "cronjob": 1}.get(way, 2)
    assert yaml.safe_load(image.sub("fixative", yaml.safe_dump(found[main]["spec"]))) == documents()[main]["spec"]
    rays = {
        "raycluster": {"RayCluster"},
        "schedule": {"RayCluster"},
        "rayjob": {"RayJob"},
        "raycronjob": {"RayCronJob"},
    }
    assert {item["kind"] for item in found.values() if item["apiVersion"].startswith("ray.io")} == rays.get(way, set())
    assert {item["metadata"].get("namespace", "fixative") for item in found.values()} == {"fixative"}
    assert found["ConfigMap/fixative-job"]["data"].keys() == {"job.yaml"}
    assert "NetworkPolicy/default-deny" in found


@pytest.mark.parametrize(("name", "template"), list(pod_templates()))
def test_pods_run_without_rights(name: str, template: dict[str, Any]) -> None:
    spec = template["spec"]
    assert spec["serviceAccountName"] == "fixative"
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == int(re.findall(r"^USER (\d+)", dockerfile(), re.MULTILINE)[0])
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert not any("hostPath" in volume for volume in volumes.values())
    (container,) = spec["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert ("livenessProbe" in container) == (name != "cronjob")


def test_secrets_come_by_reference() -> None:
    for name, template in pod_templates():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                secret = re.search("TOKEN|SECRET|PASSWORD|KEY|AUTH_STRING", variable["name"])
                assert not secret or "secretKeyRef" in variable["valueFrom"], f"{name}: {variable['name']}"
    assert not [item for item in documents().values() if item["kind"] == "Secret"]


def test_gpus_on_machines_that_may_go_away() -> None:
    for name in ("gpu", "cronjob"):
        spec = dict(pod_templates())[name]["spec"]
        assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {"nvidia.com/gpu", "fixative.io/spot"} <= {item["key"] for item in spec["tolerations"]}
    head = documents()["RayCluster/fixative"]["spec"]["headGroupSpec"]
    assert "tolerations" not in head["template"]["spec"]
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"


def test_only_ray_speaks_with_ray() -> None:
    policies = {
        item["metadata"]["name"]: item["spec"] for item in documents().values() if item["kind"] == "NetworkPolicy"
    }
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert policies["ray"]["podSelector"]["matchLabels"] == RAY_LABEL
    open_to_others = [
        rule for rule in policies["ray"]["ingress"] if rule["from"] != [{"podSelector": {"matchLabels": RAY_LABEL}}]
    ]
    assert sorted(port["port"] for rule in open_to_others for port in rule["ports"]) == [8080, 8265]
    labelled = {
        name for name, template in pod_templates() if template["metadata"]["labels"].items() >= RAY_LABEL.items()
    }
    assert labelled == {"head", "gpu", "prefect-worker"}


def test_versions_and_job_are_those_of_the_project() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert documents()["RayCluster/fixative"]["spec"]["rayVersion"] == pins["ray"]
    assert documents()["RayCluster/fixative"]["spec"]["authOptions"]["mode"] == "token"
    JobConfig.model_validate(yaml.safe_load((K8S / "base" / "job.yaml").read_text()))


def dockerfile() -> str:
    return (ROOT / "infra" / "Dockerfile").read_text()
