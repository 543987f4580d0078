"""`traceml runs rm|tag|note|rename|archive`: remove and label runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import tyro

from traceml.cli.parsing import config_over, parse
from traceml.errors import UsageError
from traceml.formatting import bytes_text, plural, printable
from traceml.runs.find import RunInfo, describe_run, find_run
from traceml.runs.remove import is_delivered, refuse_running, remove_ended
from traceml.runs.run_labels import RunLabels, add_tags, change_labels, remove_tags

__all__ = ["EDITS"]

_Dir = Annotated[str | None, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True)
class RemoveOptions:
    """Remove runs with everything in their folders. Asks first; a running job is refused."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders or ids of the runs."""
    yes: bool = False
    """Do not ask; needed where standard input is not a terminal."""
    json: bool = False
    """Print the removed runs as JSON and nothing else."""
    runs_dir: _Dir = None
    """Folder of the runs (default: the setting runs_dir)."""


@dataclass(frozen=True)
class TagOptions:
    """Add tags to a run, or remove them."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or id of the run."""
    tags: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TAG ...")] = ()
    """The tags; without any, those of the run are printed."""
    remove: bool = False
    """Remove these tags instead of adding them."""
    json: bool = False
    """Print the labels as JSON and nothing else."""
    runs_dir: _Dir = None
    """Folder of the runs (default: the setting runs_dir)."""


@dataclass(frozen=True)
class NoteOptions:
    """Write a note for a run."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or id of the run."""
    text: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[TEXT]")] = None
    """The note; an empty one removes it; without it, that of the run is printed."""
    json: bool = False
    """Print the labels as JSON and nothing else."""
    runs_dir: _Dir = None
    """Folder of the runs (default: the setting runs_dir)."""


@dataclass(frozen=True)
class RenameOptions:
    """Give a run another name in lists and on its page."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or id of the run."""
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")] = ""
    """The name; without it, the run has its own name again."""
    json: bool = False
    """Print the labels as JSON and nothing else."""
    runs_dir: _Dir = None
    """Folder of the runs (default: the setting runs_dir)."""


@dataclass(frozen=True)
class ArchiveOptions:
    """Leave runs out of lists without removing them; `traceml runs --archived` lists them."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders or ids of the runs."""
    undo: bool = False
    """List them again."""
    json: bool = False
    """Print the labels as JSON and nothing else."""
    runs_dir: _Dir = None
    """Folder of the runs (default: the setting runs_dir)."""


def _remove(argv: list[str]) -> int:
    options = parse(RemoveOptions, argv, prog="traceml runs rm")
    infos = [describe_run(path) for path in _found(options.runs, options.runs_dir)]
    refuse_running(infos)
    if not options.yes and not _confirmed(infos):
        print("Nothing was removed", file=sys.stderr)
        return 1

    remove_ended(infos)
    if options.json:
        print(json.dumps([info.id for info in infos]))
    else:
        freed = bytes_text(sum(info.size_bytes for info in infos))
        print(f"{plural(len(infos), 'run')} removed, {freed} freed")

    return 0


def _confirmed(infos: Sequence[RunInfo]) -> bool:
    """Ask on the terminal, naming each run and what would be lost with it."""
    if not sys.stdin.isatty():
        raise UsageError("rm asks for confirmation, and standard input is not a terminal: add --yes")

    for info in infos:
        lost = "" if is_delivered(info.path) else ", not yet delivered to its trackers (`traceml sync`)"
        print(f"{printable(info.id)}  {info.state}, {bytes_text(info.size_bytes)}{lost}", file=sys.stderr)

    print(f"Remove {plural(len(infos), 'run')}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _tag(argv: list[str]) -> int:
    options = parse(TagOptions, argv, prog="traceml runs tag")
    if options.remove and not options.tags:
        raise UsageError("--remove needs the tags to remove: traceml runs tag RUN TAG --remove")

    change = remove_tags if options.remove else add_tags
    labels = _edit(options.run, options.runs_dir, lambda each: change(each, list(options.tags)))
    _show(labels, ", ".join(labels.tags) or "no tags", as_json=options.json)
    return 0


def _note(argv: list[str]) -> int:
    options = parse(NoteOptions, argv, prog="traceml runs note")

    def change(labels: RunLabels) -> None:
        labels.note = labels.note if options.text is None else options.text.strip()

    labels = _edit(options.run, options.runs_dir, change)
    _show(labels, labels.note or "no note", as_json=options.json)
    return 0


def _rename(argv: list[str]) -> int:
    options = parse(RenameOptions, argv, prog="traceml runs rename")

    def change(labels: RunLabels) -> None:
        labels.name = options.name.strip()

    labels = _edit(options.run, options.runs_dir, change)
    _show(labels, labels.name or "its own name", as_json=options.json)
    return 0


def _archive(argv: list[str]) -> int:
    options = parse(ArchiveOptions, argv, prog="traceml runs archive")

    def change(labels: RunLabels) -> None:
        labels.archived = not options.undo

    done = {path.name: change_labels(path, change) for path in _found(options.runs, options.runs_dir)}
    if options.json:
        print(json.dumps({name: {"archived": labels.archived} for name, labels in done.items()}))
    else:
        print(f"{plural(len(done), 'run')} {'listed again' if options.undo else 'archived'}")

    return 0


def _found(runs: Sequence[str], runs_dir: str | None) -> list[Path]:
    if not runs:
        raise UsageError("name a run: its folder, id or name, or `latest`")

    folder = _folder(runs_dir)
    return list(dict.fromkeys(find_run(run, folder) for run in runs))


def _folder(runs_dir: str | None) -> Path:
    return Path(config_over(runs_dir).runs_dir)


def _edit(run: str, runs_dir: str | None, change: Callable[[RunLabels], None]) -> RunLabels:
    return change_labels(find_run(run, _folder(runs_dir)), change)


def _show(labels: RunLabels, text: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(msgspec.to_builtins(labels)))
    else:
        print(printable(text, lines=True))


EDITS: dict[str, Callable[[list[str]], int]] = {
    "rm": _remove, "tag": _tag, "note": _note, "rename": _rename, "archive": _archive,
}  # fmt: skip
"""Word after `traceml runs` -> function of its arguments."""
