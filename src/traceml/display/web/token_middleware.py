"""Access control: a token in the address once, a cookie after that; also for websockets."""

from __future__ import annotations

import hashlib
import hmac
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
    Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

__all__ = ["TokenMiddleware", "cookie_name", "cookie_value", "notice"]

_TOKEN_PARAMETER = "token"  # noqa: S105 - the name of the parameter
# Engine.io answers a request with it as a script, which any page may load; our own never asks for that.
_JSONP_PARAMETER = "j"
_COOKIE_AGE_S = 30 * 24 * 3600
# NiceGUI's pages need inline and evaluated scripts; other origins are neither loaded from nor sent to.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)

_HOW = """
<p>Open the address that <code>traceml serve --web</code> or <code>traceml run --live web</code> printed: it ends in
  <code>?token=&hellip;</code>. This browser then remembers it for 30 days.</p>
<p class="dim">Only the user who started traceml can read the token. Over ssh, forward the port and open the same
  address: <code>ssh -L 29766:127.0.0.1:29766 host</code></p>
"""


def cookie_name(port: int) -> str:
    """Return the cookie's name, with the port: browsers send cookies to all ports of a host."""
    return f"traceml_{port}"


def cookie_value(token: str) -> str:
    """Return the cookie's value: not the token, since other servers of this host receive it too."""
    return hmac.new(token.encode(), b"traceml page", hashlib.sha256).hexdigest()


class TokenMiddleware:
    """ASGI middleware that requires the token.

    Args:
        on_authenticated: called with the address of a client that has shown the token or the cookie.
    """

    def __init__(self, app: App, token: str, port: int, on_authenticated: Callable[[Any], object]) -> None:
        self.app = app
        self._on_authenticated = on_authenticated
        self._token = token
        self._name = cookie_name(port)
        self._cookie = cookie_value(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, exchange a token for the cookie, or refuse."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        given = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
        if self._has_cookie(scope) and _same_origin(scope) and _JSONP_PARAMETER not in given:
            self._on_authenticated(scope.get("client"))
            await self._forward(scope, receive, send, strip=_TOKEN_PARAMETER in given)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif _same(given.get(_TOKEN_PARAMETER, ""), self._token):
            self._on_authenticated(scope.get("client"))
            await _redirect(send, _without_token(scope), self._set_cookie())
        else:
            await _refuse(send, wrong=_TOKEN_PARAMETER in given)

    async def _forward(self, scope: Scope, receive: Receive, send: Send, *, strip: bool) -> None:
        if strip and scope["type"] == "http" and scope["method"] == "GET":
            await _redirect(send, _without_token(scope), self._set_cookie())
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]

            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _has_cookie(self, scope: Scope) -> bool:
        # Each by itself: one of another server of this host may be what Python's parser refuses, with all after it.
        pairs = (each.partition("=") for each in _header(scope, b"cookie").split(";"))
        return any(name.strip() == self._name and _same(value.strip(), self._cookie) for name, _, value in pairs)

    def _set_cookie(self) -> bytes:
        age = f"Max-Age={_COOKIE_AGE_S}; Path=/; HttpOnly; SameSite=Lax"
        return f"{self._name}={self._cookie}; {age}".encode()


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope.get("headers", ()) if key == name), "")


def _same_origin(scope: Scope) -> bool:
    """Return whether the request is from our own page, or opens it: `SameSite` ignores the port."""
    site, mode = _header(scope, b"sec-fetch-site"), _header(scope, b"sec-fetch-mode")
    if site in ("same-site", "cross-site") and mode != "navigate":
        return False  # read by a page of another port, as a script for example, which has no origin

    origin = _header(scope, b"origin")
    return not origin or urlsplit(origin).netloc == _header(scope, b"host")


def _without_token(scope: Scope) -> str:
    query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
    rest = urlencode([(key, value) for key, value in query if key != _TOKEN_PARAMETER])
    path = "/" + scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0].lstrip("/").replace(
        "\\", "%5C"
    )
    return f"{path}?{rest}" if rest else path


async def _redirect(send: Send, location: str, cookie: bytes) -> None:
    headers = [(b"location", location.encode("latin-1")), (b"set-cookie", cookie), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 303, "headers": [*headers, *_HEADERS]})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(send: Send, *, wrong: bool) -> None:
    what = "The token in this address is wrong." if wrong else "This page needs its token."
    body = notice(401, what, _HOW).encode()
    headers = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": [*headers, *_HEADERS]})
    await send({"type": "http.response.body", "body": body})


def notice(status: int, what: str, how: str) -> str:
    """Return the HTML of the page.

    Args:
        status: of the response.
        what: why nothing is shown.
        how: what to do about it, as HTML.
    """
    page = resources.files("traceml.display.web").joinpath("static/notice.html").read_text(encoding="utf-8")
    return page.replace("{{status}}", str(status)).replace("{{what}}", what).replace("{{how}}", how)
