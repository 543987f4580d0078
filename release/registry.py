"""Reasons for which a package registry refuses a file, or users cannot install it."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.metadata import InvalidMetadata, Metadata
from packaging.requirements import Requirement
from packaging.utils import parse_sdist_filename, parse_wheel_filename

__all__ = ["refusals"]

_MAX_BYTES = 100 << 20  # the registry's limit for a file
_PORTABLE = re.compile(r"any|(manylinux|musllinux)_\d+_\d+_\w+|manylinux(1|2010|2014)_\w+")
_LIBRARY = re.compile(r"\.so(\.\d+)*$")
_TOOLS = re.compile(r"(^|/)(__pycache__|\.venv|\.git|build|dist|traceml_runs)/")
# Without these a source distribution is not the project: it could not be tested, or its examples run.
_IN_SDIST = (
    "pyproject.toml", "hatch_build.py", "Makefile", "constraints.txt", "LICENSE", "README.md", "CHANGELOG.md",
    "CONTRIBUTING.md", "examples/mnist.py", "tests/conftest.py", "release/build.py", "docs/quickstart.md",
    "src/traceml/instrument/native/hook_type.c", "src/traceml/traces/native/scanner.c",
)  # fmt: skip
_IN_WHEEL = (
    "traceml/__init__.py",
    "traceml/py.typed",
    "traceml_torch/__init__.py",
    "traceml/cli/demonstration/_demo_train.py",
)


def refusals(path: Path) -> list[str]:
    """Return why a wheel or source distribution would be refused, or does not work where it is installed.

    Args:
        path: of a finished file.
    """
    is_wheel = path.suffix == ".whl"
    names = _names(path)
    text = _metadata(path)
    size = path.stat().st_size
    found = [f"has {size} bytes; a registry takes {_MAX_BYTES}"] if size > _MAX_BYTES else []
    found += _of_metadata(text)
    found += _of_wheel(path, names) if is_wheel else _of_sdist(path, names)
    return [*found, *(f"contains {name}" for name in sorted(names) if _TOOLS.search(name))]


def _names(path: Path) -> set[str]:
    """Return the files inside; those of a source distribution without its top folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return set(wheel.namelist())

    with tarfile.open(path) as sdist:
        return {each.name.partition("/")[2] for each in sdist.getmembers() if each.isfile()}


def _metadata(path: Path) -> bytes:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")))

    with tarfile.open(path) as sdist:
        top = path.name.removesuffix(".tar.gz")
        file = sdist.extractfile(f"{top}/PKG-INFO")
        assert file is not None
        return file.read()


def _of_metadata(text: bytes) -> Iterator[str]:
    try:
        metadata = Metadata.from_email(text)
    except ExceptionGroup as group:
        yield from (str(error) for error in group.exceptions if isinstance(error, InvalidMetadata))
        return

    if metadata.version.local:
        yield f"its version {metadata.version} is local"

    if not metadata.description:
        yield "has no description"

    for need in metadata.requires_dist or ():
        if Requirement(str(need)).url:
            yield f"needs {need}: a registry refuses direct references"


def _of_wheel(path: Path, names: set[str]) -> Iterator[str]:
    _, _, _, tags = parse_wheel_filename(path.name)
    for platform in sorted({tag.platform for tag in tags}):
        if not _PORTABLE.fullmatch(platform):
            yield f"its platform {platform!r} is of one machine: `auditwheel repair` gives it a manylinux tag"

    libraries = sorted(name for name in names if _LIBRARY.search(name))
    is_pure = all(tag.platform == "any" for tag in tags)
    if is_pure and libraries:
        yield f"is for any platform, but contains {', '.join(libraries)}"

    if not is_pure and not libraries:
        yield "is for one platform, but contains nothing that was compiled"

    yield from (f"lacks {name}" for name in _IN_WHEEL if name not in names)
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        yield "lacks its license"


def _of_sdist(path: Path, names: set[str]) -> Iterator[str]:
    parse_sdist_filename(path.name)
    yield from (f"lacks {name}" for name in _IN_SDIST if name not in names)
    yield from (f"contains {name}, which was compiled here" for name in sorted(names) if _LIBRARY.search(name))
