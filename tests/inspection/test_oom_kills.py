"""Out-of-memory kills are counted in the process's cgroup, else on its host."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from traceml.inspection.cgroups import ROOT, OomWatch, cgroup_paths, oom_counter

_LIMIT_BYTES = 96 << 20
# It moves into the group, waits for a line, and takes more memory than the group may have.
_EATER = """
import sys
open(sys.argv[1], "w").write("0")
print("inside", flush=True)
sys.stdin.readline()
kept = [b"x" * (8 << 20) for _ in range(100)]
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A version 2 group with a counter, its parent, and the host's counter."""
    inner = tmp_path / "groups" / "job" / "step"
    inner.mkdir(parents=True)
    host = tmp_path / "vmstat"
    host.write_text("pgfault 12\noom_kill 7\n")
    return {"root": tmp_path / "groups", "inner": inner, "host": host}


def watch(files: dict[str, Path], groups: dict[str, str]) -> OomWatch:
    return OomWatch(groups=groups, root=str(files["root"]), host=files["host"])


def test_a_kill_in_the_group_is_certain(files: dict[str, Path]) -> None:
    """Version 2 counts in memory.events; kills before the watch do not count."""
    events = files["inner"] / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 2\n")
    watched = watch(files, {"": "/job/step"})

    before = watched.killed()
    events.write_text("low 0\noom 4\noom_kill 3\n")

    assert (before, watched.killed()) == (None, "group")


def test_a_process_that_moves_to_a_group_of_its_own_is_followed(files: dict[str, Path]) -> None:
    """The group of its start has no kill; at its end it is in the root group, whose kills are those of others."""
    for group in ("job", "job/step", "own", "."):
        folder = files["root"] / "memory" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.oom_control").write_text("oom_kill 4\n")

    watched = watch(files, {"memory": "/job/step"})
    watched.follow({"memory": "/own"})
    (files["root"] / "memory" / "own" / "memory.oom_control").write_text("oom_kill 5\n")
    watched.follow({"memory": "/own"})
    watched.follow({"memory": "/"})
    watched.follow({})

    assert watched.killed() == "group"


def test_the_first_version_counts_in_its_own_file(files: dict[str, Path]) -> None:
    """memory.oom_control, in the folder of the controller."""
    folder = files["root"] / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    watched = watch(files, {"memory": "/job"})

    (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")

    assert watched.killed() == "group"


def test_kills_of_others_on_the_host_do_not_count_where_the_group_has_a_counter(files: dict[str, Path]) -> None:
    """The host's counter grows with every kill, also in other containers."""
    (files["inner"] / "memory.events").write_text("oom_kill 0\n")
    watched = watch(files, {"": "/job/step"})

    files["host"].write_text("oom_kill 8\n")

    assert watched.killed() is None


def test_without_a_counter_of_the_group_the_host_counts(files: dict[str, Path]) -> None:
    """What it says is less certain, and told apart."""
    watched = watch(files, {"": "/job/step"})

    files["host"].write_text("oom_kill 8\n")

    assert watched.killed() == "host"


def test_a_host_without_counters_tells_nothing(tmp_path: Path) -> None:
    """An old kernel, or a container without /proc/vmstat."""
    assert OomWatch(groups={}, root=str(tmp_path), host=tmp_path / "missing").killed() is None


def test_the_counter_is_that_of_the_innermost_group(tmp_path: Path) -> None:
    """Version 2, version 1, and the machine's."""
    for folder, name in (("pods/mine", "memory.events"), ("memory/old", "memory.oom_control")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("oom_kill_disable 0\noom_kill 1\n")

    assert oom_counter(cgroup_paths("0::/pods/mine"), str(tmp_path)) == Path(f"{tmp_path}/pods/mine/memory.events")
    assert oom_counter(cgroup_paths("9:memory:/old"), str(tmp_path)) == Path(
        f"{tmp_path}/memory/old/memory.oom_control"
    )
    assert oom_counter(cgroup_paths("0::/other"), str(tmp_path)) == Path("/proc/vmstat")


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A real group of version 1 with little memory."""
    folder = Path(f"{ROOT}/memory{cgroup_paths().get('memory', '/missing')}/traceml-test")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(_LIMIT_BYTES))
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()

        pytest.skip("cgroups of version 1 cannot be made here")

    yield folder
    folder.rmdir()


@pytest.mark.process
def test_a_real_kill_is_seen_after_the_process_is_gone(small_group: Path) -> None:
    """The kernel's own counter."""
    command = [sys.executable, "-c", _EATER, str(small_group / "cgroup.procs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as eater:
        assert eater.stdout is not None
        assert eater.stdout.readline() == "inside\n"
        watched = OomWatch(eater.pid)
        eater.communicate("go\n", timeout=240)

    assert eater.returncode == -9
    assert watched.killed() == "group"
