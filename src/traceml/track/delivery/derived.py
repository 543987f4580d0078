"""Values derived from the run for trackers: step time, phase shares, goodput, hosts and devices.

A pure function of the store's frames in their order. State between frames is stored with the cursor, so a frame that is
read again gives the same values again, and every backend gets the same.

- `traceml/step_ms`: mean wall time of a step, over all ranks and the interval.
- `traceml/steps_per_s`: of the lowest rank, since its first step or the interval before.
- `traceml/samples_per_s`, `traceml/tokens_per_s`: of the whole job, at that speed, as in the report.
- `traceml/loss`: mean over the interval of the losses that were read on the lowest rank that has any.
- `traceml/share/<phase>`: share of step time, split as in the report (`diagnosis.step_split`). A step with device times
  counts in the interval in which they arrive, some steps after it.
- `traceml/goodput`: share of all wall time since the run began that the lowest rank spent in productive steps, without
  waiting for data and saving. Start-up, evaluation, time between attempts, and steps that an attempt repeats are not
  productive.
- `traceml/restarts`, `traceml/repeated_steps`, `traceml/mtbf_s`: of a restarted job: restarts so far, steps that its
  attempts repeated on the lowest rank, and its productive seconds per restart.
- `traceml/time/<part>`: share of the same wall time by part, as in the report (`diagnosis.facts.wall_parts`).
- `system/…`: means over the interval (for counters, rates), per rank that samples them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows
from traceml.database.schema import (
    DEVICE_STEPS,
    EPOCHS,
    EVALS,
    GPU,
    HOST,
    INFO,
    PHASE_LABELS,
    PROCESS,
    STEPS,
    StepFlag,
    unpack_bits,
)
from traceml.database.store.reader import Frame, StreamRecord
from traceml.diagnosis.facts.trainings.group_use import GroupUse
from traceml.diagnosis.facts.wall_parts import ProcessSums, wall_parts
from traceml.diagnosis.steps.step_split import (
    DEVICE_LABELS,
    PHASES,
    Floats,
    put_device_times,
    split_backward,
    spread_device_times,
)
from traceml.track.delivery.training_values import TRAINING_TABLES, TrainingValues
from traceml.track.plugins.metric import Metric
from traceml.track.tracker_state import DerivedState

__all__ = ["INPUT_TABLES", "DerivedMetrics"]

INPUT_TABLES = (
    STEPS.name, DEVICE_STEPS.name, EVALS.name, EPOCHS.name, HOST.name, PROCESS.name, GPU.name, *TRAINING_TABLES,
)  # fmt: skip
_KIND_DERIVED = 100
_MS, _S = 1e6, 1e9
# Device times arrive a few steps after their step; after this many steps they are lost.
_MAX_HELD_STEPS = 1024


@dataclass(frozen=True, slots=True)
class _SampledColumn:
    """Conversion of a sampled column to a value: its mean, or a counter's growth per second, times `scale`."""

    name: str
    column: str
    is_counter: bool = False
    scale: float = 1.0


_SAMPLED: dict[str, tuple[_SampledColumn, ...]] = {
    HOST.name: (
        _SampledColumn("cpu_pct", "cpu_pct"),
        _SampledColumn("memory_used_bytes", "memory_used_bytes"),
        _SampledColumn("disk_read_bytes_per_s", "disk_read_bytes", is_counter=True),
        _SampledColumn("disk_write_bytes_per_s", "disk_write_bytes", is_counter=True),
        _SampledColumn("net_recv_bytes_per_s", "net_recv_bytes", is_counter=True),
        _SampledColumn("net_sent_bytes_per_s", "net_sent_bytes", is_counter=True),
    ),
    PROCESS.name: (
        _SampledColumn("process/rss_bytes", "rss_bytes"),
        _SampledColumn("process/cpu_pct", "cpu_ns", is_counter=True, scale=100 / _S),
        _SampledColumn("process/threads", "threads"),
    ),
    GPU.name: tuple(
        _SampledColumn(name, name) for name in ("utilization_pct", "memory_used_bytes", "temperature_c", "power_w")
    ),
}
_DTYPES = {table.name: table.dtype for table in (STEPS, DEVICE_STEPS, EVALS, EPOCHS, HOST, PROCESS, GPU)}


