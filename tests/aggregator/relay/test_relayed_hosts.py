"""The center's side of a relay, from its wire: what it admits, confirms and refuses."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from tests.aggregator.conftest import TOKEN, Serving, step_rows
from tests.aggregator.test_registry import Silent, registry  # noqa: F401 - a fixture
from tests.eventually import eventually
from traceml.aggregator.relay import relayed_hosts
from traceml.aggregator.relay.relayed_hosts import CONFIRM_S, RelayedHosts, RelayedRank
from traceml.database.schema import PROCESS, STEPS
from traceml.database.store.frame_compression import encode
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.merged_hosts.host_sums import HOST_SUMS
from traceml.diagnosis.steps.representatives import HOST_CHOICE, ExcessWork, HostChoice, packed_ms
from traceml.errors import AggregatorRefusedError
from traceml.transport.client import Connection, connect
from traceml.transport.hello import Hello

pytestmark = pytest.mark.process
CHOICE = HostChoice(host="h", typical=0, ordinary=(0, 1), sent=(0,))


def relay_to(center: Serving, recorder: str = "folder") -> Connection:
    return connect("127.0.0.1", center.port, Hello(role="relay", run="job", recorder=recorder), TOKEN, timeout_s=60)


def hello_of(rank: int, world_size: int = 2, **facts: Any) -> dict[str, Any]:
    hello = Hello(role="rank", run="job", rank=rank, world_size=world_size, recorder=f"r{rank}", schemas={}, **facts)
    return asdict(hello)


def answer(link: Connection, kind: str) -> dict[str, Any]:
    """Wait for the next message of a kind."""
    found: list[dict[str, Any]] = []

    def has_come() -> bool:
        found.extend(message for message in link.receive(0.05) if message["t"] == kind)
        return bool(found)

    eventually(has_come, kind)
    return found[0]


def join(link: Connection, *ranks: int) -> None:
    for rank in ranks:
        link.send({"t": "rank", "id": rank, "hello": hello_of(rank)})
        assert answer(link, "joined")["id"] == rank


def update(number: int, rows: list[list[Any]], choice: HostChoice | None = CHOICE, **more: Any) -> dict[str, Any]:
    told = None if choice is None else choice.to_row()
    return {"t": "update", "number": number, "rows": rows, "choice": told, "ends": [], **more}


def steps(rank: int, start: int, count: int) -> list[Any]:
    return [rank, "steps", start, count, 0, step_rows(start, count)]


def test_messages_are_confirmed_when_they_are_stored(serving):
    """Another connection of the same host goes on behind them; what is sent again is stored once."""
    center = serving()
    link = relay_to(center)
    join(link, 0, 1)
    link.send(update(1, [steps(0, 0, 10)]))
    assert answer(link, "stored")["number"] == 1

    again = relay_to(center)
    again.send({"t": "rank", "id": 7, "hello": hello_of(0)})

    assert answer(again, "joined")["acked"]["steps"] == 10
    again.send(update(1, [[7, *steps(0, 5, 10)[1:]]]))
    assert answer(again, "stored")["number"] == 1
    with center.store() as store:
        assert store.rows("steps")["step"].tolist() == [*range(15)]
        assert len(store.streams()) == 2

    link.close()
    again.close()


class HostPeer(Silent):
    """The connection of a host, of which the test reads what the center has sent."""

    def __init__(self) -> None:
        self.hello = Hello(role="relay", run="job", recorder="folder")
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


class Center:
    """The center's side of one host with one rank, on a clock that the test moves."""

    def __init__(self, registry) -> None:  # noqa: F811
        self.now_s = 100.0
        self.peer, self.registry = HostPeer(), registry
        self.hosts = RelayedHosts(self._admit, lambda: self.now_s)
        self.hosts.take(self.peer, {"t": "rank", "id": 0, "hello": hello_of(0)})
        self.run = registry.runs[0]

    def take(self, message: dict[str, Any]) -> None:
        self.hosts.take(self.peer, message)

    def commit(self) -> None:
        self.run.commit(force=True)
        self.hosts.stored(self.run)

    @property
    def confirmed(self) -> list[int]:
        return [message["number"] for message in self.peer.sent if message["t"] == "stored"]

    def _admit(self, hello: Hello, peer: Any):
        run, attempt = self.registry.assign(hello)
        return run, run.join(hello, attempt, peer)


@pytest.fixture
def center(registry):  # noqa: F811
    return Center(registry)


def test_a_confirmation_is_for_the_messages_of_some_seconds(center):
    """A host sends each second: an answer to each of a thousand hosts would be a tenth of the center's work."""
    for number in (1, 2, 3):
        center.take(update(number, [steps(0, 10 * number, 10)]))
        center.commit()
        center.now_s += 1

    assert center.confirmed == [1]

    center.now_s += CONFIRM_S
    center.hosts.confirm(center.run)
    center.hosts.confirm(center.run)
    assert center.confirmed == [1, 3]


