"""The Grafana dashboard and the alert rules query what the server has."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from traceml.diagnosis.kinds import Kind, Severity
from traceml.renderers.monitoring_metrics import Instruments

EXAMPLES = Path(__file__).parents[3] / "examples"
DASHBOARD = json.loads((EXAMPLES / "grafana" / "traceml.json").read_text())
ALERTS = yaml.safe_load((EXAMPLES / "prometheus" / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
LABELS = {each.prometheus_name: {*each.labels, "instance", "job"} for each in Instruments.all()}


def _queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])

    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])[1]


EXPRESSIONS = [*_queries(), *(rule["expr"] for rule in RULES if not rule["expr"].startswith("up{"))]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_use_metrics_and_labels_that_exist(expression: str) -> None:
    """A panel on a name that nobody exports stays empty without an error."""
    names = re.findall(r"\btraceml_\w+", expression)

    assert names
    assert set(names) <= set(LABELS)
    for name, selector in re.findall(r"(traceml_\w+)\{([^}]*)\}", expression):
        assert {label for label, _ in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"', selector)} <= LABELS[name]


def test_legends_and_texts_use_labels_that_exist() -> None:
    """A legend `{{rnak}}` is drawn as an empty text."""
    for target in (target for panel in DASHBOARD["panels"] for target in panel["targets"]):
        known = set.intersection(*(LABELS[name] for name in re.findall(r"traceml_\w+", target["expr"])))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known

    for rule in (rule for rule in RULES if not rule["expr"].startswith("up{")):
        known = LABELS[re.findall(r"traceml_\w+", rule["expr"])[0]]
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= known


def test_alerts_name_kinds_and_severities_that_exist() -> None:
    """A misspelt kind would never fire."""
    matchers = [match for rule in RULES for match in re.findall(r'(kind|severity)\s*[=!]~?\s*"([^"]*)"', rule["expr"])]
    of = {
        name: {value for label, text in matchers if label == name for value in text.split("|")} for name, _ in matchers
    }

    assert of["kind"]
    assert of["kind"] <= {kind.value for kind in Kind}
    assert of["severity"]
    assert of["severity"] <= {severity.value for severity in Severity}


def test_the_dashboard_is_laid_out() -> None:
    """Ids are unique, panels have a data source, are inside the 24 columns and do not overlap."""
    panels: list[dict[str, Any]] = DASHBOARD["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} <= {"timeseries", "table", "stat", "bargauge"}
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])

    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_variables_that_are_used_are_declared() -> None:
    """And each declared one is used."""
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)

    assert {"datasource"} | set(re.findall(r"\$(\w+)", text)) == declared


@pytest.mark.needs("prometheus")
@pytest.mark.process
def test_prometheus_takes_the_rules_and_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    """Prometheus' own parser reads each of them."""
    queries = [query.replace("$run", ".*").replace("$phase", "comm") for query in _queries()]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    for command in (
        ["check", "rules", str(tmp_path / "panels.yml")],
        ["check", "config", str(EXAMPLES / "prometheus" / "prometheus.yml")],
    ):
        checked = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.needs("prometheus")
@pytest.mark.process
def test_alerts_fire_where_they_should_and_nowhere_else(tmp_path: Path) -> None:
    """Prometheus evaluates the rules on fabricated series: a hang, a failed run, and a healthy one."""
    series = {
        'traceml_verdict{run="a",kind="HANG",severity="critical"}': "1x20",
        'traceml_verdict{run="b",kind="HEALTHY",severity="info"}': "1x20",
        'traceml_verdict{run="c",kind="COMM_BOUND",severity="warning"}': "1x20",
        'traceml_goodput_ratio{run="b"}': "0.9x20",
        'traceml_runs{state="failed"}': "0x5 1x15",
        'traceml_runs{state="finished"}': "0x5 1x15",
        'traceml_rows_lost_total{run="b"}': "0x20",
    }
    fired = {"TracemlHang": [{"severity": "critical", "run": "a", "kind": "HANG"}],
             "TracemlRunEndedBadly": [{"severity": "warning", "state": "failed"}]}  # fmt: skip
    checks = [{"alertname": rule["alert"], "eval_time": "10m",
               "exp_alerts": [{"exp_labels": labels} for labels in fired.get(rule["alert"], [])]}
              for rule in RULES]  # fmt: skip
    for check in checks:
        rule = next(rule for rule in RULES if rule["alert"] == check["alertname"])
        for alert in check["exp_alerts"]:
            alert["exp_annotations"] = {
                key: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda m, of=alert: of["exp_labels"].get(m[1], ""), text)
                for key, text in rule["annotations"].items()
            }

    inputs = [{"series": key, "values": value} for key, value in series.items()]
    test = {
        "rule_files": [str(EXAMPLES / "prometheus" / "alerts.yml")],
        "tests": [{"interval": "1m",
                   "input_series": inputs,
                   "alert_rule_test": checks}],
    }  # fmt: skip
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))

    tested = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_page_lists_every_metric() -> None:
    """docs/monitoring.md has each metric with its labels and meaning, and no other."""
    page = (EXAMPLES.parent / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| `(traceml_\w+)` \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    told = [(name, re.findall(r"`(\w+)`", labels), text) for name, labels, text in rows]

    assert told == [(each.prometheus_name, list(each.labels), each.help) for each in Instruments.all()]
