from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from traceml.transport import auth
from traceml.transport.folder_aggregator import AggregatorAddress, FolderLock, address_of, create_runs_dir, folder_id

ADDRESS = AggregatorAddress("127.0.0.1", 4321)


@pytest.fixture(autouse=True)
def own_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep other aggregators of this user out of sight."""
    (tmp_path / "runtime").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path / "runtime" / "traceml"


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def the_file(runs_dir: Path) -> Path:
    return runs_dir / ".open" / f"aggregator-{socket.gethostname()}-{os.getuid()}"


def test_git_ignores_a_runs_folder_of_ours_alone(runs_dir: Path, tmp_path: Path) -> None:
    """A folder that the user made may hold sources; whoever creates one writes the file once."""
    assert FolderLock.acquire(runs_dir) is not None
    assert (runs_dir / ".gitignore").read_text() == "*\n"

    (runs_dir / ".gitignore").unlink()
    create_runs_dir(runs_dir)
    assert not (runs_dir / ".gitignore").exists()

    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        create_runs_dir(tmp_path / "file")


def test_address_is_reported_while_the_lock_is_held(runs_dir: Path) -> None:
    """One process has the folder; others read its address, until it lets go."""
    assert address_of(runs_dir, 1) is None
    lock = FolderLock.acquire(runs_dir)
    assert lock is not None
    assert address_of(runs_dir, 1) is None  # it has not said where yet
    lock.publish(ADDRESS)

    assert FolderLock.acquire(runs_dir) is None
    assert address_of(runs_dir, 1) == ADDRESS
    assert the_file(runs_dir).stat().st_mode & 0o777 == 0o600  # another user could hold the lock of a readable file

    lock.publish(None)
    assert address_of(runs_dir, 1) is None
    lock.close()
    assert FolderLock.acquire(runs_dir) is not None


def test_address_of_a_dead_aggregator_is_not_believed(runs_dir: Path) -> None:
    """A killed process leaves its file, but not its lock."""
    lock = FolderLock.acquire(runs_dir)
    assert lock is not None
    lock.publish(ADDRESS)
    lock.close()

    assert "4321" in the_file(runs_dir).read_text()
    assert address_of(runs_dir, 1) is None


@pytest.mark.process
def test_a_child_that_inherits_the_lock_has_the_folder(runs_dir: Path) -> None:
    """The process that starts an aggregator hands the lock on, without a moment in which nobody has it."""
    lock = FolderLock.acquire(runs_dir)
    assert lock is not None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),))
    lock.publish(ADDRESS)
    lock.close()
    lock.close()

    assert FolderLock.acquire(runs_dir) is None
    assert address_of(runs_dir, 1) == ADDRESS
    child.kill()
    child.communicate()
    assert address_of(runs_dir, 1) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "h"}', '{"host": "h", "port": "x", "token_file": ""}'])
def test_half_written_address_is_none(runs_dir: Path, content: str) -> None:
    """A reader may come between lock and address."""
    lock = FolderLock.acquire(runs_dir)
    assert lock is not None
    the_file(runs_dir).write_text(content)

    assert address_of(runs_dir, 1) is None


def test_planted_file_is_left_alone(runs_dir: Path, own_runtime_folder: Path) -> None:
    """A pipe in a shared folder neither blocks nor counts: the lock is in the user's own folder then."""
    the_file(runs_dir).parent.mkdir(parents=True)
    os.mkfifo(the_file(runs_dir))

    lock = FolderLock.acquire(runs_dir)

    assert lock is not None
    lock.publish(ADDRESS)
    assert [path.name[:7] for path in own_runtime_folder.iterdir()] == ["folder-"]
    assert address_of(runs_dir, 1) == ADDRESS


def test_token_is_read_where_the_address_says(runs_dir: Path) -> None:
    """A shell with another runtime folder finds it too."""
    path = auth.publish("127.0.0.1", 4321, "secret")

    assert AggregatorAddress("127.0.0.1", 4321, str(path)).token == "secret"
    assert AggregatorAddress("127.0.0.1", 4321, str(path) + "x").token is None
    assert ADDRESS.token is None


def test_aggregator_on_the_usual_port_is_found_if_it_serves_the_folder(runs_dir: Path, tmp_path: Path) -> None:
    """It was started while another one had the folder."""
    (tmp_path / "link").symlink_to(runs_dir)
    auth.publish("127.0.0.1", 4321, "secret", runs_dir=str(runs_dir))
    assert address_of(runs_dir, 4321) is None  # neither exists
    runs_dir.mkdir()

    assert address_of(runs_dir, 4321) == address_of(tmp_path / "link", 4321) == ADDRESS
    assert address_of(tmp_path, 4321) is None
    assert address_of(runs_dir, 4322) is None


def test_folder_is_the_same_by_any_name(runs_dir: Path, tmp_path: Path) -> None:
    runs_dir.mkdir()
    (tmp_path / "link").symlink_to(runs_dir)

    assert folder_id(runs_dir) == folder_id(tmp_path / "link") != folder_id(tmp_path)
    assert folder_id(tmp_path / "none") == []
