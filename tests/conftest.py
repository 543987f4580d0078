"""Markers by folder, parts of the system that tests need, and a guard for tests that start no process."""

from __future__ import annotations

import gc
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadGroupScheduling
from xdist.workermanage import WorkerController

from tests.forked.workers import fork_workers
from tests.system import PARTS, Part, install_command, missing

ROOT = Path(__file__).parent
pytest_plugins = ["tests.crashed_workers"]

# Each of the thousand Python processes of the tests would compile its modules anew; pytest itself, its tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Folders and files whose tests start processes. Elsewhere a test has the marker, or a fixture that implies it.
_PROCESS_PATHS = (
    "aggregator",
    "cli/assistants/test_ci_action.py",
    "cli/test_mcp.py",
    "cli/assistants/test_skill.py",
    "cli/test_demo.py",
    "cli/test_sync.py",
    "cli/test_top.py",
    "display/web",
    "end_to_end",
    "forked",
    "instrument/test_compile.py",
    "integrations",
    "launch/agent",
    "launch/launcher",
    "launch/worker",
    "session",
    "supervise",
    "tasks/test_dask_plugin.py",
    "traces/query/test_cluster.py",
    "track/backends",
    "track/delivery/test_debug.py",
    "track/delivery/test_deliver.py",
    "track/delivery/test_faults.py",
    "track/delivery/test_secrets.py",
    "track/rank/frameworks",
    "track/rank/test_collectors.py",
    "track/test_everywhere.py",
)
_ALONE_PATHS = ("end_to_end/test_advice.py", "end_to_end/test_competing_processes.py", "end_to_end/test_verdicts.py")
# Values of `-m`, which the Makefile gives.
_CHECK = "not process and not long"
_LEFT_OUT = {_CHECK: _PROCESS_PATHS, "not alone and not frameworks": _ALONE_PATHS}
_PROCESS_FIXTURES = {"hosts", "program", "script", "serving", "slurm", "tiny_disk", "tmux", "traceml"}
_NEEDS_OF_FIXTURES = {
    "browser": ("chromium",),
    "hosts": ("hosts", "root"),
    "slurm": ("slurm", "hosts", "root"),
    "tiny_disk": ("root",),
    "tmux": ("tmux",),
}
# Fixtures whose tests share what is set up once: each is a group. They start first: the longest, which mostly wait.
_SHARED_FIXTURES = ("slurm", "hosts")
# Files that take long start next, so that no worker is left with one of them at the end.
_LONG_FIRST = (
    "end_to_end/test_run.py",
    "display/web",
    "track/backends",
    "instrument/test_training_continues.py",
    "test_helper_programs.py",
    "launch",
    "recorder",
    "aggregator",
    "track/delivery",
    "integrations",
    "documentation",
    "track/rank/frameworks",
    "end_to_end",
    "track",
    "session",
    "supervise",
    "cli",
    "instrument",
    "traces/reader",
    "generated",
    "database/store",
)

# Folders whose files share what takes long: the page's server and its runs, the imports of trackers' libraries, an
# agent whose zygote has imported torch.
_TOGETHER = ("display/web", "track/backends", "launch/worker")
# Files that share the syntax trees of all sources.
_READ_SOURCES = (
    "database/test_info_kinds.py",
    "database/test_row_layout.py",
    "diagnosis/test_kinds.py",
    "test_helper_programs.py",
    "test_prose.py",
    "test_packages.py",
)

_LACKING = pytest.StashKey[dict[str, Part]]()
_STARTED = pytest.StashKey[list[str]]()
_RUNTIME_FOLDER = pytest.StashKey[str]()
_STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen"}
_NOT_RUN = "this machine lacks: "
_NUMBERS = count()


