"""Parts of a Lightning trainer: classes of ours that derive from those of each Lightning package in use."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from types import ModuleType, new_class
from typing import Any, Self, TypeVar

from traceml.integrations.training_session import TrainingSession

__all__ = ["LightningPart", "lightning_packages"]

Part = TypeVar("Part", bound="LightningPart")
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


class LightningPart:
    """Callback or logger, whose instances are also those of Lightning. Its arguments are described by those classes."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Return an instance that is also one of Lightning's class."""
        return _create(cls, tuple(package.__name__ for package in lightning_packages(cls.__name__)))

    def __init__(self, *, report: bool = True, **settings: Any) -> None:
        self.session = TrainingSession(settings, report=report)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle for the processes of `ddp_spawn`, where the class is created again."""
        kind = type(self)
        packages = tuple(name for name in _PACKAGES if name in sys.modules and issubclass(kind, self.base_of(name)))
        return _create, (getattr(kind, "traceml_class", kind), packages), self.__dict__

    @staticmethod
    def base_of(package: str) -> type[Any]:
        """Return the class of a Lightning package to derive from."""
        raise NotImplementedError

    @classmethod
    def unused(cls) -> dict[str, None]:
        """Return attributes of Lightning's class that are None here."""
        return {}


def lightning_packages(needed_by: str) -> list[ModuleType]:
    """Return the packages that are imported, else the first that is installed.

    Args:
        needed_by: name of our class, for the error.

    Raises:
        ImportError: Lightning is not installed.
    """
    found = [sys.modules[name] for name in _PACKAGES if hasattr(sys.modules.get(name), "Callback")]
    if found:
        return found

    for name in _PACKAGES:
        try:
            return [import_module(name)]
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise

    raise ImportError(f"{needed_by} needs Lightning: pip install lightning")


def _create(kind: type[Part], packages: tuple[str, ...]) -> Part:
    missing = tuple(base for base in map(kind.base_of, packages) if not issubclass(kind, base))
    return object.__new__(_class(kind, missing) if missing else kind)  # type: ignore[arg-type]


@cache
def _class(kind: type[Any], bases: tuple[type[Any], ...]) -> type[Any]:
    """Return a class of the same name that also derives from Lightning's."""
    attributes = {"__module__": kind.__module__, "__doc__": kind.__doc__, "traceml_class": kind, **kind.unused()}
    return new_class(kind.__name__, (kind, *bases), exec_body=lambda namespace: namespace.update(attributes))
