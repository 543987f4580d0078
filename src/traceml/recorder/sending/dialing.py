"""Connect a rank to its aggregator: the one at the given address, else the one that serves its runs folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from traceml.clock import boot_id
from traceml.clock import own_time as time
from traceml.errors import AggregatorUnavailableError
from traceml.run_folder import AGGREGATOR_LOG, aggregator_words
from traceml.settings import Config
from traceml.transport.client import Connection, connect
from traceml.transport.client_handshake import SILENT
from traceml.transport.folder_aggregator import AggregatorAddress, address_of, folder_id
from traceml.transport.hello import Hello

__all__ = ["dial", "dial_as_client", "stored_elsewhere"]

_RECHECK_S = 1.0


def dial(
    config: Config,
    hello: Hello,
    *,
    timeout_s: float,
    tries: int | None = None,
    start_s: float = 0.0,
    is_ending: Callable[[], bool] = lambda: False,
) -> Connection:
    """Connect; with `local`, start an aggregator where none answers.

    Args:
        timeout_s: time for all tries together; an aggregator that is started here has more.
        start_s: time for one that a launcher is starting, if that is more.

    Raises:
        AggregatorRefusedError: it answered and refused; trying again would not help.
        AggregatorUnavailableError: none answered in time.
    """
    if config.local and not config.supervised:
        from traceml.recorder.local_aggregator import connect_or_start

        return connect_or_start(config, hello, is_ending)

    if config.supervised:
        return _dial_launched(config, hello, timeout_s, tries, start_s)

    if config.address_given:
        return connect(config.host, config.port, hello, config.token, timeout_s=timeout_s, tries=tries, tls=config.tls)

    return _dial_folder(config, hello, timeout_s, tries)


def dial_as_client(config: Config, run: str, *, timeout_s: float) -> Connection:
    """Connect to the rank's aggregator for commands about a run; start none.

    Raises:
        AggregatorRefusedError: it answered and refused.
        AggregatorUnavailableError: none answered in time.
    """
    return dial(config.replaced(local=False), Hello(role="client", run=run), timeout_s=timeout_s)


def stored_elsewhere(config: Config, welcome: Mapping[str, Any]) -> str:
    """Return where a welcome says that the run is stored, if not in the runs folder of the settings; else ""."""
    run_dir = Path(str(welcome.get("run_dir") or config.runs_dir / "run"))
    here = config.runs_dir
    if config.supervised or run_dir.parent == here or (folder_id(run_dir.parent) == folder_id(here) != []):
        return ""

    host = "" if folder_id(run_dir)[:1] == [boot_id()] else ", on the host of that aggregator"
    return f"{run_dir}{host}"


def _dial_launched(config: Config, hello: Hello, timeout_s: float, tries: int | None, start_s: float) -> Connection:
    """Connect to the aggregator of a launcher, whose socket takes connections also while no aggregator runs."""
    began_s = time.monotonic()
    while True:
        try:
            return connect(
                config.host, config.port, hello, config.token, timeout_s=timeout_s, tries=tries, tls=config.tls
            )
        except AggregatorUnavailableError as error:
            if not error.reason.startswith(SILENT):
                raise

            waited_s = time.monotonic() - began_s
            timeout_s = start_s - waited_s
            if timeout_s > 0:
                continue

            run_dir = config.runs_dir / (config.run_id or "")
            words = aggregator_words(run_dir)
            log = f"; {run_dir / AGGREGATOR_LOG} ends in: {words}" if words else ""
            why = f"the aggregator of this run does not answer{log}"
            raise AggregatorUnavailableError(error.host, error.port, waited_s, why) from error


def _dial_folder(config: Config, hello: Hello, timeout_s: float, tries: int | None) -> Connection:
    """Connect to the folder's aggregator; an aggregator that starts meanwhile may have any port."""
    began_s = time.monotonic()
    while True:
        found = address_of(config.runs_dir, config.port) or AggregatorAddress(config.host, config.port)
        left_s = timeout_s - (time.monotonic() - began_s)
        try:
            token, tls = config.token or found.token, config.tls or found.tls
            limit_s = min(left_s, _RECHECK_S)
            return connect(found.host, found.port, hello, token, timeout_s=limit_s, tries=tries, tls=tls)
        except AggregatorUnavailableError as error:
            waited_s = time.monotonic() - began_s
            if waited_s >= timeout_s or tries is not None:
                raise AggregatorUnavailableError(
                    found.host, found.port, waited_s, error.reason, refused=error.refused
                ) from error
