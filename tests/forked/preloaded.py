"""Modules that are imported once and shared, but look as if they were not imported until somebody imports them."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from types import MappingProxyType, ModuleType
from typing import Any

_MISSING = object()


class _Group:
    """All that the import of one module has loaded."""

    def __init__(self, needs: Sequence[str], names: Sequence[str]) -> None:
        self.needs = needs
        self.names = names
        self._attributes = [_attribute(name) for name in names if "." in name]

    def hide_attributes(self) -> None:
        """Remove its modules from packages of other groups."""
        for parent, child, _ in self._attributes:
            if parent.__name__ not in self.names:
                vars(parent).pop(child, None)

    def set_attributes(self) -> None:
        """Set submodules' names in packages as at the first time: a package may have deleted or replaced them."""
        for parent, child, value in self._attributes:
            if value is _MISSING:
                vars(parent).pop(child, None)
            else:
                vars(parent)[child] = value


def _attribute(name: str) -> tuple[ModuleType, str, object]:
    parent, _, child = name.rpartition(".")
    return sys.modules[parent], child, vars(sys.modules[parent]).get(child, _MISSING)


class Preloaded:
    """Import finder that hands out modules of an earlier import.

    Each goes through the import system again, in the order of the first time, so that import hooks see it.
    """

    def __init__(
        self,
        shared: Mapping[str, Sequence[str]],
        after: Mapping[str, Callable[[ModuleType], object]] = MappingProxyType({}),
        own: Sequence[str] = (),
    ) -> None:
        """Import modules and hide them.

        Args:
            shared: names of modules; of each, the ones before it that its import needs.
            after: of some, what to call with the module at the end of its import.
            own: names of modules that import others of their package; each comes with what it imports itself only.
        """
        self._after = after
        families = {name.partition(".")[0] for name in shared}
        groups = [_Group(needs, _load(name, families)) for name, needs in shared.items()]
        self._own = {name.partition(".")[0] for name in own}
        groups += [_Group(needs, [name]) for name, needs in _load_each(own, self._own).items()]
        self._groups = {name: group for group in groups for name in group.names}
        for group in groups:
            group.hide_attributes()

        self._hidden = {name: sys.modules.pop(name) for name in self._groups}
        sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a hidden module."""
        module = self._hidden.get(name)
        if module is None or module.__spec__ is None:
            return None

        spec = ModuleSpec(name, _Loader(self, module.__spec__), origin=module.__spec__.origin)
        spec.submodule_search_locations = module.__spec__.submodule_search_locations
        return spec

    def leave_out_others(self) -> None:
        """Hand out no module of a package that is elsewhere for this process."""
        for package in self._own & set(self._hidden):
            spec = PathFinder.find_spec(package)
            if spec is None or spec.origin != self._hidden[package].__file__:
                for name in [name for name in self._hidden if name.partition(".")[0] == package]:
                    del self._hidden[name], self._groups[name]

    def peek(self, name: str) -> Any:
        """Return a hidden module, None if there is none; it stays hidden."""
        return self._hidden.get(name)

    def take(self, name: str) -> ModuleType:
        """Return a hidden module; it is hidden no more."""
        return self._hidden.pop(name)

    def restore(self, name: str) -> None:
        """Import all that was loaded together with a module."""
        group = self._groups.pop(name, None)
        if group is None:
            return

        for member in group.names:  # not a copy of the others: they are thousands, and so are groups of one module
            if self._groups.get(member) is group:
                del self._groups[member]

        for needed in group.needs:
            if needed not in sys.modules:
                importlib.import_module(needed)

        for member in group.names:
            self._import(member)

        group.set_attributes()
        if name in self._after:
            self._after[name](sys.modules[name])

    def _import(self, name: str) -> None:
        parent = name.rpartition(".")[0]
        if parent in self._hidden:
            self._import(parent)

        if name not in self._hidden:
            return

        if getattr(self._hidden[name], "__spec__", None) and (not parent or hasattr(sys.modules[parent], "__path__")):
            importlib.import_module(name)
        else:  # another module had put it into `sys.modules`
            sys.modules[name] = self._hidden.pop(name)


class _Loader:
    """Loader of one hidden module."""

    def __init__(self, preloaded: Preloaded, spec: ModuleSpec) -> None:
        self._preloaded, self._spec = preloaded, spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the first import."""
        return self._preloaded.take(spec.name)

    def get_code(self, name: str) -> Any:
        """Return the module's code, which `python -m` runs."""
        loader: Any = self._spec.loader
        return loader.get_code(name)

    def exec_module(self, module: ModuleType) -> None:
        """Import again what the first import has loaded."""
        vars(module)["__spec__"] = self._spec  # some modules refuse to have attributes set
        self._preloaded.restore(self._spec.name)


def _load(name: str, families: set[str]) -> list[str]:
    """Import a module; return the names of what that has loaded of the families."""
    before = set(sys.modules)
    importlib.import_module(name)
    return [each for each in sys.modules if each not in before and each.partition(".")[0] in families]


def _load_each(names: Sequence[str], families: set[str]) -> dict[str, list[str]]:
    """Import modules; return each of the families that is loaded, and what it imports."""
    before = set(sys.modules)
    with _noted_imports() as imported:
        for name in names:
            importlib.import_module(name)

    found = [each for each in sys.modules if each not in before and each.partition(".")[0] in families]
    return {each: [needed for needed in imported.get(each, {}) if needed in sys.modules] for each in found}


@contextmanager
def _noted_imports() -> Iterator[dict[str, dict[str, None]]]:
    """Note what each module imports, in order; names in modules count as modules where they are ones."""
    imported: dict[str, dict[str, None]] = {}
    original = builtins.__import__

    def note(name: str, globals_: Any = None, locals_: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if globals_ is not None:
            whole = resolve_name("." * level + name, globals_["__package__"]) if level else name
            noted = imported.setdefault(globals_["__name__"], {})
            noted |= dict.fromkeys([whole, *(f"{whole}.{each}" for each in fromlist or ())])

        return original(name, globals_, locals_, fromlist, level)

    builtins.__import__ = note
    try:
        yield imported
    finally:
        builtins.__import__ = original