def test_what_a_host_says_late_of_an_earlier_attempt_does_not_count(center):
    """The job has begun again elsewhere, with fewer ranks: its rows and ends are taken, its choice and sums are not."""
    other = HostPeer()
    other.hello = Hello(role="relay", run="job", recorder="other")
    again = hello_of(0, world_size=1, attempt=1)
    center.hosts.take(other, {"t": "rank", "id": 5, "hello": {**again, "recorder": "again"}})
    assert (center.run.attempt, center.run.world_size) == (1, 1)

    center.take(update(1, [steps(0, 0, 10)], above=[0, b""], sums=[[1], {}, {}, []], ends=[[0, "killed", {}]]))
    center.commit()

    assert center.run.live.representatives.choices == []
    with StoreReader(center.run.store.path) as reader:
        assert reader.events(kind=HOST_CHOICE) == reader.events(kind=HOST_SUMS) == []
        assert reader.rows("steps")["step"].tolist() == [*range(10)]
        assert [stream.state for stream in reader.streams()] == ["killed", "running"]


@pytest.mark.parametrize("ask", [{"t": "confirm"}, update(3, [], ends=[[0, "finished", {}]])])
def test_a_host_that_waits_is_answered_when_all_is_stored(center, ask):
    """At the end of its ranks, or of itself: not before its last rows are on the disk."""
    center.take(update(1, [steps(0, 0, 10)]))
    center.commit()
    center.take(update(2, [steps(0, 10, 10)]))
    center.take(ask)
    center.hosts.confirm(center.run)
    assert center.confirmed == [1]

    center.commit()
    assert center.confirmed == [1, ask.get("number", 2)]


def test_the_last_message_of_a_host_is_confirmed_though_no_other_comes(center):
    """Also where it was stored long before it is time to say so."""
    for number in range(1, 3):
        center.take(update(number, [steps(0, 10 * number, 10)]))
        center.commit()

    assert center.confirmed == [1]
    center.now_s += CONFIRM_S
    center.hosts.confirm(center.run)
    assert center.confirmed == [1, 2]


def test_relayed_ranks_are_not_acknowledged_one_by_one(center, monkeypatch):
    """For thousands of them that took 2 % of the center's work, and nobody read it."""
    written: list[bytes] = []
    monkeypatch.setattr(RelayedRank, "write", lambda _, frames: written.append(frames))

    center.take(update(1, [steps(0, 0, 10)]))
    center.commit()

    assert center.confirmed == [1]
    assert written == []


def test_rows_of_many_hosts_become_frames_together(center, monkeypatch):
    """Each message as a frame would be written twice: it is merged a minute later."""
    monkeypatch.setattr(relayed_hosts, "MANY_HOSTS", 1)
    center.take({"t": "rank", "id": 1, "hello": hello_of(1)})
    for number in range(1, 5):  # the first message does not wait
        center.take(update(number, [steps(1, 10 * number - 10, 10)]))
        center.commit()

    assert center.confirmed == [1]  # the rows are on disk, though not as frames
    center.run.store.commit(frames_of_all=True)
    with StoreReader(center.run.store.path) as reader:
        assert [(frame.seq, frame.n) for frame in reader.frames("steps")] == [(0, 10), (10, 30)]


def test_all_is_confirmed_where_the_run_ends(center):
    """Its hosts would wait for it, and report that their rows are perhaps not stored."""
    for number in (1, 2):
        center.take(update(number, [steps(0, 10 * number, 10)]))
        center.commit()

    center.hosts.confirm(center.run, at_once=True)

    assert center.confirmed == [1, 2]


def test_rows_are_stored_in_the_form_in_which_they_come(center):
    """They are compressed once, on their host. Rows that are sent again, or in two parts of one commit, are not."""
    data = step_rows(0, 40)
    codec, packed = encode(STEPS, data)
    center.take(update(1, [[0, "steps", 0, 40, int(codec), packed]]))
    center.run.commit(force=True)
    again = encode(STEPS, step_rows(30, 20))
    center.take(update(2, [[0, "steps", 30, 20, int(again[0]), again[1]], steps(0, 50, 10)]))
    center.run.commit(force=True)
    rows = np.zeros(2, PROCESS.dtype)
    center.take(update(3, [[0, "process", 0, 2, 0, rows.tobytes()]]))
    center.run.commit(force=True)

    with StoreReader(center.run.store.path) as store:
        assert store.rows("steps")["step"].tolist() == [*range(60)]
        assert len(store.rows("process")) == 2

    with closing(sqlite3.connect(center.run.store.path)) as database:
        frames = database.execute("SELECT n, codec, data FROM frames ORDER BY id").fetchall()

    assert frames[0] == (40, int(codec), packed)
    assert [n for n, _, _ in frames] == [40, 20, 2]
    assert frames[2][1:] == (0, rows.tobytes())


