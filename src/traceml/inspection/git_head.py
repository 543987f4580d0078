"""Commit and branch of the git repository of a script, read from its files: this starts no program.

What they contain is described in gitrepository-layout(5). Uncommitted changes take git itself: `track/rank/collectors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from traceml.trusted_files import read_regular

__all__ = ["git_head", "repository_folders"]

_MAX_BYTES = 8 << 20  # of packed-refs
_MAX_LEVELS = 64
_COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def git_head(folders: Sequence[Path]) -> dict[str, str]:
    """Return `commit` and `branch` of the first of some folders that is in a working tree.

    A detached head has no branch, a repository without a commit no commit. There is neither where refs are not files,
    or the files cannot be read.
    """
    try:
        return _head_of(folders)
    except (OSError, ValueError):
        return {}


def repository_folders(script: str | None, folder: Path) -> list[Path]:
    """Return the folders whose repository is that of a training: its script's, then its working directory.

    Args:
        script: its path; empty or None if there is none.
    """
    return [*([Path(folder, script).parent] if script else []), folder]


def _head_of(folders: Sequence[Path]) -> dict[str, str]:
    found = next((git for folder in folders for git in islice(_git_folders(folder), 1)), None)
    if found is None:
        return {}

    head = _text(found / "HEAD")
    ref = head.removeprefix("ref:").strip()
    if ref == head:
        return {"commit": head} if _COMMIT.fullmatch(head) else {}

    commit = _commit_of(found, ref)
    branch = ref.removeprefix("refs/heads/")
    return ({"commit": commit} if commit else {}) | ({"branch": branch} if branch != ".invalid" else {})


def _git_folders(folder: Path) -> Iterator[Path]:
    """Yield the repositories of a folder and those above it, the nearest first."""
    place = folder.absolute()
    for each in islice((place, *place.parents), _MAX_LEVELS):
        git = each / ".git"
        if git.is_dir():
            yield git
        elif git.is_file():  # of a submodule, or of a further working tree
            yield each / _text(git).removeprefix("gitdir:").strip()


def _commit_of(git: Path, ref: str) -> str | None:
    """Return the commit of a ref, which further working trees share with the first."""
    shared = git / _text(git / "commondir") if (git / "commondir").is_file() else git
    for folder in (git, shared):
        if (folder / ref).is_file():
            commit = _text(folder / ref)
            return commit if _COMMIT.fullmatch(commit) else None

    packed = _text(shared / "packed-refs") if (shared / "packed-refs").is_file() else ""
    found = re.search(rf"^({_COMMIT.pattern}) {re.escape(ref)}$", packed, re.MULTILINE)
    return found[1] if found else None


def _text(path: Path) -> str:
    return read_regular(path, _MAX_BYTES).decode().strip()
