"""Metrics and spans as a collector receives them."""

from __future__ import annotations

import itertools
import logging
import os
import time
from contextlib import ExitStack
from typing import Any

import pytest

from tests.display.monitoring.collector import Collector, collecting
from tests.display.monitoring.running import Clock, aggregator_facts, running_run
from tests.ports import free_port
from tests.runs.fabricated_store import run_facts
from traceml.database.store.store import StoreWriter
from traceml.display.monitoring import active_runs
from traceml.display.monitoring.otlp_exporter import OtlpConfig, OtlpExporter
from traceml.runs.live_run import LiveRun
from traceml.runs.report.report import build_report, save_report


def exporter(folder: Any, url: str, clock: Clock | None = None, owner: int | None = None, **more: Any) -> OtlpExporter:
    """Return an exporter of this process's runs, those that end from 5 s before this call on."""
    config = OtlpConfig(runs_dir=folder, owner=owner or os.getpid(), endpoint=url, **{"timeout_s": 120.0, **more})
    return OtlpExporter(config, clock=clock or Clock())


def end(folder: Any, writer: StoreWriter, **facts: Any) -> Any:
    """End a run now, and write its report."""
    now_s = time.time()
    writer.put_meta("run", run_facts(id=folder.name, started=now_s - 60, **{"ended": now_s, **facts}))
    writer.commit()
    report = build_report(folder)
    save_report(folder, report)
    return report


