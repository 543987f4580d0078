"""Post-import hook: callbacks that run as soon as a module has been imported.

`traceml run` installs the hooks before the script runs, when torch is not imported yet. Importing it ourselves would
take that decision from the script. With `TRACEML=1` tracing starts inside the import of torch, which may be inside that
of a framework: such a module is in `sys.modules`, but has no classes yet. Its import ends by clearing a flag of its
spec, so the spec gets a class that calls back then.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from traceml.inspection.loaded_modules import loaded_module

__all__ = ["PostImportHook", "is_imported"]

_FLAG = "_initializing"
_CALLBACKS = "_traceml_callbacks"


def is_imported(name: str) -> bool:
    """Return whether a module is imported, and its import has ended."""
    return loaded_module(name) is not None


class PostImportHook:
    """Import finder that finds nothing itself, but runs a callback once each of certain modules is imported."""

    def __init__(self, callbacks: dict[str, Callable[[], None]]) -> None:
        self._waiting = dict(callbacks)
        self._searching = False

    def install(self) -> None:
        """Run the callbacks of modules that are imported, and watch for the import of the others."""
        for name in list(self._waiting):
            if is_imported(name):
                self.run(name)
            elif name in sys.modules:
                _when_ended(sys.modules[name].__spec__, functools.partial(self.run, name))

        if self._waiting:
            sys.meta_path.insert(0, self)

    def run(self, name: str) -> None:
        """Run the callback of a module now, unless it has run."""
        callback = self._waiting.pop(name, None)
        if callback is not None and name in sys.modules:
            callback()

    def uninstall(self) -> None:
        """Stop watching."""
        self._waiting.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the other finders find the module, and wrap its loader's `exec_module`."""
        if name not in self._waiting or self._searching:
            return None

        self._searching = True
        try:
            spec = self._found_by_others(name, path, target)
        finally:
            self._searching = False

        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._wrap(name, spec.loader)

        return spec

    def _found_by_others(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if finder is not self and find is not None else None
            if spec is not None:
                return spec

        return None

    def _wrap(self, name: str, loader: Any) -> None:
        """Wrap the loader's `exec_module`. Each module has its own loader, so an instance attribute is enough."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                execute(module)
            finally:
                loader.__dict__.pop("exec_module", None)

            self.run(name)

        try:
            loader.exec_module = exec_module
        except AttributeError:
            pass  # a loader written in C, shared by modules: torch has none


class _BegunSpec(ModuleSpec):
    """The spec of a module that is being imported: as before once that has ended."""

    @property
    def _initializing(self) -> bool:
        return bool(vars(self)[_FLAG])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        vars(self)[_FLAG] = value
        if value:
            return

        self.__class__ = ModuleSpec  # type: ignore[assignment]
        for callback in vars(self).pop(_CALLBACKS):
            callback()


def _when_ended(spec: ModuleSpec | None, callback: Callable[[], None]) -> None:
    """Call back when the import of a module has ended; never where another import system made its spec."""
    if type(spec) is ModuleSpec:
        vars(spec)[_CALLBACKS] = []
        spec.__class__ = _BegunSpec
    if type(spec) is _BegunSpec:
        vars(spec)[_CALLBACKS].append(callback)
