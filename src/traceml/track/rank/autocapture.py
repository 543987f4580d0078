"""What is captured without a `log_*` call: frameworks' own logging, and what collectors read.

It begins with the first experiment, or with the recorder where the settings name a tracker or a collector, and ends
with the recorder.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from traceml.database.schema import MetricKind
from traceml.errors import TraceMLError
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_base import FrameworkPlugin
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import load, registered

if TYPE_CHECKING:
    from traceml.settings import Config
    from traceml.track.rank.collectors.collector_process import CollectorProcess
    from traceml.track.rank.orchestrator import Orchestrator

__all__ = ["AutoCapture"]

_log = logging.getLogger("traceml")
_ONCE_S = 3.0


class AutoCapture:
    """The captures and collectors of one rank.

    Args:
        config: the settings in force.
        orchestrator: takes what is captured.
        rank: of the job; rank 0 reads git, environment and system.
        local_rank: on its host; rank 0 of each host runs the collectors of the setting.
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

    def start(self, *, collect: bool = True) -> None:
        """Patch the frameworks that are not, start the collectors once. A plugin that fails is said and left out.

        Args:
            collect: start the collectors, unless they are.
        """
        for name in dict.fromkeys(self._config.frameworks):
            if name not in self._plugins:
                self._patch(name)

        if collect and not self._collects:
            self._collects = True
            self._collect()

    def _collect(self) -> None:
        outside, inside = self._collectors()
        for name in inside:
            self._start_thread(name)

        if outside:
            self._start_child(outside)

    def unpatch(self) -> None:
        """Put the frameworks back as they were."""
        while self._plugins:
            name, plugin = self._plugins.popitem()
            try:
                plugin.unpatch_framework()
                plugin.cleanup()
            except Exception as error:  # noqa: BLE001 - a third party's
                _log.warning("framework %r did not end well: %r", name, error)

    def stop(self) -> None:
        """Put the frameworks back, let collectors that read once finish (at most 3 s), end them all."""
        self._stopped.set()
        self.unpatch()
        if self._pid != os.getpid():
            return

        if self._child is not None:
            self._child.stop(timeout_s=_ONCE_S)
            self._child = None

        for thread in self._threads:
            thread.join(1.0)

    def _patch(self, name: str) -> None:
        try:
            plugin = load(PluginType.FRAMEWORK, name)
            assert isinstance(plugin, FrameworkPlugin)
            plugin.initialize({})
            plugin.patch_framework(self._orchestrator)
        except TraceMLError as error:
            _log.warning("framework %r is not captured: %s", name, error)
        except Exception as error:  # noqa: BLE001 - a third party's
            _log.warning("framework %r is not captured: %r", name, error, exc_info=error)
        else:
            self._plugins[name] = plugin

    def _collectors(self) -> tuple[list[str], list[str]]:
        """Return who reads in a process of its own, and who here: those that only this process can import."""
        config = self._config
        names = []
        if self._rank == 0:
            wanted = {"git": config.track_git, "environment": config.track_env, "system": config.track_system}
            names = [name for name, is_on in wanted.items() if is_on]
        if self._local_rank == 0:
            names += [name for name in dict.fromkeys(config.collectors) if name not in names]

        known = registered(PluginType.COLLECTOR)
        inside = [name for name in names if _is_only_here(known.get(name, name))]
        return [name for name in names if name not in inside], inside

    def _start_child(self, names: list[str]) -> None:
        from traceml.track.rank.collectors.collector_process import CollectorProcess

        try:
            self._child = CollectorProcess(names, registered(PluginType.COLLECTOR), self._config.mask, self._take)
        except OSError as error:
            _log.warning("collectors cannot be started: %s", error)

    def _start_thread(self, name: str) -> None:
        from traceml.track.rank.collectors.readings import readings

        try:
            plugin: Any = load(PluginType.COLLECTOR, name)
            plugin.initialize({})
            collector = plugin.create_collector({})
        except Exception as error:  # noqa: BLE001 - a third party's
            _log.warning("collector %r: %s: %s", name, type(error).__name__, error)
            return

        def run() -> None:
            from traceml.privacy import Masker

            masker = Masker(self._config.mask)
            for rows in readings(collector, failed, self._stopped):
                for row in rows:
                    if isinstance(row, Metric):
                        self._orchestrator.route_metric(row)
                    else:
                        self._orchestrator.log_collected(name, masker.mask_mapping(row))

        def failed(error: Exception) -> None:
            _log.warning("collector %r: %s: %s", name, type(error).__name__, error)

        thread = threading.Thread(target=run, name=f"traceml collector {name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _take(self, row: dict[str, Any]) -> None:
        if row["kind"] == "collected":
            self._orchestrator.log_collected(row["name"], row["facts"])
            return

        timestamp = row["t_ns"] / 1e9
        self._orchestrator.route_metric(
            Metric(row["name"], row["value"], row["step"], timestamp, kind=MetricKind.COLLECTOR)
        )


def _is_only_here(path: str) -> bool:
    """Whether a class cannot be imported elsewhere: it stands in the script, or inside a function."""
    return path.startswith("__main__:") or "<locals>" in path
