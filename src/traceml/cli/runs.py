"""`traceml runs`: the runs in the folder of runs, listed, labeled and removed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from rich.cells import cell_len
from rich.text import Text

from traceml.cli.options.number_range import NumberRange
from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.cli.options.runs_dir_options import RunsDirOptions
from traceml.database.states import ENDED_BADLY
from traceml.errors import UsageError
from traceml.formatting import bytes_text, cut_text, plural, printable
from traceml.renderers.run_cells import TEXT_FIELDS, run_cell
from traceml.renderers.text.viewport import column_text, plain_console
from traceml.runs.find import RunInfo, describe_run, find_run, list_runs, why_unreadable
from traceml.runs.remove import check_removable, is_delivered, prune, remove_ended
from traceml.runs.run_labels import RunLabels, add_tags, change_labels, remove_tags
from traceml.runs.run_query import FIELDS, RunFields, select_runs, sort_runs
from traceml.runs.run_state import UNREADABLE_STATES

__all__ = ["EDITS", "main"]

_FIRST_COLUMNS, _MORE_COLUMNS = ("id", "state", "verdict"), ("ranks", "samples/s", "took", "size")
_WIDTHS = {"state": 8, "verdict": 17, "ranks": 5, "samples/s": 9, "took": 7, "size": 8}
_LONGEST = 40


@dataclass(frozen=True)
class RunsOptions(RunsDirOptions):
    """List the runs in the folder of runs, newest first, or remove old ones.

    Runs are removed and labeled by `traceml runs rm|tag|note|rename|archive RUN`.
    """

    where: Annotated[tuple[str, ...], Metavar("CONDITIONS", one_each=True)] = ()
    """Only runs that meet all of these: 'lr<0.1 tag:baseline state=finished'. Names are columns, parameters or metrics.
    Operators: = != < <= > >= ~ (contains). A single word is looked for in id, name, project, state, verdict and
    tags; ! negates."""
    sort: Annotated[str | None, Metavar("FIELD")] = None
    """Sort by this column, parameter or metric, the smallest first (default: the newest first)."""
    reverse: bool = False
    """Sort in reverse order."""
    columns: Annotated[str | None, Metavar("FIELD,...")] = None
    """Columns to show: id, name, project, user, state, verdict, severity, ranks, samples/s, step_ms, steps, took, size,
    started, tags, note, archived, git.commit, git.branch, git.dirty, and any parameter or metric (its last value)."""
    archived: bool = False
    """List archived runs too."""
    prune: bool = False
    """Remove all but your newest runs without asking, except running and tagged ones: --keep N, or the setting
    keep_runs."""
    keep: Annotated[int | None, NumberRange(minimum=0), Metavar("N")] = None
    """With --prune: the number of runs to keep."""
    json: bool = False
    """Print the list as JSON and nothing else."""


def main(argv: list[str]) -> int:
    """List runs, label them, or remove some."""
    if argv and argv[0] in EDITS:
        return EDITS[argv[0]](argv[1:])
    if argv and not argv[0].startswith("-"):
        raise UsageError(f"there is no action {argv[0]!r}; there are {', '.join(EDITS)}")

    try:
        options = parse(RunsOptions, argv, prog="traceml runs")
    except UsageError as error:
        raise _with_action_first(error) from None

    config = options.config
    if options.keep is not None and not options.prune:
        raise UsageError("--keep requires --prune")

    if options.prune:
        _check_prune(options)
        removed = prune(config.runs_dir, _keep(options, config.keep_runs))
        _print_json([RunFields(info) for info in removed]) if options.json else _print_removed(removed)
        return 0

    every = [RunFields(info) for info in list_runs(config.runs_dir)]
    runs = _chosen(every, options)
    if options.json:
        _print_json(runs, _names(options.columns) if options.columns else ())
    elif runs:
        columns = _names(options.columns or "") or [*_FIRST_COLUMNS, *_labels_of(runs), *_MORE_COLUMNS]
        _print_list(runs, columns, may_cut=not options.columns)
        _print_unreadable([run.info for run in runs])
    elif every:
        print(
            f"No run in {config.runs_dir} meets the conditions, of {plural(len(every), 'run')} with the archived ones"
        )
    else:
        print(f"No runs in {config.runs_dir}. Make one with: traceml run SCRIPT")

    return 0


def _check_prune(options: RunsOptions) -> None:
    """Refuse conditions: --prune removes by age, and a condition that is ignored would remove too much."""
    if options.where or options.sort or options.columns or options.reverse:
        raise UsageError(
            "--prune removes the oldest runs, and takes no conditions; `traceml runs rm RUN` removes others"
        )


def _chosen(runs: list[RunFields], options: RunsOptions) -> list[RunFields]:
    for name in _names(options.columns or ""):
        if runs and not any(run.has(name) for run in runs):
            raise UsageError(
                f"--columns: no run has a field, parameter or metric {name!r}. Fields: {', '.join(FIELDS)}"
            )

    chosen = runs if options.archived else [run for run in runs if not run.info.archived]
    chosen = select_runs(chosen, " ".join(options.where)) if options.where else chosen
    if options.sort:
        return sort_runs(chosen, options.sort, reverse=options.reverse)

    return chosen[::-1] if options.reverse else chosen


def _names(columns: str) -> list[str]:
    return [name.strip() for name in columns.split(",") if name.strip()]


def _labels_of(runs: Sequence[RunFields]) -> list[str]:
    """Return the labels that at least one run has; a name that people gave it is not in its id."""
    infos = [run.info for run in runs]
    given = {
        "name": any(info.renamed for info in infos),
        "tags": any(info.tags for info in infos),
        "note": any(info.note for info in infos),
    }
    return [name for name, is_given in given.items() if is_given]


def _print_json(runs: Sequence[RunFields], columns: Sequence[str] = ()) -> None:
    print(json.dumps(msgspec.to_builtins([run.record(columns) for run in runs], enc_hook=str), indent=2))


def _keep(options: RunsOptions, setting: int | None) -> int:
    keep = options.keep if options.keep is not None else setting
    if keep is None:
        raise UsageError("--prune needs the number of runs to keep: --keep N, or TRACEML_KEEP_RUNS=N")

    return keep


def _print_removed(infos: Sequence[RunInfo]) -> None:
    for info in infos:
        print(f"removed {printable(info.id)}")

    print(_removed_text(infos) if infos else "Nothing to remove")


def _removed_text(infos: Sequence[RunInfo]) -> str:
    return f"{plural(len(infos), 'run')} removed, {bytes_text(sum(info.size_bytes for info in infos))} freed"


def _with_action_first(error: UsageError) -> UsageError:
    """Return an error that says where an action goes if it stands behind options, else `error` itself."""
    action = str(error).partition("unrecognized arguments: ")[2].partition(",")[0]
    return UsageError(f"{action} comes before options: traceml runs {action} ...") if action in EDITS else error


def _print_unreadable(infos: Sequence[RunInfo]) -> None:
    """Say what to do about runs of which nothing is listed because their stores cannot be read."""
    advice = {
        "newer": "a newer traceml has written it: update this one to read it",
        "older": "only an older traceml reads its format",
    }
    for state in UNREADABLE_STATES:
        found = [info for info in infos if info.state == state]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            text = advice.get(state) or printable(why_unreadable(found[0].path))
            print(f"{state}: {printable(found[0].id)}{more}: {text}", file=sys.stderr)


def _print_list(runs: Sequence[RunFields], columns: list[str], *, may_cut: bool) -> None:
    """Print a line per run; the last columns are left out where the terminal has no room for them, if they may be."""
    console = plain_console()
    rows = [[_cell(run, name) for name in columns] for run in runs]
    heads = ["run" if name == "id" else name for name in columns]
    widths = [
        max(_WIDTHS.get(name, 0), *map(cell_len, (head, *(row[at] for row in rows))))
        for at, (name, head) in enumerate(zip(columns, heads, strict=True))
    ]
    if may_cut and console.is_terminal:
        widths = widths[: _fitting(widths, console.width)]

    columns, heads = columns[: len(widths)], heads[: len(widths)]
    sides = ["<" if name in TEXT_FIELDS else ">" for name in columns]
    console.print(_line(heads, widths, sides, ["dim"] * len(heads)), soft_wrap=True)
    for run, row in zip(runs, rows, strict=True):
        is_bad = run.info.state in (*ENDED_BADLY, *UNREADABLE_STATES)
        styles = ["red" if is_bad and name == "state" else "" for name in columns]
        console.print(_line(row[: len(widths)], widths, sides, styles), soft_wrap=True)


def _fitting(widths: Sequence[int], room: int) -> int:
    """Return how many columns fit beside each other, at least three: run, state and verdict."""
    ends = [sum(widths[:count]) + 2 * (count - 1) for count in range(1, len(widths) + 1)]
    return max(sum(end <= room for end in ends), 3)


def _line(cells: Sequence[str], widths: Sequence[int], sides: Sequence[str], styles: Sequence[str]) -> Text:
    line = Text("  ").join(
        Text(column_text(cell, width, right=side == ">"), style=style)
        for cell, width, side, style in zip(cells, widths, sides, styles, strict=True)
    )
    line.rstrip()
    return line


def _cell(run: RunFields, name: str) -> str:
    text = run_cell(run, name)
    return text if name == "id" else cut_text(text, _LONGEST)


@dataclass(frozen=True)
class RemoveOptions(RunsDirOptions):
    """Remove runs with everything in their folders. Asks first; a running job is refused."""

    runs: Annotated[tuple[str, ...], Positional("RUN ...")] = ()
    """Folders or ids of the runs."""
    yes: bool = False
    """Do not ask; needed where standard input is not a terminal."""
    json: bool = False
    """Print the removed runs as JSON and nothing else."""


@dataclass(frozen=True, kw_only=True)
class _LabelOptions(RunsDirOptions):
    """Options of a command that changes the labels of runs."""

    json: bool = False
    """Print the labels as JSON and nothing else."""


@dataclass(frozen=True)
class TagOptions(_LabelOptions):
    """Add tags to a run, or remove them."""

    run: Annotated[str, Positional("RUN")]
    """Folder or id of the run."""
    tags: Annotated[tuple[str, ...], Positional("TAG ...")] = ()
    """The tags; without any, those of the run are printed."""
    remove: bool = False
    """Remove these tags instead of adding them."""


@dataclass(frozen=True)
class NoteOptions(_LabelOptions):
    """Write a note for a run."""

    run: Annotated[str, Positional("RUN")]
    """Folder or id of the run."""
    text: Annotated[str | None, Positional("[TEXT]")] = None
    """The note; an empty one removes the present note; without TEXT, the present note is printed."""


@dataclass(frozen=True)
class RenameOptions(_LabelOptions):
    """Give a run another name in lists and on its page."""

    run: Annotated[str, Positional("RUN")]
    """Folder or id of the run."""
    name: Annotated[str, Positional("[NAME]")] = ""
    """The name; without it, the run has its own name again."""


@dataclass(frozen=True)
class ArchiveOptions(_LabelOptions):
    """Leave runs out of lists without removing them; `traceml runs --archived` lists them."""

    runs: Annotated[tuple[str, ...], Positional("RUN ...")] = ()
    """Folders or ids of the runs."""
    undo: bool = False
    """List them again."""


def _remove(argv: list[str]) -> int:
    options = parse(RemoveOptions, argv, prog="traceml runs rm")
    infos = [describe_run(path) for path in _found(options.runs, options.config.runs_dir)]
    check_removable(infos)
    if not options.yes and not _confirmed(infos):
        print("Nothing was removed", file=sys.stderr)
        return 1

    remove_ended(infos)
    print(json.dumps([info.id for info in infos]) if options.json else _removed_text(infos))
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
    return _edit(options, lambda each: change(each, list(options.tags)), lambda each: ", ".join(each.tags) or "no tags")


def _note(argv: list[str]) -> int:
    options = parse(NoteOptions, argv, prog="traceml runs note")

    def change(labels: RunLabels) -> None:
        labels.note = labels.note if options.text is None else options.text.strip()

    return _edit(options, change, lambda labels: labels.note or "no note")


def _rename(argv: list[str]) -> int:
    options = parse(RenameOptions, argv, prog="traceml runs rename")

    def change(labels: RunLabels) -> None:
        labels.name = options.name.strip()

    return _edit(options, change, lambda labels: labels.name or "its own name")


def _archive(argv: list[str]) -> int:
    options = parse(ArchiveOptions, argv, prog="traceml runs archive")

    changed = 0

    def change(labels: RunLabels) -> None:
        nonlocal changed
        changed += labels.archived == options.undo
        labels.archived = not options.undo

    done = {path.name: change_labels(path, change) for path in _found(options.runs, options.config.runs_dir)}
    if options.json:
        print(json.dumps({name: {"archived": labels.archived} for name, labels in done.items()}))
    else:
        as_before = len(done) - changed
        rest = f"; {as_before} {'not archived' if options.undo else 'archived already'}" if as_before else ""
        print(f"{plural(changed, 'run')} {'listed again' if options.undo else 'archived'}{rest}")

    return 0


def _found(runs: Sequence[str], runs_dir: Path) -> list[Path]:
    if not runs:
        raise UsageError("name a run: its folder, id or name, or `latest`")

    return list(dict.fromkeys(find_run(run, runs_dir) for run in runs))


def _edit(
    options: TagOptions | NoteOptions | RenameOptions,
    change: Callable[[RunLabels], None],
    text_of: Callable[[RunLabels], str],
) -> int:
    """Change the labels of a run, and print them."""
    labels = change_labels(find_run(options.run, options.config.runs_dir), change)
    print(json.dumps(msgspec.to_builtins(labels)) if options.json else printable(text_of(labels), lines=True))
    return 0


EDITS: dict[str, Callable[[list[str]], int]] = {
    "rm": _remove, "tag": _tag, "note": _note, "rename": _rename, "archive": _archive,
}  # fmt: skip
"""Word after `traceml runs` -> function of its arguments."""
