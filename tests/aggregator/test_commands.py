"""Commands of clients, when carrying one out fails, and what an agent reports of a rank that nobody else knows."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tests.aggregator.test_registry import hello, join, registry  # noqa: F401
from traceml.aggregator.commands import Commands
from traceml.aggregator.registry import Registry
from traceml.aggregator.silent_ranks.silent_ranks import SilentRanks
from traceml.database.snapshots.rank_snapshot import RankSnapshot
from traceml.diagnosis.kinds import Kind
from traceml.fail_open import failures


class BrokenAggregator:
    """An aggregator that cannot say how it is."""

    def statistics(self) -> dict[str, Any]:
        raise ZeroDivisionError("no runs")


class Client:
    """The connection of a client."""

    def __init__(self, run: str = "") -> None:
        self.sent: list[dict[str, Any]] = []
        self.hello = SimpleNamespace(run=run)

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


def test_an_error_of_ours_is_the_answer_and_is_counted() -> None:
    """The aggregator goes on."""
    before = failures().get("aggregator", 0)
    client: Any = Client()
    aggregator: Any = BrokenAggregator()

    asyncio.run(Commands(aggregator).run(client, {"id": 5, "name": "status"}))

    assert client.sent == [{"t": "reply", "id": 5, "error": "internal error: ZeroDivisionError('no runs')"}]
    assert failures()["aggregator"] == before + 1


def test_ranks_of_another_host_hang_before_any_has_connected(registry: Registry) -> None:  # noqa: F811
    """C code took the GIL before their recorders came to it: flight files say how many ranks, and when it hangs."""
    run = registry.begin("a-run", "job", named=True)
    client: Any = Client("job")
    aggregator: Any = SimpleNamespace(registry=registry)
    job = {"attempt": 0, "world_size": 2, "hang_timeout_s": 8.0, "on_hang": "abort"}
    for rank in range(2):
        snapshot = RankSnapshot(
            at_ns=10**11 + rank, rank=rank, pid=7 + rank, quiet_s=9.0, step=-1, in_step=False, phase="startup",
            answered="kernel", process_state="S",
        )  # fmt: skip
        args = {"host": "b", "rank": rank, "pid": 7 + rank, "snapshot": snapshot.to_row(), "job": job}
        asyncio.run(Commands(aggregator).run(client, {"id": rank, "name": "snapshot_from_outside", "args": args}))

    progress, silent = run.live.facts_builder.progress, SilentRanks(run, lambda _: None)
    found = run.live.final_findings("running")[0]
    assert client.sent == [{"t": "reply", "id": 0}, {"t": "reply", "id": 1}]
    assert (run.world_size, progress.timeout_s, progress.aborts, silent.has_absent) == (2, 8.0, True, True)
    assert (found.kind, found.ranks) == (Kind.HANG, (0, 1))

    for rank in range(2):
        join(registry, hello(rank, 2))

    assert not silent.has_absent
