"""Export of a run as a trace (pfw, Perfetto) or as tables (Parquet, CSV)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from traceml.database.store.reader import StoreReader
from traceml.errors import StoreError, UsageError
from traceml.fail_open import writing
from traceml.run_folder import STORE_NAME
from traceml.runs.export.frame_pass import FramePass, Progress
from traceml.traces.writer.writer import Writer

__all__ = ["FORMATS", "ExportResult", "default_path", "export_run", "format_of"]

FORMATS = {
    "perfetto": (".json", ".json.gz"),
    "pfw": (".pfw.gz", ".pfw"),
    "parquet": (),
    "csv": (),
}
"""Format -> suffixes of its file, the default first; formats without are folders with a file per table."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Result of an export."""

    path: Path
    format: str  # pfw, perfetto, parquet or csv
    steps: int
    rows: int  # events of a trace, as `traceml analyze` counts them, or rows of all tables
    files: tuple[Path, ...]  # files in the folder; of a trace the file itself
    damage: tuple[str, ...]  # messages about unreadable parts of the store


def format_of(path: Path) -> str | None:
    """Return the format of a file name, None if it is of none."""
    return next((name for name, ends in FORMATS.items() if path.name.endswith(ends or (f".{name}",))), None)


def default_path(run_dir: Path, form: str) -> Path:
    """Return the default path of an export: the run's id in the working directory."""
    ends = FORMATS[form]
    return Path(f"{run_dir.name}{ends[0] if ends else f'-{form}'}")


def export_run(run_dir: Path, form: str, path: Path, progress: Progress = lambda *_: None) -> ExportResult:
    """Write a run, also one that is running or damaged, to a file (pfw, perfetto) or a folder (parquet, csv).

    A file is replaced atomically.

    Args:
        form: one of `FORMATS`.
        path: the file or folder to write. A file of another name is written too, compressed if it ends in .gz.
        progress: called from time to time with the frames of the store that were read, and their number.

    Raises:
        UsageError: the path ends like a file of another format, or is no file; or the format needs a package that is
            not installed.
        StoreError: the store cannot be read at all, or the output cannot be written.
    """
    ends = FORMATS[form]
    if ends and format_of(path) not in (form, None):
        raise UsageError(f"{path}: a file of format {form} ends in {' or '.join(ends)}")

    damage: dict[str, None] = {}  # a frame may be read twice
    with StoreReader(run_dir / STORE_NAME, on_damage=damage.setdefault) as reader:
        try:
            reader.check_frames()
        except StoreError as error:
            damage[str(error)] = None

        with writing(path, "Give another path with -o, in an existing folder", kind=StoreError):
            return (_export_trace if ends else _export_tables)(FramePass(reader, damage, progress), form, path)


def _missing_end(path: Path, form: str) -> str:
    """Return the suffix by which the writer knows the format, if the path has none."""
    ends = FORMATS[form]
    if path.name.endswith(ends):
        return ""

    return next(end for end in ends if end.endswith(".gz") == path.name.endswith(".gz"))


def _export_tables(frames: FramePass, form: str, path: Path) -> ExportResult:
    from traceml.runs.export.table_files import export_tables

    counts = export_tables(frames, form, path)
    files = tuple(path / f"{name}.{form}" for name in counts)
    return ExportResult(path, form, counts["steps"], sum(counts.values()), files, tuple(frames.damage))


def _export_trace(frames: FramePass, form: str, path: Path) -> ExportResult:
    from traceml.runs.export.timeline import TimelineExporter, origin_of

    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a folder, pipe or device; {form} is written to a file, which it replaces")

    # dftracer's readers take microseconds since 1970; Perfetto takes nanoseconds, but not 19 digits of them.
    origin_ns = origin_of(frames) if form == "perfetto" else None
    target = path.resolve()  # keeps a symbolic link
    draft = target.with_name(f".{os.getpid()}-{target.name}{_missing_end(target, form)}")
    try:
        with Writer(draft, origin_ns=origin_ns) as writer:
            timeline = TimelineExporter(frames, writer)
            timeline.write()

        statistics = writer.statistics
        if statistics.lost:
            tried = statistics.lost + statistics.written
            raise StoreError(f"cannot write {path}: {statistics.lost} of {tried} events did not fit.")

        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)

    events = statistics.written - timeline.names
    return ExportResult(path, form, timeline.steps, events, (path,), tuple(frames.damage))
