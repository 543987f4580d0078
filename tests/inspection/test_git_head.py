"""Tests of reading commit and branch from a repository's files, against git itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from traceml.inspection.git_head import git_head, repository_folders
from traceml.recorder.identity import identify
from traceml.recorder.recorder_facts import process_facts
from traceml.settings import Config

_AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "protocol.file.allow=always")


def git(folder: Path, *arguments: str) -> str:
    """Return git's output."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", *_AUTHOR, *arguments]
    return subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, text=True).stdout.strip()


def expected(folder: Path, branch: str) -> dict[str, str]:
    return {"commit": git(folder, "rev-parse", "HEAD"), "branch": branch}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit on the branch `of/training`."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "of/training")
    git(folder, "commit", "-q", "--allow-empty", "-m", "one")
    return folder


@pytest.mark.process
def test_commit_and_branch_are_those_of_git(repository: Path, tmp_path: Path) -> None:
    """From a folder below, with packed refs, of a further working tree, of a submodule, and with a detached head."""
    below = repository / "a" / "b"
    below.mkdir(parents=True)
    assert git_head([tmp_path / "none", below]) == expected(repository, "of/training")

    git(repository, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    git(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "two")
    assert git_head([tmp_path / "tree"]) == expected(tmp_path / "tree", "other")

    git(repository, "pack-refs", "--all")
    assert not (repository / ".git" / "refs" / "heads" / "of" / "training").exists()
    assert git_head([repository]) == expected(repository, "of/training")
    assert git_head([tmp_path / "tree"]) == expected(tmp_path / "tree", "other")

    git(repository, "submodule", "--quiet", "add", str(repository), "sub")
    assert git_head([repository / "sub"]) == expected(repository / "sub", "of/training")

    git(repository, "checkout", "-q", "--detach", "other")
    assert git_head([repository]) == {"commit": git(repository, "rev-parse", "other")}


@pytest.mark.process
def test_a_repository_without_a_commit(tmp_path: Path) -> None:
    """There is a branch alone."""
    git(tmp_path, "init", "-q", "-b", "main")

    assert git_head([tmp_path]) == {"branch": "main"}


def test_files_of_other_content_give_nothing(tmp_path: Path) -> None:
    """A head that leads elsewhere, or refs that are no files, are no commit."""
    folder = tmp_path / ".git"
    folder.mkdir()
    (tmp_path / "secret").write_text("password")
    (folder / "HEAD").write_text("ref: ../secret\n")
    assert "commit" not in git_head([tmp_path])

    (folder / "HEAD").write_text("ref: refs/heads/.invalid\n")  # the refs are a table
    assert git_head([tmp_path]) == {}

    for data in (b"garbage", b"\xff" * 40, b"ref: refs/heads/\0"):
        (folder / "HEAD").write_bytes(data)
        assert "commit" not in git_head([tmp_path])

    (folder / "HEAD").unlink()
    assert git_head([tmp_path]) == {}


def test_rank_0_records_it_unless_it_must_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`track_git` decides."""
    folder = tmp_path / ".git"
    folder.mkdir()
    (folder / "HEAD").write_text("a" * 40 + "\n")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py")])

    assert process_facts(identify(Config()), Config())["git"] == {"commit": "a" * 40}
    assert "git" not in process_facts(identify(Config()), Config(track_git=False))


@pytest.mark.parametrize(
    ("script", "folders"),
    [("src/train.py", ["/a/src", "/a"]), ("/b/train.py", ["/b", "/a"]), ("", ["/a"]), (None, ["/a"])],
)
def test_the_folder_of_the_script_comes_first(script, folders):
    """A script is in its repository wherever it is started."""
    assert repository_folders(script, Path("/a")) == [Path(folder) for folder in folders]
