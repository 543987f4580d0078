"""Pages of other sites and of other ports cannot read or change runs through the user's browser."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.diagnosis.fabricated import Job
from tests.display.web.conftest import Tabs, Visit
from tests.runs.fabricated_store import store_run
from traceml.supervise.page_process import PageProcess

Visits = Callable[..., Visit]
# Each way in which a page reaches another server; what it could read, and which sockets opened.
_ATTACK = """async (page) => {
  const read = {};
  const asked = async (name, address, options) => {
    try {
      const answer = await fetch(address, {credentials: "include", ...options});
      read[name] = answer.type === "opaque" ? "" : `${answer.status} ${await answer.text()}`;
    } catch { read[name] = ""; }
  };
  const polling = `http://${page}/_nicegui_ws/socket.io/?EIO=4&transport=polling&client_id=x`;
  await asked("page", `http://${page}/`);
  await asked("blind", `http://${page}/`, {mode: "no-cors"});
  await asked("polling", polling);
  await asked("posted", polling, {method: "POST", body: "40", headers: {"Content-Type": "text/plain"}});
  await asked("report", `http://${page}/files/RUN/report.json`);
  const loaded = (element, address) => new Promise((done) => {
    element.onload = () => done(true);
    element.onerror = () => done(false);
    element.src = address;
    document.body.append(element);
  });
  read.script = await loaded(document.createElement("script"), `${polling}&j=0`);
  read.image = await loaded(document.createElement("img"), `http://${page}/files/RUN/artifacts/x.png`);
  read.socket = await new Promise((done) => {
    const socket = new WebSocket(`ws://${page}/_nicegui_ws/socket.io/?EIO=4&transport=websocket&client_id=x`);
    socket.onopen = () => done(true);
    socket.onerror = () => done(false);
  });
  const frame = document.createElement("iframe");
  await loaded(frame, `http://${page}/`);
  try { read.frame = frame.contentDocument.body.textContent; } catch { read.frame = ""; }
  return read;
}"""
_NOTHING = dict.fromkeys(("page", "blind", "polling", "posted", "report", "frame"), "") | dict.fromkeys(
    ("script", "image", "socket"), False
)


class OwnTabs(Tabs):
    """Tabs of a new profile: within one, connections and caches are shared, which an attack would use."""

    def give_back(self, pages: list[Page]) -> None:
        """Close the profile with its tabs, as they are."""
        self.close()


@pytest.fixture
def tabs(browser: Browser, page_process: PageProcess) -> Tabs:
    """Of one test."""
    return OwnTabs(browser, f"http://127.0.0.1:{page_process.port}")


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of another server on this host, with an empty page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>another site</title>")

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.example"])
def test_a_page_elsewhere_reads_nothing_and_opens_no_socket(
    visit: Visits, page_process: PageProcess, elsewhere: int, host: str
) -> None:
    """Browsers send the cookie to all ports of a host, and a page may ask any: neither is enough."""
    mine = visit()
    mine.open("/")
    mine.page.goto(f"http://{host}:{elsewhere}/")

    assert mine.page.evaluate(_ATTACK, f"127.0.0.1:{page_process.port}") == _NOTHING
    mine.foreign.clear()
    mine.errors.clear()


def test_a_name_that_is_bound_to_this_host_later_is_another_site(visit: Visits, page_process: PageProcess) -> None:
    """The cookie is of the address that was opened: under any other name of it the page asks for the token."""
    mine = visit()
    mine.open("/")
    mine.page.goto(f"http://evil.example:{page_process.port}/")

    assert "This page needs its token" in mine.page.content()
    found = mine.page.evaluate(_ATTACK, f"evil.example:{page_process.port}")
    assert [
        name for name, text in found.items() if isinstance(text, str) and text and "needs its token" not in text
    ] == []
    assert found["socket"] is False
    mine.foreign.clear()
    mine.errors.clear()


def test_a_click_on_a_page_elsewhere_changes_nothing(
    visit: Visits, page_process: PageProcess, elsewhere: int, runs_dir: Path
) -> None:
    """A link or a form opens the page, which is all that a navigation can do: runs change over its websocket alone."""
    run = store_run(runs_dir / "20251203-000000-victim-0013", Job(ranks=1, steps=5))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    mine = visit()
    mine.open("/")
    mine.page.goto(f"http://127.0.0.1:{elsewhere}/")
    here = f"http://127.0.0.1:{page_process.port}"
    submit = """([action, method]) => {
      const form = Object.assign(document.createElement("form"), {action, method});
      form.innerHTML = "<input name=delete value=1>";
      document.body.append(form);
      form.submit();
    }"""
    for path in (
        f"/run/{run.name}",
        f"/files/{run.name}/report.json",
        "/_nicegui_ws/socket.io/?EIO=4&transport=polling",
    ):
        for method in ("get", "post"):
            page = mine.context.new_page()
            page.goto(f"http://127.0.0.1:{elsewhere}/")
            with page.expect_request(lambda request: request.url.startswith(here)) as sent:
                page.evaluate(submit, [f"{here}{path}", method])

            sent.value.response()  # the tab stays: Chromium may never close one that navigates

    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    mine.foreign.clear()
    mine.errors.clear()