def test_rows_of_ranks_that_are_not_sent_are_no_loss(serving):
    """A gap is a time in which the rank was not chosen. Of tables that are sent whole it counts."""
    center = serving()
    link = relay_to(center)
    join(link, 0)

    link.send(update(1, [steps(0, 0, 10), steps(0, 40, 10), [0, "info", 3, 1, 0, b"\x80"]]))

    answer(link, "stored")
    with center.store() as store:
        assert (store.lost("steps"), store.lost("info")) == (0, 3)

    link.close()


def test_a_rank_that_was_lost_with_its_host_goes_on(serving):
    """The center waits for its host, not for its process, which may be on the host of the center."""
    center = serving()
    link = relay_to(center)
    join(link, 0, 1)
    link.send(update(1, [steps(0, 0, 10)], ends=[[1, "lost", {}]]))
    answer(link, "stored")

    link.send({"t": "rank", "id": 1, "hello": hello_of(1)})
    answer(link, "joined")
    link.send(update(2, [], ends=[[0, "finished", {}], [1, "failed", {"code": 3}]]))

    eventually(lambda: center.state() == "failed")
    with center.store() as store:
        ends = {stream.rank: (stream.state, stream.facts["exit"].get("code")) for stream in store.streams()}

    assert ends == {0: ("finished", None), 1: ("failed", 3)}
    link.close()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"t": "unheard"}, "'unheard' is not expected from the aggregator of a host"),
    ({"t": "rows", "table": "steps", "seq": 0, "n": 0, "data": b""}, "rows come from ranks only"),
    ({"t": "rank"}, "a relayed rank has no id and hello"),
    ({"t": "rank", "id": 1, "hello": {}}, "the hello lacks 'role'"),
    ({"t": "rank", "id": 1, "hello": {**hello_of(0), "rank": 9}}, "rank 9 of 2 is not possible"),
    ({"t": "update", "number": 1}, "has no rows and number"),
    (update(1, [[5, *steps(0, 0, 1)[1:]]]), "relayed rows cannot be read"),
    (update(1, [[0, "nothing", 0, 1, 0, b""]]), "relayed rows cannot be read"),
    (update(1, [[0, "steps", 0, 1, 4, b"no zstd"]]), "relayed rows cannot be read"),
    (update(1, [[0, "steps", 0, 2, 0, step_rows(0, 1)]]), "2 rows of 'steps' are"),
    (update(1, [7]), "relayed rows cannot be read"),
    ({**update(1, []), "choice": [1]}, "the choice of a host cannot be read"),
    (update(1, [], HostChoice(host="h", typical=2, ordinary=(2,), sent=(2,))), "ranks beyond the 2 of its run"),
    (update(1, [], above=[-1, b""]), "the own work beyond the typical rank's cannot be read"),
    (update(1, [], sums=[[0], {"steps": "?"}, {}, []]), "the sums of a host cannot be read"),
    (update(1, [], sums=[[2], {}, {}, []]), "of other ranks than the 2 of its run"),
    (update(1, [], ends=[[0, "vanished", {}]]), "the end of a relayed rank cannot be read"),
    (update(1, [], events=[["snapshot", 5, {}]]), "the event of a host cannot be read"),
    (update(1, [], ends=[3]), "the end of a relayed rank cannot be read"),
]


def test_what_is_no_message_of_a_host_is_refused(serving):
    """That connection ends with the reason; the center goes on."""
    center = serving()
    for number, (message, why) in enumerate(REFUSED):
        link = relay_to(center, str(number))
        join(link, 0)
        link.send(message)

        with pytest.raises(AggregatorRefusedError, match=why):
            answer(link, "never")

        link.close()

    assert center.process.poll() is None


def test_a_choice_is_one_event(serving):
    """With the ranks alone; work beyond that of the typical rank comes without it."""
    center = serving()
    link = relay_to(center)
    join(link, 0, 1)
    for number in (1, 2, 3):
        above = ExcessWork(10 * number, packed_ms(np.full(10, 2e6, np.float32))).to_row()
        link.send(update(number, [steps(0, 10 * number, 10)], CHOICE if number < 3 else None, above=above))
        link.send({"t": "confirm"})
        assert answer(link, "stored")["number"] == number

    with center.store() as store:
        (event,) = store.events(kind="host_choice")

    chosen = HostChoice.from_row(event.data["choice"])
    assert (chosen.typical, chosen.ordinary, chosen.sent) == (0, (0, 1), (0,))
    link.close()
