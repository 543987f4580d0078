"""Facts of a run other than its rows: program, versions, model, source and machine, as rank 0 reported them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from traceml.database.info_kinds import InfoKind
from traceml.database.schema import INFO, LOGGED
from traceml.database.source_record import SOURCE, SourceReading
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.diagnosis.facts.trainings.models_and_loaders import is_first_trained
from traceml.privacy.masker import Masker

__all__ = ["About", "about_run", "package_versions"]

# Facts are at the beginning, and results at the end; other frames contain texts, images, histograms.
_FRAMES = 64
_KINDS = (InfoKind.PROCESS, InfoKind.MODEL, InfoKind.LOADER, InfoKind.OPTIMIZER)
_COLLECTORS = ("git", "environment", "system")
_UNREAD = {
    "elsewhere": "rank 0 is on another host than the aggregator, or in another container; with "
    "TRACEML_COLLECTORS=git,environment,system it reads them itself",
    "relayed": "they stay with the aggregator on rank 0's host: its page and its reports have them",
    "ended": "the run ended before they were read",
    "late": "reading took too long",
    "failed": "they could not be read; the aggregator's log says why",
}
_NO_GIT = "git did not answer: it is not installed, took too long, or the repository belongs to another user"


@dataclass(frozen=True, slots=True)
class About:
    """Facts of a run by their source; a map is empty if they are missing.

    Attributes:
        process: python, traceml, executable, argv, folder.
        model, loader, optimizer: of the training.
        git: from its collector; without it, commit and branch as the process read them at its start.
        environment, system: from their collectors, which rank 0 or the aggregator on its host has started.
        unread: those of the three that settings do not turn off, and whose collector has told nothing; git outside a
            repository is not one of them.
        not_read: why there are such; empty if unknown.
        params: parameters that the user logged, with personal data masked, as reports are shared.
        tags: tags that the training set, with their values, masked too.
        project: of its last experiment; empty without one.
        relayed: whether an aggregator has sent the run here, which keeps what was logged other than numbers.
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
    project: str = ""
    relayed: bool = False
    unread: tuple[str, ...] = ()
    not_read: str = ""

    @property
    def tag_texts(self) -> list[str]:
        """The tags as `name=value`, or the name of those without one."""
        return [f"{name}={value}" if value else name for name, value in self.tags.items()]


def about_run(reader: StoreReader) -> About:
    """Return the facts that the first rank of the last attempt reported."""
    ranks = [stream for stream in reader.streams() if stream.is_rank]
    first = sorted(ranks, key=lambda stream: (-stream.attempt, stream.rank, -stream.id))[:1]
    found, project = _reported(reader, first)
    reading = _reading_of(reader, first)
    for name, facts in reading.facts.items() if reading is not None else ():
        if name in _COLLECTORS:
            found.setdefault(name, dict(facts))  # what the rank has read itself counts

    process = found.get("process", {})
    head, asked = process.pop("git", None), process.pop("collect", None)
    unread = tuple(name for name in _wanted(asked) if name not in found and (name != "git" or head)) if first else ()
    if isinstance(head, Mapping):
        found.setdefault("git", dict(head))

    for name in ("params", "tags"):
        found[name] = Masker().mask_mapping(found.get(name, {}))

    return About(
        **found,
        project=project,
        relayed=_is_relayed(first),
        unread=unread,
        not_read=_why_not(unread, reading, asked, first) if unread else "",
    )


def _reported(reader: StoreReader, streams: Sequence[StreamRecord]) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the facts of the rows of streams by their kind, and the project."""
    found: dict[str, dict[str, Any]] = {}
    project = ""
    for stream in streams:
        rows = list(reader.first_maps(INFO.name, stream.id, _FRAMES))
        for row in (*_training_loaders(rows), *rows):
            kind = row.get("kind")
            if kind in _KINDS and (
                kind not in found or (kind == InfoKind.MODEL and is_first_trained(found[kind], row))
            ):
                found[kind] = {name: row[name] for name in row if name not in ("kind", "t_ns")}

        for row in reader.outer_maps(LOGGED.name, stream.id, _FRAMES):
            if row.get("kind") == "params":
                found.setdefault("params", {}).update(row.get("params") or {})
            elif row.get("kind") in ("tags", "experiment"):
                found.setdefault("tags", {}).update(row.get("tags") or {})
                project = str(row.get("project") or project)
            elif row.get("kind") == "collected" and row.get("name") in _COLLECTORS:
                found[row["name"]] = dict(row.get("facts") or {})

    return found, project


def _training_loaders(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the loader whose batches are trained on, if it is known: a script may read that of an evaluation first.

    Loaders with the facts of the one before them have no row.
    """
    numbers = [row.get("number") for row in rows if row.get("kind") == InfoKind.TRAINING_LOADER]
    if not numbers or not isinstance(last := numbers[-1], int):
        return ()

    loaders = [row for row in rows if row.get("kind") == InfoKind.LOADER and isinstance(row.get("number"), int)]
    return [row for row in loaders if row["number"] <= last][-1:]


def _is_relayed(first: Sequence[StreamRecord]) -> bool:
    return any(stream.facts.get("relayed") for stream in first)


def _wanted(asked: Any) -> Sequence[str]:
    """Return the collectors that settings have not turned off, as far as the rank has told."""
    names = asked.get("names") if isinstance(asked, Mapping) else None
    return [name for name in _COLLECTORS if name in names] if isinstance(names, list) else _COLLECTORS


def _reading_of(reader: StoreReader, first: Sequence[StreamRecord]) -> SourceReading | None:
    event = reader.last_event(SOURCE)
    reading = None if event is None else SourceReading.from_event(event.data)
    return reading if reading is not None and [reading.stream] == [stream.id for stream in first] else None


def _why_not(unread: Sequence[str], reading: SourceReading | None, asked: Any, first: Sequence[StreamRecord]) -> str:
    """Return why collectors have told nothing.

    Args:
        asked: what the rank has asked it to read; None if it has not.
    """
    if _is_relayed(first):
        return _UNREAD["relayed"]
    if reading is not None:
        return _UNREAD.get(reading.unread, _NO_GIT if unread == ("git",) else "")
    due_s = asked.get("after_s") if isinstance(asked, Mapping) else None
    if not isinstance(due_s, int | float):
        return ""

    began_s, ended_s = (first[0].facts.get(name) for name in ("started", "ended"))
    if ended_s is None:
        return f"they are read when the run is {due_s:g} s old"

    is_short = began_s is not None and ended_s - began_s < due_s
    return f"the run was shorter than {due_s:g} s" if is_short else _UNREAD["ended"]


def package_versions(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the installed packages by name; none where the collector did not run."""
    packages = environment.get("packages") or ()
    lines = packages.splitlines() if isinstance(packages, str) else packages
    if not isinstance(lines, Iterable):
        return {}

    pairs = (str(line).partition("==")[::2] for line in lines)
    return {name: version for name, version in pairs if name}
