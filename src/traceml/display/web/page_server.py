"""The page's server: NiceGUI behind the token check, on a socket inherited from the parent process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.display.web.token_middleware import notice

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from traceml.display.web.pages import Pages

__all__ = ["serve"]

# A browser that was away for less is sent what it missed; else, or after a restart of the server, it reloads the page.
_RECONNECT_S = 30.0
_HISTORY = 60
# So many connections are accepted before the first of them is counted and cut.
_BACKLOG = 64


def serve(runs_dir: Path, sock: socket.socket, token: str) -> None:
    """Serve the pages on a listening socket until a signal stops the process."""
    # NiceGUI reads stored values at its import, and writes them back; our pages have none. A place that others can
    # write to, such as the temporary folder, would let them plant a pipe or a link there.
    os.environ["NICEGUI_STORAGE_PATH"] = f"{os.devnull}/none"
    import uvicorn
    from fastapi import FastAPI
    from nicegui import app as nicegui_app
    from nicegui import ui

    from traceml.display.web.pages import Pages
    from traceml.display.web.run_files import RunFiles
    from traceml.display.web.token_middleware import TokenMiddleware
    from traceml.display.web.unauthenticated_connections import UnauthenticatedConnections

    unauthenticated = UnauthenticatedConnections()
    pages = Pages(runs_dir)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=partial(_lifespan, pages))
    RunFiles(runs_dir).register(app)
    pages.register()
    nicegui_app.add_exception_handler(404, _no_page)
    port = sock.getsockname()[1]
    app.add_middleware(TokenMiddleware, token=token, port=port, on_authenticated=unauthenticated.discard)
    # No bar over the page during a request: it has no name for screen readers, and pages say what they wait for.
    nicegui_app.config.quasar_config["loadingBar"]["skipHijack"] = True
    ui.run_with(
        app,
        title="traceml",
        favicon=_FAVICON,
        dark=None,
        language="en-US",
        binding_refresh_interval=None,
        reconnect_timeout=_RECONNECT_S,
        message_history_length=_HISTORY,
        gzip_middleware_factory=None,  # on loopback it costs more than it saves
        tailwind=False,
        show_welcome_message=False,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            http=unauthenticated.protocol(),
            backlog=_BACKLOG,
            ws="wsproto",
            ws_per_message_deflate=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
    )
    asyncio.run(server.serve(sockets=[sock]))


@asynccontextmanager
async def _lifespan(pages: Pages, _: object) -> AsyncIterator[None]:
    """Read the list of runs, and all again on SIGUSR1: the parent sends it when a run has ended."""
    pages.read_ahead()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, pages.refresh)
    yield


async def _no_page(_request: Request, _error: Exception) -> Response:
    from starlette.responses import HTMLResponse

    return HTMLResponse(notice(404, "There is no such page.", '<p><a href="/">All runs</a></p>'), status_code=404)


_FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="8" fill="#2f6fed"/>'
    '<path d="M6 20h4l3-10 5 14 3-8h5" fill="none" stroke="#fff" stroke-width="2.6" stroke-linecap="round" '
    'stroke-linejoin="round"/></svg>'
)
