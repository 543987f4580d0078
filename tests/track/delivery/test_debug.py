"""The setting `debug`, from each of its sources: profiles of deliveries, and output of collectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.ports import free_port
from tests.track.fabricated import LoggedRun
from tests.track.jobs import Job, finish

SCRIPT = """
    import os, time, traceml

    traceml.init({settings})
    with traceml.Experiment("debugged", backend=["jsonl"]) as experiment:
        experiment.log_metric("loss", 1.0)
        while not os.path.exists("{awaited}"):
            time.sleep(0.01)
"""
COLLECTOR = """
import pathlib, sys
from traceml.track.plugins.interfaces import CollectorInterface

class Talking(CollectorInterface):
    def collect(self):
        print("a collector talks", file=sys.stderr, flush=True)
        pathlib.Path("collected").touch()
        return [{"a": 1}]
"""
SOURCES = pytest.mark.parametrize(
    ("file", "variable", "is_on"),
    [
        ("true", {}, True),
        ("false", {"TRACEML_DEBUG": "1"}, True),
        ("true", {"TRACEML_DEBUG": "0"}, False),
        ("true", {"TRACEML_DEBUG": "off"}, False),
    ],
)


def profiles(run_dir: Path) -> list[Path]:
    return list(run_dir.glob("trackers/jsonl.*.prof"))


@SOURCES
def test_file_and_variable(tmp_path: Path, file: str, variable: dict[str, str], is_on: bool) -> None:
    """Deliveries write profiles, and what collectors print is shown, only if the setting in force is on."""
    (tmp_path / "my_collectors.py").write_text(COLLECTOR)
    (tmp_path / "traceml.toml").write_text(f"debug = {file}\n")
    settings = {"TRACEML_COLLECTORS": "my_collectors:Talking"} | variable
    job = Job(tmp_path, {}, code=SCRIPT.format(settings="", awaited="collected"), **settings)

    printed = job.finish()

    assert ("a collector talks" in printed, bool(profiles(job.run_dir))) == (is_on, is_on)


@SOURCES
def test_sync(tmp_path: Path, file: str, variable: dict[str, str], is_on: bool) -> None:
    """Deliveries of `traceml sync` write profiles if its own setting is on."""
    (tmp_path / "traceml.toml").write_text(f"debug = {file}\n")
    run = LoggedRun(tmp_path / "traceml_runs" / "a")
    run.experiment(["jsonl"], id="a")
    run.end()

    assert finish(tmp_path, "sync", **variable).returncode == 0
    assert bool(profiles(run.path)) == is_on


def test_argument(tmp_path: Path) -> None:
    """An aggregator that `init` starts has the setting of its argument."""
    code = SCRIPT.format(settings="local=True, debug=True", awaited="script.py")
    job = Job(tmp_path, {}, code=code, command=(), TRACEML_PORT=str(free_port()))
    job.finish()

    eventually(lambda: profiles(job.run_dir))
