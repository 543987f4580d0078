"""Registry of plugins: built-in ones, those of third parties, and how a name is resolved.

A name is looked up, in this order, as: an import path (`package:Class`), one given to `traceml.register`, a built-in
one, an entry point of an installed package in the group `traceml.backends`, `traceml.frameworks` or
`traceml.collectors`. Nothing is imported before it is asked for. Backends are loaded in processes of their own, by an
import path; the class of a backend that is defined in a script, a notebook or a function is sent to them, pickled.
"""

from __future__ import annotations

import inspect
import io
import logging
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from traceml.errors import PluginError
from traceml.fail_open import fail_open
from traceml.track.plugins.interfaces import BackendInterface, CollectorInterface, FrameworkInterface
from traceml.track.plugins.plugin_base import BackendPlugin, CollectorPlugin, FrameworkPlugin, PluginInterface
from traceml.track.plugins.plugin_metadata import PluginMetadata, PluginType

__all__ = [
    "BUILT_IN",
    "available",
    "backend_metadata",
    "check_name",
    "create_backend",
    "is_local_class",
    "is_sent",
    "known_backends",
    "load",
    "register",
    "registered",
    "sent_backends",
]

_log = logging.getLogger("traceml")

_BASES: dict[PluginType, Any] = {
    PluginType.BACKEND: BackendPlugin,
    PluginType.FRAMEWORK: FrameworkPlugin,
    PluginType.COLLECTOR: CollectorPlugin,
}
# The class of an interface is accepted in place of its plugin: `backend=["my_package:MyBackend"]`.
_INTERFACES: dict[PluginType, Any] = {
    PluginType.BACKEND: BackendInterface,
    PluginType.FRAMEWORK: FrameworkInterface,
    PluginType.COLLECTOR: CollectorInterface,
}
BUILT_IN: dict[PluginType, dict[str, str]] = {
    PluginType.BACKEND: {
        "aim": "traceml.track.backends.aim:AimBackend",
        "clearml": "traceml.track.backends.clearml:ClearMLBackend",
        "jsonl": "traceml.track.backends.jsonl:JsonlBackend",
        "mlflow": "traceml.track.backends.mlflow:MLflowBackend",
        "tensorboard": "traceml.track.backends.tensorboard:TensorBoardBackend",
        "trackio": "traceml.track.backends.trackio:TrackioBackend",
        "wandb": "traceml.track.backends.wandb:WandbBackend",
    },
    PluginType.FRAMEWORK: {
        "huggingface": "traceml.track.rank.frameworks.huggingface:HuggingFaceCapture",
        "lightning": "traceml.track.rank.frameworks.lightning:LightningCapture",
        "ray": "traceml.track.rank.frameworks.ray:RayCapture",
        "tensorboard": "traceml.track.rank.frameworks.tensorboard:TensorBoardCapture",
    },
    PluginType.COLLECTOR: {
        "environment": "traceml.track.rank.collectors.environment:EnvironmentCollector",
        "git": "traceml.track.rank.collectors.git:GitCollector",
        "system": "traceml.track.rank.collectors.environment:SystemCollector",
    },
}
_NOUNS = {PluginType.BACKEND: "tracker", PluginType.FRAMEWORK: "framework", PluginType.COLLECTOR: "collector"}
_registered: dict[PluginType, dict[str, str]] = {kind: {} for kind in PluginType}
# Classes by path as they were registered, so that a class of the script is found in the process that defined it.
_classes: dict[str, type] = {}
# In place of the import path of a class that was sent: then Python's version, whose code it has, and the pickle.
_SENT = "sent by Python "
_MOST_SENT_BYTES = 1 << 20

_Plugin = TypeVar("_Plugin")


