"""Reports of fabricated runs on many hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.runs.report.report_types import (
    SCHEMA,
    PhaseSection,
    RankMean,
    RankSection,
    Report,
    RunSection,
    SetupSection,
    StepsSection,
)

__all__ = ["DAY", "PHASES_MS", "STARTED", "fleet_report"]

DAY = 86_400.0
STARTED = 1_760_000_000.0
PHASES_MS = {"input_wait": 4.0, "forward": 30.0, "backward": 60.0, "comm": 10.0, "optimizer": 6.0}


def fleet_report(
    number: int,
    hosts: Sequence[str] = ("h0",),
    *,
    random: np.random.Generator | None = None,
    slow: Mapping[str, float] | None = None,
    factors: Mapping[str, float] | None = None,
    ranks_per_host: int = 2,
    steps: int = 500,
    batch_size: int = 32,
    noise: float = 0.01,
    **run: Any,
) -> Report:
    """Return the report of a run that started on a day of its own.

    Args:
        number: of the run, which is also its day.
        hosts: its hosts, rank 0 on the first.
        random: source of the noise of each rank and phase; without it there is none.
        slow: host -> factor of its forward.
        factors: phase -> factor on all ranks.
        ranks_per_host, steps, batch_size: of the run.
        noise: deviation of each time, as a share.
        run: other facts of the run.
    """
    verdict = Finding(kind=Kind.HEALTHY, severity=Severity.INFO, summary="", next="")
    of_rank = [host for host in hosts for _ in range(ranks_per_host)]
    phases = []
    for name, ms in PHASES_MS.items():
        means = [
            ms
            * (factors or {}).get(name, 1.0)
            * ((slow or {}).get(host, 1.0) if name == "forward" else 1.0)
            * (1.0 if random is None else random.normal(1.0, noise))
            for host in of_rank
        ]
        by_rank = [RankMean(rank, mean) for rank, mean in enumerate(means)]
        phases.append(PhaseSection(phase=name, mean_ms=float(np.mean(means)), share=0.2, by_rank=by_rank))

    started = STARTED + number * DAY
    facts = {"id": f"run-{number:04}", "name": "train", "project": "vision", "state": "finished", "started": started}
    return Report(
        schema=SCHEMA,
        run=RunSection(
            **{
                **facts,
                "ended": started + 60,
                "duration_s": 60.0,
                "command": "/home/me/train.py --lr 1",
                "world_size": len(of_rank),
                **run,
            }
        ),
        verdict=verdict,
        findings=[verdict],
        steps=StepsSection(count=steps, mean_ms=sum(phase.mean_ms for phase in phases)),
        phases=phases,
        ranks=[RankSection(rank=rank, host=host) for rank, host in enumerate(of_rank)],
        setup=SetupSection(model={"model": "ResNet", "parameters": 1000, "device": "cuda:0"}, batch_size=batch_size),
    )
