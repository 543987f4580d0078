"""Hostfiles: hosts and slots in the forms of other launchers, and what is wrong with a line."""

from __future__ import annotations

from pathlib import Path

import pytest

import traceml
from tests.launch.hosts import Hosts
from traceml.errors import UsageError
from traceml.launch.launcher.hosts.hostfile import is_hostfile, read_hostfile, split_port
from traceml.launch.launcher.hosts.hosts import resolve_hosts


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("worker-1 slots=4\nworker-2 slots=2\n", {"worker-1": 4, "worker-2": 2}),
        ("# a comment\n\nnode1 slots=8 max_slots=16 # fast\nnode2:2222\n", {"node1": 8, "node2:2222": None}),
        ("node1\nnode1\nnode2\n", {"node1": 2, "node2": None}),
        ("node1 slots=2\nnode2\nnode1 slots=3\n", {"node1": 5, "node2": None}),
    ],
)
def test_hosts_and_slots_are_read(text: str, expected: dict[str, int | None], tmp_path: Path) -> None:
    """DeepSpeed's and Open MPI's slots, comments, ports, and the repeated lines of PBS; the order is kept."""
    found = read_hostfile(hostfile(tmp_path, text))

    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host: write one per line, for example `node1 slots=8`"),
        ("# only this\n", "names no host"),
        ("node1\nnode2 slots=0\n", "line 2: slots=0 is not a number of workers"),
        ("node1 slots=two\n", "line 1: slots=two is not a number of workers"),
        ("node1 4\n", "line 1: '4' is not understood; write `host`, `host:port` or `host slots=8`"),
    ],
)
def test_a_bad_line_is_reported(text: str, words: str, tmp_path: Path) -> None:
    """The error names file, line and value."""
    with pytest.raises(UsageError) as caught:
        read_hostfile(hostfile(tmp_path, text))

    assert words in str(caught.value)
    assert "hosts.txt" in str(caught.value)


def test_slots_are_workers_unless_numbers_are_given(tmp_path: Path) -> None:
    """A path, its text and a command line's list of one are the same; an explicit number wins over slots."""
    path = hostfile(tmp_path, "node1 slots=3\nnode2\n")

    for given in (path, str(path), [str(path)]):
        assert [(each.name, each.workers) for each in resolve_hosts(given, "auto", None, {})] == [
            ("node1", 3),
            ("node2", None),
        ]

    assert [each.workers for each in resolve_hosts(path, 2, None, {})] == [2, 2]


def test_a_launch_goes_where_the_hostfile_says(hosts: Hosts, tmp_path: Path) -> None:
    """Two hosts, one by its sshd's port, with two workers and one."""
    path = hostfile(tmp_path, "node1 slots=2\nnode2:22 slots=1\n")
    code = f"""
import os, socket, traceml
def where(): return socket.gethostname(), int(os.environ["RANK"])
result = traceml.launch(where, hostnames={str(path)!r}, ssh_config_file={str(hosts.ssh_config)!r}, backend=None)
print(result.results)
"""
    told = hosts.launcher.python(code).stdout

    assert told.splitlines()[-1] == "{'node1': [('node1', 0), ('node1', 1)], 'node2:22': [('node2', 2)]}"
    assert traceml.Launcher(hostnames=path).hostnames == path


@pytest.mark.parametrize("text", ["~nobody-of-this-name", "x" * 5000, "a\0b"])
def test_names_that_are_no_path_are_no_hostfile(text: str) -> None:
    """A home of nobody and a name that is too long are not looked for on disk."""
    assert not is_hostfile(text)
    with pytest.raises(UsageError, match="cannot be read"):
        read_hostfile(Path(text))


def test_numbers_without_end_are_refused(tmp_path: Path) -> None:
    """Python converts no text of thousands of digits."""
    (tmp_path / "hosts").write_text("node1 slots=" + "9" * 5000)
    with pytest.raises(UsageError, match="is not a number of workers"):
        read_hostfile(tmp_path / "hosts")

    with pytest.raises(UsageError, match="is not a port"):
        split_port("node1:" + "9" * 5000)
