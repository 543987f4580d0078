"""The answer to Prometheus, and who gets it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.diagnosis.fabricated import Job
from tests.display.monitoring.running import Clock, running_run, series_of
from tests.runs.fabricated_store import run_facts, store_run
from traceml.display.monitoring import active_runs
from traceml.display.monitoring.active_runs import ActiveRuns
from traceml.display.monitoring.metrics_server import metrics_app
from traceml.renderers.monitoring_metrics import Instruments
from traceml.runs.live_run import LiveRun


def ask(app: Any, path: str = "/metrics", host: str = "localhost:29767", **headers: str) -> tuple[str, str]:
    """Return status and text of a request."""
    answered: list[str] = []
    environ = {"PATH_INFO": path, "HTTP_HOST": host, "REQUEST_METHOD": "GET", "QUERY_STRING": "", **headers}
    body = b"".join(app(environ, lambda status, _: answered.append(status)))
    return answered[0], body.decode()


def test_a_running_run_has_its_verdict_and_the_reports_figures(tmp_path):
    """The same figures as the screens have, in the text format that Prometheus parses."""
    with running_run(tmp_path / "r1"):
        status, text = ask(metrics_app(ActiveRuns(tmp_path), None))
        live = LiveRun(tmp_path / "r1")
        live.refresh()
        report = live.report()
        live.close()

    found = series_of(text)
    assert status == "200 OK"
    assert found['traceml_verdict{kind="COMPUTE_STRAGGLER",run="r1",severity="critical"}'] == 1
    assert found['traceml_step_seconds{run="r1"}'] == pytest.approx(report.steps.mean_ms / 1e3)
    assert found['traceml_steps_total{run="r1"}'] == 200
    assert found['traceml_runs{state="running"}'] == 1
    known = {each.prometheus_name for each in Instruments.all()}
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert names <= known


def test_runs_that_are_over_are_counted_only(tmp_path):
    """An ended run has no series of its own: they would stay forever."""
    store_run(tmp_path / "done", Job(ranks=1, steps=60), facts=run_facts(id="done"))
    _, text = ask(metrics_app(ActiveRuns(tmp_path), None))

    found = {name: value for name, value in series_of(text).items() if value}
    assert found == {'traceml_runs{state="finished"}': 1}
    assert not [name for name in series_of(text) if "run=" in name]


def test_a_run_that_ends_disappears(tmp_path):
    """Its series end with it; an answer of the last second is used again."""
    clock = Clock()
    app = metrics_app(ActiveRuns(tmp_path, clock=clock), None)
    with running_run(tmp_path / "r1") as writer:
        assert 'traceml_step_seconds{run="r1"}' in series_of(ask(app)[1])
        writer.put_meta("run", run_facts(id="r1"))
        writer.commit()
        assert 'traceml_step_seconds{run="r1"}' in series_of(ask(app)[1])
        clock.now_s += 1.0
        assert 'traceml_step_seconds{run="r1"}' not in series_of(ask(app)[1])


def test_a_damaged_store_hides_no_other_run(tmp_path):
    """One run that cannot be read costs its own series only."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "traceml.db").write_bytes(b"no database" * 500)
    with running_run(tmp_path / "good"):
        found = series_of(ask(metrics_app(ActiveRuns(tmp_path), None))[1])

    assert 'traceml_step_seconds{run="good"}' in found
    assert not [name for name in found if 'run="bad"' in name]


def test_only_the_newest_runs_are_shown(tmp_path, monkeypatch):
    """Above the limit the oldest are counted, so that the answer stays small."""
    monkeypatch.setattr(active_runs, "MAX_RUNS", 4)
    with ExitStack() as stack:
        for number in range(6):
            stack.enter_context(running_run(tmp_path / f"r{number:02}", ranks=1, steps=30, started=1e9 + number))

        found = series_of(ask(metrics_app(ActiveRuns(tmp_path), None))[1])

    assert found["traceml_runs_hidden"] == 2
    shown = {name for name in found if name.startswith("traceml_world_size")}
    assert len(shown) == 4
    assert 'traceml_world_size{run="r01"}' not in shown


def test_text_of_a_user_cannot_break_the_format(tmp_path):
    """Quotes, line ends and backslashes in a name are escaped."""
    name = 'a"b\\c\nd'
    with running_run(tmp_path / "r1", name=name):
        text = ask(metrics_app(ActiveRuns(tmp_path), None))[1]

    info = next(family for family in text_string_to_metric_families(text) if family.name == "traceml_run_info")
    assert info.samples[0].labels["name"] == name


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Basic secret", "secret", "Bearer secretx", "Bearer \xe9"]
)
def test_without_the_token_nothing_is_reported(tmp_path, header):
    """A wrong token is refused on every path, before a run is read."""
    app = metrics_app(ActiveRuns(tmp_path), "secret")

    for path in ("/metrics", "/"):
        status, text = ask(app, path, "trainer:29767", HTTP_AUTHORIZATION=header)
        assert status == "401 Unauthorized"
        assert "traceml_" not in text


@pytest.mark.parametrize("header", ["Bearer secret", "bearer secret", "BEARER  secret"])
def test_the_token_is_a_bearer_token(tmp_path, header):
    """As Prometheus sends it, under any host name; HTTP ignores the case of the scheme."""
    app = metrics_app(ActiveRuns(tmp_path), "secret")

    assert ask(app, host="trainer:29767", HTTP_AUTHORIZATION=header)[0] == "200 OK"


@pytest.mark.parametrize("host", ["evil.example:29767", "evil.example", "127.0.0.1.evil.example", "", "[::1", "[x]:1"])
def test_a_name_that_only_resolves_to_loopback_is_refused(tmp_path, host):
    """A page of another site must not read the metrics through the user's browser."""
    assert ask(metrics_app(ActiveRuns(tmp_path), None), host=host)[0] == "403 Forbidden"


@pytest.mark.parametrize("host", ["localhost:29767", "127.0.0.1:1", "[::1]:29767"])
def test_this_host_needs_no_token(tmp_path, host):
    """The names of loopback are taken, and only the path of the metrics."""
    app = metrics_app(ActiveRuns(tmp_path), None)

    assert ask(app, host=host)[0] == "200 OK"
    assert ask(app, "/other", host)[0] == "404 Not Found"