def register(plugin: _Plugin) -> _Plugin:
    """Register a class under the name in its metadata; usable as a decorator.

    Examples:
        >>> @traceml.register
        ... class Watts(traceml.CollectorInterface):
        ...     metadata = traceml.PluginMetadata(name="watts", version="1.0")
        ...
        ...     def collect(self):
        ...         return [{"power/limit_watts": 300}]
        >>> Watts().collect()
        [{'power/limit_watts': 300}]

    Args:
        plugin: a plugin, or a backend, framework or collector that declares `metadata`; or an instance of such a class,
            without attributes of its own, as one is made anew where it is used.

    Returns:
        the class or instance, unchanged.

    Raises:
        PluginError: the class is not a plugin, its name is taken, or it can be neither imported nor sent.
    """
    _register(plugin if isinstance(plugin, type) else _class_of(plugin))
    return plugin


def _class_of(instance: Any) -> Any:
    """Return the class of an instance of a plugin that holds nothing; other objects are returned as they are."""
    if _kind_of(type(instance)) is None:
        return instance

    if own := getattr(instance, "__dict__", None):
        raise PluginError(
            f"{instance!r:.100} has attributes of its own ({', '.join(own)}), and a plugin is made anew where it is "
            f"used: register the class {type(instance).__name__}, whose initialize() gets the configuration"
        )

    return type(instance)


def _register(plugin: Any) -> None:
    kind = _kind_of(plugin)
    if kind is None:
        raise PluginError(
            f"{plugin!r} is not a plugin: derive a class from BackendPlugin, FrameworkPlugin or CollectorPlugin, or "
            "from BackendInterface, FrameworkInterface or CollectorInterface with `metadata = PluginMetadata(...)`"
        )

    name = _metadata_of(plugin).name
    path = f"{plugin.__module__}:{plugin.__qualname__}"
    if "<locals>" in path:  # all classes of one function have one
        path += f"#{name}"

    if kind is PluginType.BACKEND and is_local_class(path):
        _pickled(name, plugin)  # an error is raised here, and not when values are logged

    taken = _registered[kind].get(name) or BUILT_IN[kind].get(name)
    if taken not in {None, path}:
        raise PluginError(f"a plugin named {name!r} is already registered ({taken}): choose another name for {path}")

    _registered[kind][name] = path
    _classes[path] = plugin


def registered(kind: PluginType) -> dict[str, str]:
    """Return the names given to `register` -> import path."""
    return dict(_registered[kind])


def sent_backends(wanted: Collection[str]) -> dict[str, str]:
    """Return the registered backends for delivery: names -> import path.

    Of a class that cannot be imported, it is the class, if its name is among the `wanted`.
    """
    known = registered(PluginType.BACKEND)
    local = {name for name, path in known.items() if is_local_class(path)}
    sent = {name: path for name, path in known.items() if name not in local}
    for name in local.intersection(wanted):
        with fail_open(_log, "track", f"backend {name!r} cannot be used"):
            sent[name] = _pickled(name, _classes[known[name]])

    return sent


def is_local_class(path: str) -> bool:
    """Return whether a class cannot be imported elsewhere: it is defined in the script, or inside a function."""
    return path.startswith(("__main__:", "__mp_main__:")) or "<locals>" in path


def is_sent(path: str) -> bool:
    """Return whether a name of another process stands for a class that it has sent: to load it runs its code."""
    return path.startswith(_SENT)


def _pickled(name: str, backend: type) -> str:
    """Return the class of a backend by value: its process does not run the script again.

    Raises:
        PluginError: it uses what cannot be sent; the text says what to do.
    """
    import base64

    import cloudpickle

    if backend.__module__ == "__mp_main__":  # the script, in a process that multiprocessing has spawned
        cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])

    data = _BoundedBytes()
    try:
        cloudpickle.dump(backend, data)
    except Exception as error:  # what the script holds may raise anything
        why = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        raise PluginError(
            f"backend {name!r} is defined in the script and cannot be sent to the process in which it runs: "
            f"{why:.300}. Move the class into a module"
        ) from error

    return f"{_SENT}{_python_version()}:{base64.b64encode(data.getvalue()).decode()}"


