"""Facts of a run other than its rows: program, versions, model, source and machine, as rank 0 reported them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from traceml.database.schema import INFO, LOGGED
from traceml.database.store.reader import StoreReader
from traceml.privacy.masker import Masker

__all__ = ["About", "about_run", "package_versions"]

# Facts are at the beginning; later frames contain texts, images, histograms.
_FRAMES = 64


@dataclass(frozen=True, slots=True)
class About:
    """Facts of a run by their source; a map is empty where they are missing.

    Attributes:
        process: python, traceml, executable, argv, folder.
        model, loader, optimizer: of the training.
        git: from its collector; without it, commit and branch as the process read them at its start.
        environment, system: from their collectors.
        params: parameters that the user logged, with personal data masked, as reports are shared.
        tags: tags that the training set, with their values, masked too.
    """

    process: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    loader: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    git: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    system: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)


def about_run(reader: StoreReader) -> About:
    """Return the facts that the first rank of the last attempt reported.

    Raises:
        StoreError: the store cannot be read.
    """
    streams = sorted(reader.streams(), key=lambda stream: (-stream.attempt, stream.rank, -stream.id))
    found: dict[str, dict[str, Any]] = {}
    for stream in streams[:1]:
        for row in _rows(reader, INFO.name, stream.id):
            if row.get("kind") in ("process", "model", "loader", "optimizer"):
                found.setdefault(row["kind"], {name: row[name] for name in row if name not in ("kind", "t_ns")})

        for row in _rows(reader, LOGGED.name, stream.id):
            if row.get("kind") == "params":
                found.setdefault("params", {}).update(row.get("params") or {})
            elif row.get("kind") in ("tags", "experiment"):
                found.setdefault("tags", {}).update(row.get("tags") or {})
            elif row.get("kind") == "collected" and row.get("name") in ("git", "environment", "system"):
                found[row["name"]] = dict(row.get("facts") or {})

    head = found.get("process", {}).pop("git", None)
    if isinstance(head, Mapping):
        found.setdefault("git", dict(head))

    for name in ("params", "tags"):
        found[name] = Masker().mask_mapping(found.get(name, {}))

    return About(**found)


def package_versions(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the installed packages by name; none where the collector did not run."""
    packages = environment.get("packages") or ()
    lines = packages.splitlines() if isinstance(packages, str) else packages
    if not isinstance(lines, Iterable):
        return {}

    pairs = (str(line).partition("==")[::2] for line in lines)
    return {name: version for name, version in pairs if name}


def _rows(reader: StoreReader, name: str, stream: int) -> list[dict[str, Any]]:
    if name not in reader.tables:
        return []  # written by a version before it

    return [row for frame in reader.frames(name, stream=stream, limit=_FRAMES) for row in frame.maps()]
