"""State of the code: commit, branch, uncommitted changes, and remote."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from traceml.inspection.git_head import repository_folders
from traceml.track.plugins.interfaces import CollectorInterface
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = ["GitCollector"]

MAX_DIFF_BYTES = 256 * 1024
_TIMEOUT_S = 20.0
# Read-only: takes no lock, asks for no password, starts no pager and no program that the repository configures.
# Files above 16 MiB are compared without their text, which git would hold in memory several times.
_GIT = ("git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.bigFileThreshold=16m",
        "--no-pager")  # fmt: skip
# Set in hooks of git, for the repository of the hook.
_OTHER_REPOSITORY = {
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE",
    "GIT_PREFIX", "GIT_EXTERNAL_DIFF",
}  # fmt: skip
_ENVIRON = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


class GitCollector(CollectorInterface):
    """Reads the repository of the script, else that of the working directory.

    Args:
        config: `script` and `folder`: paths of the training process; `git_timeout_s`: longest time of a command.
    """

    metadata = PluginMetadata(name="git", version="1", description="commit, branch, uncommitted changes, remote")

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._folders = repository_folders(config.get("script"), Path(config.get("folder") or "."))
        self._timeout_s = float(config.get("git_timeout_s", _TIMEOUT_S))

    def collect(self) -> list[Metric | dict[str, Any]]:
        """Return one map: commit, branch, dirty, remote, diff, diff_truncated; nothing outside a repository."""
        for folder in self._folders:
            read = partial(_output, folder, self._timeout_s)
            status = read("status", "--porcelain=v2", "--branch", "--untracked-files=no")
            if status is not None:
                return [_facts(read, status)]

        return []


def _facts(read: Callable[..., str | None], status: str) -> dict[str, Any]:
    lines = status.splitlines()
    heads = dict(line.removeprefix("# branch.").split(" ", 1) for line in lines if line.startswith("# branch."))
    is_dirty = any(not line.startswith("#") for line in lines)
    commit, branch = heads.get("oid", ""), heads.get("head", "")
    facts: dict[str, Any] = {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if branch == "(detached)" else branch,
        "dirty": is_dirty,
    }
    remote = _remote(read, heads.get("upstream", ""))
    if remote:
        facts["remote"] = without_credentials(remote)

    if is_dirty:
        diff = read("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", limit=MAX_DIFF_BYTES)
        facts["diff"] = diff or ""
        facts["diff_truncated"] = len((diff or "").encode()) >= MAX_DIFF_BYTES

    return facts


def _remote(read: Callable[..., str | None], upstream: str) -> str | None:
    names = (read("remote") or "").split()
    if not names:
        return None

    wanted = upstream.partition("/")[0]
    name = next((each for each in (wanted, "origin") if each in names), names[0])
    return (read("remote", "get-url", name) or "").strip() or None


def without_credentials(url: str) -> str:
    """Return a remote's address without user name and password; the common `git@` stays.

    Args:
        url: `https://user:password@host/path`, or `user@host:path`.
    """
    shown = re.sub(
        r"^([a-z][a-z0-9+.-]*://)([^/]*)@", lambda match: match[1] + _without_user(match[2]), url, flags=re.IGNORECASE
    )
    if "://" not in shown:
        shown = re.sub(r"^([^/@:]+)@(?=[^/]+:)", lambda match: _without_user(match[1]), shown)

    return shown.partition("?")[0]


def _without_user(user: str) -> str:
    return "git@" if user == "git" else ""


def _output(folder: Path, timeout_s: float, *arguments: str, limit: int = 1 << 20) -> str | None:
    """Return git's output, at most `limit` bytes; None when it fails or there is no git."""
    environ = {key: value for key, value in os.environ.items() if key not in _OTHER_REPOSITORY}
    try:
        process = subprocess.Popen(
            [*_GIT, *arguments],
            cwd=folder,
            env=environ | _ENVIRON,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None

    assert process.stdout is not None
    deadline = threading.Timer(timeout_s, process.kill)  # the file system of a repository may hang
    deadline.daemon = True
    deadline.start()
    with process.stdout:
        output = process.stdout.read(limit)
        if len(output) == limit:
            process.kill()

        process.wait()

    deadline.cancel()
    if len(output) == limit:
        return output.decode("utf-8", "replace")[:limit]

    return output.decode("utf-8", "replace") if process.returncode == 0 else None
