"""Plugins: what is built in, what third parties add, and how a name becomes one.

A plugin is found, in this order, as: an import path (`package:Class`), one given to `traceml.register`, a built-in one,
an entry point of an installed package in the group `traceml.backends`, `traceml.frameworks` or `traceml.collectors`.
Nothing is imported before it is asked for. Backends are loaded in processes of their own, so what `register` keeps for
them is an import path too.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from traceml.errors import PluginError
from traceml.track.plugins.interfaces import BackendInterface, CollectorInterface, FrameworkInterface

if TYPE_CHECKING:
    from traceml.track.rank.orchestrator import Orchestrator

__all__ = [
    "BUILT_IN",
    "BackendPlugin",
    "CollectorPlugin",
    "FrameworkPlugin",
    "PluginInterface",
    "PluginMetadata",
    "PluginType",
    "available",
    "check_name",
    "check_options",
    "create_backend",
    "load",
    "missing_extra",
    "register",
    "registered",
]


class PluginType(StrEnum):
    """What a plugin adds; the value is the end of its entry-point group."""

    BACKEND = "backends"
    FRAMEWORK = "frameworks"
    COLLECTOR = "collectors"


_Kinds = type | tuple[type, ...]


@dataclass(frozen=True, kw_only=True)
class PluginMetadata:
    """What a plugin says about itself.

    Args:
        name: what users write in `backend=[…]`, `frameworks=[…]` or `collectors=[…]`.
        version: the plugin's own.
        type: what it adds; taken from the base class when left out.
        description: one line, shown by `traceml doctor`.
        author: who to ask.
        dependencies: modules that must be importable; said with a hint when one is not.
        extra: the extra of a distribution that brings them, as in `pip install 'traceml[mlflow]'`.
        options: what may be configured: a name and its type or types; empty takes anything.
    """

    name: str
    version: str
    type: PluginType | None = None
    description: str = ""
    author: str = ""
    dependencies: tuple[str, ...] = ()
    extra: str | None = None
    options: Mapping[str, _Kinds] = field(default_factory=dict)


class PluginInterface(ABC):
    """Base of every plugin: made without arguments, then initialized."""

    @classmethod
    @abstractmethod
    def get_metadata(cls) -> PluginMetadata:
        """Return what the plugin says about itself; imports nothing heavy."""

    def initialize(self, config: Mapping[str, Any]) -> None:  # noqa: B027 - most plugins have nothing to prepare
        """Take the configuration: for a backend its options, else what the settings hold for it."""

    def cleanup(self) -> None:  # noqa: B027 - most plugins have nothing to release
        """Release what `initialize` took."""


class BackendPlugin(PluginInterface):
    """Makes a backend."""

    @abstractmethod
    def create_backend(self, config: Mapping[str, Any]) -> BackendInterface:
        """Return a backend; connect to nothing yet.

        Args:
            config: `options` (of this backend), `run_id`, `run_dir` (of the traceml run), `experiment` (`id`, `name`,
                `project`, `tags`, `parent` as the tracker's own run id or None, `params`), `continue_run` (the
                tracker's own id of a run to go on with, or None), `mark` (what `mark` returned last, of a run that
                was begun before, else None), `local_only`.
        """


class FrameworkPlugin(PluginInterface):
    """Captures a framework's logging calls."""

    _framework: FrameworkInterface | None = None

    @abstractmethod
    def create_framework(self) -> FrameworkInterface:
        """Return what does the capturing; patch nothing yet."""

    def patch_framework(self, orchestrator: Orchestrator) -> None:
        """Start capturing into `orchestrator`."""
        if self._framework is not None:
            return

        framework = self.create_framework()
        framework.patch(orchestrator)
        self._framework = framework

    def unpatch_framework(self) -> None:
        """Put the framework back as it was."""
        if self._framework is None:
            return

        self._framework.unpatch()
        self._framework = None


class CollectorPlugin(PluginInterface):
    """Makes a collector."""

    @abstractmethod
    def create_collector(self, config: Mapping[str, Any]) -> CollectorInterface:
        """Return a collector; `config` holds what the settings say for it."""


