"""The report's section on trackers."""

from __future__ import annotations

from pathlib import Path

from traceml.database.schema import METRICS
from traceml.database.store.reader import StoreReader
from traceml.runs.report.report_types import TrackerSection
from traceml.track.delivery.delivery_plan import DeliveryPlan
from traceml.track.delivery.record_reader import logged_rows
from traceml.track.tracker_state import FAILING_PHASES, DeliveryPhase, TrackerState, states_of

__all__ = ["trackers"]


def trackers(run_dir: Path, reader: StoreReader | None = None) -> list[TrackerSection]:
    """Return the report's section on trackers.

    Args:
        reader: its store, to count the pending rows and to find trackers that never wrote a state; without one
            neither is known.
    """
    states = {state.backend: state for state in states_of(run_dir)}
    logged = None
    if reader is not None and METRICS.name in reader.tables:
        logged = logged_rows(reader)
        # One that cannot write its state has everything pending.
        plan = DeliveryPlan(reader, run_dir)
        plan.refresh()
        states = {name: TrackerState(name) for name in plan.backends()} | states
        if any(state.phase is DeliveryPhase.STARTING for state in states.values()):
            _mark_unknown(states, plan.unknown_backends())

    return [_tracker(states[name], logged) for name in sorted(states)]


def _mark_unknown(states: dict[str, TrackerState], unknown: dict[str, str]) -> None:
    """Mark the deliveries to trackers that do not exist: their processes have not come so far yet, and never will."""
    for name, why in unknown.items():
        if states[name].phase is DeliveryPhase.STARTING:
            states[name].phase, states[name].error = DeliveryPhase.BROKEN, f"PluginError: {why}"


def _tracker(state: TrackerState, logged: int | None) -> TrackerSection:
    return TrackerSection(
        backend=state.backend,
        state=str(DeliveryPhase.STOPPED if state.was_cut_off else state.phase),
        delivered=state.delivered,
        pending=state.pending(logged) if logged is not None else None,
        failed=state.failed,
        filtered=state.filtered,
        fallback=state.fallback,
        derived=state.derived,
        masked=state.masked,
        latency_ms=None if state.latency_ms is None else round(state.latency_ms, 3),
        target=state.target,
        urls=[each["url"] for each in state.experiments.values() if each.get("url")],
        error=state.error if state.phase in FAILING_PHASES | {DeliveryPhase.STOPPED} else "",
        reasons=dict(state.reasons),
    )