def pytest_configure(config: pytest.Config) -> None:
    """Look once at what this machine has."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        gc.disable()  # until all is collected: next to nothing of it is garbage

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what it runs in the background so
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)

    examples = 30 if config.option.markexpr == _CHECK else 100  # `make test` draws the others
    quiet = [HealthCheck.too_slow]  # a machine that does much else makes no example slow
    settings.register_profile("busy", deadline=None, suppress_health_check=quiet, max_examples=examples)
    settings.load_profile("busy")
    config.stash[_LACKING] = {part.name: part for part in missing()}
    # Commands find this user's aggregators, pages and joined runs by files in it: not those of another worker's tests.
    config.stash[_RUNTIME_FOLDER] = folder = tempfile.mkdtemp(prefix="traceml-tests-")
    os.environ["XDG_RUNTIME_DIR"] = folder
    config.stash[_STARTED] = started = []
    starts = _STARTS  # which outlives this module at the interpreter's end

    def note(event: str, values: tuple[Any, ...]) -> None:
        if event in starts and values[:1] != ("fc-list",):  # Matplotlib's first import on a machine lists its fonts
            started.append(event)

    sys.addaudithook(note)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the folder of this process's tests."""
    shutil.rmtree(config.stash[_RUNTIME_FOLDER], ignore_errors=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file whose tests are all left out: each worker imports every file that is collected."""
    chosen = config.option.markexpr
    if chosen == "alone" and collection_path.is_file():
        return None if _lies_in(collection_path, _ALONE_PATHS) is not None else True

    return True if _lies_in(collection_path, _LEFT_OUT.get(chosen, ())) is not None else None


class _Groups(LoadGroupScheduling):
    """Gives a worker that replaces a crashed one two tests to begin with, or the word that there are no more.

    A worker runs a test only when it knows the next one. pytest-xdist 3.8 gives a late worker one group, which may have
    been run by the worker that crashed, and another one after a test: both then wait for each other.
    """

    def _reschedule(self, node: WorkerController) -> None:
        super()._reschedule(node)
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Import the tests once for all workers."""
    fork_workers(config, len(specs))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Groups:
    """Return what gives groups of tests to workers."""
    return _Groups(config, log)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder and fixture, and give each file's tests to one worker; those that share a set-up also."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        for name in fixtures & set(_NEEDS_OF_FIXTURES):
            item.add_marker(pytest.mark.needs(*_NEEDS_OF_FIXTURES[name]))

        if _lies_in(item.path, _PROCESS_PATHS) is not None or fixtures & _PROCESS_FIXTURES:
            item.add_marker(pytest.mark.process)

        if _lies_in(item.path, _ALONE_PATHS) is not None:
            item.add_marker(pytest.mark.alone)

        item.add_marker(pytest.mark.xdist_group(_group(item)))

    items.sort(key=_order)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Check that the groups are effective: a version of pytest and pytest-xdist may not fit each other."""
    gc.freeze()  # else each full collection goes through the modules and tests, of which none goes away
    gc.enable()
    is_worker = hasattr(session.config, "workerinput")
    assert not is_worker or all("@" in item.nodeid for item in session.items), "pytest-xdist ignores the groups"
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            logger.propagate = True  # else pytest gives each of them its handlers, six times for each test


def _group(item: pytest.Item) -> str:
    """Return the name of the tests that one worker runs."""
    return _shared_fixture(item) or _group_of_file(item.path)


@cache
def _group_of_file(path: Path) -> str:
    if _lies_in(path, _READ_SOURCES) is not None:
        return "sources"

    place = _lies_in(path, _TOGETHER)
    return str(path.relative_to(ROOT)) if place is None else _TOGETHER[place]


def _shared_fixture(item: pytest.Item) -> str | None:
    return next((name for name in _SHARED_FIXTURES if name in getattr(item, "fixturenames", ())), None)


@cache
def _lies_in(path: Path, places: tuple[str, ...]) -> int | None:
    inside = path.relative_to(ROOT).as_posix() + "/"
    return next((i for i, place in enumerate(places) if inside.startswith(f"{place}/")), None)


def _order(item: pytest.Item) -> tuple[int, bool]:
    """Return the place of a test; in folders that share a browser, tests that need none come first."""
    is_late = "browser" in getattr(item, "fixturenames", ()) and _lies_in(item.path, _TOGETHER) is not None
    if (fixture := _shared_fixture(item)) is not None:
        return _SHARED_FIXTURES.index(fixture) - len(_SHARED_FIXTURES), is_late

    place = _lies_in(item.path, _LONG_FIRST)
    return len(_LONG_FIRST) if place is None else place, is_late


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out a test that needs a missing part of the system; in CI that is a failure."""
    _seed()
    needed = {name for mark in item.iter_markers("needs") for name in mark.args}
    assert needed <= {part.name for part in PARTS}, f"unknown parts: {needed}"
    lacking = sorted(needed & set(item.config.stash[_LACKING]))
    item.config.stash[_STARTED].clear()
    if lacking:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(_NOT_RUN + ", ".join(lacking))


def _seed() -> None:
    """Give each test the same random numbers: one that fails with a thousandth of them fails always, or never."""
    random.seed(0)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(0)  # `torch.manual_seed` formats a stack for devices: 0.4 ms


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Fail a test that started a process without the marker: `make check` would run it."""
    started = item.config.stash[_STARTED]
    if started and not item.get_closest_marker("process"):
        pytest.fail(f"it starts a process ({started[0]}): give it the marker `process`", pytrace=False)


def pytest_sessionfinish() -> None:
    """Print no verdict of a run that a test has started in this process: its aggregator and its folder are gone."""
    if "traceml.recorder.run_notices" in sys.modules:
        sys.modules["traceml.recorder.run_notices"]._due.clear()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Report last which tests did not run, and the one command that changes it."""
    skipped = [report for report in terminalreporter.getreports("skipped") if _NOT_RUN in str(report.longrepr)]
    if not skipped:
        return

    lacking = list(config.stash[_LACKING].values())
    terminalreporter.section(f"{len(skipped)} tests did not run", red=True)
    terminalreporter.line(_NOT_RUN + ", ".join(part.name for part in lacking))
    remedies = [install_command(lacking), *(part.remedy for part in lacking)]
    terminalreporter.line(f"to run them: {'; '.join(filter(None, remedies))}")


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder. pytest's own fixture looks at the folders of all earlier tests to find the next number."""
    name = re.sub(r"\W", "_", request.node.name)[:26]
    return tmp_path_factory.mktemp(f"{name}_{next(_NUMBERS)}", numbered=False)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a maker of file systems of a given size in bytes, each mounted on a folder of its own."""
    mounted: list[Path] = []

    def make(size_bytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        options = f"size={size_bytes},mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