_BASES: dict[PluginType, Any] = {
    PluginType.BACKEND: BackendPlugin,
    PluginType.FRAMEWORK: FrameworkPlugin,
    PluginType.COLLECTOR: CollectorPlugin,
}
# An interface's own class is accepted where its plugin is: `backend=["my_package:MyBackend"]`.
_INTERFACES: dict[PluginType, Any] = {
    PluginType.BACKEND: BackendInterface,
    PluginType.FRAMEWORK: FrameworkInterface,
    PluginType.COLLECTOR: CollectorInterface,
}
BUILT_IN: dict[PluginType, dict[str, str]] = {
    PluginType.BACKEND: {
        "aim": "traceml.track.backends.aim:AimPlugin",
        "clearml": "traceml.track.backends.clearml:ClearMLPlugin",
        "jsonl": "traceml.track.backends.jsonl:JsonlPlugin",
        "mlflow": "traceml.track.backends.mlflow:MLflowPlugin",
        "tensorboard": "traceml.track.backends.tensorboard:TensorBoardPlugin",
        "wandb": "traceml.track.backends.wandb:WandbPlugin",
    },
    PluginType.FRAMEWORK: {
        "huggingface": "traceml.track.rank.frameworks.huggingface:HuggingFacePlugin",
        "lightning": "traceml.track.rank.frameworks.lightning:LightningPlugin",
        "tensorboard": "traceml.track.rank.frameworks.tensorboard:TensorBoardPlugin",
    },
    PluginType.COLLECTOR: {
        "environment": "traceml.track.rank.collectors.environment:EnvironmentPlugin",
        "git": "traceml.track.rank.collectors.git:GitPlugin",
        "system": "traceml.track.rank.collectors.environment:SystemPlugin",
    },
}
_registered: dict[PluginType, dict[str, str]] = {kind: {} for kind in PluginType}

_Plugin = TypeVar("_Plugin", bound=type[PluginInterface])


def register(plugin: _Plugin) -> _Plugin:
    """Make a plugin's class known under its metadata's name; usable as a decorator.

    Returns:
        the class, unchanged.

    Raises:
        PluginError: it is no plugin, its name is taken, or no other process could import it.
    """
    if not _is_plugin(plugin):
        raise PluginError(
            f"{plugin!r} is no plugin: derive a class from BackendPlugin, FrameworkPlugin or CollectorPlugin"
        )

    kind = next(kind for kind, base in _BASES.items() if issubclass(plugin, base))
    name = plugin.get_metadata().name
    path = f"{plugin.__module__}:{plugin.__qualname__}"
    if kind is PluginType.BACKEND and (plugin.__module__ == "__main__" or "<locals>" in plugin.__qualname__):
        where = "the script itself" if plugin.__module__ == "__main__" else "a function"
        raise PluginError(
            f"backend {name!r} is defined in {where} and runs in a process of its own, which could not import it: "
            "move the class into a module"
        )

    taken = _registered[kind].get(name) or BUILT_IN[kind].get(name)
    if taken not in {None, path}:
        raise PluginError(f"a plugin named {name!r} is already there ({taken}): choose another name for {path}")

    _registered[kind][name] = path
    _classes[path] = plugin
    return plugin


# Classes as they were registered, so that one defined in a script is found in the process that defined it.
_classes: dict[str, type] = {}


def _is_plugin(given: Any) -> bool:
    return isinstance(given, type) and issubclass(given, tuple(_BASES.values()))


def registered(kind: PluginType) -> dict[str, str]:
    """Return what `register` was given: name -> import path."""
    return dict(_registered[kind])


def available(kind: PluginType) -> dict[str, str]:
    """Return every name that can be asked for -> where it comes from."""
    return {**_entry_points(kind), **BUILT_IN[kind], **_registered[kind]}


def check_name(kind: PluginType, name: str) -> None:
    """See that a name can be asked for, without importing what it stands for.

    Raises:
        PluginError: there is none of that name; the text has those that there are.
    """
    if ":" not in name and name not in _registered[kind] and name not in BUILT_IN[kind] and name not in available(kind):
        raise PluginError(_unknown(kind, name))


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """See that a built-in backend takes these options; its library is not imported.

    Raises:
        PluginError: it has no such option, or one is of another type.
    """
    if options:
        _check_options(load(PluginType.BACKEND, name).get_metadata(), options)


