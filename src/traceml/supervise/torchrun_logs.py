"""`torchrun --logs-specs traceml`: the output of each rank as a file in the run's folder, named by its rank.

torchrun loads it by the entry point `torchrun.logs_specs`.

Process: torchrun.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, Std

from traceml import settings
from traceml.fail_open import fail_open
from traceml.ids import new_run_id, safe_run_id
from traceml.run_folder import LOGS_FOLDER
from traceml.transport.folder_aggregator import create_runs_dir

__all__ = ["RunLogsSpecs"]

_log = logging.getLogger("traceml")


class RunLogsSpecs(DefaultLogsSpecs):  # type: ignore[misc]  # types are checked without torch
    """Writes `logs/rank-3.out.log` and `logs/rank-3.err.log` into the run's folder; a restart's have its number too.

    Without `--redirects` and `--tee` both streams go to files and to the terminal, with torchrun's prefix on each line.
    The job gets the id of its run here (`TRACEML_RUN_ID`), unless it has one. Nodes of one job cannot agree on an id:
    with several, torchrun's own log folder is used unless `TRACEML_RUN_ID` is set on all of them.

    Args:
        log_dir: folder of torchrun's error files; by default a temporary one, as without us.
        redirects: streams that go to files only.
        tee: streams that go to files and to the terminal.
    """

    def __init__(self, log_dir: str | None = None, redirects: Any = Std.NONE, tee: Any = Std.NONE, **more: Any) -> None:
        if redirects == Std.NONE and tee == Std.NONE:
            tee = Std.ALL

        super().__init__(log_dir=log_dir, redirects=redirects, tee=tee, **more)
        self._run_id = ""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return the files of each local rank of an attempt; torchrun calls it before it starts them."""
        destination = super().reify(envs)
        with fail_open(_log, "supervise", "the ranks' output is in torchrun's own log folder"):
            folder = self._log_folder(envs)
            if folder is not None:
                return _moved(destination, folder, envs)

        return destination

    def _log_folder(self, envs: Mapping[int, dict[str, str]]) -> Path | None:
        """Return the run's folder of logs, and pass its id to the ranks; None if the id cannot be known."""
        config = settings.load()
        if not config.run_id and any(int(env.get("GROUP_WORLD_SIZE", 1)) > 1 for env in envs.values()):
            _log.warning(
                "the ranks' output is in torchrun's own log folder: the job has several nodes, which need one run id. "
                "Set TRACEML_RUN_ID to the same value on all of them."
            )
            return None

        name = config.run_name or next((Path(word).stem for word in sys.argv[1:] if word.endswith(".py")), "torchrun")
        self._run_id = self._run_id or safe_run_id(config.run_id or new_run_id(name, config.runs_dir))
        create_runs_dir(config.runs_dir)
        folder = config.runs_dir.absolute() / self._run_id / LOGS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for env in envs.values():
            env["TRACEML_RUN_ID"] = self._run_id

        return folder


def _moved(destination: LogsDest, folder: Path, envs: Mapping[int, dict[str, str]]) -> LogsDest:
    """Return destinations with each rank's files in a folder; streams that go to no file stay as they are."""

    def move(paths: dict[int, str], stream: str) -> dict[int, str]:
        return {
            local_rank: str(folder / _file_name(envs[local_rank], stream)) if path and path != os.devnull else path
            for local_rank, path in paths.items()
        }

    return replace(
        destination,
        stdouts=move(destination.stdouts, "out"),
        stderrs=move(destination.stderrs, "err"),
        tee_stdouts=move(destination.tee_stdouts, "out"),
        tee_stderrs=move(destination.tee_stderrs, "err"),
    )


def _file_name(env: Mapping[str, str], stream: str) -> str:
    attempt = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
    restart = f".restart-{attempt}" if attempt else ""
    return f"rank-{env['RANK']}{restart}.{stream}.log"
