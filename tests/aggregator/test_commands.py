"""Commands of clients, when carrying one out fails."""

from __future__ import annotations

import asyncio
from typing import Any

from traceml.aggregator.commands import Commands
from traceml.fail_open import failures


class BrokenAggregator:
    """An aggregator that cannot say how it is."""

    def statistics(self) -> dict[str, Any]:
        raise ZeroDivisionError("no runs")


class Client:
    """The connection of a client."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

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
