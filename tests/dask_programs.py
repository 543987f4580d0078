"""A Dask cluster as users start one: scheduler and workers are programs of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["dask_programs"]

_START_S = 120


@contextmanager
def dask_programs(folder: Path, *, workers: int = 1) -> Iterator[str]:
    """Start a scheduler and workers with one thread each; the value is the scheduler's address."""
    file = folder / "scheduler.json"
    options = ["--scheduler-file", str(file), "--no-dashboard"]
    commands = [["dask_scheduler", "--host", "127.0.0.1", "--port", "0", *options]]
    commands += [["dask_worker", "--nthreads", "1", "--no-nanny", *options]] * workers
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    programs = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{command[0]}", *command[1:]],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command in commands
    ]
    try:
        yield _address(file)
    finally:
        for program in reversed(programs):
            program.terminate()
            program.wait(240)


def _address(file: Path) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            return str(json.loads(file.read_text())["address"])
        except (FileNotFoundError, ValueError):
            time.sleep(0.02)

    raise TimeoutError(f"no scheduler within {_START_S} s")
