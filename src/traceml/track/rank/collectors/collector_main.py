"""Collector process, a child of a rank, or of the aggregator on the host of rank 0.

It reads its request from standard input, as one line of JSON, and writes rows to standard output, as msgpack:
`{"kind": "collected", "name", "facts"}`, `{"kind": "metric", "name", "value", "step", "t_ns"}`,
`{"kind": "warning", "text"}` and, when all collectors that read once have done so, `{"kind": "once"}`. It ends with its
last collector, or when its standard input ends, which is when its parent ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgpack

from traceml.helper_programs import lower_priority
from traceml.privacy import Masker
from traceml.track.plugins.interfaces import CollectorInterface
from traceml.track.plugins.plugin_base import CollectorPlugin
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import load
from traceml.track.rank.collectors.reading_schedule import readings

__all__ = ["main"]

MAX_ROW_BYTES = 1 << 20
_FIRST_READING_S = 2.0


def main() -> None:
    """Run the collectors that standard input names, until it ends."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the thread that has started it may block all
    with open(0, "rb", closefd=False) as parent_pipe:
        line = parent_pipe.readline()  # all that comes, until the pipe is closed

    if not line.endswith(b"\n"):  # the parent has ended
        os._exit(0)

    request = json.loads(line)
    own = sys.path[len(sys.argv) - 1 :]  # those of the command line have served to import this module
    sys.path[:] = own + [folder for folder in request["path"] if folder not in own]  # last: the user's collectors
    # Output of a collector must not mix with the rows.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    collectors = _CollectorThreads(out, request)
    collectors.start()
    threading.Thread(target=collectors.join, daemon=True).start()
    # Forked children of the rank hold the pipe too, so an open pipe does not mean that the rank lives.
    parent = os.getppid()
    while os.getppid() == parent:
        if select.select([0], [], [], 1.0)[0] and not os.read(0, 4096):
            break

    collectors.stop()
    os._exit(0)  # without waiting for a collector that hangs


class _CollectorThreads:
    """Runs each collector on a thread of its own: one that hangs stops no other."""

    def __init__(self, out: Any, request: Mapping[str, Any]) -> None:
        self._out = out
        self._request = request
        self._masker = Masker(request["mask"])
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._once: list[threading.Thread] = []
        self._first_readings = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        for name in self._request["collectors"]:
            try:
                plugin, collector = self._load(name)
            except Exception as error:  # noqa: BLE001 - code of a third party, which must not stop the others
                self._warn(name, error)
                continue

            given = name, plugin, collector
            thread = threading.Thread(target=self._run, args=given, name=f"collector {name}", daemon=True)
            (self._once if collector.interval is None else self._threads).append(thread)
            thread.start()

    def join(self) -> None:
        """Report when the collectors that read once are done; end the process when there are no others."""
        for thread in self._once:
            thread.join()

        self._first_readings.set()
        self._send({"kind": "once"})
        for thread in self._threads:
            thread.join()

        os._exit(0)

    def stop(self) -> None:
        """End the readings; wait a moment until the plugins have released what they took."""
        self._stopped.set()
        ends_s = time.monotonic() + self._request["cleanup_s"]  # the parent kills this process soon after
        for thread in self._threads:
            thread.join(max(0.0, ends_s - time.monotonic()))

    def _load(self, name: str) -> tuple[CollectorPlugin, CollectorInterface]:
        plugin = load(PluginType.COLLECTOR, name, self._request["known"])
        assert isinstance(plugin, CollectorPlugin)
        config = self._request["config"]
        plugin.initialize(config)
        return plugin, plugin.create_collector(config)

    def _run(self, name: str, plugin: CollectorPlugin, collector: CollectorInterface) -> None:
        # A single reading is little work, and a short run waits for it; repeated readings yield to the training.
        if collector.interval is not None:
            self._first_readings.wait(_FIRST_READING_S)
            lower_priority()

        for action in (partial(self._read, name, collector), plugin.cleanup):
            try:
                action()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - code of a third party
                self._warn(name, error)

    def _read(self, name: str, collector: CollectorInterface) -> None:
        for rows in readings(collector, lambda error: self._warn(name, error), self._stopped):
            for row in rows:
                self._send_row(name, row)

    def _send_row(self, name: str, row: Any) -> None:
        if isinstance(row, Mapping):
            self._send({"kind": "collected", "name": name, "facts": self._masker.mask_mapping(row)})
        else:
            t_ns = int(row.timestamp * 1e9)
            self._send({"kind": "metric", "name": row.name, "value": row.value, "step": row.step, "t_ns": t_ns})

    def _warn(self, name: str, error: BaseException) -> None:
        self._send({"kind": "warning", "text": f"collector {name!r}: {type(error).__name__}: {error}"})

    def _send(self, row: dict[str, Any]) -> None:
        data = msgpack.packb({"t_ns": time.time_ns(), **row}, default=str, unicode_errors="backslashreplace")
        if len(data) > MAX_ROW_BYTES:
            self._send(
                {"kind": "warning", "text": f"collector {row['name']!r} returned {len(data)} bytes: at most 1 MiB"}
            )
            return

        with self._lock:
            try:
                self._out.write(data)
            except OSError:  # the rank has ended
                os._exit(0)
