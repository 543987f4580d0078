"""The run of a job of several nodes, agreed on in torchrun's rendezvous.

At each rendezvous the nodes agree on one run: the one that has begun already, else that of the first node. Its node
has put the address of its aggregator, and the token, into the store in which torchrun's agents meet. The ranks of the
other nodes send their rows there, and `traceml run` on these nodes has no run of its own.

Process: torchrun, which tells `traceml run`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Self

import msgspec
from msgspec.structs import replace

from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError, TraceMLError
from traceml.fail_open import fail_open, print_notice
from traceml.formatting import printable
from traceml.setting_sources import TLS_PREFIX

__all__ = ["NodeRun", "NodeRunReport", "RunLocation"]

_CHOSEN, _BEGUN = "traceml/run", "traceml/begun"
_CHOICE = timedelta(seconds=10)  # the first node makes it at once; one that is not traced never does
_CONNECT_S, _ANSWER_S = 5.0, 10.0  # an aggregator that starts on a busy host takes seconds

_log = logging.getLogger("traceml")


class RunLocation(msgspec.Struct, frozen=True, kw_only=True):
    """A run, and where other nodes reach its aggregator."""

    run_id: str
    node: str  # name of its host
    hosts: list[str] = []  # names and addresses of its host, the likeliest first
    port: int
    tls: bool = False
    token: str | None = None  # None where every node was given it

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, shows_token: bool) -> Self:
        """Return the run of this node's own aggregator, by the variables of its ranks."""
        return cls(
            run_id=environ["TRACEML_RUN_ID"],
            node=socket.gethostname(),
            port=int(environ["TRACEML_ADDRESS"].rpartition(":")[2]),
            tls=environ["TRACEML_ADDRESS"].startswith(TLS_PREFIX),
            token=environ["TRACEML_TOKEN"] if shows_token else None,
        )

    def is_run_of(self, other: RunLocation) -> bool:
        """Whether both are the same run."""
        return (self.run_id, self.node, self.port) == (other.run_id, other.node, other.port)


class NodeRunReport(msgspec.Struct, frozen=True, kw_only=True):
    """Report of a rendezvous to `traceml run`: which run the ranks of this node belong to."""

    location: RunLocation | None = None  # None: its own
    host: str = ""  # one of the location's hosts, at which it was reached
    token: str = ""
    run_dir: str = ""  # folder of the run, on its host


class NodeRun:
    """The run of this node's ranks.

    Args:
        environ: of the ranks: the variables by which they find their own node's run; changed by `agree`.
        shows_token: whether to put the token into the store; else every node was given the same.
        tell: takes a report of each rendezvous.
    """

    def __init__(
        self, environ: dict[str, str] | os._Environ[str], tell: Callable[[NodeRunReport], object], *, shows_token: bool
    ) -> None:
        self._environ, self._tell = environ, tell
        self._own = RunLocation.from_environ(environ, shows_token=shows_token)
        self._own_variables = {name: environ[name] for name in ("TRACEML_ADDRESS", "TRACEML_TOKEN", "TRACEML_RUN_ID")}
        self._has_begun = False
        self._joined: NodeRunReport | None = None

    def claim(self, store: Any) -> None:
        """Before the ranks are assigned: name the run in which this node's ranks were before, if it can be reached.

        Args:
            store: in which the agents of all nodes meet.
        """
        with fail_open(_log, "supervise", "the run of this node is not offered to other nodes"):
            if self._joined is not None and self._joined.location is not None:
                self._joined = self._join(self._joined.location)

            begun = self._own if self._has_begun else self._joined.location if self._joined is not None else None
            if begun is not None:
                store.compare_set(_BEGUN, "", msgspec.json.encode(begun).decode())

    def agree(self, store: Any, node: int, nodes: int, rendezvous_host: str) -> None:
        """Join the run that the first node has chosen, or stay in this node's own.

        Args:
            store: see `claim`.
            node: number of this node.
            nodes: number of nodes.
            rendezvous_host: where the nodes meet: this host's address on the way there is one for other nodes.
        """
        joined = None
        self._own = replace(self._own, hosts=list(dict.fromkeys(_own_hosts(rendezvous_host))))
        if nodes > 1:
            with fail_open(_log, "supervise", "this node's ranks stay in a run of their own"):
                joined = self._choose(store, node)

        self._joined = joined
        self._has_begun = joined is None
        self._environ.update(self._own_variables if joined is None else _variables(joined))
        self._tell(joined or NodeRunReport())

    def _choose(self, store: Any, node: int) -> NodeRunReport | None:
        if node == 0:
            begun = store.get(_BEGUN) if store.check([_BEGUN]) else None
            chosen = self._own if begun is None else _location(begun)
            store.set(_CHOSEN, msgspec.json.encode(chosen).decode())
        else:
            try:
                store.wait([_CHOSEN], _CHOICE)
            except RuntimeError as error:  # torch's DistStoreError
                _log.info("the first node has named no run: %s", error)
                return None

            chosen = _location(store.get(_CHOSEN))

        if self._has_begun or chosen.is_run_of(self._own):
            return None

        known = self._joined
        if known is not None and known.location is not None and known.location.is_run_of(chosen):
            return known

        return self._join(chosen)

    def _join(self, location: RunLocation) -> NodeRunReport | None:
        """Join a run on another node; None, with a notice, if it cannot be reached."""
        from traceml.supervise.aggregator_client import AggregatorClient

        token = location.token or self._own_variables["TRACEML_TOKEN"]
        member = {"host": socket.gethostname(), "pid": os.getppid()}  # of `traceml run`, which reports the ends
        reasons = []
        for host in location.hosts:
            client = AggregatorClient(host, location.port, token, location.run_id, location.tls)
            try:
                connection = client.connect(_CONNECT_S)
                with contextlib.closing(connection):
                    reply = connection.request("join", member, timeout_s=_ANSWER_S)
            except AggregatorRefusedError as error:
                reasons.append(f"{host}:{location.port}: {error.why}")
                break
            except (TraceMLError, OSError) as error:
                why = error.reason if isinstance(error, AggregatorUnavailableError) else error
                reasons.append(f"{host}:{location.port}: {why}")
            else:
                run_dir = str(reply.get("run_dir", ""))
                return NodeRunReport(location=location, host=host, token=token, run_dir=run_dir)

        print_notice(
            printable(
                f"traceml: the ranks of this node are a run of their own: that of {location.node} cannot be joined "
                f"({'; '.join(reasons) or 'it has no address'})"
            )
        )
        return None


def _location(text: bytes) -> RunLocation:
    return msgspec.json.decode(text, type=RunLocation)


def _variables(joined: NodeRunReport) -> dict[str, str]:
    assert joined.location is not None
    host = f"[{joined.host}]" if ":" in joined.host else joined.host
    return {
        "TRACEML_ADDRESS": f"{TLS_PREFIX if joined.location.tls else ''}{host}:{joined.location.port}",
        "TRACEML_TOKEN": joined.token,
        "TRACEML_RUN_ID": joined.location.run_id,
    }


def _own_hosts(rendezvous_host: str) -> Iterator[str]:
    """Yield addresses and the name of this host, by which others may reach it: the address on the way to them first."""
    for family, kind, protocol, _, address in _resolved(rendezvous_host):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: it asks the routing table
            yield probe.getsockname()[0]

    yield socket.gethostname()


def _resolved(host: str) -> list[Any]:
    with contextlib.suppress(OSError):
        return socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)

    return []
