"""Tests of the dashboard and the alerts: they load, use metrics that exist, and every alert is documented."""

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from cluster.metrics import COUNTERS, GAUGES, HISTOGRAMS, LABELS
from serve_app.auth.metrics import METRICS as OF_KEYS
from serve_app.jobs.metrics import COUNTERS as JOB_COUNTERS
from serve_app.jobs.metrics import GAUGES as JOB_GAUGES

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "cluster" / "launch" / "monitoring"
RAY = Path(ray.__file__).parent
RAY_SOURCES = (
    *(RAY / "serve" / "_private").glob("*.py"),
    RAY / "dashboard" / "modules" / "reporter" / "reporter_agent.py",
)
RAY_LABELS = {
    "application",
    "deployment",
    "route",
    "status_code",
    "error_code",
    "instance",
    "GpuIndex",
    "node_type",
}
ALL_COUNTERS = {*COUNTERS, *OF_KEYS, *JOB_COUNTERS}
ALL_GAUGES = {*GAUGES, *JOB_GAUGES}
OUR_LABELS = {*LABELS, "key", "code", "status"}
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_count")}
"""Suffixes that Prometheus appends. `_sum` is left out, because Ray computes it from the middles of the
buckets."""

DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
QUERIES = {
    **{f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]},
    **{alert["alert"]: alert["expr"] for alert in ALERTS},
}

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here: apt-get install prometheus (Debian, Ubuntu)"
)


def exported(kind: str, name: str) -> set[str]:
    """Returns the metric's names in Prometheus."""
    stem = name.removesuffix("_total") if kind == "Counter" else name
    return {f"ray_{stem}{suffix}" for suffix in SUFFIXES[kind]}


def our_metrics() -> set[str]:
    kinds = {"Counter": ALL_COUNTERS, "Gauge": ALL_GAUGES, "Histogram": HISTOGRAMS}
    return set().union(*(exported(kind, name) for kind, names in kinds.items() for name in names))


@cache
def ray_metrics() -> set[str]:
    """Returns the metrics of Serve and of the node agents, found by how the installed Ray constructs them."""
    return set().union(*(exported(*metric) for path in RAY_SOURCES for metric in constructed(path)))


def constructed(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (kind, name) of every metric whose name is a literal, or is complete but for the protocol."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            kind = getattr(node.func, "attr", getattr(node.func, "id", ""))
            names = [*node.args[:1], *(word.value for word in node.keywords if word.arg == "name")]
            if kind in SUFFIXES and names:
                name = ast.unparse(names[0]).replace("{protocol_name}", "http").lstrip("f").strip("'\"")
                yield kind, name


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_every_query_names_metrics_that_exist(query: str) -> None:
    named = set(re.findall(r"\bray_\w+", query))
    assert named
    assert named <= our_metrics() | ray_metrics()


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_every_query_goes_by_labels_that_exist(query: str) -> None:
    by = re.findall(r"\b(?:by|on) \(([^)]*)\)", query)
    selected = re.findall(r'(\w+)(?:=~|!~|!=|=)"', query)
    assert {*", ".join(by).replace(" ", "").split(","), *selected} <= {"", "le", *OUR_LABELS, *RAY_LABELS}


def test_the_dashboard_shows_all_our_metrics() -> None:
    queries = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    hidden = {name for name in {*ALL_COUNTERS, *ALL_GAUGES, *HISTOGRAMS} if f"ray_{name}" not in queries}
    assert hidden == {"relay_batch_size"}  # its exact mean is shown instead, from two counters


def test_the_dashboards_panels_have_a_unit_a_description_and_a_place_of_their_own() -> None:
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = [cell for panel in DASHBOARD["panels"] for cell in cells(panel["gridPos"])]
    assert len(set(taken)) == len(taken)


def cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


def test_the_dashboard_asks_for_its_prometheus_and_names_none() -> None:
    sources = {panel["datasource"]["uid"] for panel in PANELS}
    sources |= {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert sources == {"${datasource}"}
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_is_explained(alert: dict[str, Any]) -> None:
    file, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (\w+)$", (ROOT / file).read_text(), re.MULTILINE)
    assert alert["alert"] in headings
    assert anchor == alert["alert"].lower()
    assert alert["labels"]["severity"] in {"critical", "warning"}


def test_every_metric_is_explained() -> None:
    explained = set(re.findall(r"`(relay_\w+)`", (ROOT / "docs" / "operations.md").read_text()))
    assert explained == {*ALL_COUNTERS, *ALL_GAUGES, *HISTOGRAMS}


def run_promtool(*args: str) -> None:
    run = subprocess.run(["promtool", *args], cwd=FOLDER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@promtool
def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    run_promtool("check", "config", "prometheus.yml")


@promtool
def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    run_promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_tried() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    fired = {rule["alertname"] for test in tests for rule in test["alert_rule_test"] if "exp_alerts" in rule}
    quiet = {rule["alertname"] for rule in tests[0]["alert_rule_test"]}
    assert fired == quiet == {alert["alert"] for alert in ALERTS}


@promtool
def test_prometheus_can_parse_every_query_of_the_dashboard(tmp_path: Path) -> None:
    grafana = {"$__rate_interval": "1m", "$model": ".*", "$application": ".*"}
    rules = []
    for panel in PANELS:
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in grafana.items():
                query = query.replace(name, value)
            rules.append({"record": f"panel:{panel['id']}:{target['refId']}", "expr": query})
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run_promtool("check", "rules", str(tmp_path / "rules.yml"))
