"""Downloads from a run's folder: its reports, logs and logged files. Nothing else of the disk is served."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, PlainTextResponse, Response

from traceml.display.report_files import page_text
from traceml.display.web.run_sources import is_run_id
from traceml.errors import StoreError
from traceml.run_folder import PAGE_NAME, REPORT_NAME
from traceml.runs.report.report import build_report
from traceml.trusted_files import is_file_inside

__all__ = ["IMAGE_TYPES", "RunFiles", "file_path"]

IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif",
               ".webp": "image/webp", ".bmp": "image/bmp"}  # fmt: skip
"""Suffixes of images that the page shows; other files are only downloaded, as they may contain scripts."""

_LOGGED = re.compile(r"artifacts/[0-9a-f]{64}(?:\.[A-Za-z0-9]{1,16})?")
_LOG = re.compile(r"logs/(?:[^/\0]+/)*[^/\0]+\.log")
# Of a served file no script runs, even where a browser would show it.
_HEADERS = {"content-security-policy": "sandbox; default-src 'none'", "x-content-type-options": "nosniff"}


def file_path(run_id: str, path: str, name: str = "") -> str:
    """Return the address of a file of a run.

    Args:
        path: the file in the run's folder.
        name: its name for the browser, where that is another one.
    """
    query = f"?name={quote(name, safe='')}" if name else ""
    return f"/files/{quote(run_id, safe='')}/{quote(path)}{query}"


class RunFiles:
    """Serves files of runs."""

    def __init__(self, runs_dir: Path) -> None:
        self._runs_dir = runs_dir

    def register(self, app: FastAPI) -> None:
        """Add the route."""
        app.get("/files/{run_id}/{path:path}")(self.serve)

    async def serve(self, run_id: str, path: str, name: str = "") -> Response:
        """Return a file of a run as a download, an image for display; reports are made where there are none yet."""
        if not is_run_id(run_id):
            return _refused()

        run_dir = self._runs_dir / run_id
        if path in (REPORT_NAME, PAGE_NAME):
            return await run_in_threadpool(_report, run_dir, path)

        file = run_dir / path
        if not (_LOGGED.fullmatch(path) or _LOG.fullmatch(path)) or not is_file_inside(file, run_dir):
            return _refused()

        image = IMAGE_TYPES.get(file.suffix.lower())
        return FileResponse(
            file,
            media_type=image or "application/octet-stream",
            filename=name or file.name,
            content_disposition_type="inline" if image else "attachment",
            headers=_HEADERS,
        )


def _report(run_dir: Path, name: str) -> Response:
    """Return a report as it was written at the end of the run, or that of the run so far."""
    headers = {**_HEADERS, "content-disposition": f"attachment; filename*=UTF-8''{quote(f'{run_dir.name}-{name}')}"}
    kind = "application/json" if name == REPORT_NAME else "text/html"
    try:
        if is_file_inside(run_dir / name, run_dir):
            content = (run_dir / name).read_bytes()
        else:
            text = build_report(run_dir).to_json() if name == REPORT_NAME else page_text(run_dir)
            content = text.encode()
    except (StoreError, OSError) as error:
        return PlainTextResponse(f"There is no report of this run: {error}", status_code=404)

    return Response(content, media_type=kind, headers=headers)


def _refused() -> Response:
    return PlainTextResponse("There is no such file in the folder of this run.", status_code=404)
