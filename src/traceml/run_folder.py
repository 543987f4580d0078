"""Names in the folder of a run, and in that of all runs. Light, as each rank imports it."""

from __future__ import annotations

import resource
from pathlib import Path

from traceml.formatting import bytes_text

__all__ = [
    "AGGREGATOR_LOG",
    "ARTIFACTS",
    "COPIES_FOLDER",
    "LABELS_NAME",
    "LOGS_FOLDER",
    "OPEN_FOLDER",
    "OUTPUT_LOG",
    "PAGE_NAME",
    "PROFILE_NAME",
    "RELAY_NAME",
    "REPORT_NAME",
    "RUN_FOLDERS",
    "STORE_NAME",
    "STORE_PATH_BYTES",
    "TRACKERS_FOLDER",
    "UNREAD_LOG",
    "aggregator_words",
    "moved_text",
    "report_command",
    "size_limit_text",
    "unwritable_text",
]

STORE_NAME = "store.db"
# SQLite opens no longer path: it has room for 512 bytes, with the "-journal" behind it.
STORE_PATH_BYTES = 504
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
# Tags, note and name that people gave the run.
LABELS_NAME = "labels.json"
# The trace of a profile that the aggregator took by itself.
PROFILE_NAME = "profile.json.gz"
# `{"address", "sent", "safe"}` of a run that is sent to another aggregator: whether all of it is stored there; before,
# the number up to which its frames are.
RELAY_NAME = "upstream.json"

# Output of the aggregator, of the script, and of a script that nobody read.
LOGS_FOLDER = "logs"
AGGREGATOR_LOG = f"{LOGS_FOLDER}/aggregator.log"
OUTPUT_LOG = f"{LOGS_FOLDER}/output.log"
UNREAD_LOG = f"{LOGS_FOLDER}/unread.log"
# Logged files, by their SHA-256.
ARTIFACTS = "artifacts"
# Folders that each run has from its start.
RUN_FOLDERS = (LOGS_FOLDER, ARTIFACTS)
# State, lock and log of each tracker's delivery.
TRACKERS_FOLDER = "trackers"
# In the runs folder: a small file per open run, from which a later aggregator learns the run's folder, and the lock of
# each host's aggregator with its address.
OPEN_FOLDER = ".open"
# Copies of flight files from other hosts.
COPIES_FOLDER = "flights"

_LAST_WORDS_BYTES = 2048


def aggregator_words(run_dir: Path) -> str:
    """Return the last line of the log of the run's aggregator; empty without one."""
    try:
        with (run_dir / AGGREGATOR_LOG).open("rb") as log:
            log.seek(max(log.seek(0, 2) - _LAST_WORDS_BYTES, 0))
            lines = log.read().decode(errors="replace").split("\n")
    except OSError:
        return ""

    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def moved_text(run_dir: Path) -> str:
    """Return why a run whose folder is gone at its end has no report, and what to do."""
    return (
        f"its folder {run_dir} was moved or removed while it ran. If you moved it, `traceml report FOLDER` shows the "
        "run, and `traceml sync FOLDER` delivers to trackers what they lack."
    )


def report_command(run: Path | str) -> str:
    """Return the command that shows a run's report, for a message from which it is copied: a path may have spaces."""
    from traceml.formatting import shell_quoted  # a rank rarely says it

    return f"traceml report {shell_quoted(str(run))}"


def unwritable_text(folder: Path, what: str, error: OSError) -> str:
    """Return why a folder cannot be made or written: the system's "File exists" names no file.

    Args:
        what: what it is, in words.
        error: the error of an attempt.
    """
    there = next((each for each in (folder, *folder.parents) if each.exists()), None)
    if there is not None and not there.is_dir():
        before = "" if there == folder else f"cannot write {what} {folder}: "
        return f"{before}{there} is a file, not a folder"

    return f"cannot write {what} {folder}: {error.strerror}"


def size_limit_text() -> str | None:
    """Return the limit of the size of files that this process writes, and what to do; None without a limit."""
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit_bytes == resource.RLIM_INFINITY:
        return None

    return f"Files may have {bytes_text(limit_bytes)} here (ulimit -f): raise the limit"
