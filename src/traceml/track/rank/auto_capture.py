"""Values logged without a `log_*` call: frameworks' own logging, and what collectors read.

Capture starts with the first experiment, or with the recorder where the settings name a tracker or a collector, and
ends with the recorder.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from traceml.database.schema import MetricKind
from traceml.fail_open import fail_open
from traceml.process_ends import start_without_signals
from traceml.recorder.recorder_facts import wanted_collectors
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_base import FrameworkPlugin
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import is_local_class, load, registered

if TYPE_CHECKING:
    from traceml.settings import Config
    from traceml.track.rank.collectors.collector_process import CollectorProcess
    from traceml.track.rank.orchestrator import Orchestrator

__all__ = ["AutoCapture"]

_log = logging.getLogger("traceml")
_FIRST_READING_S = 3.0


class AutoCapture:
    """Framework captures and collectors of one rank.

    Args:
        rank: rank in the job; rank 0 reads git, environment and system.
        local_rank: rank on its host; local rank 0 runs the collectors of the setting.
    """

    def __init__(self, config: Config, orchestrator: Orchestrator, *, rank: int = 0, local_rank: int = 0) -> None:
        self._config = config
        self._orchestrator = orchestrator
        self._rank, self._local_rank = rank, local_rank
        self._plugins: dict[str, FrameworkPlugin] = {}
        self._child: CollectorProcess | None = None
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._collects = False
        self._pid = os.getpid()

    def start(self, config: Config, *, collect: bool = True, numbers_only: bool = False) -> None:
        """Patch the frameworks of the settings, restore others, and start the collectors once.

        A plugin that fails is reported and left out.

        Args:
            collect: start the collectors, unless they run.
            numbers_only: leave out images and histograms.
        """
        self._config = config
        self._orchestrator.numbers_only = numbers_only
        for name in self._plugins.keys() - set(config.frameworks):
            self._restore(name)

        for name in dict.fromkeys(config.frameworks):
            if name not in self._plugins:
                self._patch(name)

        if collect and not self._collects:
            self._collects = True
            self._collect()

    def _collect(self) -> None:
        importable, local = self._collectors()
        for name in local:
            self._start_thread(name)

        if importable:
            self._start_child(importable)

    def unpatch(self) -> None:
        """Restore the frameworks."""
        for name in reversed(list(self._plugins)):
            self._restore(name)

    def stop(self) -> None:
        """Restore the frameworks, let collectors that read once finish (at most 3 s), and end them all."""
        self._stopped.set()
        self.unpatch()
        if self._pid != os.getpid():
            return

        if self._child is not None:
            self._child.stop(timeout_s=_FIRST_READING_S)
            self._child = None

        for thread in self._threads:
            thread.join(1.0)

    def _restore(self, name: str) -> None:
        plugin = self._plugins.pop(name)
        with fail_open(_log, "track", f"framework {name!r} could not be restored"):
            plugin.unpatch_framework()
            plugin.cleanup()

    def _patch(self, name: str) -> None:
        with fail_open(_log, "track", f"framework {name!r} is not captured"):
            plugin = load(PluginType.FRAMEWORK, name)
            assert isinstance(plugin, FrameworkPlugin)
            plugin.initialize({})
            plugin.patch_framework(self._orchestrator)
            self._plugins[name] = plugin

    def _collectors(self) -> tuple[list[str], list[str]]:
        """Return the collectors for a process of their own, and those that only this process can import."""
        config = self._config
        names = wanted_collectors(config) if self._rank == 0 else []
        if self._local_rank == 0:
            names += [name for name in dict.fromkeys(config.collectors) if name not in names]

        known = registered(PluginType.COLLECTOR)
        local = [name for name in names if is_local_class(known.get(name, name))]
        return [name for name in names if name not in local], local

    def _start_child(self, names: list[str]) -> None:
        from traceml.track.rank.collectors.collector_process import CollectorProcess

        with fail_open(_log, "track", "collectors cannot be started"):
            known, config = registered(PluginType.COLLECTOR), self._config
            self._child = CollectorProcess(names, known, config.mask, self._log_row, debug=config.debug)

    def _start_thread(self, name: str) -> None:
        from traceml.privacy import Masker
        from traceml.track.rank.collectors.reading_schedule import readings

        def guard() -> fail_open:
            return fail_open(_log, "track", f"collector {name!r} failed")

        collector: Any = None
        with guard():
            plugin: Any = load(PluginType.COLLECTOR, name)
            plugin.initialize({})
            collector = plugin.create_collector({})

        if collector is None:
            return

        def failed(error: Exception) -> None:
            with guard():
                raise error

        masker = Masker(self._config.mask)

        def run() -> None:
            with guard():
                for rows in readings(collector, failed, self._stopped):
                    for row in rows:
                        if isinstance(row, Metric):
                            self._orchestrator.route_metric(row)
                        else:
                            self._orchestrator.log_collected(name, masker.mask_mapping(row))

            with guard():
                plugin.cleanup()

        with guard():
            thread = threading.Thread(target=run, name=f"traceml collector {name}", daemon=True)
            start_without_signals(thread)
            self._threads.append(thread)

    def _log_row(self, row: dict[str, Any]) -> None:
        if row["kind"] == "collected":
            self._orchestrator.log_collected(row["name"], row["facts"])
            return

        timestamp = row["t_ns"] / 1e9
        self._orchestrator.route_metric(
            Metric(row["name"], row["value"], row["step"], timestamp, kind=MetricKind.COLLECTOR)
        )
