"""Discovery of traces by files, folders and patterns, and the identity of a file."""

from __future__ import annotations

import codecs
import glob
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from traceml.errors import TraceNotFoundError

__all__ = [
    "GZIP_MAGIC",
    "SKIPPABLE",
    "ZSTD_MAGIC",
    "ZSTD_START_BYTES",
    "Identity",
    "conversion_advice",
    "discover",
    "first_text",
    "identity",
    "is_zstd",
    "may_be_json",
]

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC, ZSTD_START_BYTES = b"\x28\xb5\x2f\xfd", 4
SKIPPABLE = range(0x184D2A50, 0x184D2A60)  # magic numbers of zstd frames without text; pzstd begins with one
_SUFFIXES = (".pfw", ".pfw.gz", ".pfw.zst")  # these are traces even when nothing in them is readable
_FTRACE = re.compile(rb"^# tracer: |^[ \t]*\S[^\n]{0,40}-\d+ +(?:\( *[\d-]+\) +)?\[\d{3}\] ", re.MULTILINE)
_SYSTRACE = (b"systrace", b"trace-viewer", b"trace viewer", b"tracing_analyzer")
_OF_SYSTRACE = (
    "This is systrace's format, which is not read. Convert it by Perfetto's tool: traceconv json FILE trace.json"
)
_NOT_READ = (
    (b"BZh", "bzip2", "bunzip2 --keep FILE"),
    (b"\xfd7zXZ\0", "xz", "unxz --keep FILE"),
    (b"PK\x03\x04", "A zip archive", "unzip FILE"),
    (codecs.BOM_UTF16_LE, "Text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > trace.json"),
    (codecs.BOM_UTF16_BE, "Text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > trace.json"),
)  # first bytes of a file, its format, and the command that converts it
_SNIFFED_BYTES = 64 * 1024  # of a file in a folder: torch.profiler writes its device properties before the events

# Device, inode, size in bytes, times of modification and of change in nanoseconds.
Identity = tuple[int, int, int, int, int]


def discover(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Find trace files.

    Examples:
        >>> [path.name for path in traces.discover("*.pfw.gz")]
        ['trace.pfw.gz']

    Args:
        paths: a file (taken as it is), a folder (all traces in and under it, recognized by their content), a pattern
            with `*`, `?` or `[`, or several of these.

    Returns:
        The files, each once, in the order of `paths`; those of one folder or pattern are sorted.

    Raises:
        TraceNotFoundError: no trace was found under a path.
    """
    named = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not named:
        raise TraceNotFoundError("no trace was named: give a file, a folder or a pattern")

    found: dict[Path, Path] = {}
    for path in named:
        if path == "":  # a variable that is not set; Path would take it for the working directory
            raise TraceNotFoundError("the path of a trace is empty; the working directory is '.'")

        for file in _under(Path(path)):
            found.setdefault(file.resolve(), file)

    return list(found.values())


def identity(path: Path) -> Identity:
    """Return values that change when a file is written to or replaced."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns  # mtime can be set


def _looks_like_a_trace(path: Path) -> bool:
    """Return whether a file in a folder is a trace, by its name and first bytes."""
    if path.name.endswith(_SUFFIXES):
        return True

    start = first_text(path)
    return may_be_json(start) and (b'"traceEvents"' in start or b'"ph"' in start)


def is_zstd(start: bytes) -> bool:
    """Return whether bytes begin a zstd frame; the first ZSTD_START_BYTES show it."""
    return start.startswith(ZSTD_MAGIC) or int.from_bytes(start[:ZSTD_START_BYTES], "little") in SKIPPABLE


def first_text(path: Path, size: int = _SNIFFED_BYTES) -> bytes:
    """Return the first text of a possible trace, about `size` bytes at most; empty when there is none."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            if start.startswith(GZIP_MAGIC):
                return zlib.decompressobj(31).decompress(start + file.read(size), size)

            if is_zstd(start):
                return _first_of_zstd(start + file.read(size), size)

            return start + file.read(size) if may_be_json(start) else b""
    except (OSError, zlib.error):
        return b""


def conversion_advice(path: Path) -> str:
    """Return how to convert a file of a known format that is not read; empty for others."""
    try:
        with path.open("rb") as file:
            start = file.read(_SNIFFED_BYTES)
    except OSError:
        return ""

    if _is_systrace(start):
        return _OF_SYSTRACE

    found = ((name, command) for magic, name, command in _NOT_READ if start.startswith(magic))
    return next((f"{name} is not read. Convert it first: {command}" for name, command in found), "")


def _is_systrace(start: bytes) -> bool:
    """Whether a file that begins so is of systrace: lines of ftrace, or a page that shows them."""
    is_page = start.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))
    return _FTRACE.search(start) is not None or (is_page and any(word in start.lower() for word in _SYSTRACE))


def _under(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in _walk(path) if _looks_like_a_trace(file))
        looked = "a folder in which no file is a trace (.pfw, .pfw.gz, Chrome JSON, torch.profiler's JSON)"
    elif path.is_fifo():
        raise TraceNotFoundError(f"{path}: a pipe. A trace is read at several places at once: write it to a file first")
    elif path.exists():
        return [path]
    elif any(mark in str(path) for mark in "*?["):
        hits = [Path(hit) for hit in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - absolute ones too
        files = [file for hit in hits for file in (_under(hit) if hit.is_file() else [])]
        looked = "a pattern that matches no file"
    else:
        raise TraceNotFoundError(f"{path}: there is no such file or folder")

    if not files:
        raise TraceNotFoundError(f"{path}: {looked}")

    return files


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (file for name in names if (file := Path(parent, name)).is_file() and not name.startswith("."))


def _first_of_zstd(data: bytes, size: int) -> bytes:
    import zstandard

    try:
        text: bytes = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read(size)
    except zstandard.ZstdError:
        return b""

    return text


def may_be_json(start: bytes) -> bool:
    """Return whether bytes begin as JSON of events does."""
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{")
