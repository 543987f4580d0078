"""Collectors of real repositories and processes, and the process in which they run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.eventually import eventually
from traceml.fail_open import failures
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import BUILT_IN
from traceml.track.rank.collectors.collector_process import CollectorProcess
from traceml.track.rank.collectors.environment import EnvironmentCollector, SystemCollector
from traceml.track.rank.collectors.git import MAX_DIFF_BYTES, GitCollector, without_credentials
from traceml.track.rank.collectors.reading_schedule import readings

PASSWORD = "hunter2" + "correcthorse"
BUILT_IN_NAMES = BUILT_IN[PluginType.COLLECTOR]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=trunk")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit and a remote whose address holds a password."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.py").write_text("lr = 0.1\n")
    git(folder, "add", "train.py")
    git(folder, "commit", "-q", "-m", "first")
    git(folder, "remote", "add", "origin", f"https://bob:{PASSWORD}@git.example.org/team/repository.git")
    return folder


def facts_of(collector: Any) -> dict[str, Any]:
    [facts] = collector.collect()
    return facts


def test_git_of_a_clean_repository(repository: Path) -> None:
    """Commit, branch and remote are told, the remote's password is not."""
    assert facts_of(GitCollector({"folder": str(repository)})) == {
        "commit": git(repository, "rev-parse", "HEAD"),
        "branch": "trunk",
        "dirty": False,
        "remote": "https://git.example.org/team/repository.git",
    }


def test_git_of_the_script(repository: Path, tmp_path: Path) -> None:
    """The repository is the script's, wherever it was started; changes are a diff."""
    (repository / "train.py").write_text("lr = 0.2\n")
    facts = facts_of(GitCollector({"folder": str(tmp_path), "script": "repository/train.py"}))

    assert facts["dirty"]
    assert "-lr = 0.1\n+lr = 0.2\n" in facts["diff"]
    assert not facts["diff_truncated"]


def test_git_diff_is_bounded(repository: Path) -> None:
    """A diff of any size costs a bounded row."""
    (repository / "train.py").write_text("x = 1  # changed\n" * 200_000)
    facts = facts_of(GitCollector({"folder": str(repository)}))

    assert facts["diff_truncated"]
    assert len(facts["diff"].encode()) == MAX_DIFF_BYTES


def test_git_changes_nothing(repository: Path) -> None:
    """Reading takes no lock, runs no hook and writes no index."""
    index = repository / ".git" / "index"
    (repository / "train.py").touch()
    before = index.read_bytes()
    facts_of(GitCollector({"folder": str(repository)}))

    assert index.read_bytes() == before


def test_git_without_commit_branch_or_repository(repository: Path, tmp_path: Path) -> None:
    """Missing facts are None; outside a repository there are none."""
    git(repository, "checkout", "-q", "--detach")
    assert facts_of(GitCollector({"folder": str(repository)}))["branch"] is None

    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    assert facts_of(GitCollector({"folder": str(empty)}))["commit"] is None
    assert GitCollector({"folder": str(tmp_path)}).collect() == []
    assert GitCollector({"folder": str(tmp_path / "gone")}).collect() == []


def test_git_of_large_files_has_no_text(repository: Path) -> None:
    """Git would hold them in memory several times; changes of other files follow."""
    (repository / "data.csv").write_text("a\n")
    git(repository, "add", "data.csv")
    git(repository, "commit", "-q", "-m", "second")
    with (repository / "data.csv").open("r+b") as data:
        data.truncate(20 << 20)

    (repository / "train.py").write_text("lr = 0.2\n")
    facts = facts_of(GitCollector({"folder": str(repository)}))

    assert "Binary files a/data.csv and b/data.csv differ" in facts["diff"]
    assert "+lr = 0.2" in facts["diff"]


def test_git_that_refuses_hangs_or_is_missing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is told, nothing is raised, and nothing is waited for longer than the time that it has."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as for a repository of another user
    assert GitCollector({"folder": str(repository)}).collect() == []

    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    assert GitCollector({"folder": str(repository)}).collect() == []

    (folder / "git").write_text("#!/bin/sh\nexec /bin/sleep 3600\n")
    (folder / "git").chmod(0o755)
    assert GitCollector({"folder": str(repository), "git_timeout_s": 0.2}).collect() == []


