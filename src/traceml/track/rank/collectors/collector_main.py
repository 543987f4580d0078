"""The process in which collectors run, a child of a rank.

It takes what to do from its standard input, as one line of JSON, and gives rows on its standard output, as msgpack:
`{"kind": "collected", "name", "facts"}`, `{"kind": "metric", "name", "value", "step", "t_ns"}`,
`{"kind": "warning", "text"}` and, when all that read once have read, `{"kind": "once"}`. It ends with its last
collector, or when its standard input ends: with the rank, however that ends.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import msgpack

from traceml.priority import step_back
from traceml.privacy import Masker
from traceml.track.plugins.interfaces import CollectorInterface
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import load
from traceml.track.rank.collectors.readings import readings

__all__ = ["main"]

MAX_ROW_BYTES = 1 << 20
_ONCE_S = 2.0


def main() -> None:
    """Run the collectors that standard input names, until it ends."""
    given = json.loads(_first_line())
    sys.path[:] = given["path"]
    # What a collector prints must not come between the rows.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    host = _CollectorThreads(out, given)
    host.start()
    threading.Thread(target=host.join, daemon=True).start()
    # Forked children of the rank hold the pipe too, so its end alone does not tell that the rank is gone.
    rank = os.getppid()
    while os.getppid() == rank:
        if select.select([0], [], [], 1.0)[0] and not os.read(0, 4096):
            break

    os._exit(0)  # a collector that hangs holds nobody up


def _first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(0, 1 << 16)
        if not data:
            os._exit(0)

        line += data

    return line


class _CollectorThreads:
    """Runs each collector on a thread of its own: one that hangs stops no other."""

    def __init__(self, out: Any, given: Mapping[str, Any]) -> None:
        self._out = out
        self._given = given
        self._masker = Masker(given["mask"])
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._once: list[threading.Thread] = []
        self._once_read = threading.Event()

    def start(self) -> None:
        for name in self._given["collectors"]:
            try:
                collector = self._load(name)
            except Exception as error:  # noqa: BLE001 - a third party's, of which one must not stop the others
                self._warn(name, error)
                continue

            thread = threading.Thread(target=self._run, args=(name, collector), name=f"collector {name}", daemon=True)
            (self._once if collector.interval is None else self._threads).append(thread)
            thread.start()

    def join(self) -> None:
        """Say when those that read once have read; end the process when there are no others."""
        for thread in self._once:
            thread.join()

        self._once_read.set()
        self._send({"kind": "once"})
        for thread in self._threads:
            thread.join()

        os._exit(0)

    def _load(self, name: str) -> CollectorInterface:
        plugin = load(PluginType.COLLECTOR, name, self._given["known"])
        config = self._given["config"]
        plugin.initialize(config)
        return plugin.create_collector(config)  # type: ignore[attr-defined, no-any-return]

    def _run(self, name: str, collector: CollectorInterface) -> None:
        # What is read once is little, and whoever ends soon waits for it; what goes on reading gives way to training.
        if collector.interval is not None:
            self._once_read.wait(_ONCE_S)
            step_back()

        for rows in readings(collector, lambda error: self._warn(name, error)):
            for row in rows:
                self._give(name, row)

    def _give(self, name: str, row: Any) -> None:
        if isinstance(row, Mapping):
            self._send({"kind": "collected", "name": name, "facts": self._masker.mask_mapping(row)})
        else:
            t_ns = int(row.timestamp * 1e9)
            self._send({"kind": "metric", "name": row.name, "value": row.value, "step": row.step, "t_ns": t_ns})

    def _warn(self, name: str, error: BaseException) -> None:
        self._send({"kind": "warning", "text": f"collector {name!r}: {type(error).__name__}: {error}"})

    def _send(self, row: dict[str, Any]) -> None:
        data = msgpack.packb({"t_ns": time.time_ns(), **row}, default=str)
        if len(data) > MAX_ROW_BYTES:
            self._send({"kind": "warning", "text": f"collector {row['name']!r} gave {len(data)} bytes: at most 1 MiB"})
            return

        with self._lock:
            try:
                self._out.write(data)
            except OSError:  # the rank has gone
                os._exit(0)
