"""Description of a plugin: its name, options and library, and for a tracker its address and credentials."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from traceml.errors import PluginError
from traceml.installation import install_command, unsupported

__all__ = ["PluginMetadata", "PluginType", "first_set"]

_OptionType = type | tuple[type, ...]
_OptionReader = Callable[[Mapping[str, str]], str]


class PluginType(StrEnum):
    """Kind of plugin; the value is the end of its entry-point group."""

    BACKEND = "backends"
    FRAMEWORK = "frameworks"
    COLLECTOR = "collectors"


@dataclass(frozen=True, kw_only=True)
class PluginMetadata:
    """Facts about a plugin; the built-in ones and third parties' declare the same.

    Examples:
        >>> metadata = traceml.PluginMetadata(name="watts", version="1.0", dependencies=("wattmeter",))
        >>> print(metadata.missing())
        watts needs wattmeter, which is not installed: pip install wattmeter

    Args:
        name: what users write in `backend=[…]`, `frameworks=[…]` or `collectors=[…]`.
        version: the plugin's own.
        type: kind of plugin; taken from the base class when left out.
        description: one line, shown by `traceml doctor`.
        author: whom to ask.
        dependencies: modules that must be importable; the error for a missing one has the command that installs it.
        extra: the extra of a distribution that installs them, as in `pip install 'traceml-torch[mlflow]'`.
        options: options by name, with their type or types; empty accepts any option.
        option_variables: options that the tracker's own environment variables set: by option, what returns its value
            from the environment, "" where they set none. Delivery then uses them whatever its own environment says.
        exclusive_options: options of which one is the whole place: with it, variables set none of the others.
        address_option: the option that `start_logging(backend_url=…)` sets.
        key_variable: the environment variable that a key alone goes into.
        project_variable: the environment variable that names the project where the user names none.
        environment: patterns of the environment variables that the tracker's library reads; only its own delivery
            process gets those. None means variables that begin with the plugin's name.
    """

    name: str
    version: str
    type: PluginType | None = None
    description: str = ""
    author: str = ""
    dependencies: tuple[str, ...] = ()
    extra: str | None = None
    options: Mapping[str, _OptionType] = field(default_factory=dict)
    option_variables: Mapping[str, _OptionReader] = field(default_factory=dict)
    exclusive_options: tuple[str, ...] = ()
    address_option: str | None = None
    key_variable: str | None = None
    project_variable: str | None = None
    environment: tuple[str, ...] | None = None

    @classmethod
    def from_declared(cls, declared: object, name: str, kind: PluginType | None) -> PluginMetadata:
        """Return what a plugin declares about itself: ours, or the fields of the same names of any other object."""
        if isinstance(declared, cls):
            return declared

        given = {each.name: getattr(declared, each.name) for each in fields(cls) if hasattr(declared, each.name)}
        return cls(**{"name": name, "version": "", "type": kind, **given})

    def missing(self) -> str | None:
        """Return which dependency is not installed and how to install it, or None; imports nothing."""
        from importlib.util import find_spec

        missing = [module for module in self.dependencies if find_spec(module.partition(".")[0]) is None]
        if not missing:
            return None

        reason = f"{self.name} needs {', '.join(missing)}, which is not installed: "
        if self.extra is None:
            return f"{reason}pip install {' '.join(missing)}"

        return reason + (unsupported(self.extra) or install_command(self.extra))

    def environment_options(
        self,
        options: Mapping[str, Any],
        environ: Mapping[str, str] = os.environ,
        is_allowed: Callable[[str], bool] = bool,
    ) -> dict[str, str]:
        """Return the options that environment variables set in addition to the given ones.

        Args:
            is_allowed: returns whether a value may be an option.
        """
        found: dict[str, str] = {}
        for option, read in self.option_variables.items():
            rivals = self.exclusive_options if option in self.exclusive_options else (option,)
            is_given = any(options.get(rival) or rival in found for rival in rivals)
            if not is_given and (value := read(environ)) and is_allowed(value):
                found[option] = value

        return found

    def with_environment(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options, and those that this process's environment variables set in addition."""
        return {**options, **self.environment_options(options)}

    def check_options(self, options: Mapping[str, object]) -> None:
        """Check the names and types of options.

        Raises:
            PluginError: there is no such option, or its value has another type.
        """
        if not self.options:
            return

        for key, value in options.items():
            types = self.options.get(key)
            if types is None:
                known = ", ".join(sorted(self.options))
                raise PluginError(f"backend {self.name!r} has no option {key!r}; there are: {known}")
            if not isinstance(value, types):
                wanted = " or ".join(each.__name__ for each in (types if isinstance(types, tuple) else (types,)))
                raise PluginError(f"option {key!r} of backend {self.name!r} is {value!r:.100}; it must be {wanted}")


def first_set(*variables: str) -> _OptionReader:
    """Return a reader of the first of these environment variables that is set."""
    return lambda environ: next(filter(None, map(environ.get, variables)), "")