def test_git_of_the_folder_within_a_hook(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository of the hook, whose variables git sets, is not asked."""
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.setenv(name, str(tmp_path / "other"))

    facts = facts_of(GitCollector({"folder": str(repository)}))
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name)

    assert facts["commit"] == git(repository, "rev-parse", "HEAD")
    assert not facts["dirty"]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("git@github.com:org/repo.git", "git@github.com:org/repo.git"),
        ("alice@host:repo.git", "host:repo.git"),
        ("ssh://git@host:22/repo.git", "ssh://git@host:22/repo.git"),
        ("ssh://alice@host/repo.git", "ssh://host/repo.git"),
        ("https://token@host/repo.git?private_token=x", "https://host/repo.git"),
        ("https://a:b@c@host/repo.git", "https://host/repo.git"),
        ("/srv/git/repo.git", "/srv/git/repo.git"),
    ],
)
def test_remotes_without_credentials(address: str, shown: str) -> None:
    assert without_credentials(address) == shown


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are those that an import would find, torch is not imported, the command hides what is secret."""
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SHELL_HISTORY_OF_ALICE", "x")
    monkeypatch.setenv("TRACEML_PARENT", "{}")
    argv = ["train.py", "--lr", "0.1", "--api-key", PASSWORD, f"--db.password={PASSWORD} and more", "data.secret=x y"]
    facts = facts_of(EnvironmentCollector({"argv": argv, "path": sys.path, "executable": "/bin/python"}))

    assert facts["torch"] == torch.__version__
    assert f"pytest=={pytest.__version__}" in facts["packages"].splitlines()
    assert facts["python"].startswith("3.")
    assert facts["variables"]["OMP_NUM_THREADS"] == "3"
    assert "SHELL_HISTORY_OF_ALICE" not in facts["variables"]
    assert "TRACEML_PARENT" not in facts["variables"]
    assert PASSWORD not in facts["command"]
    assert "and more" not in facts["command"]
    assert "x y" not in facts["command"]
    assert facts["command"].startswith("train.py --lr 0.1 --api-key ")


@pytest.mark.parametrize(
    ("environ", "told"), [({"OMP_NUM_THREADS": "5", "A": "b"}, {"OMP_NUM_THREADS": "5"}), (None, {})]
)
def test_environment_of_another_process(environ: dict[str, str] | None, told: dict[str, str]) -> None:
    """Its variables and its version are told, none where they are not known."""
    facts = facts_of(EnvironmentCollector({"argv": [], "python": "3.99.1", "environ": environ}))

    assert facts["variables"] == told
    assert facts["python"] == "3.99.1"


def test_our_own_secrets_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they look like: a token of a few letters, or a webhook whose path is its key."""
    monkeypatch.setenv("TRACEML_TOKEN", "kitten")
    monkeypatch.setenv("TRACEML_ON_FINDING", "https://hooks.example.org/kitten")
    monkeypatch.setenv("TRACEML_PROJECT", "cats")
    variables = facts_of(EnvironmentCollector({"argv": []}))["variables"]

    assert "kitten" not in str(variables)
    assert {"TRACEML_TOKEN", "TRACEML_ON_FINDING"}.isdisjoint(variables)
    assert variables["TRACEML_PROJECT"] == "cats"


def test_system() -> None:
    """The machine is told in numbers that agree with Python's own."""
    facts = facts_of(SystemCollector())

    assert facts["cores"] == os.cpu_count()
    assert facts["memory_bytes"] > 1 << 28
    assert facts["host"] == os.uname().nodename


# --- the process -----------------------------------------------------------------------------------------------------

COLLECTORS = """
    import os
    import time

    import numpy as np

    from traceml.track.plugins.interfaces import CollectorInterface
    from traceml.track.plugins.metric import Metric
    from traceml.track.plugins.plugin_base import CollectorPlugin
    from traceml.track.plugins.plugin_metadata import PluginMetadata

    class Once(CollectorInterface):
        def __init__(self, config):
            self.config = config

        def collect(self):
            print("what a collector prints is not taken for a row")
            return [{"pid": os.getpid(), "argv": self.config["argv"], "api_key": "hunter2"}, Metric("m", 0.1 + 0.2, 7)]

    class Ticking(CollectorInterface):
        interval = 0.1
        n = 0

        def collect(self):
            self.n += 1
            if self.n == 2:
                raise RuntimeError("out of order for once")

            return [Metric("tick", float(self.n))]

    class Hanging(CollectorInterface):
        def collect(self):
            time.sleep(3600)

    class Numbers(CollectorInterface):
        def collect(self):
            return [Metric("f32", np.float32(1.5), np.int64(7)), Metric("big", 2**80), {"count": 2**70}]

    class Undecoded(CollectorInterface):
        def collect(self):
            return [{"folder": os.fsdecode(b"/runs/\\xff"), "beside": 1}]

    class Mapping(Once):
        interval = 0.1

        def collect(self):
            return {"pid": os.getpid()}

    class Text(Ticking):
        interval = "1"

    class Leaving(CollectorInterface):
        def collect(self):
            raise SystemExit(3)

    class Holding(CollectorPlugin):
        @classmethod
        def get_metadata(cls):
            return PluginMetadata(name="holding", version="1")

        def create_collector(self, config):
            return Ticking()

        def cleanup(self):
            open("cleaned", "w").close()
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with collectors, found as the training process would find it."""
    (tmp_path / "my_collectors.py").write_text(textwrap.dedent(COLLECTORS))
    monkeypatch.syspath_prepend(str(tmp_path))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False

    return True


@pytest.mark.usefixtures("plugins")
def test_collectors_run_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts arrive masked, values as they are, from another process, and it ends when it is told to."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--token=" + PASSWORD])
    rows: list[dict[str, Any]] = []
    child = CollectorProcess(["my_collectors:Once", *BUILT_IN_NAMES], {}, (), rows.append)
    child.stop(timeout_s=60)

    assert not is_running(child.pid)
    assert {row["name"] for row in rows} >= {"my_collectors:Once", "environment", "system", "m"}
    assert PASSWORD not in repr(rows)
    facts = next(row["facts"] for row in rows if row["name"] == "my_collectors:Once")
    assert facts["pid"] == child.pid
    assert facts["api_key"] == "[masked:secret]"
    [metric] = [row for row in rows if row["kind"] == "metric"]
    assert (metric["value"], metric["step"]) == (0.1 + 0.2, 7)


