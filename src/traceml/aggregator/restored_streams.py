"""Streams of a run that an earlier aggregator began, from its store."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from traceml.aggregator.streams import Incarnation, Stream, StreamState
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter

__all__ = ["restored_streams"]


def restored_streams(reader: StoreReader, store: StoreWriter) -> Iterator[Stream]:
    """Yield the streams of a store as they were, disconnected."""
    names: defaultdict[int, dict[int, str]] = defaultdict(dict)
    for number, row in reader.log_rows("names"):
        names[number][row["id"]] = row["name"]

    exits: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for number, row in reader.log_rows("info"):
        if row.get("kind") == "exit":
            exits[number] |= {key: value for key, value in row.items() if key not in ("kind", "t_ns")}

    for record in reader.streams():
        facts, identity = record.facts, record.identity
        incarnation = Incarnation(identity.host, facts.get("boot_id", ""), identity.pid, identity.start_ticks,
                          identity.recorder)  # fmt: skip
        stream = Stream(record.id, identity.rank, identity.attempt, incarnation, flight=facts.get("flight", ""))
        stream.is_helper = bool(facts.get("helps"))
        stream.is_relayed = bool(facts.get("relayed"))
        stream.resumes_at = int(facts.get("resumes_at", 0))
        stream.seen_here = bool(facts.get("seen_here")) and stream.on_this_boot
        stream.state = StreamState(record.state)
        stream.exit = facts.get("exit", {}) | exits[record.id]
        stream.disconnected_s = time.monotonic()
        stream.next = {table: store.next_seq(record.id, table) for table in reader.tables}
        stream.names = names[record.id]
        yield stream
