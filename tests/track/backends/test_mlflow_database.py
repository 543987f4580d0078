"""MLflow's database file: whenever a process is killed, the next delivery works, and no run is lost."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.forked import client as forked
from tests.track.backends.conftest import Maker
from tests.track.conftest import CREATE
from traceml.errors import BackendError
from traceml.track.backends.mlflow_database import prepare_database

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.timeout(240),
]

# A step was done and not recorded, as after a kill between the two: MLflow's own upgrade fails at it.
INTERRUPT = "UPDATE alembic_version SET version_num = '7ac759974ad8'"


def _copy(empty_mlflow: Path, folder: Path, *statements: str) -> Path:
    path = folder / "mlflow.db"
    path.write_bytes(empty_mlflow.read_bytes())
    with closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)

    return path


def _version(path: Path) -> str:
    with closing(sqlite3.connect(path)) as database:
        return str(database.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def _add_run(make: Maker, path: Path) -> None:
    backend = make("mlflow", tracking_uri=f"sqlite:///{path}")
    backend.start_experiment("first", "tests")
    backend.log_metric("loss", 1.0, 1)
    backend.end_experiment()


def test_a_killed_creation_leaves_no_database(tmp_path: Path, empty_mlflow: Path) -> None:
    """The file appears complete or not at all, also beside what an earlier try left."""
    path, draft = tmp_path / "mlflow.db", tmp_path / ".mlflow.db.new"

    def is_partly_there() -> bool:
        return draft.exists() and draft.stat().st_size > 20_000

    killed = False
    while not killed:  # it may have ended before
        path.unlink(missing_ok=True)
        command = [sys.executable, "-c", CREATE, str(path)]
        process = forked.Popen(command, imports="mlflow", stderr=subprocess.DEVNULL)
        eventually(lambda: is_partly_there() or process.poll() is not None)  # noqa: B023
        process.kill()
        killed = process.wait() == -signal.SIGKILL and draft.exists()

    assert not path.exists()

    prepare_database(path, is_ours=True)
    assert _version(path) == _version(empty_mlflow)
    assert not draft.exists()


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_interrupted_creation_is_repaired(make: Maker, tmp_path: Path, empty_mlflow: Path, is_ours: bool) -> None:
    """What an earlier version of traceml, or MLflow itself, left incomplete holds no run and is created anew."""
    path = _copy(empty_mlflow, tmp_path, INTERRUPT)
    prepare_database(path, is_ours=is_ours)

    assert _version(path) == _version(empty_mlflow)
    assert _version(tmp_path / "mlflow.db.before-1") == "7ac759974ad8"
    _add_run(make, path)


def test_a_database_with_runs_is_never_replaced(make: Maker, tmp_path: Path, empty_mlflow: Path) -> None:
    """Its upgrade fails: the error names the file and what to do, and the file stays."""
    path = _copy(empty_mlflow, tmp_path)
    _add_run(make, path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(INTERRUPT)

    before = path.read_bytes()
    for is_ours, words in ((True, "cannot be upgraded"), (False, "^run `mlflow db upgrade sqlite:///")):
        with pytest.raises(BackendError, match=words) as caught:
            prepare_database(path, is_ours=is_ours)

        assert str(path) in str(caught.value)

    assert path.read_bytes() == before


def test_a_database_of_a_newer_mlflow_is_refused(tmp_path: Path, empty_mlflow: Path) -> None:
    path = _copy(empty_mlflow, tmp_path, "UPDATE alembic_version SET version_num = 'ffffffffffff'")

    with pytest.raises(BackendError, match="install the version that wrote it"):
        prepare_database(path, is_ours=True)


def test_a_database_of_an_older_mlflow_is_upgraded(make: Maker, tmp_path: Path) -> None:
    """Only where traceml chose the file; its runs stay, and so does the earlier file."""
    from alembic import command
    from mlflow.store.db import utils

    path = tmp_path / "mlflow.db"
    engine = utils.create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    utils.InitialBase.metadata.create_all(engine)
    config = utils._get_alembic_config(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "7ac759974ad8")

    engine.dispose()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'old', 'active')")
        database.execute(
            "INSERT INTO runs (run_uuid, name, experiment_id, status, lifecycle_stage, source_type, user_id, "
            "start_time) VALUES ('abc', 'old', 7, 'FINISHED', 'active', 'LOCAL', 'me', 1)"
        )

    prepare_database(path, is_ours=True)
    from mlflow import MlflowClient

    assert MlflowClient(f"sqlite:///{path}").get_run("abc").info.run_name == "old"
    assert (tmp_path / "mlflow.db.before-1").exists()
    _add_run(make, path)


def test_a_database_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is awaited once, for all of the file: a power cut leaves the whole database, or none."""
    path, synced = tmp_path / "mlflow.db", []

    def note(fd: int) -> None:
        synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    prepare_database(path, is_ours=True)

    assert synced == [(path.stat().st_ino, path.stat().st_size, False)]


def test_a_relative_path(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path) -> None:
    """It starts at the folder of the script, for the artifacts too."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, "here.db")
    backend = make("mlflow", tracking_uri="sqlite:///here.db")
    backend.start_experiment("first", "tests")
    backend.log_text("note", "hello", 1)
    backend.end_experiment()

    assert next(tmp_path.glob("mlartifacts/*/artifacts/text/note/1.txt")).read_text() == "hello"
