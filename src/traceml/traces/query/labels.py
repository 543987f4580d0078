"""Ranks, hosts and files of events, from metadata, headers and names of files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Labels", "metadata_names", "read_labels"]

_RANK = re.compile(r"\brank[\s_:#-]*(\d+)", re.IGNORECASE)
_RANK_IN_PATH = re.compile(r"(?:^|[^a-z])rank[_.=-]?(\d+)", re.IGNORECASE)
_HOST_IN_BRACKETS = re.compile(r"\brank[\s_:#-]*\d+\s*\(([^()]+)\)", re.IGNORECASE)
_TORCH_FILE = re.compile(r"^(.+)_\d+\.\d+\.pt\.trace\.json")
_HASHES = {"HH": "hosts", "FH": "files"}  # dftracer's metadata; SH has other texts
_PROCESS_NAMES = ("process_name", "process_labels")


def metadata_names(fields: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the metadata events that a query needs: dftracer writes one for each file it saw."""
    asked = set(fields)
    hashes = (("host", "HH"), ("file", "FH"))
    return (*_PROCESS_NAMES, *(name for field, name in hashes if field in asked))


class Labels:
    """Labels from metadata; complete after all of it was added."""

    def __init__(self) -> None:
        self.hosts: dict[object, str] = {}
        self.files: dict[object, str] = {}
        self._process_names: dict[tuple[int, object], str] = {}
        self._ranks: dict[int, int] = {}
        self._file_hosts: dict[int, str] = {}

    def add_metadata(self, source: int, events: Iterable[Mapping[str, Any]]) -> None:
        """Add metadata events of one file."""
        for event in events:
            args = event.get("args")
            if not isinstance(args, Mapping):
                continue

            if event.get("name") in _HASHES:
                known: dict[object, str] = getattr(self, _HASHES[event["name"]])
                known[str(args.get("value"))] = str(args.get("name"))
            elif event.get("name") in _PROCESS_NAMES:
                self._name_process(source, event.get("pid"), str(args.get("name") or args.get("labels") or ""))

    def merge(self, other: Labels) -> None:
        """Add the labels of other files, or of other parts of them."""
        self.hosts |= other.hosts
        self.files |= other.files
        self._ranks |= other._ranks
        self._file_hosts |= other._file_hosts
        for (source, pid), name in other._process_names.items():
            self._name_process(source, pid, name)

    def add_file(self, source: int, path: Path, header: Mapping[str, Any]) -> None:
        """Add the labels in a file's header and name."""
        distributed = header.get("distributedInfo")
        rank = distributed.get("rank") if isinstance(distributed, Mapping) else header.get("rank")
        in_path = _RANK_IN_PATH.search(path.name) or _RANK_IN_PATH.search(path.absolute().parent.name)
        if isinstance(rank, int):
            self._ranks[source] = rank
        elif in_path:
            self._ranks[source] = int(in_path[1])

        host = header.get("hostname") or header.get("host_name")
        named = _TORCH_FILE.match(path.name)
        if host or named:
            self._file_hosts[source] = str(host or (named and named[1]))

    def rank(self, source: int, pid: object) -> int | None:
        """Return the rank of a process, None when it is unknown."""
        named = self.process_rank(source, pid)
        return self._ranks.get(source) if named is None else named

    def process_rank(self, source: int, pid: object) -> int | None:
        """Return the rank in a process's own name, None without one."""
        named = _RANK.search(self._process_names.get((source, pid), ""))
        return int(named[1]) if named else None

    def host(self, source: int, pid: object) -> str | None:
        """Return the host of a process, None when it is unknown."""
        named = _HOST_IN_BRACKETS.search(self._process_names.get((source, pid), ""))
        return named[1] if named else self._file_hosts.get(source)

    def process(self, source: int, pid: object) -> str | None:
        """Return the name of a process, None without one."""
        return self._process_names.get((source, pid)) or None

    def _name_process(self, source: int, pid: object, name: str) -> None:
        earlier = self._process_names.get((source, pid))
        if earlier is None or not (_RANK.search(earlier) or name in earlier):
            self._process_names[source, pid] = name if earlier is None else f"{earlier} {name}"


def read_labels(files: Sequence[Path], metadata: tuple[str, ...], first: int = 0) -> Labels:
    """Return the labels of files whose metadata may be anywhere in them.

    Args:
        metadata: the names of the metadata events that are needed.
        first: the number of the first file.
    """
    from traceml.traces.reader.reading import read

    labels, reader = Labels(), read(files, metadata=metadata)
    for batch in reader:
        labels.add_metadata(first + batch.source, batch.metadata)

    for source, facts in enumerate(reader.files, first):
        labels.add_file(source, facts.path, facts.header)

    return labels
