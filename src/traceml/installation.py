"""The installed distribution: its name, commands that install its extras, other distributions of the same package."""

from __future__ import annotations

import logging
import sys
from functools import cache
from pathlib import Path

__all__ = [
    "DISTRIBUTION",
    "PACKAGE",
    "foreign_distributions",
    "foreign_hint",
    "free_threading_limits",
    "install_command",
    "unsupported",
    "warn_of_foreign",
]

DISTRIBUTION = "traceml-torch"
# Other products that install a folder `traceml` too, by the normalized names of their metadata folders.
_FOREIGN = ("traceml", "traceml_ai")
_METADATA = (".dist-info", ".egg-info")
PACKAGE = Path(__file__).parent
"""The folder of the package; products of the same name install into the folder around it."""
# Extras whose library has no release for newer versions of Python: the first version without one.
_ENDS: dict[str, tuple[int, int]] = {"aim": (3, 13)}


def install_command(extra: str) -> str:
    """Return the command that installs an extra: `pip install 'traceml-torch[web]'`."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def unsupported(extra: str, python: tuple[int, int] = sys.version_info[:2]) -> str:
    """Return why an extra cannot be installed for this Python, as a sentence without a period; "" if it can.

    Args:
        extra: name of an extra in `pyproject.toml`.
        python: major and minor version of the interpreter.
    """
    end = _ENDS.get(extra)
    if end is None or python < end:
        return ""

    return f"{extra} has no release for Python {python[0]}.{python[1]}: use Python {end[0]}.{end[1] - 1} or older"


def free_threading_limits() -> str:
    """Return what a free-threaded Python means for tracing, as a sentence without a period; "" for a usual Python."""
    if "t" not in sys.abiflags:
        return ""

    return (
        "this Python is free-threaded: traceml is not tested with it, and must use its hooks in Python (the stable ABI "
        "of those in C does not cover it), which cost some microseconds more per step"
    )


def foreign_distributions(folder: Path = PACKAGE.parent) -> list[str]:
    """Return names and versions of other products that have installed a package `traceml` into the same folder.

    It reads names in one folder, so that a training process can afford it.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:  # inside a zip file
        return []

    stems = (name.removesuffix(suffix) for suffix in _METADATA for name in names if name.endswith(suffix))
    parts = (stem.partition("-") for stem in stems)
    return sorted(f"{name.replace('_', '-')} {version}" for name, _, version in parts if name.lower() in _FOREIGN)


@cache
def warn_of_foreign() -> None:
    """Log, once per process, that other products have installed files into our package."""
    if found := foreign_distributions():
        logging.getLogger("traceml").warning(
            "%s installed a package `traceml` over this one, in %s, and either may fail: %s",
            " and ".join(found), PACKAGE, foreign_hint(found),
        )  # fmt: skip


def foreign_hint(found: list[str]) -> str:
    """Return what to do about other distributions of the package."""
    names = " ".join(each.split()[0] for each in found)
    return f"pip uninstall {names}, then install {DISTRIBUTION} again as before, with --force-reinstall --no-deps"
