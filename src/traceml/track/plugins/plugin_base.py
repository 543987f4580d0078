"""Base classes of plugins: each makes a backend, a framework capture or a collector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from traceml.track.plugins.interfaces import (
    BackendInterface,
    CollectorInterface,
    FrameworkInterface,
    OrchestratorInterface,
)
from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = ["BackendPlugin", "CollectorPlugin", "FrameworkPlugin", "PluginInterface"]


class PluginInterface(ABC):
    """Base of every plugin: created without arguments, then initialized.

    Examples:
        >>> class Named(traceml.PluginInterface):
        ...     @classmethod
        ...     def get_metadata(cls):
        ...         return traceml.PluginMetadata(name="named", version="1.0")
        >>> Named().initialize({})
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        declared = vars(cls).get("get_metadata")
        if isinstance(declared, FunctionType):  # written as a method; it is asked before there is an instance
            cls.get_metadata = classmethod(declared)  # type: ignore[method-assign, assignment]

    @classmethod
    @abstractmethod
    def get_metadata(cls) -> PluginMetadata:
        """Return the facts about the plugin; imports nothing heavy."""

    def initialize(self, config: Mapping[str, Any]) -> None:  # noqa: B027 - most plugins have nothing to prepare
        """Take the configuration: for a backend its options, else what the settings hold for it."""

    def cleanup(self) -> None:  # noqa: B027 - most plugins have nothing to release
        """Release what `initialize` took."""


class BackendPlugin(PluginInterface):
    """Creates a backend.

    Examples:
        >>> class PrintPlugin(traceml.BackendPlugin):
        ...     @classmethod
        ...     def get_metadata(cls):
        ...         return traceml.PluginMetadata(name="print", version="1.0")
        ...
        ...     def create_backend(self, config):
        ...         return PrintBackend()  # see BackendInterface
        >>> PrintPlugin.get_metadata().name
        'print'
    """

    @abstractmethod
    def create_backend(self, config: Mapping[str, Any]) -> BackendInterface:
        """Return a backend that has connected to nothing yet.

        Args:
            config: `options` (of this backend), `run_id`, `run_dir` (of the traceml run), `experiment` (`id`, `name`,
                `project`, `tags`, `parent` as the tracker's own run id or None, `params`, `started` in epoch seconds,
                `user` and `source`, the script; both may be empty), `continue_run` (the
                tracker's own id of a run to continue, or None), `mark` (what `mark` returned last, of a run that was
                started before, else None), `local_only`.
        """


class FrameworkPlugin(PluginInterface):
    """Captures a framework's logging calls.

    It defines `create_framework`, or `patch_framework` and `unpatch_framework` themselves.

    Examples:
        >>> class PrintCapturePlugin(traceml.FrameworkPlugin):
        ...     @classmethod
        ...     def get_metadata(cls):
        ...         return traceml.PluginMetadata(name="print-capture", version="1.0")
        ...
        ...     def create_framework(self):
        ...         return PrintCapture()  # see FrameworkInterface
        >>> PrintCapturePlugin.get_metadata().name
        'print-capture'
    """

    _framework: FrameworkInterface | None = None

    def create_framework(self) -> FrameworkInterface:
        """Return the capture; patch nothing yet."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot be used as FrameworkPlugin: it does not define create_framework, nor "
            "patch_framework and unpatch_framework"
        )

    def patch_framework(self, orchestrator: OrchestratorInterface) -> None:
        """Start capturing into `orchestrator`; does nothing when it has."""
        if self._framework is not None:
            return

        framework = self.create_framework()
        framework.patch(orchestrator)
        self._framework = framework

    def unpatch_framework(self) -> None:
        """Restore the framework."""
        if self._framework is None:
            return

        self._framework.unpatch()
        self._framework = None


class CollectorPlugin(PluginInterface):
    """Creates a collector.

    Examples:
        >>> class LoadPlugin(traceml.CollectorPlugin):
        ...     @classmethod
        ...     def get_metadata(cls):
        ...         return traceml.PluginMetadata(name="load-average", version="1.0")
        ...
        ...     def create_collector(self, config):
        ...         return LoadAverage()  # see CollectorInterface
        >>> LoadPlugin().create_collector({}).interval
        5.0
    """

    @abstractmethod
    def create_collector(self, config: Mapping[str, Any]) -> CollectorInterface:
        """Return a collector; `config` holds what the settings say for it."""
