"""Targets of alerts: a command that reads JSON on its standard input, or a webhook that is sent it."""

from __future__ import annotations

import asyncio
import contextlib
import html
import logging
import os
import threading
from base64 import b64encode
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit

import msgspec

from traceml.aggregator.child_programs import kill_group
from traceml.errors import TraceMLError
from traceml.loopback import host_of, is_on_this_machine
from traceml.version import __version__

__all__ = ["AlertTarget", "CommandAlert", "WebhookAlert", "targets_of"]

_COMMAND_S = 30.0
_KEPT_BYTES = 2000  # of a command's output, for the log
_READ_BYTES = 1 << 16
_WEBHOOK_S = 10.0
_ALL_TRIES_S = 30.0
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # between tries of a webhook
_BUSY = (408, 425, 429)  # such a refusal may pass
_SLACK = (".slack.com", ".slack-gov.com")
_URL_SIGNS = "!#$%&'()*+,/:;=?@[]~"  # what stands in a URL as it is
_OWN_SECRETS = ("TRACEML_TOKEN", "TRACEML_ON_FINDING")

_log = logging.getLogger("traceml")


def targets_of(entries: Iterable[str], *, local_only: bool = False) -> list[AlertTarget]:
    """Return the targets that the entries of `on_finding` name, each an http(s) URL or else a command.

    Args:
        local_only: whether URLs of other machines are left out, which is logged.
    """
    targets = [
        WebhookAlert(each) if each.lower().startswith(("http://", "https://")) else CommandAlert(each)
        for each in entries
    ]
    left_out = [each for each in targets if local_only and isinstance(each, WebhookAlert) and not each.is_local]
    if left_out:
        names = ", ".join(each.name for each in left_out)
        _log.warning("no alert is sent to %s: local_only is set", names)

    return [each for each in targets if each not in left_out]


