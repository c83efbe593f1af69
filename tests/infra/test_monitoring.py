"""What `infra/monitoring` asks Prometheus for is what runs export: every query names metrics and labels that exist."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from pipeline.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "infra" / "monitoring"
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "fixative.json").read_text())

# What Grafana puts in place of its variables.
VARIABLES = {"$method": ".*", "$__rate_interval": "1m", "$__range": "3h", "$actor_hour": "2.00"}
# By name and label what Ray 2.60 exports itself, and what Prometheus adds.
FOREIGN = {
    "ray_tasks": {"Name", "State"},
    "ray_actors": {"Name", "State"},
    "ray_node_gpus_utilization": {"GpuIndex"},
    "ray_node_gram_used": {"GpuIndex"},
    "ray_node_gram_available": {"GpuIndex"},
    "ray_node_gpu_power_milliwatts": {"GpuIndex"},
    "up": {"job"},
}
EVERYWHERE = {"instance", "job", "WorkerId"}


def exported() -> dict[str, set[str]]:
    """Labels of every series that there may be, by its name."""
    series = dict(FOREIGN)
    for metric in METRICS:
        suffixes = ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",)
        for suffix in suffixes:
            series[f"ray_{metric.name}{suffix}"] = {*metric.tags, *(["le"] if suffix == "_bucket" else [])}
    return series | {rule["record"]: set() for rule in rules("record")}


def rules(kind: str) -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"] if kind in rule]


def queries() -> Iterator[tuple[str, str]]:
    for rule in [*rules("record"), *rules("alert")]:
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            yield f"{panel['title']} {target['refId']}", query


QUERIES = dict(queries())


def nodes(expression: Any) -> Iterator[Any]:
    """The expression and everything in it."""
    yield expression
    children = [getattr(expression, name, None) for name in ("lhs", "rhs", "expr", "param", "vector_selector")]
    for child in [*children, *(getattr(expression, "args", None) or [])]:
        if child is not None:
            yield from nodes(child)


def selectors(query: str) -> list[Any]:
    return [node for node in nodes(promql_parser.parse(query)) if isinstance(node, promql_parser.VectorSelector)]


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_names_exported_metrics_and_labels(name: str) -> None:
    series = exported()
    found = selectors(QUERIES[name])
    assert found
    for selector in found:
        assert selector.name in series, f"{selector.name} is not exported"
        asked = {matcher.name for matcher in selector.matchers.matchers}
        assert asked <= series[selector.name] | EVERYWHERE, f"{selector.name} has no {asked - series[selector.name]}"


@pytest.mark.parametrize("name", QUERIES)
def test_what_is_grouped_by_is_a_label(name: str) -> None:
    series = exported()
    for node in nodes(promql_parser.parse(QUERIES[name])):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            below = [item for item in nodes(node.expr) if isinstance(item, promql_parser.VectorSelector)]
            for selector in below:
                unknown = set(node.modifier.labels) - series[selector.name] - EVERYWHERE
                assert not unknown, f"{selector.name} has no {unknown}"


def test_every_metric_is_shown() -> None:
    """On the dashboard, by itself or through a rule that it shows."""
    asked = {selector.name for query in QUERIES.values() for selector in selectors(query)}
    unseen = {
        metric.name
        for metric in METRICS
        if not {f"ray_{metric.name}{suffix}" for suffix in ("", "_bucket", "_count")} & asked
    }
    assert unseen == set()


def test_the_parser_finds_what_is_wrong() -> None:
    assert [item.name for item in selectors('sum(rate(a{x="1"}[5m])) / on () b offset 1h or vector(0)')] == ["a", "b"]
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        promql_parser.parse("sum(rate(a[5m])")


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Throughput", "Quality of protection", "Failures", "Commits", "Cost per image", "GPU"]
    datasource = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())
    (uid,) = {panel["datasource"]["uid"] for panel in panels if "datasource" in panel}
    assert [source["uid"] for source in datasource["datasources"]] == [uid]


def test_alerts_say_what_is_wrong() -> None:
    for rule in rules("alert"):
        assert rule["alert"].startswith("Fixative")
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]


def test_prometheus_reads_rays_discovery_file() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (ray_job,) = (job for job in config["scrape_configs"] if job["job_name"] == "ray")
    (discovery,) = ray_job["file_sd_configs"]
    assert discovery["files"] == [
        "/tmp/ray/prom_metrics_service_discovery.json"
    ]  # test_ray_metrics.py sees Ray write it
    assert [(FOLDER / name).is_file() for name in config["rule_files"]] == [True]


def test_prefects_password_is_in_a_file() -> None:
    """Of the names under which compose puts it and the address beside prometheus.yml."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "prefect")
    assert job["basic_auth"] == {"username": "fixative", "password_file": "prefect-password"}
    (discovery,) = job["file_sd_configs"]
    compose = yaml.safe_load((FOLDER.parent / "compose.yaml").read_text())
    service, folder = compose["services"]["prometheus"], "/etc/fixative"
    assert f"--config.file={folder}/prometheus.yml" in service["command"]
    (targets,), (password,) = service["configs"], service["secrets"]
    assert [f"{folder}/{name}" for name in discovery["files"]] == [targets["target"]]
    assert f"{folder}/{job['basic_auth']['password_file']}" == password["target"]
    assert json.loads(compose["configs"][targets["source"]]["content"]) == [{"targets": ["prefect-server:4200"]}]
    assert compose["secrets"][password["source"]] == {"environment": "PREFECT_PASSWORD"}
    server = compose["services"]["prefect-server"]["environment"]
    assert server["PREFECT_SERVER_METRICS_ENABLED"] == "true"
    assert server["PREFECT_SERVER_API_AUTH_STRING"].startswith("fixative:${PREFECT_PASSWORD:?")
    assert all(f"{folder}/{name}" in " ".join(service["volumes"]) for name in config["rule_files"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("arguments", [("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")])
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    subprocess.run(["promtool", *arguments], cwd=FOLDER, check=True, timeout=60)
