"""One delivery: a run, a backend, and what the run's settings select for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from traceml.database.store.reader import StoreReader
from traceml.settings import Config
from traceml.track.delivery.audit import AuditLog
from traceml.track.delivery.delivery_plan import DeliveryPlan
from traceml.track.delivery.record_reader import RecordReader
from traceml.track.delivery.tracker_session import TrackerSession
from traceml.track.filters import DeliveryFilter
from traceml.track.tracker_state import TrackerState

__all__ = ["Delivery"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Parts that one delivery consists of."""

    run_dir: Path
    reader: StoreReader
    records: RecordReader
    plan: DeliveryPlan
    config: Config
    filters: DeliveryFilter
    session: TrackerSession
    state: TrackerState
    audit: AuditLog