class DerivedMetrics:
    """Computes the values of one run.

    Args:
        state: kept between frames, changed in place; plain values for JSON.
        interval_s: seconds of the run's own clock per value of a name.
        started: epoch seconds at which the run began.
        system: whether to include sampled system values.
    """

    def __init__(self, state: DerivedState, interval_s: float, started: float, *, system: bool = True) -> None:
        self._state = state
        self._interval_ns = max(int(interval_s * _S), 1)
        self._started_ns = int(started * _S)
        self._system = system
        self._training = TrainingValues(state.setdefault("training", {}))
        self._group = GroupUse(**state.get("group", {}))

    def take(self, frame: Frame, stream: StreamRecord) -> list[Metric]:
        """Take a frame of one of the tables `INPUT_TABLES`; return the values of completed intervals."""
        if frame.table == INFO.name:
            self._take_group(frame)
        if frame.table in TRAINING_TABLES:
            self._training.take(frame, stream)
            return []

        rows = np.frombuffer(frame.data, _DTYPES[frame.table])
        offset_ns = _epoch_offset_ns(stream)
        if frame.table == STEPS.name:
            return list(self._take_steps(stream, rows, rows["t_end_ns"] + offset_ns))
        if frame.table == DEVICE_STEPS.name:
            self._take_device_steps(stream, rows)
            return []
        if frame.table in (EVALS.name, EPOCHS.name):
            self._add_time(frame.table, stream, rows, rows["t_end_ns"] + offset_ns)
            return []
        if not self._system:
            return []

        return list(self._take_samples(frame.table, stream.rank, rows, rows["t_ns"] + offset_ns))

    def finish(self) -> list[Metric]:
        """Close the open intervals and return their values."""
        for held in self._state.pop("held", {}).values():
            self._add_times(_decoded(held))

        rows = list(self._close_steps(last=True))
        for key in list(self._state.get("samples", {})):
            rows += self._close_samples(key)

        return rows

    # --- steps -------------------------------------------------------------------------------------------------------

    def _take_steps(self, stream: StreamRecord, rows: NDArray[np.void], ends_ns: NDArray[np.int64]) -> Iterator[Metric]:
        interval = ends_ns // self._interval_ns
        for number in np.unique(interval).tolist():
            is_open = self._state.get("interval")
            if is_open is not None and number > is_open["number"]:
                yield from self._close_steps()

            chosen = interval == number
            self._add_time(STEPS.name, stream, rows[chosen], ends_ns[chosen])
            self._add_steps(int(number), stream, rows[chosen], ends_ns[chosen])
            has_device = unpack_bits(rows["bits"]).flags & StepFlag.DEVICE > 0
            self._add_times(rows[chosen & ~has_device])
            self._hold(stream, rows[chosen & has_device])

    def _take_group(self, frame: Frame) -> None:
        for row in frame.maps():
            self._group.info(row)

        self._state["group"] = asdict(self._group)

    def _add_steps(self, number: int, stream: StreamRecord, rows: NDArray[np.void], ends_ns: NDArray[np.int64]) -> None:
        state, rank = self._state, stream.rank
        first_ns = int(ends_ns[0]) - int(rows["total_ns"][0])
        began = min(self._started_ns, first_ns)  # it may have stepped before the run existed: it starts the aggregator
        lead = state.setdefault("lead", {"rank": rank, "began": began, "t": first_ns, "productive": 0, "step": -1})
        state.setdefault("step_of", {})[str(rank)] = int(rows["step"][-1])
        state["ranks"] = max(state.get("ranks", 0), int(stream.facts.get("world_size", 0)), len(state["step_of"]))
        if rank < lead["rank"]:
            lead["rank"] = rank

        steps = state.setdefault("interval", {"number": number, "n": 0, "total": 0, "lead": 0, "split": {}})
        steps["n"] += len(rows)
        steps["total"] += int(rows["total_ns"].sum())
        self._training.take_steps(rank, rows)
        self._group.steps(rows)
        state["group"] = asdict(self._group)
        if rank != lead["rank"]:
            return

        numbers = rows["step"] + self._resumes_at(stream, int(rows["step"][0]))
        new = rows[numbers > lead["step"]]
        lead["productive"] += int((new["total_ns"] - new["input_wait_ns"] - new["checkpoint_ns"]).sum())
        lead["step"] = max(lead["step"], int(numbers.max()))
        lead["restarts"] = max(lead.get("restarts", 0), stream.attempt)
        lead["repeated"] = lead.get("repeated", 0) + len(rows) - len(new)
        steps["lead"] += len(rows)
        steps["t"] = int(ends_ns[-1])

    def _resumes_at(self, stream: StreamRecord, first: int) -> int:
        """Return the steps before those of a process that counts its own from 0."""
        known = self._state.setdefault("resumes_at", {})
        return int(known.setdefault(str(stream.id), 0 if first else int(stream.facts.get("resumes_at", 0))))

    def _close_steps(self, *, last: bool = False) -> Iterator[Metric]:
        steps, lead = self._state.pop("interval", None), self._state.get("lead")
        if steps is None or lead is None or not steps["n"]:
            return

        at_ns = steps.get("t", lead["t"])
        step, timestamp = max(lead["step"], 0), at_ns / _S
        values = {"traceml/step_ms": steps["total"] / steps["n"] / _MS}
        speed = steps["lead"] / ((at_ns - lead["t"]) / _S) if at_ns > lead["t"] else None
        if speed is not None:
            values["traceml/steps_per_s"] = speed

        values |= self._training.close(speed, step, [int(rank) for rank in self._state["step_of"]], last=last)

        grouped = self._group.is_grouped(self._state["ranks"])
        values |= {
            f"traceml/share/{name}": share
            for name, share in _shares(steps["split"], steps.get("device_split", {}), grouped).items()
        }
        if at_ns > lead["began"]:
            values["traceml/goodput"] = min(lead["productive"] / (at_ns - lead["began"]), 1.0)
            values |= self._time_shares(lead["began"], at_ns)

        if restarts := lead.get("restarts"):
            values |= {"traceml/restarts": restarts, "traceml/repeated_steps": lead["repeated"]}
            values["traceml/mtbf_s"] = lead["productive"] / _S / restarts

        lead["t"] = at_ns
        for name, value in values.items():
            yield Metric(name, value, step, timestamp, 0, _KIND_DERIVED)

    def _add_time(self, table: str, stream: StreamRecord, rows: NDArray[np.void], ends_ns: NDArray[np.int64]) -> None:
        """Add rows to the sums of the lowest rank's process."""
        time = self._state.setdefault("time", {"rank": stream.rank, "processes": {}})
        if stream.rank < time["rank"]:
            time["rank"], time["processes"] = stream.rank, {}

        if stream.rank == time["rank"] and len(rows):
            process = ProcessSums(**time["processes"].get(str(stream.id), {"attempt": stream.attempt}))
            process.add(table, rows, ends_ns)
            time["processes"][str(stream.id)] = asdict(process)

    def _time_shares(self, began_ns: int, at_ns: int) -> dict[str, float]:
        processes = [ProcessSums(**sums) for sums in self._state.get("time", {}).get("processes", {}).values()]
        parts = wall_parts([each for each in processes if each.steps], began_ns, at_ns)
        wall_s = (at_ns - began_ns) / _S
        return {f"traceml/time/{part}": min(seconds / wall_s, 1.0) for part, seconds in parts.items() if seconds > 0}

    def _take_device_steps(self, stream: StreamRecord, device: NDArray[np.void]) -> None:
        held = _decoded(self._state.get("held", {}).pop(str(stream.id), ""))
        _, host_rows, device_rows = np.intersect1d(held["step"], device["step"], return_indices=True)
        self._add_times(held[host_rows], device[device_rows])
        # Device rows arrive in the order of their steps: earlier steps without one have lost theirs.
        unmatched = np.delete(held, host_rows)
        is_lost = unmatched["step"] < device["step"][-1]
        self._add_times(unmatched[is_lost])
        self._hold(stream, unmatched[~is_lost])

    def _hold(self, stream: StreamRecord, rows: NDArray[np.void]) -> None:
        """Keep steps until their device times arrive."""
        if not len(rows):
            return

        held = self._state.setdefault("held", {})
        waiting = join_rows([_decoded(held.get(str(stream.id), "")), rows])
        held[str(stream.id)] = base64.b64encode(waiting[-_MAX_HELD_STEPS:].tobytes()).decode()
        self._add_times(waiting[:-_MAX_HELD_STEPS])

    def _add_times(self, rows: NDArray[np.void], device: NDArray[np.void] | None = None) -> None:
        """Add the phases of steps to the open interval, with their device times where they have any."""
        steps = self._state.get("interval")
        if steps is None or not len(rows):
            return

        total = rows["total_ns"] if device is None else device["total_ns"]
        times = {name: rows[f"{name}_ns"].astype(np.float64) for name in PHASE_LABELS}
        own = np.where(rows["backward_own_ns"] < 0, np.nan, rows["backward_own_ns"])
        if device is not None:
            values = {name: device[f"{name}_ns"] for name in (*DEVICE_LABELS, "backward_own")}
            put_device_times(times, own, total, values, np.ones(len(rows), bool))

        times["other"] = np.maximum(total - sum(times.values()), 0)
        own = np.minimum(own, times["backward"])[~np.isnan(own)]
        new = {
            "steps": len(rows),
            "measured": len(own),
            "own": float(own.sum()),
            "total": float(total.sum()),
        }
        new |= {name: float(values.sum()) for name, values in times.items()}
        clock = "split" if device is None else "device_split"
        steps[clock] = {name: steps.get(clock, {}).get(name, 0) + value for name, value in new.items()}

    # --- samples -----------------------------------------------------------------------------------------------------

    def _take_samples(
        self, table: str, rank: int, rows: NDArray[np.void], times_ns: NDArray[np.int64]
    ) -> Iterator[Metric]:
        columns = _SAMPLED[table]
        for row, t_ns in zip(rows, times_ns.tolist(), strict=True):
            index = int(row["index"]) if table == GPU.name else 0
            key, number = f"{table}/{rank}/{index}", t_ns // self._interval_ns
            window = self._state.setdefault("samples", {}).get(key)
            if window is not None and number > window["window"]:
                yield from self._close_samples(key)
                window = None

            values = [float(row[column.column]) for column in columns]
            if window is None:
                before = self._state.setdefault("counters", {}).get(key, [t_ns, *values])
                window = {"window": number, "n": 0, "sums": [0.0] * len(values), "before": before}
                self._state["samples"][key] = window

            window["n"] += 1
            window["sums"] = [total + value for total, value in zip(window["sums"], values, strict=True)]
            window["last"] = [t_ns, *values]

    def _close_samples(self, key: str) -> Iterator[Metric]:
        window = self._state["samples"].pop(key)
        table, rank, index = key.split("/")
        self._state["counters"][key] = window["last"]
        t_ns = window["last"][0]
        passed_s = (t_ns - window["before"][0]) / _S
        # Without steps, intervals are counted.
        step = self._state.get("step_of", {}).get(rank, max(t_ns - self._started_ns, 0) // self._interval_ns)
        prefix = f"system/gpu{index}" if table == GPU.name else "system"
        for at, column in enumerate(_SAMPLED[table]):
            if column.is_counter and passed_s <= 0:
                continue

            grown = window["last"][at + 1] - window["before"][at + 1]
            value = grown / passed_s if column.is_counter else window["sums"][at] / window["n"]
            yield Metric(f"{prefix}/{column.name}", value * column.scale, step, t_ns / _S, int(rank), _KIND_DERIVED)


def _shares(cpu: dict[str, float], device: dict[str, float], grouped: bool) -> dict[str, float]:
    """Return the shares of step time of the phases that occur.

    Args:
        cpu: sums of the steps without device times.
        device: sums of the steps with device times.
        grouped: whether the ranks wait for each other.
    """
    known = device or cpu
    if not known:
        return {}

    times = {name: np.array([device.get(name, 0.0), cpu.get(name, 0.0)]) for name in PHASES}
    if device and cpu:
        _put_device_means(times, cpu, device)

    own_mean = np.array(known["own"] / known["measured"] if known["measured"] else np.nan)
    whole = {name: values.sum() for name, values in times.items()}
    count = int(cpu.get("steps", 0) + device.get("steps", 0))
    split = split_backward(whole, own_mean, count, grouped=grouped)
    total = float(sum(split.values()))
    return {name: float(time) / total for name, time in split.items() if time > 0}


def _put_device_means(times: dict[str, Floats], cpu: dict[str, float], device: dict[str, float]) -> None:
    """Give the steps without device times, the second cell, the means of those with, the first cell."""
    total, steps = (np.array([device[name], cpu[name]]) for name in ("total", "steps"))
    measured = {name: times[name] * [1, 0] for name in DEVICE_LABELS}
    spread = spread_device_times(measured, total, steps, steps * [1, 0])
    host = {name: times[name] for name in PHASE_LABELS}
    put_device_times(host, np.zeros(2), total, {**spread, "backward_own": np.zeros(2)}, np.array([False, True]))
    times["other"][1] = max(cpu["total"] - sum(values[1] for values in host.values()), 0)


def _decoded(rows: str) -> NDArray[np.void]:
    return np.frombuffer(base64.b64decode(rows), STEPS.dtype)


def _epoch_offset_ns(stream: StreamRecord) -> int:
    """Return the offset from a stream's monotonic clock to epoch nanoseconds."""
    clock = stream.facts.get("clock") or (0, 0)
    return int(clock[1]) - int(clock[0])