class _BoundedBytes(io.BytesIO):
    """Bytes of a pickle, which ends where it grows too large: the training waits for it."""

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > _MOST_SENT_BYTES:
            raise PluginError(f"what it uses of the script has more than {_MOST_SENT_BYTES >> 20} MiB")

        return super().write(data)


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def available(kind: PluginType) -> dict[str, str]:
    """Return every name of a kind -> import path."""
    return {**_entry_points(kind), **BUILT_IN[kind], **_registered[kind]}


def check_name(kind: PluginType, name: str, *, source: str = "") -> None:
    """Check that a plugin of this name exists, without importing it.

    Args:
        name: a name, or `package:Class`.
        source: where a tracker's name was set, for the text of a warning.

    Raises:
        PluginError: there is none; the text lists the names that exist.
    """
    if ":" not in name and name not in _registered[kind] and name not in BUILT_IN[kind] and name not in available(kind):
        raise PluginError(_unknown(kind, name, source))


def backend_metadata(name: str) -> PluginMetadata | None:
    """Return the metadata of a built-in or registered backend; None for any other, which would have to be imported."""
    path = {**BUILT_IN[PluginType.BACKEND], **_registered[PluginType.BACKEND]}.get(name)
    if path is None:
        return None

    return _metadata_of(_classes.get(path) or _import(path, name))


def known_backends() -> dict[str, PluginMetadata]:
    """Return the metadata of all built-in and registered backends, by name."""
    names = {**BUILT_IN[PluginType.BACKEND], **_registered[PluginType.BACKEND]}
    return {name: metadata for name in names if (metadata := backend_metadata(name)) is not None}


def load(kind: PluginType, name: str, known: Mapping[str, str] | None = None) -> PluginInterface:
    """Return a new plugin by name or import path, not yet initialized.

    Args:
        name: a name, or `package:Class`.
        known: names registered in another process, as `sent_backends` or `registered` returned them there. A class
            that was sent runs code: the caller has checked from whom it is.

    Raises:
        PluginError: there is none of that name, it cannot be imported, or it is of another kind.
    """
    path = name if ":" in name else {**(known or {}), **BUILT_IN[kind], **_registered[kind]}.get(name)
    path = path or _entry_points(kind).get(name)  # last, because looking for them takes long
    if path is None:
        raise PluginError(_unknown(kind, name))

    has_sent = path != name and is_sent(path)
    found = _classes.get(path) or (_unpickle(path, name) if has_sent else _import(path, name))
    where = name if has_sent else path
    base, interface = _BASES[kind], _INTERFACES[kind]
    if not (isinstance(found, type) and issubclass(found, (base, interface))):
        raise PluginError(f"{where} must be a {base.__name__} or a {interface.__name__}, got {found!r:.100}")
    if inspect.isabstract(found):
        role = next(each.__name__ for each in (base, interface) if issubclass(found, each))
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise PluginError(f"{where} cannot be used as {role}: it does not define {missing}")
    if issubclass(found, interface):
        return _plugin_of(found, kind, name)

    plugin: PluginInterface = found()
    return plugin


def create_backend(
    name: str,
    config: Mapping[str, Any],
    known: Mapping[str, str] | None = None,
    on_end: Callable[[Callable[[], object]], object] = lambda _cleanup: None,
) -> BackendInterface:
    """Return a backend that is configured and not yet connected.

    Args:
        name: a name, or `package:Class`.
        config: see `BackendPlugin.create_backend`.
        known: names registered in another process.
        on_end: takes the plugin's `cleanup`, which is to be called when the backend is no longer used.

    Raises:
        PluginError: there is no such backend, an option is unknown, or `local_only` forbids its target.
        ImportError: its library is missing; the text has the command that installs it.
    """
    plugin = load(PluginType.BACKEND, name, known)
    assert isinstance(plugin, BackendPlugin)
    metadata = _metadata_of(type(plugin))
    if (missing := metadata.missing()) is not None:
        raise ImportError(missing)

    options = config.get("options") or {}
    metadata.check_options(options)
    plugin.initialize(options)
    on_end(plugin.cleanup)
    backend = plugin.create_backend(config)
    if not isinstance(backend, BackendInterface):
        raise PluginError(f"backend {name!r}: create_backend() must return a BackendInterface, not {backend!r:.100}")

    if config.get("local_only") and not backend.is_local:
        raise PluginError(
            f"backend {name!r} would deliver to {backend.target}, which is not on this machine, and local_only is set: "
            "choose a local target, or turn local_only off"
        )

    return backend


