"""Only regular files of this user are opened, and nothing planted under their names makes a reader wait."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from threading import get_native_id

import pytest

from traceml.trusted_files import (
    GuardedDescriptor,
    check_trusted_folder,
    create_trusted,
    is_file_inside,
    make_trusted_folder,
    open_trusted,
    opened_trusted,
    read_regular,
    replace_file,
)


def test_a_file_of_this_user_is_opened(tmp_path: Path) -> None:
    """The descriptor reads the file; a new file is for this user alone."""
    os.close(create_trusted(tmp_path / "own"))
    (tmp_path / "own").write_text("text")

    descriptor = open_trusted(tmp_path / "own")

    assert os.read(descriptor, 10) == b"text"
    os.close(descriptor)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        create_trusted(tmp_path / "own")


def test_pipes_links_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    """A FIFO without a writer would stop its reader for good."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")

    for name, why in (("pipe", "not a regular file"), ("link", "symbolic link"), (".", "not a regular file")):
        with pytest.raises(OSError, match=why):
            open_trusted(tmp_path / name)

    with pytest.raises(OSError, match="not a regular file"):
        open_trusted(tmp_path / "pipe", os.O_RDWR)


@pytest.mark.needs("root")
def test_files_and_folders_of_another_user_are_refused(tmp_path: Path) -> None:
    """Root too reads only its own: a file that somebody else wrote may say anything."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir(mode=0o700)
    for name in ("file", "folder"):
        os.chown(tmp_path / name, 12345, -1)

    with pytest.raises(PermissionError, match="uid 12345"):
        open_trusted(tmp_path / "file")
    with pytest.raises(PermissionError, match="uid 12345"):
        make_trusted_folder(tmp_path / "folder")


def test_a_folder_on_a_read_only_filesystem_is_refused(tiny_disk: Callable[[int], Path]) -> None:
    """It is there, and nothing can be written into it: the next place is used."""
    disk = tiny_disk(1 << 16)
    make_trusted_folder(disk / "own")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    with pytest.raises(PermissionError, match="it cannot be written"):
        make_trusted_folder(disk / "own")


def test_folders_that_others_may_use_are_refused(tmp_path: Path) -> None:
    """Others must not write into it; into a private one they must not even look."""
    make_trusted_folder(tmp_path / "new" / "folder", private=True)
    (tmp_path / "new" / "folder").chmod(0o755)
    check_trusted_folder(tmp_path / "new" / "folder")
    with pytest.raises(PermissionError, match="mode is 0755"):
        check_trusted_folder(tmp_path / "new" / "folder", private=True)

    (tmp_path / "new" / "folder").chmod(0o775)
    with pytest.raises(PermissionError, match="mode is 0775"):
        check_trusted_folder(tmp_path / "new" / "folder")

    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(PermissionError, match="not a folder"):
        check_trusted_folder(tmp_path / "link")


def test_only_regular_files_are_read_and_none_is_waited_for(tmp_path: Path) -> None:
    """Of any user and through links, as in a run's folder from elsewhere; a pipe or a device there is an error."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")

    assert read_regular(tmp_path / "file") == read_regular(tmp_path / "link") == b"text"
    for name in ("pipe", "endless", "."):
        with pytest.raises(PermissionError, match="not a regular file"):
            read_regular(tmp_path / name)

    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")


def test_a_file_with_holes_takes_no_memory(tmp_path: Path) -> None:
    """A few bytes of an archive may become a file of terabytes; the limit itself is read."""
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1 << 40)

    with pytest.raises(OSError, match="more than 268,435,456 bytes"):
        read_regular(tmp_path / "holes")
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_regular(_written(tmp_path / "four", b"four"), 3)

    assert read_regular(tmp_path / "four", 4) == b"four"


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_what_leads_out_of_a_folder_is_not_inside(tmp_path: Path) -> None:
    """By dots, by an absolute path, or by a link; a folder that is a link itself is no way out."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text("text")
    (tmp_path / "secret").write_text("secret")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "in").symlink_to("sub/file")
    (tmp_path / "other").symlink_to(folder)
    os.mkfifo(folder / "pipe")

    assert is_file_inside(folder / "sub" / "file", folder)
    assert is_file_inside(folder / "in", folder)
    assert is_file_inside(tmp_path / "other" / "in", tmp_path / "other")
    for name in ("out", "../secret", str(tmp_path / "secret"), "pipe", "sub", "none", "a\0b", "x" * 5000):
        assert not is_file_inside(folder / name, folder), name


def test_a_file_is_replaced_as_a_whole_and_never_through_a_planted_link(tmp_path: Path) -> None:
    """The draft's name can be guessed: what stands there is removed, and what it leads to stays as it is."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".file-{os.getpid()}-{get_native_id()}").symlink_to(victim)

    replace_file(tmp_path / "file", b"new")

    assert (tmp_path / "file").read_bytes() == b"new"
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "victim"]
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path, b"new")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "victim"]


def test_a_number_that_is_another_file_now_is_left_alone(tmp_path: Path) -> None:
    """The script has closed ours, and opened one of its own."""
    own = GuardedDescriptor(os.open(tmp_path / "ours", os.O_CREAT | os.O_RDWR))
    os.close(own.number)
    theirs = os.open(tmp_path / "theirs", os.O_CREAT | os.O_RDWR)
    os.dup2(theirs, own.number)

    with pytest.raises(OSError, match="the script has closed this descriptor"):
        own.check()

    own.close()
    assert os.fstat(own.number).st_ino == os.fstat(theirs).st_ino
    os.close(theirs)
    if theirs != own.number:
        os.close(own.number)


def test_a_number_that_is_another_file_after_the_block_is_left_alone(tmp_path: Path) -> None:
    """The script has closed all descriptors meanwhile, in its own thread."""
    for name in ("ours", "theirs"):
        (tmp_path / name).touch()

    with opened_trusted(tmp_path / "ours") as number:
        theirs = os.open(tmp_path / "theirs", os.O_RDONLY)
        os.dup2(theirs, number)
        os.close(theirs)

    assert os.fstat(number).st_ino == (tmp_path / "theirs").stat().st_ino
    os.close(number)
    with opened_trusted(tmp_path / "ours") as number:
        pass

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
