"""Fabricated reports in the shape of `traceml.report/1`."""

from __future__ import annotations

from typing import Any

import msgspec

from traceml.diagnosis.findings import Finding
from traceml.runs.report.report_types import Report, TelemetrySection

PHASES = ("input_wait", "h2d", "forward", "backward", "optimizer", "comm", "checkpoint", "other")
WAIT = "Profile rank 1's forward pass; compare its input sizes and its host's load with rank 0's."


def finding(kind: str = "HEALTHY", **over: Any) -> Finding:
    base: dict[str, Any] = {
        "kind": kind,
        "severity": "info",
        "ranks": [],
        "phase": None,
        "summary": "No phase and no rank stands out over 1,000 steps of 5.61 ms.",
        "next": "Nothing to do; compare with a later run by `traceml report`.",
        "evidence": {},
        "cost_share": 0.0,
        "speedup_if_fixed": 1.0,
    }
    return Finding.from_dict({**base, **over})


def straggler(**over: Any) -> Finding:
    known: dict[str, Any] = {
        "severity": "critical",
        "ranks": [1],
        "phase": "forward",
        "summary": "Rank 1 spends 20.4 ms of each step in forward, the others 0.55 ms; they wait 19.9 ms for it.",
        "next": WAIT,
        "cost_share": 0.787,
        "speedup_if_fixed": 4.69,
    }
    return finding("COMPUTE_STRAGGLER", **{**known, **over})


def time_of(wall_s: float, **parts: float) -> dict[str, Any]:
    """Return the section on a run's wall time."""
    listed = [{"part": part, "seconds": seconds, "share": seconds / wall_s} for part, seconds in parts.items()]
    return {"wall_s": wall_s, "parts": listed, "goodput": 0.6}


def report(
    rank_times: list[dict[str, float]],
    verdict: Finding | None = None,
    *,
    state: str = "finished",
    others: tuple[Finding, ...] = (),
    exits: dict[int, dict[str, Any]] | None = None,
    lost: int = 0,
    cuda: bool = False,
) -> Report:
    """Return the report of a run whose ranks spend these milliseconds in phases."""
    verdict = verdict or finding()
    exits = exits or {}
    totals = [sum(times.values()) for times in rank_times]
    mean = sum(totals) / max(len(totals), 1)
    names = [name for name in PHASES if any(name in times for times in rank_times)]
    names += sorted({name for times in rank_times for name in times} - set(PHASES))
    phases = []
    for name in names:
        values = [times.get(name, 0.0) for times in rank_times]
        phases.append(
            {
                "phase": name,
                "mean_ms": sum(values) / len(values),
                "share": sum(values) / len(values) / mean,
                "by_rank": [{"rank": rank, "mean_ms": value} for rank, value in enumerate(values)],
            }
        )

    data = {
        "schema": "traceml.report/1",
        "traceml_version": "0.1.0",
        "run": {
            "id": "20250102-030405-train-1a2b",
            "name": "train",
            "project": "default",
            "attempt": 0,
            "started": 1735787045.0,
            "ended": 1735787072.4,
            "duration_s": 27.4,
            "state": state,
            "world_size": max(len(rank_times), 1),
            "hosts": ["node1"],
            "command": "train.py --epochs 3",
        },
        "verdict": verdict.to_dict(),
        "time": time_of(27.4, startup=6.1, steps=18.3, evaluation=1.4, between_epochs=0.5, idle=1.1),
        "findings": [each.to_dict() for each in (verdict, *others)],
        "steps": {
            "count": 1000 if rank_times else 0,
            "mean_ms": mean if rank_times else None,
            "p50_ms": mean * 0.99 if rank_times else None,
            "p95_ms": mean * 1.1 if rank_times else None,
            "p99_ms": mean * 1.3 if rank_times else None,
            "per_second": 1000 / mean if rank_times else None,
        },
        "phases": phases,
        "ranks": [
            {"rank": rank, "host": "node1", "pid": 4000 + rank, "steps": 1000, "state": state, **exits.get(rank, {})}
            for rank in range(len(rank_times))
        ],
        "memory": {
            "by_rank": [
                {
                    "rank": rank,
                    "rss_peak_bytes": (412 + rank) << 20,
                    "rss_slope_bytes_per_step": 0.0,
                    "cuda_peak_bytes": (9 << 30) if cuda else None,
                }
                for rank in range(len(rank_times))
            ]
        },
        "system": {"hosts": []},
        "metrics": {},
        "trackers": [],
        "telemetry": {
            "rows_appended": 8012,
            "rows_stored": 8012 - lost,
            "rows_lost": lost,
            "overhead_us_per_step": 5.13,
            "overhead_share": 0.0002,
            "bytes_sent": 861_000,
        },
    }
    return msgspec.convert(data, Report)