def attributes(of: Any) -> dict[str, Any]:
    """Return attributes as Python's values."""
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in of.attributes}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    """OpenTelemetry's variables of this machine do not count."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def test_metrics_are_those_of_the_report(tmp_path):
    """With names, base units and attributes; counters are sums that only grow."""
    with collecting() as collector, running_run(tmp_path / "r1"):
        exporter(tmp_path, collector.url).poll(15.0)
        live = LiveRun(tmp_path / "r1")
        live.refresh()
        report = live.report()
        live.close()

    points = collector.points()
    assert points["traceml.step", (("run", "r1"),)] == pytest.approx(report.steps.mean_ms / 1e3)
    assert points["traceml.steps", (("run", "r1"),)] == 200
    verdict = ("kind", "COMPUTE_STRAGGLER"), ("run", "r1"), ("severity", "critical")
    assert points["traceml.verdict", verdict] == 1
    sent = collector.metrics[0].resource_metrics[0]
    assert attributes(sent.resource)["service.name"] == "traceml"
    metrics = {metric.name: metric for metric in sent.scope_metrics[0].metrics}
    assert metrics["traceml.step"].unit == "s"
    assert metrics["traceml.steps"].sum.is_monotonic
    assert metrics["traceml.rank_memory_peak"].unit == "By"


def test_runs_of_another_aggregator_are_its_own(tmp_path):
    """Two aggregators of one folder do not send a run twice."""
    with collecting() as collector, running_run(tmp_path / "r1") as writer:
        other = exporter(tmp_path, collector.url, owner=1)
        other.poll(15.0)
        end(tmp_path / "r1", writer)
        other.poll(15.0, last=True)

    assert (collector.metrics, collector.traces) == ([], [])


def test_newer_runs_of_other_aggregators_hide_none(tmp_path, monkeypatch):
    """Of a sweep in one folder each job has an aggregator: the limit counts its own runs, and it follows no others."""
    monkeypatch.setattr(active_runs, "MAX_RUNS", 4)
    with collecting() as collector, ExitStack() as stack:
        stack.enter_context(running_run(tmp_path / "mine", started=1e9))
        for number in range(4):
            other = stack.enter_context(running_run(tmp_path / f"r{number}", ranks=1, steps=30))
            other.put_meta("aggregator", aggregator_facts(os.getppid()))
            other.commit()

        sender = exporter(tmp_path, collector.url)
        sender.poll(15.0)
        assert list(sender._runs._live) == [tmp_path / "mine"]

    assert ("traceml.steps", (("run", "mine"),)) in collector.points()


def test_metrics_wait_for_their_interval(tmp_path):
    """The folder is looked at more often than metrics are sent."""
    clock = Clock()
    with collecting() as collector, running_run(tmp_path / "r1"):
        sender = exporter(tmp_path, collector.url, clock)
        for now_s in (100.0, 105.0, 114.0, 115.0, 120.0):
            clock.now_s = now_s
            sender.poll(15.0)

    assert len(collector.metrics) == 2


def test_an_ended_run_is_a_trace_with_its_findings(tmp_path):
    """The run contains its attempts, these contain blocks of steps, and findings are events of the run."""
    with collecting() as collector, running_run(tmp_path / "r1") as writer:
        sender = exporter(tmp_path, collector.url)
        sender.poll(15.0)
        assert collector.traces == []
        report = end(tmp_path / "r1", writer)
        sender.poll(15.0, last=True)
        sender.poll(15.0, last=True)

    spans = collector.spans()
    root, attempt, *blocks = sorted(spans, key=lambda span: (span.name[:3] != "run", span.name[:3] != "att"))
    assert [root.name, attempt.name] == ["run train", "attempt 0"]
    assert (root.parent_span_id, attempt.parent_span_id) == (b"", root.span_id)
    assert {block.parent_span_id for block in blocks} == {attempt.span_id}
    assert len({span.span_id for span in spans}) == len(spans)
    assert len({span.trace_id for span in spans}) == 1
    facts = attributes(root)
    assert facts["traceml.verdict.kind"] == report.verdict.kind.value == "COMPUTE_STRAGGLER"
    assert (facts["traceml.run.id"], facts["traceml.run.steps"]) == ("r1", 200)
    assert root.end_time_unix_nano - root.start_time_unix_nano == pytest.approx(60e9, rel=1e-3)
    assert [attributes(event)["traceml.finding.kind"] for event in root.events] == [
        finding.kind.value for finding in report.findings
    ]
    assert root.status.code == 0


def test_blocks_cover_the_steps_and_have_the_times_of_their_rows(tmp_path):
    """Blocks follow each other without a gap, and their phases are those of the charts."""
    with collecting() as collector, running_run(tmp_path / "r1") as writer:
        sender = exporter(tmp_path, collector.url)
        end(tmp_path / "r1", writer)
        sender.poll(15.0, last=True)

    blocks = [span for span in collector.spans() if span.name.startswith("step")]
    facts = sorted((attributes(block) for block in blocks), key=lambda each: each["traceml.step.first"])
    assert (facts[0]["traceml.step.first"], facts[-1]["traceml.step.last"]) == (0, 199)
    assert all(one["traceml.step.last"] + 1 == two["traceml.step.first"] for one, two in itertools.pairwise(facts))
    ordered = sorted(blocks, key=lambda block: block.start_time_unix_nano)
    assert all(block.end_time_unix_nano > block.start_time_unix_nano for block in ordered)
    assert all(one.end_time_unix_nano <= two.start_time_unix_nano for one, two in itertools.pairwise(ordered))
    assert {"traceml.phase.forward_seconds", "traceml.step.p95_seconds"} <= set(facts[0])


def test_a_failed_run_is_an_error(tmp_path):
    """Its root span has the status of an error, which tracing systems show in red."""
    with collecting() as collector, running_run(tmp_path / "r1") as writer:
        sender = exporter(tmp_path, collector.url)
        end(tmp_path / "r1", writer, state="failed")
        sender.poll(15.0, last=True)

    root = next(span for span in collector.spans() if span.name.startswith("run"))
    assert (root.status.code, root.status.message) == (2, "the run is failed")


def test_the_same_run_has_the_same_ids(tmp_path):
    """An exporter that was restarted and sends a run again makes no second trace."""
    with collecting() as collector, running_run(tmp_path / "r1") as writer:
        senders = [exporter(tmp_path, collector.url) for _ in range(2)]
        end(tmp_path / "r1", writer)
        for sender in senders:
            sender.poll(15.0, last=True)

    ids = [span.span_id for span in collector.spans()]
    assert ids[: len(ids) // 2] == ids[len(ids) // 2 :]


def test_a_run_that_goes_on_after_its_end_is_sent_again(tmp_path):
    """As a job that was queued again: its trace becomes that of all its attempts."""
    with collecting() as collector, running_run(tmp_path / "r1") as writer:
        sender, clock = exporter(tmp_path, collector.url), time.time()
        end(tmp_path / "r1", writer, state="failed")
        sender.poll(0.0, last=True)
        writer.put_meta("run", run_facts(id="r1", state="running", started=clock - 60, ended=None))
        writer.commit()
        sender.poll(0.0, last=True)
        end(tmp_path / "r1", writer)
        sender.poll(0.0, last=True)

    roots = [span for span in collector.spans() if span.name.startswith("run")]
    assert [root.status.code for root in roots] == [2, 0]
    assert len({root.trace_id for root in roots}) == 1


def test_runs_that_ended_before_are_not_sent(tmp_path):
    """A start of the exporter does not send the history of the folder."""
    with collecting() as collector, running_run(tmp_path / "r1") as writer:
        end(tmp_path / "r1", writer, ended=time.time() - 30)
        exporter(tmp_path, collector.url).poll(15.0, last=True)

    assert collector.traces == []


def test_a_collector_that_is_down_gets_the_spans_later(tmp_path, caplog):
    """Two lines are logged, however often it is tried; nothing is lost or sent twice."""
    port = free_port()

    clock = Clock()
    sender = exporter(tmp_path, f"http://127.0.0.1:{port}", clock, timeout_s=0.75)  # under that no request is retried
    with caplog.at_level(logging.WARNING, logger="traceml"), running_run(tmp_path / "r1") as writer:
        sender.poll(15.0)
        end(tmp_path / "r1", writer)
        for _ in range(3):
            clock.now_s += 1000
            sender.poll(15.0)

        patient = exporter(tmp_path, f"http://127.0.0.1:{port}", clock)
        sender._metrics, sender._spans = patient._metrics, patient._spans
        with collecting(port) as collector:
            clock.now_s += 1000
            sender.poll(15.0)
            sender.poll(15.0, last=True)

    assert len([span for span in collector.spans() if span.name.startswith("run")]) == 1
    told = [record.getMessage() for record in caplog.records if record.name == "traceml"]
    assert len(told) == 2
    assert "accepts nothing; it is tried again, training is not affected" in told[0]
    assert "accepts data again" in told[1]


def test_texts_of_findings_are_masked(tmp_path):
    """The setting `mask` counts for what leaves the machine here too."""
    with collecting() as collector, running_run(tmp_path / "r1") as writer:
        sender = exporter(tmp_path, collector.url, mask=("re:Rank",))
        report = end(tmp_path / "r1", writer)
        sender.poll(15.0, last=True)

    root = next(span for span in collector.spans() if span.name.startswith("run"))
    assert "Rank" in report.verdict.summary
    assert "Rank" not in attributes(root.events[0])["traceml.finding.summary"]
    assert "[masked:custom]" in attributes(root.events[0])["traceml.finding.summary"]


@pytest.mark.parametrize("status", [400, 302])
def test_an_error_of_the_collector_keeps_the_spans(tmp_path, caplog, status):
    """A refusal is tried again; then each run arrives once. A redirect would become a GET, without the spans."""
    clock = Clock()
    with collecting() as collector, running_run(tmp_path / "r1") as writer:
        sender = exporter(tmp_path, collector.url, clock)
        collector.status = status
        end(tmp_path / "r1", writer)
        sender.poll(15.0)
        assert collector.spans() == []
        assert ("it redirects: set the address" in caplog.text) is (status == 302)
        collector.status = 200
        clock.now_s += 1000
        sender.poll(15.0)

    assert len([span for span in collector.spans() if span.name.startswith("run")]) == 1


def test_a_name_in_the_environment_counts(tmp_path, monkeypatch):
    """OTEL_SERVICE_NAME is the name of the service."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-cluster")
    with collecting() as collector, running_run(tmp_path / "r1"):
        assert isinstance(collector, Collector)
        exporter(tmp_path, collector.url).poll(15.0)

    assert attributes(collector.metrics[0].resource_metrics[0].resource)["service.name"] == "my-cluster"