def _kind_of(found: Any) -> PluginType | None:
    """Return the kind of plugin that a class is, or declares itself to be by its `metadata`."""
    if not isinstance(found, type):
        return None

    return next(
        (
            kind
            for kind in PluginType
            if issubclass(found, _BASES[kind])
            or (issubclass(found, _INTERFACES[kind]) and isinstance(vars(found).get("metadata"), PluginMetadata))
        ),
        None,
    )


def _metadata_of(found: Any) -> PluginMetadata:
    declared = found.get_metadata() if issubclass(found, PluginInterface) else found.metadata
    return PluginMetadata.from_declared(declared, found.__name__, None)


def _unknown(kind: PluginType, name: str, source: str = "") -> str:
    import difflib

    names = sorted(available(kind))
    near = difflib.get_close_matches(name, names, n=1)
    origin, effect = (f" (from {source})", "; nothing is delivered to it") if source else ("", "")
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"there is no {_NOUNS[kind]} {name!r}{origin}{effect}. {hint}Available: {', '.join(names)}, or package:Class"


def _import(path: str, name: str) -> Any:
    from importlib import import_module

    module, _, qualname = path.partition(":")
    try:
        found: Any = import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception as error:  # a third party's module may raise anything while it is imported
        source = "" if path == name else f" from {path}"
        raise PluginError(f"{name} cannot be loaded{source}: {type(error).__name__}: {error}") from error

    return found


def _unpickle(sent: str, name: str) -> Any:
    """Return a class that was sent; the same each time."""
    import base64
    import pickle

    version, _, data = sent.removeprefix(_SENT).partition(":")
    if version != _python_version():
        raise PluginError(f"backend {name!r} was defined in a script by Python {version}: deliver with that version")

    try:
        found = _classes[sent] = pickle.loads(base64.b64decode(data))  # noqa: S301 - as `_import`, of a run that is trusted
    except Exception as error:  # what it needs may be missing here
        raise PluginError(f"{name} cannot be loaded as it was sent: {type(error).__name__}: {error}") from error

    return found


def _entry_points(kind: PluginType) -> dict[str, str]:
    from importlib.metadata import entry_points  # takes 15 ms: only when a name is looked for

    return {each.name: each.value for each in entry_points(group=f"traceml.{kind.value}")}


def _plugin_of(found: type, kind: PluginType, name: str) -> PluginInterface:
    """Return a plugin for a class that implements an interface directly."""
    # A third party's class may have a `metadata` of its own that means something else.
    own = vars(found).get("metadata")
    declared = own if isinstance(own, PluginMetadata) else None
    metadata = replace(PluginMetadata.from_declared(declared, name, kind), name=name)
    body: dict[str, Any] = {"get_metadata": classmethod(lambda _cls: metadata)}
    if kind is PluginType.BACKEND:
        body["create_backend"] = lambda _self, config: _create(found, config)
    elif kind is PluginType.COLLECTOR:
        body["create_collector"] = lambda _self, config: _create(found, config)
    else:
        body["create_framework"] = lambda _self: found()

    plugin: PluginInterface = type(found.__name__ + "Plugin", (_BASES[kind],), body)()
    return plugin


def _create(found: type, config: Mapping[str, Any]) -> Any:
    """Create an object that takes the configuration, or no argument."""
    takes = inspect.signature(found).parameters
    return found(config) if takes else found()
