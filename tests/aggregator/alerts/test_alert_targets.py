"""Targets of alerts: real commands, and a real web server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from base64 import b64encode
from collections.abc import Callable
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest

from tests.eventually import eventually
from tests.ports import free_port
from traceml.aggregator.alerts import alert_targets
from traceml.aggregator.alerts.alert_targets import CommandAlert, WebhookAlert, targets_of
from traceml.errors import TraceMLError

DOCUMENT = json.dumps({"finding": {"kind": "HANG"}}).encode()


def _send(target: CommandAlert | WebhookAlert, document: bytes = DOCUMENT) -> None:
    asyncio.run(target.send(document))


@pytest.mark.process
def test_a_command_reads_the_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its standard input; it runs in a shell, without our token."""
    monkeypatch.setenv("TRACEML_TOKEN", "secret")
    _send(CommandAlert(f'cat > {tmp_path}/alert.json && echo "token=$TRACEML_TOKEN" > {tmp_path}/environ'))

    assert (tmp_path / "alert.json").read_bytes() == DOCUMENT
    assert (tmp_path / "environ").read_text() == "token=\n"


@pytest.mark.process
def test_a_command_that_fails_is_reported_with_its_words() -> None:
    """Status and the end of its output; its arguments, which may hold a key, are not repeated."""
    with pytest.raises(TraceMLError, match="command sh failed with status 3: no mail today") as failure:
        _send(CommandAlert("sh -c 'echo no mail today >&2; exit 3' --key=hidden"))

    assert "hidden" not in str(failure.value)
    with pytest.raises(TraceMLError, match="status 127"):
        _send(CommandAlert("there-is-no-such-program"))


@pytest.mark.process
def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what it has left in the background."""
    path, limits = tmp_path / "pid", list[asyncio.Timeout]()

    def timeout(limit_s: float) -> asyncio.Timeout:
        limits.append(asyncio.timeout(limit_s))
        return limits[-1]

    async def send_until_late() -> None:
        """Send, and let the time be over once the command has started its child."""
        target = CommandAlert(f"sleep 600 & echo $! > {path}.new; mv {path}.new {path}; sleep 600", limit_s=3600.0)
        sending = asyncio.create_task(target.send(DOCUMENT))
        await asyncio.to_thread(eventually, lambda: limits and path.exists(), "the child")
        limits[0].reschedule(0.0)
        await sending

    monkeypatch.setattr(alert_targets, "asyncio", SimpleNamespace(**{**vars(asyncio), "timeout": timeout}))
    with pytest.raises(TraceMLError, match=r"did not end within 3600 s, and was killed"):
        asyncio.run(send_until_late())

    pid = int(path.read_text())

    eventually(lambda: _state_of(pid) in ("", "Z"), "the end of the child")


def _state_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    return ""


@pytest.mark.process
def test_a_command_that_prints_a_lot_or_reads_nothing_is_no_harm() -> None:
    """Its output is read and dropped, and an alert of megabytes does not block."""
    _send(CommandAlert("head -c 50000000 /dev/zero"))
    _send(CommandAlert("true"), b"x" * (4 << 20))
    with pytest.raises(TraceMLError) as failure:
        _send(CommandAlert("yes | head -c 1000000; exit 1"))

    assert len(str(failure.value)) < 3000


class _Receiver(BaseHTTPRequestHandler):
    """A webhook that answers with the next status of its server's list."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((self.headers["Content-Type"], body))  # type: ignore[attr-defined]
        self.server.asked.append((self.path, self.headers["Authorization"]))  # type: ignore[attr-defined]
        statuses = self.server.statuses  # type: ignore[attr-defined]
        self.send_response(statuses.pop(0) if statuses else 200)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_args: object) -> None: ...


