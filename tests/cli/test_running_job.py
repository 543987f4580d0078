"""Search of a running job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_top import running_run
from traceml.cli.running_job import running_job
from traceml.errors import RunNotFoundError
from traceml.settings import load
from traceml.transport import auth


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A running job of another folder, whose aggregator has the usual port."""
    run = running_run(tmp_path / "other" / "going-on")
    served = auth.PublishedServer("127.0.0.1", 1, "token", 1, 1, "boot", str(run.parent))
    monkeypatch.setattr(auth, "discover", lambda _port: served)
    return Path(run)


def test_a_job_of_the_usual_aggregator_is_found(elsewhere: Path, tmp_path: Path) -> None:
    """The folder of the settings has none."""
    assert running_job(None, load(runs_dir=tmp_path / "runs")) == elsewhere


@pytest.mark.usefixtures("elsewhere")
def test_a_job_of_another_folder_than_the_named_one_is_not_meant(tmp_path: Path) -> None:
    """Its stacks would be taken for those of a job that has just ended."""
    with pytest.raises(RunNotFoundError, match=f"no job is running in {tmp_path / 'runs'}"):
        running_job(None, load(runs_dir=tmp_path / "runs"), only_there=True)
