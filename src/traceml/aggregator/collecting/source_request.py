"""Request of a rank that leaves it to its aggregator to read about its code, environment and machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec

from traceml.database.schema import INFO, LOGGED
from traceml.database.source_reading import SOURCE, SourceReading
from traceml.database.store.reader import StoreReader
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import BUILT_IN

__all__ = ["SourceRequest", "find_request"]

# Of a rank's info and logged rows: those of its start are first.
_FRAMES = 8
_GIT_TIMEOUT_S = 120.0  # while a training takes all cores


class CollectRequest(msgspec.Struct, kw_only=True):
    """Names of collectors, the rank's `sys.path`, its setting `mask`, and the age of the run at which they read."""

    names: list[str]
    path: list[str]
    mask: list[str] = []
    after_s: float


class SourceRequest(msgspec.Struct, kw_only=True):
    """Row `process` of a rank, as far as collectors need it."""

    kind: str
    argv: list[str] = []
    folder: str = ""
    executable: str = ""
    python: str = ""
    collect: CollectRequest | None = None

    def line(self, names: list[str], pid: int) -> bytes:
        """Return the request for the process of the collectors; see `collector_main`."""
        assert self.collect is not None
        config = {
            "script": self.argv[0] if self.argv else "", "folder": self.folder, "argv": self.argv,
            "executable": self.executable, "python": self.python, "path": self.collect.path,
            "mask": self.collect.mask, "environ": _environ(pid), "git_timeout_s": _GIT_TIMEOUT_S,
        }  # fmt: skip
        # No path and no name of the rank's: the process imports nothing from where another process says.
        request = {"collectors": names, "known": {}, "mask": self.collect.mask, "path": [], "config": config}
        return json.dumps(request).encode() + b"\n"


def find_request(store: Path, stream: int) -> tuple[SourceRequest | None, list[str]]:
    """Return a rank's row `process`, None while it is not stored, and the built-in collectors that it asks for.

    Those that the rank has started itself meanwhile, as with an `Experiment`, are left out; all where another reading
    has come to its end, of an earlier aggregator.

    Raises:
        StoreError: the store cannot be read.
        msgspec.ValidationError: the row has values of other types.
    """
    with StoreReader(store) as reader:
        row = next((row for row in reader.first_maps(INFO.name, stream, _FRAMES) if row.get("kind") == "process"), None)
        if row is None:
            return None, []

        request = msgspec.convert(row, SourceRequest)
        wanted = request.collect.names if request.collect is not None else ()
        last = reader.last_event(SOURCE)
        if last is not None and SourceReading.from_event(last.data).is_whole_for(stream):
            return request, []

        logged = reader.first_maps(LOGGED.name, stream, _FRAMES)
        own = {row.get("name") for row in logged if row.get("kind") == "collected"}

    return request, [name for name in BUILT_IN[PluginType.COLLECTOR] if name in wanted and name not in own]


def _environ(pid: int) -> dict[str, str] | None:
    """Return the variables with which a program of this user was started.

    None where they are not known: for a forked process, such as a worker of a launch, the kernel shows its parent's.
    """
    own = Path("/proc", str(pid))
    try:
        if own.stat().st_uid != os.getuid() or _is_fork(own):
            return None

        text = (own / "environ").read_bytes().decode("utf-8", "replace")
    except (OSError, ValueError):
        return None

    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def _is_fork(process: Path) -> bool:
    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
    return (process / "cmdline").read_bytes() == Path("/proc", parent, "cmdline").read_bytes()
