"""Metrics and spans of an aggregator's runs, sent to an OpenTelemetry collector by OTLP over HTTP.

The collector may be down: metrics are sent at the next interval, spans of ended runs are kept and tried again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import StatusCode, set_span_in_context
from requests import Response, Session

from traceml.database.states import ENDED_BADLY, RunStatus
from traceml.display.monitoring.active_runs import ActiveRuns, is_store_of
from traceml.errors import StoreError
from traceml.privacy.masker import Masker
from traceml.renderers.monitoring_metrics import Instrument, Instruments
from traceml.renderers.monitoring_readings import Reading
from traceml.run_folder import REPORT_NAME
from traceml.runs.export.run_spans import RunSpan, run_spans
from traceml.runs.find import RunInfo
from traceml.runs.report.report import written_report
from traceml.runs.report.report_types import Report
from traceml.version import __version__

__all__ = ["OtlpConfig", "OtlpExporter"]

_POLL_S = 5.0
_INTERVAL_S = 15.0
_LONGEST_PAUSE_S = 300.0
_MAX_PENDING = 100  # ended runs whose spans wait for the collector

_log = logging.getLogger("traceml")


@dataclass(frozen=True, kw_only=True)
class OtlpConfig:
    """Configuration of the exporter."""

    runs_dir: Path
    owner: int  # process id of the aggregator whose runs are sent
    endpoint: str | None = None  # base URL of the collector; None: that of the OTEL_EXPORTER_OTLP_ variables
    mask: tuple[str, ...] = ()  # the setting `mask`, for texts of findings
    timeout_s: float = 5.0  # of one request with its retries

    def url(self, signal: str) -> str | None:
        """Return the address for `metrics` or `traces`; None: the exporter reads the variables."""
        return None if self.endpoint is None else f"{self.endpoint.rstrip('/')}/v1/{signal}"


class OtlpExporter:
    """Sends the metrics of running runs at intervals, and the spans of a run when it has ended."""

    def __init__(self, config: OtlpConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._runs = ActiveRuns(config.runs_dir, owner=config.owner)
        self._masker = Masker(config.mask)
        self._resource = Resource.create({} if _named() else {"service.name": "traceml"})
        self._readings: list[Reading] = []
        self._reader = InMemoryMetricReader()
        self._provider = MeterProvider([self._reader], self._resource, shutdown_on_exit=False)
        session, self._redirects = self._session(), False
        self._metrics = OTLPMetricExporter(endpoint=config.url("metrics"), timeout=config.timeout_s, session=session)
        self._spans = OTLPSpanExporter(endpoint=config.url("traces"), timeout=config.timeout_s, session=session)
        self._pending: deque[tuple[ReadableSpan, ...]] = deque(maxlen=_MAX_PENDING)
        self._known: set[str] = set()
        self._due_s = self._retry_s = 0.0
        self._pause_s = _INTERVAL_S
        self._failing = False
        self._began_s = time.time()
        self._declare()

    def run(self, wait: Callable[[float], bool]) -> None:
        """Export until asked to end, then once more.

        Args:
            wait: waits some seconds; returns True at the end.
        """
        interval_s = _interval_s()
        while not wait(min(_POLL_S, interval_s)):
            self.poll(interval_s)

        self.poll(0.0, last=True)

    def poll(self, interval_s: float, *, last: bool = False) -> None:
        """Send metrics if they are due, and the spans of runs that have ended.

        Args:
            interval_s: between two exports of metrics.
            last: whether this is the last call: then nothing waits for a better time.
        """
        now_s = self._clock()
        snapshot = self._runs.snapshot(fresh=last) if now_s >= self._due_s else None
        if snapshot is not None:
            self._readings = [each for each in snapshot.readings() if each.instrument.labels[:1] == ("run",)]
            if self._readings:
                self._due_s = now_s + interval_s
                self._send_metrics()

        for info in self._runs.infos() if snapshot is None else snapshot.infos:
            if info.state == RunStatus.RUNNING:
                self._known.discard(info.id)  # a job that was started again continues it
            elif info.id not in self._known:
                self._take_ended(info, last=last)

        if self._pending and (last or now_s >= self._retry_s):
            self._send_spans()

    def _session(self) -> Session | None:
        """Return a session for which a redirect is an error: the exporters take it for success, or send a GET.

        None where a provider of credentials makes the session, by OpenTelemetry's variables.
        """
        if any(name.endswith("_CREDENTIAL_PROVIDER") for name in os.environ):
            return None

        def refuse_redirect(response: Response, **_: object) -> None:
            if response.is_redirect:
                self._redirects, response.status_code = True, HTTPStatus.MISDIRECTED_REQUEST

        session = Session()
        session.hooks["response"].append(refuse_redirect)
        return session

    def _declare(self) -> None:
        meter = self._provider.get_meter("traceml", __version__)
        for instrument in Instruments.all():
            make = meter.create_observable_counter if instrument.counter else meter.create_observable_gauge
            observe = partial(self._observe, instrument)
            make(instrument.otel_name, [observe], unit=instrument.unit.ucum, description=instrument.help)

    def _observe(self, instrument: Instrument, _: CallbackOptions) -> Iterator[Observation]:
        for each in self._readings:
            if each.instrument is instrument:
                yield Observation(each.value, dict(zip(instrument.labels, each.labels, strict=True)))

    def _send_metrics(self) -> None:
        data = self._reader.get_metrics_data()
        if data is not None:
            self._log_change(self._metrics.export(data) is MetricExportResult.SUCCESS)

    def _send_spans(self) -> None:
        """Send the spans of ended runs, the oldest first; at a failure the rest waits, longer each time."""
        while self._pending:
            accepted = self._spans.export(self._pending[0]) is SpanExportResult.SUCCESS
            self._log_change(accepted)
            if not accepted:
                self._retry_s = self._clock() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                return

            self._pending.popleft()
            self._pause_s = _INTERVAL_S

    def _log_change(self, accepted: bool) -> None:
        """Log a change: a collector that is down for hours is one line."""
        if accepted is self._failing:
            self._failing = not accepted
            where = self._config.endpoint or "the address in OTEL_EXPORTER_OTLP_ENDPOINT"
            state = "accepts data again" if accepted else "accepts nothing; it is tried again, training is not affected"
            remedy = "; it redirects: set the address that it leads to" if self._redirects and not accepted else ""
            _log.warning("the OpenTelemetry collector at %s %s%s", where, state, remedy)

    def _take_ended(self, info: RunInfo, *, last: bool) -> None:
        """Keep the spans of a run of our aggregator; before its report is written only at the end."""
        if not (info.path / REPORT_NAME).is_file() and not last:
            return

        self._known.add(info.id)
        try:
            if not self._is_ours(info):
                return

            report = written_report(info.path)
            spans = run_spans(info.path, report)
        except StoreError as error:
            _log.warning("the spans of %s are missing: %s", info.id, error)
            return

        if len(self._pending) == _MAX_PENDING:
            _log.warning("the spans of the oldest of %d runs are dropped: no collector took them", _MAX_PENDING)

        if spans:
            self._pending.append(self._made(report, spans))

    def _is_ours(self, info: RunInfo) -> bool:
        ended_s = (info.started or 0.0) + (info.duration_s or 0.0)
        if ended_s < self._began_s - _POLL_S:
            return False

        return is_store_of(info.path, self._config.owner)

    def _made(self, report: Report, spans: Iterable[RunSpan]) -> tuple[ReadableSpan, ...]:
        """Return spans of the SDK; a run has the same ids each time, so that sending it again makes no second run."""
        ids, kept = _RunIds(report.run.id), InMemorySpanExporter()
        provider = TracerProvider(resource=self._resource, id_generator=ids, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(kept))
        tracer = provider.get_tracer("traceml", __version__)
        made: dict[str | None, Any] = {}
        for span in spans:
            ids.key = span.key
            around = set_span_in_context(made[span.parent]) if span.parent else None
            made[span.key] = tracer.start_span(span.name, around, attributes=span.attributes, start_time=span.start_ns)
            if span.parent is None:
                self._describe(made[span.key], report, span.end_ns)

            made[span.key].end(span.end_ns)

        return tuple(kept.get_finished_spans())

    def _describe(self, root: Any, report: Report, at_ns: int) -> None:
        """Add the findings as events, and the outcome as the status."""
        for finding in report.findings:
            facts: dict[str, Any] = {
                "traceml.finding.kind": finding.kind.value,
                "traceml.finding.severity": finding.severity.value,
                "traceml.finding.summary": self._masker.mask_text(finding.summary),
                "traceml.finding.next": self._masker.mask_text(finding.next),
                "traceml.finding.cost_ratio": finding.cost_share,
                "traceml.finding.ranks": list(finding.ranks),
            }
            phase = {} if finding.phase is None else {"traceml.finding.phase": finding.phase}
            root.add_event("traceml.finding", {**facts, **phase}, at_ns)

        if report.run.state in ENDED_BADLY:
            root.set_status(StatusCode.ERROR, f"the run is {report.run.state}")


class _RunIds(IdGenerator):  # type: ignore[misc]  # types are checked without OpenTelemetry
    """Ids of spans from the run's id and the span's key."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self.key = ""

    def generate_trace_id(self) -> int:
        """Return 128 bits."""
        return self._number("", 16)

    def generate_span_id(self) -> int:
        """Return 64 bits."""
        return self._number(self.key, 8)

    def _number(self, key: str, size: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self._run_id}\0{key}".encode(), digest_size=size).digest()) or 1


def _named() -> bool:
    """Return whether the environment names the service."""
    return bool(os.environ.get("OTEL_SERVICE_NAME")) or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )


def _interval_s() -> float:
    """Return the seconds between two exports of metrics, by OpenTelemetry's variable."""
    try:
        return max(float(os.environ.get("OTEL_METRIC_EXPORT_INTERVAL", "")) / 1e3, 1.0)
    except ValueError:
        return _INTERVAL_S