class CommandAlert(msgspec.Struct, frozen=True):
    """A command, run by the shell in the folder in which the aggregator was started."""

    command: str
    limit_s: float = _COMMAND_S  # time after which it is killed with all that it has started
    is_masked: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The program, without its arguments: they may hold a key."""
        return f"command {Path(self.command.split()[0]).name}" if self.command.strip() else "command"

    async def send(self, document: bytes) -> None:
        """Run it with the alert on its standard input.

        Raises:
            TraceMLError: it failed, or was killed after its time.
        """
        process = await asyncio.create_subprocess_shell(
            self.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # its process group can be killed, and a terminal's Ctrl-C does not end it
            env={name: value for name, value in os.environ.items() if name.upper() not in _OWN_SECRETS},
        )
        is_done = False
        try:
            async with asyncio.timeout(self.limit_s):
                output = await _converse(process, document)
                status = await process.wait()
                is_done = True
        except TimeoutError:
            raise TraceMLError(
                f"{self.name} did not end within {self.limit_s:g} s, and was killed. Run long work in the "
                "background, with its output redirected"
            ) from None
        finally:
            if not is_done:
                await kill_group(process)

        if status:
            said = output.decode(errors="replace").strip()
            raise TraceMLError(f"{self.name} failed with status {status}" + (f": {said}" if said else ""))


async def _converse(process: asyncio.subprocess.Process, document: bytes) -> bytes:
    """Write the alert and read the output until it ends; return the end of the output."""

    async def write() -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read
            process.stdin.write(document)
            await process.stdin.drain()
            process.stdin.close()

    async def read() -> bytes:
        assert process.stdout is not None
        kept = b""
        while data := await process.stdout.read(_READ_BYTES):
            kept = (kept + data)[-_KEPT_BYTES:]

        return kept

    _, output = await asyncio.gather(write(), read())
    return output


class WebhookAlert(msgspec.Struct, frozen=True):
    """A URL that alerts are posted to."""

    url: str  # the URL; its path is often a secret
    pauses_s: tuple[float, ...] = _PAUSES_S  # seconds between tries
    limit_s: float = _WEBHOOK_S  # seconds that the server may take to connect, and then to answer
    is_masked: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The host, without path and password."""
        return f"webhook {host_of(self.url) or '(a URL without a host)'}"

    @property
    def is_local(self) -> bool:
        """Whether its server is this machine."""
        return is_on_this_machine(self.url)

    async def send(self, document: bytes) -> None:
        """Post it, with some tries if the server is down or busy.

        A server that has it and does not answer gets it once: it may show it, only late. One that cannot be reached is
        not tried again either: a firewall that drops packets would hold up the end of a job.

        Raises:
            TraceMLError: the server refuses it, gave no answer, or did not take it in any try.
        """
        if host_of(self.url).endswith(_SLACK):
            document = _escaped_for_slack(document)

        try:
            async with asyncio.timeout(_ALL_TRIES_S):
                await self._try(document)
        except TimeoutError:
            raise TraceMLError(f"{self.name} did not accept the alert within {_ALL_TRIES_S:g} s") from None

    async def _try(self, document: bytes) -> None:
        from http.client import HTTPException
        from urllib.error import HTTPError  # 10 ms with what else it imports, for nothing where no alert is sent

        for pause_s in (*self.pauses_s, None):
            try:
                await _in_thread(partial(self._post, document))
                return
            except HTTPError as error:
                error.close()
                why = f"it answered {error.code} {error.reason}"
                why += "; set the URL that it leads to" if error.code < 400 else ""
                if error.code < 500 and error.code not in _BUSY:
                    raise TraceMLError(f"{self.name} refuses alerts: {why}") from None
            except TimeoutError:  # of the answer: that of the connection is a URLError
                raise TraceMLError(
                    f"{self.name} was sent the alert, but did not answer within {self.limit_s:g} s"
                ) from None
            except (OSError, ValueError) as error:
                reason = getattr(error, "reason", error)
                why = str(reason) or type(error).__name__
                if isinstance(reason, TimeoutError):
                    raise TraceMLError(f"{self.name} cannot be reached within {self.limit_s:g} s") from None
            except HTTPException:  # its text repeats what the server sent, or the URL
                raise TraceMLError(f"{self.name} refuses alerts: it does not answer by HTTP") from None

            if pause_s is not None:
                await asyncio.sleep(pause_s)

        tries = len(self.pauses_s) + 1
        raise TraceMLError(f"{self.name} did not accept the alert in {tries} tries: {why}")

    def _post(self, document: bytes) -> None:
        from urllib.request import HTTPRedirectHandler, Request, build_opener

        class NoRedirects(HTTPRedirectHandler):
            """Makes a redirect an error: it would become a GET, whose answer says nothing of the alert."""

            def redirect_request(self, *_: object) -> None:
                """Follow none."""

        headers = {"Content-Type": "application/json", "User-Agent": f"traceml/{__version__}"}
        parts = urlsplit(quote(self.url, safe=_URL_SIGNS))
        login, _, server = parts.netloc.rpartition("@")
        if login:
            name, _, password = login.partition(":")
            headers["Authorization"] = f"Basic {b64encode(f'{unquote(name)}:{unquote(password)}'.encode()).decode()}"

        url = parts._replace(netloc=server).geturl()
        request = Request(url, document, headers, method="POST")  # noqa: S310 - http(s), see target_of
        with build_opener(NoRedirects).open(request, timeout=self.limit_s):
            pass


def _escaped_for_slack(document: bytes) -> bytes:
    """Return an alert whose text Slack shows as it is: `<string>` would be a link, `<!channel>` notify a channel."""
    alert = msgspec.json.decode(document)
    alert["text"] = html.escape(alert["text"], quote=False)
    return msgspec.json.encode(alert)


AlertTarget = CommandAlert | WebhookAlert
"""Receiver of alerts. Texts are masked before where it `is_masked`, as they leave the machine."""


async def _in_thread(work: Callable[[], None]) -> None:
    """Call a function in a thread that nobody waits for at the end: the look-up of a name has no time limit."""
    answer = Future[None]()

    def run() -> None:
        if not answer.set_running_or_notify_cancel():  # from now on it cannot be cancelled
            return

        try:
            work()
            answer.set_result(None)
        except BaseException as error:  # noqa: BLE001 - for the one who awaits it
            answer.set_exception(error)

    threading.Thread(target=run, name="traceml-alert", daemon=True).start()
    await asyncio.wrap_future(answer)
