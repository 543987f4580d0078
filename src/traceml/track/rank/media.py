"""Texts, images, histograms and artifacts: copied by the call where they may change, processed by a thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceml.clock import own_time as time
from traceml.coerce import path_text
from traceml.database.file_contents import OpenFile
from traceml.database.flight.flight_folders import FALLBACK_FOLDER
from traceml.errors import FileForbiddenError, FileMissingError, FileUnreadableError
from traceml.inspection.user_files import working_folder
from traceml.recorder.current_recorder import current_recorder
from traceml.recorder.sending.uploads import FileUpload
from traceml.run_folder import OPEN_FOLDER, STORE_NAME
from traceml.track.rank.logged_values import checked_name
from traceml.track.rank.media_encoding import histogram_of, image_of

if TYPE_CHECKING:
    from traceml.recorder.recorder import Recorder
    from traceml.track.rank.logger import Logger

__all__ = ["artifact", "base_name", "histogram", "image", "text", "wait"]

_INLINE_CHARS = 1 << 20
_FOLDER_FILES = 10_000
_OWN_FOLDERS = {OPEN_FOLDER, FALLBACK_FOLDER}  # in the runs folder, beside the runs


def text(logger: Logger, name: str, content: str, step: int | None, t_ns: int = 0) -> None:
    """Log text; a very long one becomes an artifact."""
    recorder = _recorder(logger)
    if recorder is None:
        return

    content, name = str(content), checked_name(name)
    step = logger.next_step(name, step)
    if len(content) <= _INLINE_CHARS:
        logger.row("text", step=step, t_ns=t_ns, name=name, text=content)
        return

    data = content.encode("utf-8", "replace")
    limit = recorder.config.max_artifact_bytes
    recorder.files.add(
        FileUpload(logger.experiment, "artifact", f"{name}.txt", step, t_ns or time.time_ns(), data, limit, ".txt")
    )


def image(logger: Logger, name: str, content: Any, step: int | None, t_ns: int = 0) -> None:
    """Log an image: its pixels are copied now, and a thread does the rest."""
    recorder = _recorder(logger)
    if recorder is None:
        return

    limit, name = recorder.config.max_image_bytes, checked_name(name)
    step = logger.next_step(name, step)
    is_file = isinstance(content, str | os.PathLike)
    with _readable(f"log_image({name!r}, {os.fspath(content)!r:.300})") if is_file else nullcontext():
        pixels, suffix = image_of(content, limit)

    recorder.files.add(
        FileUpload(logger.experiment, "image", name, step, t_ns or time.time_ns(), pixels, limit, suffix)
    )


def histogram(logger: Logger, name: str, values: Any, step: int | None, *, bins: int) -> None:
    """Log the distribution of values; they are counted now."""
    if _recorder(logger) is None:
        return

    name = checked_name(name)
    counts, edges, not_finite = histogram_of(values, bins)
    facts = {"not_finite": not_finite} if not_finite else {}
    step = logger.next_step(name, step)
    logger.row("histogram", step=step, name=name, counts=counts, edges=edges, **facts)


def artifact(logger: Logger, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Log a file, or the files of a folder; they are opened now. A runs folder within it is left out.

    Raises:
        ArgumentTypeError: it is no path.
        FileUnreadableError: the path cannot be opened, or is not a file.
    """
    if _recorder(logger) is None:
        return

    where = Path(path_text(path, "the file or folder of log_artifact()"))
    call = f"log_artifact({str(path)!r:.300})"
    if not os.fspath(path):
        raise FileMissingError(f"{call}: the path is empty; the working directory is '.'")

    with _readable(call):
        _log_path(logger, where, name)


@contextmanager
def _readable(call: str) -> Iterator[None]:
    """Raise an error of the package, which names the call, where a file cannot be read.

    Raises:
        FileUnreadableError: it cannot be read; of a class that is also the built-in one.
    """
    try:
        yield
    except FileUnreadableError:
        raise
    except FileNotFoundError as error:
        raise FileMissingError(
            f"{call}: there is no such file or folder, seen from {working_folder()}. Log it after it was written"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null character
        kind = FileForbiddenError if isinstance(error, PermissionError) else FileUnreadableError
        raise kind(f"{call}: {getattr(error, 'strerror', None) or error}") from error


def _log_path(logger: Logger, where: Path, name: str | None) -> None:
    if not where.is_dir():
        _log_file(logger, where, name or where.name)
        return

    inside = sorted(_files_in(where, _recorder(logger)))
    name = name or base_name(where)
    for each in inside[:_FOLDER_FILES]:
        _log_file(logger, each, f"{name}/{each.relative_to(where).as_posix()}".lstrip("/"))

    if len(inside) > _FOLDER_FILES:
        why = f"the folder has {len(inside)} files: the first {_FOLDER_FILES} were taken. Log an archive of it instead"
        job = FileUpload(logger.experiment, "artifact", name, None, time.time_ns(), b"", 0)
        _recorder(logger).files.refuse(job, why)


def base_name(path: Path) -> str:
    """Return the name of a file or folder, also of `.` and `..`."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def _files_in(folder: Path, recorder: Recorder) -> Iterator[Path]:
    """Yield the files in a folder, without traceml's own in the runs folder: those of this run change meanwhile."""
    own = {os.path.realpath(recorder.config.runs_dir)}
    if recorder.run_dir is not None:
        own.add(os.path.realpath(recorder.run_dir.parent))

    for parent, folders, names in os.walk(folder):
        if os.path.realpath(parent) in own:
            folders[:] = [
                each for each in folders if each not in _OWN_FOLDERS and not Path(parent, each, STORE_NAME).exists()
            ]

        yield from (path for each in names if (path := Path(parent, each)).is_file())


def wait(logger: Logger, timeout_s: float = 60.0) -> None:
    """Wait for the files that are being copied, so that an experiment ends after them; give up without progress."""
    recorder = _recorder(logger)
    if recorder is not None:
        recorder.wait_for_files(timeout_s)


def _log_file(logger: Logger, path: Path, name: str) -> None:
    recorder = _recorder(logger)
    assert recorder is not None
    opened = OpenFile.open(path)
    limit = recorder.config.max_artifact_bytes
    job = FileUpload(logger.experiment, "artifact", str(name), None, time.time_ns(), opened, limit, path.suffix)
    if not opened.is_regular:
        job.release()
        raise FileUnreadableError(f"{path} is not a regular file: only files and folders can be logged")

    if opened.size > limit:
        job.release()
        recorder.files.refuse(job, f"it has {opened.size} bytes, above max_artifact_bytes={limit}")
        return

    recorder.files.add(job)


def _recorder(logger: Logger) -> Any:
    """Return the recorder of a logger; None while nothing is recorded."""
    return current_recorder() if logger.begin() else None