def load(kind: PluginType, name: str, known: Mapping[str, str] | None = None) -> PluginInterface:
    """Return a new plugin by name or import path, not yet initialized.

    Args:
        kind: what it must be.
        name: a name, or `package:Class`.
        known: names registered in another process, as `registered` returned them there.

    Raises:
        PluginError: there is none of that name, it cannot be imported, or it is something else.
    """
    path = name if ":" in name else {**(known or {}), **BUILT_IN[kind], **_registered[kind]}.get(name)
    path = path or _entry_points(kind).get(name)  # those last: looking for them takes long
    if path is None:
        raise PluginError(_unknown(kind, name))

    found = _classes.get(path) or _import(path, name)
    base, interface = _BASES[kind], _INTERFACES[kind]
    if isinstance(found, type) and issubclass(found, interface) and not inspect.isabstract(found):
        return _plugin_of(found, kind, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(f"{path} is no {base.__name__} nor {interface.__name__}, but {found!r:.100}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise PluginError(f"{path} cannot be used as {base.__name__}: it does not define {missing}")

    plugin: PluginInterface = found()
    return plugin


def create_backend(name: str, config: Mapping[str, Any], known: Mapping[str, str] | None = None) -> BackendInterface:
    """Return a backend that is configured and not yet connected.

    Args:
        name: a name, or `package:Class`.
        config: see `BackendPlugin.create_backend`.
        known: names registered in another process.

    Raises:
        PluginError: there is no such backend, an option is unknown, or `local_only` forbids where it delivers to.
        ImportError: its library is missing; the text has the command that installs it.
    """
    plugin = load(PluginType.BACKEND, name, known)
    assert isinstance(plugin, BackendPlugin)
    metadata = plugin.get_metadata()
    if (missing := missing_extra(metadata)) is not None:
        raise ImportError(missing)

    options = config.get("options") or {}
    _check_options(metadata, options)
    plugin.initialize(options)
    backend = plugin.create_backend(config)
    if config.get("local_only") and not backend.is_local:
        raise PluginError(
            f"backend {name!r} would deliver to {backend.target}, which is not on this machine, and local_only is set: "
            "choose a local target, or turn local_only off"
        )

    return backend


def missing_extra(metadata: PluginMetadata) -> str | None:
    """Return what is not installed and how to install it, or None; imports nothing."""
    from importlib.util import find_spec

    missing = [module for module in metadata.dependencies if find_spec(module.partition(".")[0]) is None]
    if not missing:
        return None

    wanted = f"'traceml[{metadata.extra}]'" if metadata.extra else " ".join(missing)
    return f"{metadata.name} needs {', '.join(missing)}, which is not installed: pip install {wanted}"


def _unknown(kind: PluginType, name: str) -> str:
    import difflib

    names = sorted(available(kind))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no plugin {name!r} among the {kind.value}; {hint}There are: {', '.join(names)}, or package:Class"


def _import(path: str, name: str) -> Any:
    from importlib import import_module

    module, _, qualname = path.partition(":")
    try:
        found: Any = import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception as error:  # a third party's module may raise anything while it is imported
        raise PluginError(f"plugin {name!r} cannot be loaded from {path}: {type(error).__name__}: {error}") from error

    return found


def _entry_points(kind: PluginType) -> dict[str, str]:
    from importlib.metadata import entry_points  # takes 15 ms: only when a name is looked for

    return {each.name: each.value for each in entry_points(group=f"traceml.{kind.value}")}


def _plugin_of(found: type, kind: PluginType, name: str) -> PluginInterface:
    """Return a plugin around a class that implements an interface directly."""
    metadata = PluginMetadata(name=name, version="", type=kind)
    body: dict[str, Any] = {"get_metadata": classmethod(lambda _cls: metadata)}
    if kind is PluginType.BACKEND:
        body["create_backend"] = lambda _self, config: _made(found, config)
    elif kind is PluginType.COLLECTOR:
        body["create_collector"] = lambda _self, config: _made(found, config)
    else:
        body["create_framework"] = lambda _self: found()

    plugin: PluginInterface = type(found.__name__ + "Plugin", (_BASES[kind],), body)()
    return plugin


def _made(found: type, config: Mapping[str, Any]) -> Any:
    """Make an object that takes the configuration, or nothing."""
    takes = inspect.signature(found).parameters
    return found(config) if takes else found()


def _check_options(metadata: PluginMetadata, options: Mapping[str, Any]) -> None:
    if not metadata.options:
        return

    for key, value in options.items():
        kinds = metadata.options.get(key)
        if kinds is None:
            known = ", ".join(sorted(metadata.options))
            raise PluginError(f"backend {metadata.name!r} has no option {key!r}; there are: {known}")
        if not isinstance(value, kinds):
            wanted = " or ".join(each.__name__ for each in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise PluginError(f"option {key!r} of backend {metadata.name!r} is {value!r:.100}; it must be {wanted}")