def healthy() -> Report:
    times = {"input_wait": 0.12, "forward": 1.56, "backward": 2.2, "optimizer": 1.08, "other": 0.15}
    return with_data(report([times], finding(severity="info")), samples=16.0, tokens=16_384.0)


def with_data(made: Report, *, samples: float, tokens: float | None = None, ranks: int | None = None) -> Report:
    """Return the report with the samples and tokens of a mean step, of some or all ranks."""
    made.steps.samples_per_step, made.steps.tokens_per_step = samples, tokens
    made.steps.data_ranks = len(made.ranks) if ranks is None else ranks
    made.steps.set_rate(made.steps.per_second)
    return made


def slow_rank() -> Report:
    fast = {"input_wait": 0.12, "forward": 0.55, "backward": 0.91, "optimizer": 1.08, "comm": 21.9, "other": 0.17}
    slow = {"input_wait": 0.12, "forward": 20.4, "backward": 0.87, "optimizer": 1.08, "comm": 1.75, "other": 0.35}
    other = finding("JITTER", severity="warning", cost_share=0.11, summary="x", next="y")
    return with_data(report([fast, slow], straggler(), others=(other,)), samples=64.0)


def killed_rank() -> Report:
    times = {"input_wait": 0.12, "forward": 1.56, "backward": 2.2, "optimizer": 1.08, "comm": 0.4, "other": 0.15}
    left = {"code": None, "signal": 9, "exception": None, "last_step": 36, "open_phase": "forward", "stack": None}
    lost = finding(
        "RANK_LOST",
        severity="critical",
        ranks=[1],
        phase="forward",
        summary="Rank 1 (pid 4001 on node1) was killed by SIGKILL in step 37, in forward.",
        next="Look for the kernel's out-of-memory killer on node1: journalctl -k | grep -i oom.",
        evidence={"signal": 9, "step": 37, "last_step": 36},
    )
    return report([times, times], lost, state="failed", exits={1: {"state": "killed", "exit": left}}, lost=120)


def thousand_ranks() -> Report:
    ranks = []
    for rank in range(1000):
        slow = 10.0 if rank == 617 else 0.0
        wait = 10.0 - slow + (rank % 7) * 0.1
        ranks.append({"input_wait": 0.4, "forward": 5.0 + slow, "backward": 9.0, "optimizer": 1.0, "comm": wait})

    summary = "Rank 617 spends 15 ms of each step in forward, the others 5 ms; they wait 10 ms for it."
    blame = straggler(ranks=[617], cost_share=0.39, speedup_if_fixed=1.64, summary=summary)
    return with_data(report(ranks, blame, state="running", cuda=True), samples=256_000.0, ranks=500)


def too_early() -> Report:
    missing = finding("INSUFFICIENT_DATA", summary="No step has ended yet.", next="Let it run for 20 steps or more.")
    made = report([], missing, state="running")
    made.telemetry = TelemetrySection()
    return made


REPORTS = {
    "healthy": healthy,
    "slow_rank": slow_rank,
    "killed_rank": killed_rank,
    "thousand_ranks": thousand_ranks,
    "too_early": too_early,
}