@pytest.mark.usefixtures("plugins")
def test_failing_and_hanging_collectors_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """One that is missing, one that fails and one that hangs leave the others alive, and are named."""
    rows: list[dict[str, Any]] = []
    before = failures().get("track", 0)
    names = ["my_collectors:Hanging", "my_collectors:Ticking", "my_collectors:Missing"]
    child = CollectorProcess(names, {}, (), rows.append)
    eventually(lambda: sum(row["name"] == "tick" for row in rows) >= 3)
    child.stop(timeout_s=0)

    assert not is_running(child.pid)
    values = [row["value"] for row in rows if row["name"] == "tick"]
    assert values[:3] == [1.0, 3.0, 4.0]
    assert "out of order for once" in caplog.text
    assert "Missing" in caplog.text
    assert failures()["track"] == before + 2


@pytest.mark.usefixtures("plugins")
def test_values_of_numpy_arrive_as_numbers() -> None:
    """What msgpack cannot hold is converted, as a value that the script logs itself; nothing after it is lost."""
    rows: list[dict[str, Any]] = []
    child = CollectorProcess(["my_collectors:Numbers"], {}, (), rows.append)
    child.stop(timeout_s=60)

    found = {row["name"]: (row["value"], row["step"]) for row in rows if row["kind"] == "metric"}
    assert found == {"f32": (1.5, 7), "big": (float(2**80), None)}
    assert [row["facts"] for row in rows if row["kind"] == "collected"] == [{"count": str(2**70)}]


@pytest.mark.usefixtures("plugins")
def test_names_that_are_not_utf_8_cost_no_facts() -> None:
    """A folder may have any bytes in its name; the facts beside it were lost with it."""
    rows: list[dict[str, Any]] = []
    child = CollectorProcess(["my_collectors:Undecoded"], {}, (), rows.append)
    child.stop(timeout_s=60)

    assert [row["facts"] for row in rows] == [{"folder": "/runs/\\udcff", "beside": 1}]


def test_a_collector_that_returns_nothing_is_told_so() -> None:
    """It forgot its `return`; "'NoneType' object is not iterable" did not say whose error it was."""
    errors: list[Exception] = []
    collector: Any = SimpleNamespace(interval=None, collect=lambda: None)

    assert list(readings(collector, errors.append)) == []
    assert [str(error) for error in errors] == ["collect() must return a list of Metric and dict, not of NoneType None"]


@pytest.mark.usefixtures("plugins")
def test_a_collector_that_returns_no_list_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    """A dict in place of a list of dicts was lost without a word, and the collector with it."""
    child = CollectorProcess(["my_collectors:Mapping"], {}, (), lambda row: None)
    eventually(lambda: "collect() must return a list of Metric and dict, not of str 'pid'" in caplog.text)
    child.stop(timeout_s=0)


@pytest.mark.usefixtures("plugins")
def test_a_collector_that_ends_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    """Its thread ended without a word."""
    child = CollectorProcess(["my_collectors:Text", "my_collectors:Leaving"], {}, (), lambda row: None)
    eventually(lambda: "my_collectors:Text': TypeError" in caplog.text and "Leaving': SystemExit: 3" in caplog.text)
    child.stop(timeout_s=0)


@pytest.mark.usefixtures("plugins")
def test_plugins_release_what_they_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cleanup` is called at the end, also of a collector with an interval."""
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = []
    child = CollectorProcess(["my_collectors:Holding"], {}, (), rows.append, cleanup_s=60)
    eventually(lambda: rows)
    child.stop(timeout_s=0)

    assert (tmp_path / "cleaned").exists()


@pytest.mark.usefixtures("plugins")
def test_the_process_ends_with_its_rank(tmp_path: Path) -> None:
    """Collectors end with a killed rank."""
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from traceml.track.rank.collectors.collector_process import CollectorProcess

            child = CollectorProcess(["my_collectors:Ticking"], {}, (), lambda row: None)
            print(child.pid, flush=True)
            time.sleep(3600)
            """
        )
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        pid = int(rank.stdout.readline())
        assert is_running(pid)
        rank.kill()

    eventually(lambda: not is_running(pid))