class _Webhook:
    """A web server on a thread."""

    def __init__(self, port: int = 0, statuses: tuple[int, ...] = ()) -> None:
        self.server = HTTPServer(("127.0.0.1", port), _Receiver)
        self.server.bodies, self.server.asked = [], []  # type: ignore[attr-defined]
        self.server.statuses = list(statuses)  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/SECRET"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def bodies(self) -> list[tuple[str, bytes]]:
        bodies: list[tuple[str, bytes]] = self.server.bodies  # type: ignore[attr-defined]
        return bodies

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def port() -> int:
    return free_port()


def test_a_webhook_is_sent_the_alert() -> None:
    """As JSON."""
    with closing(_Webhook()) as webhook:
        _send(WebhookAlert(webhook.url))

        assert webhook.bodies == [("application/json", DOCUMENT)]


@pytest.mark.parametrize(
    ("address", "login"),
    [
        ("http://me:p%40ss@127.0.0.1:{port}/a b", "me:p@ss"),
        ("http://key@127.0.0.1:{port}/a%20b", "key:"),
        ("http://127.0.0.1:{port}/a b", None),
    ],
)
def test_a_name_and_a_password_in_the_url_are_sent_as_curl_does(address: str, login: str | None) -> None:
    """As those of a server of one's own; a blank is sent as browsers do."""
    with closing(_Webhook()) as webhook:
        _send(WebhookAlert(address.format(port=webhook.server.server_port)))

        sent = None if login is None else f"Basic {b64encode(login.encode()).decode()}"
        assert webhook.server.asked == [("/a%20b", sent)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("url", ["http://[::1/SECRET", "http:///SECRET"])
def test_a_url_without_a_host_fails_like_a_server_that_is_down(url: str) -> None:
    """Its name can be logged, also where only this machine is notified."""
    target = WebhookAlert(url, pauses_s=())

    with pytest.raises(TraceMLError, match=r"webhook \(a URL without a host\) did not accept") as failure:
        _send(target)

    assert "SECRET" not in str(failure.value)
    assert targets_of([url], local_only=True) == []


def test_a_server_that_does_not_speak_http_refuses() -> None:
    """Once, and without its words: they may be anything."""
    with closing(_Webhook()) as webhook:
        webhook.server.RequestHandlerClass = type("", (_Receiver,), {"do_POST": lambda self: self.wfile.write(b"no")})
        with pytest.raises(TraceMLError, match=r"refuses alerts: it does not answer by HTTP$"):
            _send(WebhookAlert(webhook.url))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://hooks.slack.com/services/T0/B0/key", "at &lt;string&gt;:47, R&amp;D &lt;!channel&gt;"),
        ("https://slack.com.example.org/", "at <string>:47, R&D <!channel>"),
    ],
)
def test_slack_shows_names_as_they_are(url: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what is in angle brackets for links and mentions; other servers show the text as it is."""
    sent: list[bytes] = []
    monkeypatch.setattr(WebhookAlert, "_post", lambda _, document: sent.append(document))
    _send(WebhookAlert(url), b'{"text": "at <string>:47, R&D <!channel>", "run": {"name": "<b>"}}')

    assert [json.loads(each) for each in sent] == [{"text": text, "run": {"name": "<b>"}}]


def test_a_webhook_that_is_busy_is_tried_again() -> None:
    """One that refuses is not; its path is a secret and not repeated."""
    with closing(_Webhook(statuses=(503, 429))) as busy:
        _send(WebhookAlert(busy.url, pauses_s=(0.0, 0.0)))
        assert len(busy.bodies) == 3

    with closing(_Webhook(statuses=(403,))) as closed:
        with pytest.raises(TraceMLError, match=r"webhook 127.0.0.1 refuses alerts: it answered 403") as failure:
            _send(WebhookAlert(closed.url, pauses_s=(0.0, 0.0)))

        assert len(closed.bodies) == 1
        assert "SECRET" not in str(failure.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307])
def test_a_webhook_that_has_moved_refuses(status: int) -> None:
    """The redirect of a POST loses the alert: what answers at the new address has not got it."""
    with closing(_Webhook(statuses=(status,))) as moved:
        with pytest.raises(
            TraceMLError, match=rf"refuses alerts: it answered {status} .*; set the URL that it leads to"
        ):
            _send(WebhookAlert(moved.url, pauses_s=(0.0, 0.0)))

        assert len(moved.bodies) == 1


def test_a_webhook_that_does_not_answer_gets_the_alert_once() -> None:
    """It may show it late, and would show it again with each try."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/services/SECRET"
        with pytest.raises(TraceMLError, match=r"webhook 127.0.0.1 was sent the alert, but did not answer within 1 s"):
            _send(WebhookAlert(url, pauses_s=(0.0, 0.0), limit_s=1.0))

        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_a_webhook_behind_a_firewall_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets are dropped: the end of a job would wait for each try."""
    tries: list[bytes] = []

    def post(_: WebhookAlert, document: bytes) -> None:
        tries.append(document)
        raise URLError(TimeoutError("timed out"))

    monkeypatch.setattr(WebhookAlert, "_post", post)
    with pytest.raises(TraceMLError, match=r"webhook hooks.example.com cannot be reached within 10 s"):
        _send(WebhookAlert("https://hooks.example.com/x", pauses_s=(0.0, 0.0)))

    assert tries == [DOCUMENT]


def test_nobody_waits_for_a_name_that_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up has no time limit: an aggregator that ends leaves it behind."""
    begun, is_resolved, ended = threading.Event(), threading.Event(), threading.Event()

    def post(_: WebhookAlert, _document: bytes) -> None:
        begun.set()
        is_resolved.wait(60)
        ended.set()

    async def give_up() -> None:
        sending = asyncio.create_task(WebhookAlert("https://hooks.example.com/x").send(DOCUMENT))
        await asyncio.to_thread(begun.wait)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

    monkeypatch.setattr(WebhookAlert, "_post", post)
    asyncio.run(give_up())

    assert not ended.is_set()
    is_resolved.set()
    assert ended.wait(60)


def test_an_alert_that_is_given_up_before_its_thread_runs_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread finds that nobody awaits it, and ends without a traceback."""
    threads, sent = list[Callable[[], None]](), list[bool]()

    def thread(target: Callable[[], None], **_known: object) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: threads.append(target))

    async def give_up() -> None:
        sending = asyncio.create_task(alert_targets._in_thread(lambda: sent.append(True)))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        threads[0]()

    monkeypatch.setattr(alert_targets, "threading", SimpleNamespace(Thread=thread))
    asyncio.run(give_up())
    assert not sent


def test_a_webhook_that_is_down_and_comes_up_gets_it(port: int) -> None:
    """The alert waits between tries; the tries are bounded."""
    url = f"http://127.0.0.1:{port}/x"
    with pytest.raises(TraceMLError, match=r"did not accept the alert in 3 tries: .*refused"):
        _send(WebhookAlert(url, pauses_s=(0.0, 0.0)))

    async def send_and_come_up() -> _Webhook:
        sending = asyncio.create_task(WebhookAlert(url, pauses_s=(0.05,) * 200).send(DOCUMENT))
        await asyncio.sleep(0.1)
        webhook = _Webhook(port)
        await sending
        return webhook

    with closing(asyncio.run(send_and_come_up())) as webhook:
        assert [body for _, body in webhook.bodies] == [DOCUMENT]


def test_targets_by_their_text() -> None:
    """A URL is posted to; anything else is a command. Names have no secrets."""
    entries = "https://hooks.example.com/T0/B1", "/opt/notify.sh --key abc"
    assert [each.name for each in targets_of(entries)] == ["webhook hooks.example.com", "command notify.sh"]


def test_local_only_leaves_out_webhooks_of_other_machines(caplog: pytest.LogCaptureFixture) -> None:
    """One line says so."""
    entries = "https://hooks.example.com/T0/B1", "http://127.0.0.1:9/x", "notify.sh"

    assert [each.name for each in targets_of(entries, local_only=True)] == ["webhook 127.0.0.1", "command notify.sh"]
    assert caplog.messages == ["no alert is sent to webhook hooks.example.com: local_only is set"]
