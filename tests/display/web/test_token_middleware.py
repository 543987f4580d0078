"""The page requires its token, over HTTP and over the websocket."""

from __future__ import annotations

import http.client
import stat
from collections.abc import Callable

import pytest

from traceml.display.web.token_middleware import cookie_name, cookie_value
from traceml.supervise.page_process import PageProcess
from traceml.transport import auth

Ask = Callable[..., http.client.HTTPResponse]
_UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
_SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket&client_id=x"


@pytest.fixture
def ask(page_process: PageProcess) -> Ask:
    """Send one request and return the answer, read."""

    def send(path: str, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", page_process.port, timeout=60)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            answer.body = b"" if answer.status == 101 else answer.read()  # type: ignore[attr-defined]
            return answer
        finally:
            connection.close()

    return send


@pytest.fixture
def cookie(page_process: PageProcess) -> str:
    """The cookie that an authorized browser sends."""
    return f"{cookie_name(page_process.port)}={cookie_value(page_process.token)}"


@pytest.mark.parametrize("path", ["/", "/run/x", "/compare/a/b", "/_nicegui/3/static/nicegui.js", "/nowhere"])
def test_without_the_token_there_is_nothing(ask: Ask, path: str) -> None:
    """Each address answers 401 with a page that says where to find the token."""
    answer = ask(path)

    assert answer.status == 401
    assert b"This page needs its token" in answer.body
    assert b"traceml serve --web" in answer.body


@pytest.mark.parametrize("token", ["", "wrong", "%00", "é" * 50])
def test_a_wrong_token_is_reported(ask: Ask, token: str) -> None:
    from urllib.parse import quote

    answer = ask(f"/?token={quote(token)}")

    assert answer.status == 401
    assert b"is wrong" in answer.body
    assert answer.getheader("set-cookie") is None


def test_the_token_becomes_a_cookie_and_leaves_the_address(ask: Ask, page_process: PageProcess, cookie: str) -> None:
    """The address loses the token; the cookie is not the token, and scripts cannot read it."""
    answer = ask(f"/run/a%20b?x=1&token={page_process.token}")

    assert answer.status == 303
    assert answer.getheader("location") == "/run/a%20b?x=1"
    told = answer.getheader("set-cookie") or ""
    assert told.startswith(f"{cookie};")
    assert "HttpOnly" in told
    assert "SameSite=Lax" in told
    assert page_process.token not in told
    assert ask("/", Cookie=cookie).status == 200


@pytest.mark.parametrize("path", ["//evil.example/", "/%5Cevil.example", "/\\evil.example"])
def test_the_redirect_stays_here(ask: Ask, page_process: PageProcess, path: str) -> None:
    answer = ask(f"{path}?token={page_process.token}")

    location = answer.getheader("location") or "/"
    assert not location.startswith(("//", "/\\"))


@pytest.mark.parametrize("forged", ["traceml_1=x", "{name}=", "{name}={token}", "{name}=0", ";;=;"])
def test_another_cookie_is_none(ask: Ask, page_process: PageProcess, forged: str) -> None:
    """The token itself is not a valid cookie."""
    cookie = forged.format(name=cookie_name(page_process.port), token=page_process.token)

    assert ask("/", Cookie=cookie).status == 401


@pytest.mark.parametrize("other", ['state={"tab": 1}', "text=a b", "flag", "é=1", 'open="1'])
def test_cookies_of_other_servers_do_not_hide_ours(ask: Ask, cookie: str, other: str) -> None:
    """A browser sends those of all ports of the host, in any form, and in any order."""
    assert ask("/nowhere", Cookie=f"{other}; {cookie}".encode().decode("latin-1")).status == 404


def test_the_websocket_is_guarded_too(ask: Ask, page_process: PageProcess, cookie: str) -> None:
    """It opens only with the cookie, and not from a page of another server, although that sends the cookie too."""
    here = f"http://127.0.0.1:{page_process.port}"

    assert ask(_SOCKET, **_UPGRADE).status == 403
    assert ask(_SOCKET, **_UPGRADE, Cookie=cookie, Origin="http://127.0.0.1:1").status == 403
    assert ask(_SOCKET, **_UPGRADE, Cookie=cookie, Origin=here).status == 101


def test_a_page_of_another_server_gets_nothing(ask: Ask, cookie: str) -> None:
    assert ask("/", Cookie=cookie, Origin="http://127.0.0.1:1").status == 401


def test_nothing_may_be_loaded_from_elsewhere(ask: Ask, cookie: str) -> None:
    """The headers allow loading only from this server, and no referrer."""
    answer = ask("/", Cookie=cookie)

    assert "default-src 'self'" in (answer.getheader("content-security-policy") or "")
    assert answer.getheader("referrer-policy") == "no-referrer"


def test_the_token_is_kept_for_this_user_alone(page_process: PageProcess) -> None:
    kept = auth.discover(page_process.port, kind=auth.PAGE)

    assert kept is not None
    assert kept.token == page_process.token
    path = auth.runtime_folder() / f"page-{page_process.port}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


_POLLING = "/_nicegui_ws/socket.io/?EIO=4&transport=polling&client_id=x"


def test_a_page_of_another_port_reads_nothing(ask: Ask, cookie: str) -> None:
    """Its scripts have the cookie and no origin; the browser says where they come from, and JSONP is refused anyway."""
    same_site = {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}

    assert ask(f"{_POLLING}&j=0", Cookie=cookie).status == 401
    assert ask(_POLLING, Cookie=cookie, **same_site).status == 401
    assert ask(_POLLING, Cookie=cookie, **{"Sec-Fetch-Site": "same-origin"}).status == 200
    assert ask("/", Cookie=cookie, **{**same_site, "Sec-Fetch-Mode": "navigate"}).status == 200
