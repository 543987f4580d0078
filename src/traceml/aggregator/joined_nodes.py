"""Other nodes of a job whose ranks send their rows here: their `traceml run` reports the ends of its ranks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traceml.database.flight.flight_archive import ARCHIVE_LIMIT_BYTES, unpack_flight
from traceml.run_folder import COPIES_FOLDER

__all__ = ["JoinedNodes"]

_POLLS, _POLL_S = 500, 0.01
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]")


class JoinedNodes:
    """Nodes that have joined runs of one aggregator and have not reported the end of their part."""

    def __init__(self) -> None:
        self._members: dict[str, set[tuple[str, int]]] = {}
        self._archives: dict[str, bytearray] = {}

    def join(self, run_id: str, args: dict[str, Any]) -> None:
        """Add a node: `{host, pid}` of its `traceml run`."""
        if (member := _member(args)) is not None:
            self._members.setdefault(run_id, set()).add(member)

    def leave(self, run_id: str, args: dict[str, Any]) -> None:
        """Remove a node, of which no report follows."""
        self._members.get(run_id, set()).discard(_member(args))

    async def left(self, run_id: str) -> None:
        """Wait until all nodes have left, five seconds at most: their ranks end when the others do."""
        for _ in range(_POLLS):
            if not self._members.get(run_id):
                break

            await asyncio.sleep(_POLL_S)

    async def take_archive(self, run_dir: Path, args: dict[str, Any]) -> Path | None:
        """Take `{name, data, offset, last}`, a part of a dead rank's archive; after the last, return its flight file.

        A part at offset 0 begins anew: the node sends all again when it was interrupted. One without continues.

        Raises:
            ValueError: it is larger than the limit, or damaged, or a part is missing.
            OSError: it cannot be written.
        """
        name, data, offset = str(args.get("name")), args.get("data"), args.get("offset")
        if offset == 0:
            self._archives.pop(name, None)

        archive = self._archives.setdefault(name, bytearray())
        if offset is not None and offset != len(archive):
            del self._archives[name]
            raise ValueError(f"a part of the files of {name} is missing")

        archive += data if isinstance(data, bytes) else b""
        if len(archive) <= ARCHIVE_LIMIT_BYTES and args.get("last") is not True:
            return None

        del self._archives[name]
        if len(archive) > ARCHIVE_LIMIT_BYTES:
            raise ValueError(f"files of more than {ARCHIVE_LIMIT_BYTES >> 20} MiB of one rank are not taken")

        label = _NOT_IN_NAMES.sub("_", name)[:100]
        return await asyncio.to_thread(unpack_flight, bytes(archive), run_dir / COPIES_FOLDER, label)


def _member(args: Mapping[str, object]) -> tuple[str, int] | None:
    host, pid = args.get("host"), args.get("pid")
    return (host, pid) if isinstance(host, str) and isinstance(pid, int) else None
