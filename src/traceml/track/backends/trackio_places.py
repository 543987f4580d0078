"""Places where Trackio keeps runs: a folder of databases, or a server (also a Hugging Face Space)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traceml.errors import BackendUnauthorizedError

__all__ = ["TrackioEntry", "TrackioFolder", "TrackioPlace", "TrackioRun", "TrackioServer"]


@dataclass(frozen=True, slots=True)
class TrackioRun:
    """Project, name and id by which Trackio knows a run."""

    project: str
    name: str
    id: str


@dataclass(frozen=True, slots=True)
class TrackioEntry:
    """One entry of a run's log."""

    values: Mapping[str, Any]  # values by name; media as Trackio's own maps
    step: int
    timestamp: str  # ISO time; a server sets its own
    key: str  # entries with the same key are stored once


class TrackioFolder:
    """Databases in a folder, written by Trackio's own storage.

    Args:
        folder: created when it is missing. A process can use one only: Trackio reads it at its import.
    """

    def __init__(self, folder: Path) -> None:
        os.environ["TRACKIO_DIR"] = str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        from trackio.sqlite_storage import SQLiteStorage

        self._storage: Any = SQLiteStorage

    def write(self, run: TrackioRun, entries: Sequence[TrackioEntry], config: Mapping[str, Any] | None) -> None:
        """Store entries in one transaction, those of known keys not again, and the whole config unless it is None."""
        self._storage.bulk_log(
            project=run.project,
            run=run.name,
            run_id=run.id,
            metrics_list=[dict(entry.values) for entry in entries],
            steps=[entry.step for entry in entries],
            timestamps=[entry.timestamp for entry in entries],
            log_ids=[entry.key for entry in entries],
            config=None if config is None else dict(config),
        )

    def config(self, run: TrackioRun) -> dict[str, Any]:
        """Return the stored config; empty when there is none."""
        return dict(self._storage.get_run_config(run.project, run_id=run.id) or {})

    def put_media(self, run: TrackioRun, path: Path, name: str, step: int) -> None:
        """Copy a file."""
        from trackio.media.utils import get_project_media_path

        shutil.copyfile(path, get_project_media_path(run.project, run.name, step) / name)

    def put_artifact(self, run: TrackioRun, name: str, path: Path, inner: str, title: str) -> None:
        """Copy a file into the project's artifacts."""
        from trackio import cas

        digest, size = cas.stage_blob_into_project(path, run.project)
        self._storage.commit_artifact_version(
            **_artifact(run, name, title, {"path": inner, "digest": digest, "size": size})
        )


class TrackioServer:
    """A Trackio server or Space, over its HTTP interface.

    Args:
        address: URL, which may hold a write token, or the id of a Space.
    """

    def __init__(self, address: str) -> None:
        from trackio.remote_client import RemoteClient

        token = os.environ.get("HF_TOKEN")
        self._token = {"hf_token": token}
        self._client: Any = RemoteClient(
            address, hf_token=token, write_token=os.environ.get("TRACKIO_WRITE_TOKEN") or None
        )

    def write(self, run: TrackioRun, entries: Sequence[TrackioEntry], config: Mapping[str, Any] | None) -> None:
        """Send entries in one request."""
        from trackio.utils import serialize_values

        about = {"project": run.project, "run": run.name, "run_id": run.id, "config": serialize_values(config)}
        logs = [
            {**about, "metrics": serialize_values(entry.values), "step": entry.step, "log_id": entry.key}
            for entry in entries
        ]
        self._call("bulk_log", logs=logs, **self._token)

    def config(self, run: TrackioRun) -> dict[str, Any]:
        """Ask for the config."""
        return dict(self._call("get_run_summary", project=run.project, run_id=run.id)["config"] or {})

    def put_media(self, run: TrackioRun, path: Path, name: str, step: int) -> None:
        """Upload a file."""
        about = {"project": run.project, "run": run.name, "run_id": run.id, "step": step, "relative_path": None}
        self._call(
            "bulk_upload_media",
            uploads=[{**about, "uploaded_file": {**_upload(path), "orig_name": name}}],
            **self._token,
        )

    def put_artifact(self, run: TrackioRun, name: str, path: Path, inner: str, title: str) -> None:
        """Upload a file that the server does not have, and commit the artifact."""
        from trackio import cas

        digest, size = cas.hash_file(path)
        found = self._call("check_artifact_blobs", project=run.project, digests=[digest], **self._token)
        if digest not in found["present"]:
            uploads = [{"project": run.project, "digest": digest, "uploaded_file": _upload(path)}]
            self._call("bulk_upload_artifact_blob", project=run.project, uploads=uploads, **self._token)

        artifact = _artifact(run, name, title, {"path": inner, "digest": digest, "size": size})
        self._call("artifact_log", **artifact, **self._token)

    def _call(self, function: str, /, **arguments: Any) -> Any:
        with _errors():
            return self._client.predict(api_name=f"/{function}", **arguments)


TrackioPlace = TrackioFolder | TrackioServer


def _artifact(run: TrackioRun, name: str, title: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "project": run.project,
        "name": name,
        "type": "artifact",
        "description": None,
        "manifest": [dict(entry)],
        "metadata": {"name": title},
        "aliases": [],
        "run_name": run.name,
        "run_id": run.id,
    }


def _upload(path: Path) -> Any:
    from gradio_client import handle_file

    return handle_file(str(path))


@contextmanager
def _errors() -> Iterator[None]:
    """Raise our error where the server requests a token: its status is 400, as for rows that it refuses."""
    try:
        yield
    except Exception as error:
        if "write_token" in str(getattr(getattr(error, "response", None), "text", "")):
            raise BackendUnauthorizedError(
                "the Trackio server requires its write token: set TRACKIO_WRITE_TOKEN, or api_key_file for this backend"
            ) from error

        raise
