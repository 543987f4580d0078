"""The process that sends to a collector, beside an aggregator."""

from __future__ import annotations

import logging
import signal
import socket
from pathlib import Path

import pytest

from tests.display.monitoring.collector import collecting
from tests.display.monitoring.running import running_run
from tests.display.monitoring.test_otlp_exporter import end
from tests.eventually import eventually
from traceml import settings
from traceml.supervise import otlp_process
from traceml.supervise.otlp_process import OtlpProcess, otlp_beside, otlp_endpoint

URL = "OTEL_EXPORTER_OTLP_ENDPOINT"


def config(folder: Path, **given: object) -> settings.Config:
    """Return settings of a folder."""
    return settings.load({}, folder, runs_dir=folder / "runs", **given)


def test_the_last_spans_are_sent_at_the_end(tmp_path, monkeypatch):
    """A run that ends together with its aggregator arrives too."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1000")
    with collecting() as collector, running_run(tmp_path / "runs" / "r1") as writer:
        with OtlpProcess(config(tmp_path, otlp_endpoint=collector.url)) as process:
            process.start()
            started = process.process
            eventually(lambda: collector.metrics, "the first metrics")
            end(tmp_path / "runs" / "r1", writer)

        eventually(lambda: collector.spans(), "the spans")
        started.wait(240)

    assert "run train" in {span.name for span in collector.spans()}


def test_a_collector_that_is_silent_holds_nobody_up(tmp_path, monkeypatch):
    """The block ends although the exporter does not; the exporter ends by itself later."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1000")
    with running_run(tmp_path / "runs" / "r1"), socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(120)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with otlp_beside(config(tmp_path, otlp_endpoint=address), {}) as process:
            started = process.process
            silent.accept()[0].close()
            started.send_signal(signal.SIGSTOP)  # however long the machine takes, it has not ended

        assert started.poll() is None
        started.send_signal(signal.SIGCONT)

    assert started.wait(240) is not None


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ({}, {}, None),
        ({"otlp_endpoint": "http://a:4318"}, {}, "http://a:4318"),
        ({}, {URL: "http://b:4318"}, "http://b:4318"),
        ({}, {URL: ""}, None),
        ({"otlp_endpoint": "http://a:4318"}, {URL: "http://b:4318"}, "http://a:4318"),
        ({"otlp_endpoint": "http://a:4318"}, {"OTEL_SDK_DISABLED": "true"}, None),
        ({}, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/v1/traces"}, "http://c/v1/traces"),
    ],
)
def test_it_is_off_unless_asked_for(tmp_path, given, environ, expected):
    assert otlp_endpoint(config(tmp_path, **given), environ) == expected


def test_nothing_is_started_without_an_endpoint(tmp_path):
    with otlp_beside(config(tmp_path), {}) as process:
        assert process is None


@pytest.mark.parametrize(("url", "told"), [("http://collector:4318", True), ("http://localhost:4318", False)])
def test_local_only_keeps_everything_here(tmp_path, monkeypatch, caplog, url, told):
    """The reason is logged; a collector on this host is allowed."""
    monkeypatch.setattr(OtlpProcess, "start", lambda self: None)
    with (
        caplog.at_level(logging.WARNING, logger="traceml"),
        otlp_beside(config(tmp_path, local_only=True, otlp_endpoint=url), {}) as process,
    ):
        assert (process is None) is told

    assert ("local_only is set" in caplog.text) is told


def test_without_its_library_the_extra_is_named(tmp_path, monkeypatch, caplog):
    """The aggregator goes on. A variable that is set for other programs is no reason for a warning."""
    monkeypatch.setattr(otlp_process, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, logger="traceml"):
        with otlp_beside(config(tmp_path), {URL: "http://a:4318"}) as process:
            assert process is None

        assert caplog.text == ""
        with otlp_beside(config(tmp_path, otlp_endpoint="http://a:4318"), {}) as process:
            assert process is None

    assert "pip install 'traceml-torch[otlp]'" in caplog.text
