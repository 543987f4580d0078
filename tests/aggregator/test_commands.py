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


def test_a_rank_of_another_host_hangs_before_any_has_connected(registry: Registry) -> None:  # noqa: F811
    """C code took the GIL before its recorder came to it: its flight file says how many ranks, and when it hangs."""
    run = registry.begin("a-run", "job", named=True)
    client: Any = Client("job")
    aggregator: Any = SimpleNamespace(registry=registry)
    snapshot = RankSnapshot(
        at_ns=100 * 10**9, rank=1, pid=7, quiet_s=9.0, step=-1, in_step=False, phase="startup", answered="kernel",
        process_state="S",
    )  # fmt: skip
    job = {"attempt": 0, "world_size": 2, "hang_timeout_s": 8.0, "on_hang": "abort"}
    args = {"host": "b", "rank": 1, "pid": 7, "snapshot": snapshot.to_row(), "job": job}

    asyncio.run(Commands(aggregator).run(client, {"id": 1, "name": "snapshot_from_outside", "args": args}))

    progress, silent = run.live.facts_builder.progress, SilentRanks(run, lambda _: None)
    assert client.sent == [{"t": "reply", "id": 1}]
    assert (run.world_size, progress.timeout_s, progress.aborts, silent.has_absent) == (2, 8.0, True, True)
    assert run.live.final_findings("stopped")[0].kind is Kind.HANG

    join(registry, hello(1, 2))
    assert not silent.has_absent
