"""Aggregators of hosts that send their ranks to another one: real aggregators, each in a process of its own."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.aggregator.conftest import TOKEN, Serving, step_rows, wait_for_acks
from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.diagnosis.merged_hosts.clusters import Cluster, FaultyRun
from tests.eventually import eventually
from traceml.aggregator.relay.run_relay import RunRelay
from traceml.aggregator.relay.upstream import Upstream
from traceml.database.schema import PROCESS, STEPS
from traceml.database.snapshots.rank_snapshot import ABORT, SNAPSHOT
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.diagnosis.facts.run_time import SET_UP_STEPS
from traceml.diagnosis.merged_hosts.row_requests import CLEAR_GAIN
from traceml.errors import TraceMLError, UsageError
from traceml.fail_open import failures
from traceml.run_folder import RELAY_NAME, STORE_NAME
from traceml.runs.report.report import build_report
from traceml.runs.report.report_types import Report
from traceml.transport.client import Connection, connect
from traceml.transport.hello import Hello

RANKS, STEPS_SENT = 8, 120
HOSTS = ((0, 1, 2, 3), (4, 5, 6, 7))
SLOW = rows_of(Job(ranks=RANKS, steps=STEPS_SENT), adds("forward", 9.0, (5,)))


class Tree:
    """A center, and the aggregators of two hosts with four ranks each."""

    def __init__(self, serving: Callable[..., Serving], folder: Path, *, tls: bool = False) -> None:
        self.center = serving(folder=folder / "center", tls=tls)
        upstream = "--upstream", f"127.0.0.1:{self.center.port}"
        self.hosts = [serving(*upstream, folder=folder / f"host{number}", tls=tls) for number in range(2)]
        self.links: dict[int, Connection] = {}

    def join(self, hosts: Sequence[int] = (0, 1)) -> None:
        """Connect the ranks of some hosts to their aggregators."""
        for number in hosts:
            for rank in HOSTS[number]:
                if rank in self.links:
                    self.links[rank].close()

                self.links[rank] = self.hosts[number].rank(rank, RANKS, run="tree", run_id="tree")

    def send(self, rows: Sequence[np.ndarray[Any, Any]], first: int, count: int, ranks: Sequence[int] = ()) -> None:
        """Send steps of ranks, and wait until their hosts have stored them."""
        for rank in ranks or self.links:
            send_steps(self.links[rank], rows[rank], first, count)

        for rank in ranks or self.links:
            wait_for_acks(self.links[rank], "steps", first + count)

    def finish(self) -> None:
        """End all ranks."""
        for link in self.links.values():
            assert link.finish("finished", timeout_s=60)

    def finish_run(self) -> dict[int, list[int]]:
        """End all ranks after their last step, and wait until the center knows; return the steps that it has."""
        eventually(lambda: self.has_step(STEPS_SENT - 1))
        self.finish()
        eventually(lambda: self.facts().get("state") == "finished")
        return self.stored_steps()

    def close(self) -> None:
        """Cut the connections of the ranks."""
        for link in self.links.values():
            link.close()

    def facts(self) -> dict[str, Any]:
        """The facts of the center's run; empty before it has one."""
        path = self.center.folder / "tree" / STORE_NAME
        if not path.exists():
            return {}

        with StoreReader(path) as store:
            return dict(store.meta().get("run", {}))

    def verdict(self) -> dict[str, Any]:
        """The last verdict of the center; empty before there is one."""
        return verdict_of(self.center)

    def stored_steps(self) -> dict[int, list[int]]:
        """The steps that the center has, by rank."""
        if not (self.center.folder / "latest").exists():
            return {}

        with self.center.store() as store:
            rows, streams = store.rows("steps"), {stream.id: stream.rank for stream in store.streams()}

        return {rank: rows["step"][rows["stream"] == stream].tolist() for stream, rank in streams.items()}

    def has_step(self, step: int, hosts: Sequence[int] = (0, 1)) -> bool:
        """Whether the center has a step of these hosts."""
        last = {rank: steps[-1] for rank, steps in self.stored_steps().items() if steps}
        return all(any(last.get(rank, -1) >= step for rank in HOSTS[number]) for number in hosts)


def send_steps(link: Connection, rows: np.ndarray[Any, Any], first: int, count: int) -> None:
    link.send_rows("steps", first, count, rows[first : first + count].tobytes())


def verdict_of(aggregator: Serving) -> dict[str, Any]:
    if not (aggregator.folder / "latest").exists():
        return {}

    with aggregator.store() as store:
        event = store.last_event("verdict")
        return {} if event is None else dict(event.data["verdict"])


def told(verdict: dict[str, Any]) -> tuple[Any, ...]:
    return verdict.get("kind"), tuple(verdict.get("ranks", ())), verdict.get("phase")


@pytest.fixture
def tree(serving: Callable[..., Serving], tmp_path: Path) -> Iterator[Tree]:
    with closing(Tree(serving, tmp_path)) as tree:
        yield tree


def flat_verdict(serving: Callable[..., Serving], folder: Path, rows: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Return the verdict of one aggregator of all ranks."""
    flat = serving(folder=folder)
    links = [flat.rank(rank, RANKS, run="tree") for rank in range(RANKS)]
    for rank, link in enumerate(links):
        send_steps(link, rows[rank], 0, STEPS_SENT)

    found = eventually(lambda: (each := verdict_of(flat)).get("ranks") and each)
    for link in links:
        link.close()

    assert isinstance(found, dict)
    return found


@pytest.mark.process
def test_the_center_has_the_run_of_all_hosts(tree, serving, tmp_path):
    """The verdict is that of one aggregator of all ranks, live and in the report, from the rows of fewer ranks."""
    tree.join()
    for first in range(0, STEPS_SENT, 40):
        tree.send(SLOW, first, 40)
        eventually(lambda last=first + 39: tree.has_step(last))

    flat = flat_verdict(serving, tmp_path / "flat", SLOW)
    assert told(flat) == ("COMPUTE_STRAGGLER", (5,), "forward")
    eventually(lambda: told(tree.verdict()) == told(flat))

    tree.finish()
    eventually(lambda: tree.facts().get("state") == "finished")
    report = build_report(tree.center.folder / "tree")
    assert told(report.verdict.to_dict()) == told(flat)
    assert [(rank.rank, rank.state, rank.steps) for rank in report.ranks] == [
        (rank, "finished", STEPS_SENT) for rank in range(RANKS)
    ]
    assert (report.run.world_size, report.steps.count, report.telemetry.rows_lost) == (RANKS, STEPS_SENT, 0)
    is_exact(report, SLOW)
    steps = tree.stored_steps()
    assert steps[5] == [*range(STEPS_SENT)]
    assert sum(map(len, steps.values())) < RANKS * STEPS_SENT
    for host in tree.hosts:
        with host.store() as store:
            assert store.stored("steps") == 4 * STEPS_SENT


@pytest.mark.process
def test_a_slow_device_is_named_in_the_center(tree):
    """Hosts compare the device times: what their ranks launch takes all the same time."""
    rows = rows_of(Job(ranks=RANKS, steps=STEPS_SENT), adds("forward", 9.0, (7,)))
    run = FaultyRun(Cluster(ranks=RANKS, per_host=4), rows, "rank", (7,), "forward").on_devices(1)
    tree.join()
    for rank, link in tree.links.items():
        link.send_rows("device_steps", 0, STEPS_SENT, run.device_rows[rank].tobytes())

    tree.send(run.rows, 0, STEPS_SENT)

    eventually(lambda: told(tree.verdict()) == ("COMPUTE_STRAGGLER", (7,), "forward"))


def is_exact(report: Report, rows: Sequence[np.ndarray[Any, Any]]) -> None:
    """Check that step times and phases are those of all steps of all ranks, after the set-up."""
    kept = np.concatenate([each[SET_UP_STEPS:STEPS_SENT] for each in rows])
    phases = {phase.phase: phase for phase in report.phases}
    assert report.steps.summed_ranks == RANKS
    assert report.steps.mean_ms == pytest.approx(kept["total_ns"].mean() / 1e6, rel=1e-3)
    assert report.steps.p95_ms == pytest.approx(np.quantile(kept["total_ns"], 0.95) / 1e6, rel=0.01)
    for name in ("forward", "optimizer", "input_wait"):
        assert phases[name].mean_ms == pytest.approx(kept[f"{name}_ns"].mean() / 1e6, rel=1e-3)

    assert sum(phase.share for phase in report.phases) == pytest.approx(1.0, abs=0.01)


@pytest.mark.process
def test_names_facts_and_metrics_of_all_ranks_are_there(tree):
    """Each once, whoever is chosen."""
    tree.join()
    tree.send(SLOW, 0, 40)
    for rank, link in tree.links.items():
        link.send_rows("names", 0, 1, msgpack.packb({"id": 0, "name": f"loss {rank}"}))
        link.send_rows("info", 0, 1, msgpack.packb({"kind": "warning", "t_ns": 1, "text": f"of {rank}"}))

    tree.finish()
    eventually(lambda: tree.facts().get("state") == "finished")

    with tree.center.store() as store:
        assert sorted(row["name"] for _, row in store.log_rows("names")) == [f"loss {rank}" for rank in range(RANKS)]
        assert sorted(row["text"] for _, row in store.log_rows("info")) == [f"of {rank}" for rank in range(RANKS)]


@pytest.mark.process
def test_samples_that_wait_in_a_large_job_are_sent_at_its_end(serving, tmp_path):
    """In a job of a thousand ranks a host sends the samples of its typical rank every ten seconds."""
    center = serving(folder=tmp_path / "center")
    host = serving("--upstream", f"127.0.0.1:{center.port}", folder=tmp_path / "host")
    rank = host.rank(0, 1000, run="large")
    samples = np.zeros(3, PROCESS.dtype)
    for number in range(3):
        rank.send_rows(PROCESS.name, number, 1, samples[number : number + 1].tobytes())
        send_steps(rank, SLOW[0], 40 * number, 40)
        eventually(lambda last=40 * (number + 1): stored_of(center, STEPS.name) == last)

    assert rank.finish("finished", timeout_s=60)

    eventually(lambda: stored_of(center, PROCESS.name) == 3)


def stored_of(aggregator: Serving, table: str) -> int:
    if not (aggregator.folder / "latest").exists():
        return 0

    with aggregator.store() as store:
        return store.stored(table)


@pytest.mark.process
def test_a_killed_center_goes_on_where_it_was(tree):
    """Its hosts go on meanwhile, and nothing is stored twice or lost of the ranks that are sent."""
    tree.join()
    tree.send(SLOW, 0, 40)
    eventually(lambda: tree.has_step(39))

    tree.center.kill()
    tree.send(SLOW, 40, 40)
    eventually(lambda: f"waits here until 127.0.0.1:{tree.center.port} answers" in tree.center.log.read_text())
    tree.center.start()
    tree.send(SLOW, 80, 40)

    steps = tree.finish_run()
    assert steps[5] == [*range(STEPS_SENT)]
    for host in HOSTS:
        assert {step for rank in host for step in steps[rank]} == {*range(STEPS_SENT)}
        assert all(steps[rank] == sorted(set(steps[rank])) for rank in host)


@pytest.mark.process
def test_a_killed_aggregator_of_a_host_goes_on_where_it_was(tree):
    """Its ranks come back to it, and its rows to the center: each once."""
    tree.join()
    tree.send(SLOW, 0, 40)
    eventually(lambda: tree.has_step(39))

    tree.hosts[1].kill()
    tree.hosts[1].start()
    tree.join([1])
    tree.send(SLOW, 40, 80)

    steps = tree.finish_run()
    assert steps[5] == [*range(STEPS_SENT)]
    assert all(each == sorted(set(each)) for each in steps.values())


@pytest.mark.process
def test_a_silent_host_is_counted(tree):
    """The verdict is about the others, and says how many were seen; an early one may be about that host alone."""
    tree.join()
    tree.send(SLOW, 0, 60)
    eventually(lambda: tree.has_step(59))

    tree.hosts[1].kill()
    tree.send(SLOW, 60, 60, HOSTS[0])

    eventually(lambda: is_about_half(tree.verdict()))


def is_about_half(verdict: dict[str, Any]) -> bool:
    said = verdict.get("summary", "").endswith("4 of 8 ranks were seen in these steps.")
    return said and not set(verdict["ranks"]) & set(HOSTS[1])


@pytest.mark.process
def test_what_could_not_be_sent_is_told_and_sent_later(tree):
    """Also the end of a run that ended while the center was away: by the next aggregator of the same folder."""
    tree.join([0])
    tree.send(SLOW, 0, 40)
    eventually(lambda: tree.has_step(39, [0]))
    tree.center.kill()
    tree.finish()

    assert tree.hosts[0].stop() == 0
    log = tree.hosts[0].log.read_text()
    assert f"run tree: 127.0.0.1:{tree.center.port} has not confirmed that its last rows are stored" in log

    tree.center.start()
    tree.hosts[0].start()
    eventually(lambda: states_of(tree.center) == ["finished"] * 4)


def states_of(aggregator: Serving) -> list[str]:
    with aggregator.store() as store:
        return [stream.state for stream in store.streams()]


@pytest.mark.process
def test_the_rows_beside_a_small_finding_are_asked_for(tree):
    """A gain of some percent is told when the rows of all ranks of that host confirm it."""
    rows = rows_of(Job(ranks=RANKS, steps=STEPS_SENT), adds("forward", 1.4, (5,)))
    tree.join()
    tree.send(rows, 0, 80)
    eventually(lambda: tree.has_step(79))

    eventually(lambda: all(steps for rank, steps in tree.stored_steps().items() if rank in HOSTS[1]))
    eventually(lambda: told(tree.verdict()) == ("COMPUTE_STRAGGLER", (5,), "forward"))
    assert tree.verdict()["speedup_if_fixed"] < CLEAR_GAIN


@pytest.mark.process
def test_commands_for_ranks_belong_to_their_hosts(tree):
    """The center does not wait for answers that cannot come."""
    tree.join()
    tree.send(SLOW, 0, 10)
    eventually(lambda: tree.facts().get("world_size") == RANKS)

    with pytest.raises(TraceMLError, match="connected to the aggregators of their hosts: ask on"):
        tree.center.ask("stacks", run="tree")


def host_run(folder: Path, steps: int) -> Path:
    """Store a run of one rank with a frame for each of its steps."""
    identity = StreamIdentity(rank=0, attempt=0, host="h", pid=1, start_ticks=1, recorder="r")
    with StoreWriter(folder / STORE_NAME) as store:
        store.put_meta("run", {"id": "tree", "job": "tree", "world_size": 1, "started": time.time()})
        stream = store.stream(identity, state="running", world_size=1)
        for step in range(store.next_seq(stream, STEPS.name), steps):
            store.append(stream, STEPS.name, step, 1, step_rows(step, 1), step, step)
            store.commit()

    return folder


def damage(folder: Path, frames: int) -> None:
    """Make the first frames of a run unreadable."""
    with closing(sqlite3.connect(folder / STORE_NAME)) as database:
        database.execute("UPDATE frames SET codec = 99 WHERE id <= ?", (frames,))
        database.commit()


@pytest.fixture
def dial(serving, tmp_path):
    center = serving(folder=tmp_path / "center")
    return center, lambda hello: connect("127.0.0.1", center.port, hello, TOKEN, timeout_s=60)


@pytest.mark.process
def test_a_relay_goes_on_where_the_one_before_has_stopped(dial, tmp_path, monkeypatch):
    """After a day it would read a day of rows, of which the center has all."""
    monkeypatch.setattr("traceml.aggregator.relay.run_relay._HISTORY_FRAMES", 8)
    center, connected = dial
    run = host_run(tmp_path / "run", 40)
    first = RunRelay(run, "host", connected)
    first.finish(20)
    first.disconnect()
    assert first.safe == 40

    host_run(run, 60)
    damage(run, 30)
    second = RunRelay(run, "host", connected, first.safe)
    second.finish(20)
    second.disconnect()

    assert second.safe == 60
    assert stored_of(center, STEPS.name) == 60


@pytest.mark.process
def test_a_connected_relay_reads_no_row_again(dial, tmp_path):
    """Not even of a rank that joined as a new one, so that the center had none of its rows."""
    center, connected = dial
    run = host_run(tmp_path / "run", 40)
    relay = RunRelay(run, "host", connected)
    relay.finish(20)

    host_run(run, 60)
    damage(run, 40)
    relay.finish(20)
    relay.disconnect()

    assert relay.safe == 60
    assert stored_of(center, STEPS.name) == 60


@pytest.mark.process
def test_a_center_without_the_run_gets_all_of_it(dial, tmp_path, monkeypatch):
    """Its folder was removed, or another center has the same address."""
    monkeypatch.setattr("traceml.aggregator.relay.run_relay._HISTORY_FRAMES", 8)
    center, connected = dial
    relay = RunRelay(host_run(tmp_path / "run", 40), "host", connected, 40)

    relay.finish(20)
    relay.disconnect()

    assert stored_of(center, STEPS.name) == 40


@pytest.mark.process
def test_what_a_rank_does_that_cannot_answer_is_known_in_the_center(dial, tmp_path):
    """Its host takes the snapshots, also of a rank that has never connected; each is sent once, as is the job's end.

    An earlier attempt that was ended is none of this one. A later aggregator sends what it has written itself.
    """

    def refuse(_hello: Hello) -> Connection:
        raise ConnectionError

    center, connected = dial
    run = host_run(tmp_path / "run", 40)
    with StoreWriter(run / STORE_NAME) as store:
        store.put_meta("run", {"id": "tree", "job": "tree", "world_size": 2, "started": time.time()})
        store.update_stream(1, world_size=2)
        for rank, whose in ((0, {"stream": 1}), (1, {"attempt": 0})):
            store.event(SNAPSHOT, {"rank": rank, "at_ns": 7, "answered": "kernel", "t_ns": 7, **whose})

        store.event("verdict", {})
        for attempt in (-1, 0):
            store.event(ABORT, {"why": "hang", "attempt": attempt})

        store.commit()

    relay = RunRelay(run, "host", connected)
    for _ in range(2):
        relay.finish(20)
        relay.disconnect()

    with center.store() as store:
        assert len(store.events(kind=ABORT)) == 1

    later = RunRelay(run, "host", refuse, relay.safe)
    with pytest.raises(ConnectionError):
        later.poll()

    with StoreWriter(run / STORE_NAME) as store:
        store.event(ABORT, {"why": "hang", "attempt": 0})
        store.commit()

    later._dial = connected
    later.finish(20)
    later.disconnect()
    with center.store() as store:
        (stream,) = store.streams()
        assert [(each.data.get("rank", 0), each.data.get("stream")) for each in store.events(kind=SNAPSHOT)] == [
            (0, stream.id), (1, None),
        ]  # fmt: skip
        assert len(store.events(kind=ABORT)) == 2


@pytest.mark.process
def test_how_far_a_run_is_sent_is_kept_in_its_folder(dial, tmp_path):
    """Also without an end of the aggregator; for another center it says nothing."""
    center, _ = dial
    run = host_run(tmp_path / "runs" / "run", 40)
    upstream = Upstream(f"127.0.0.1:{center.port}", run.parent, TOKEN)

    def is_kept() -> bool:
        upstream.poll([run])
        return bool(json.loads((run / RELAY_NAME).read_text())["safe"] == 40)

    eventually(is_kept)
    upstream.close()
    assert json.loads((run / RELAY_NAME).read_text()) == {"address": upstream.address, "sent": False, "safe": 40}
    Upstream("127.0.0.1:9", run.parent, TOKEN).poll([run])
    assert json.loads((run / RELAY_NAME).read_text())["safe"] == 0


@pytest.mark.process
def test_the_rows_of_one_run_do_not_keep_others_waiting(dial, tmp_path, monkeypatch):
    """After a while it is the next one's turn; at the end all that is possible is sent."""
    for name, value in (("_FRAMES", 8), ("_MESSAGE_BYTES", 1), ("_TURN_S", 0.0)):
        monkeypatch.setattr(f"traceml.aggregator.relay.run_relay.{name}", value)

    center, connected = dial
    relay = RunRelay(host_run(tmp_path / "run", 40), "host", connected)
    relay.poll()
    assert relay._cursor == 8

    relay.finish(20)
    relay.disconnect()
    assert stored_of(center, STEPS.name) == 40


def test_the_end_does_not_wait_for_a_center_that_is_away(tmp_path, monkeypatch):
    """A run that could not be sent just now is not tried again: with many it would take minutes."""
    runs = [host_run(tmp_path / "runs" / name, 1) for name in ("first", "second")]
    tried: list[str] = []

    def poll(relay: RunRelay) -> None:
        tried.append(relay.path.name)
        raise TimeoutError

    monkeypatch.setattr(RunRelay, "poll", poll)
    upstream = Upstream("127.0.0.1:9", tmp_path / "runs", TOKEN)
    upstream.poll(runs)
    upstream.close()

    assert tried == ["first", "second"]
    assert [json.loads((run / RELAY_NAME).read_text())["sent"] for run in runs] == [False, False]


def test_an_error_of_one_run_is_counted_and_the_others_are_sent(tmp_path, monkeypatch, caplog):
    """It is tried again later."""
    runs = [host_run(tmp_path / "runs" / name, 1) for name in ("first", "second")]
    tried: list[str] = []

    def poll(relay: RunRelay) -> None:
        tried.append(relay.path.name)
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(RunRelay, "poll", poll)
    before = failures().get("aggregator", 0)
    Upstream("127.0.0.1:9", tmp_path / "runs", TOKEN).poll(runs)

    assert tried == ["first", "second"]
    assert failures()["aggregator"] == before + 2
    assert "run second cannot be sent: ZeroDivisionError('broken')" in caplog.text


@pytest.mark.parametrize("address", ["center", ":29765", "center:0", "center:port", "center:70000", ""])
def test_an_upstream_that_is_no_address_is_refused(address, tmp_path):
    """With the form that it takes."""
    with pytest.raises(UsageError, match=f"upstream takes HOST:PORT of another aggregator, not {address!r}"):
        Upstream(address, tmp_path, None)


@pytest.mark.process
def test_a_host_with_a_wrong_token_goes_on(serving, tmp_path, monkeypatch):
    """Its own run is complete, and its log says why nothing is sent."""
    center = serving(folder=tmp_path / "center")
    monkeypatch.setattr("tests.aggregator.conftest.TOKEN", "another")
    host = serving("--upstream", f"127.0.0.1:{center.port}", folder=tmp_path / "host")
    rank = host.rank(0, 1, run="tree")
    send_steps(rank, SLOW[0], 0, 40)

    assert rank.finish("finished", timeout_s=60)

    eventually(lambda: "cannot be sent" in host.log.read_text())
    eventually(lambda: host.state() == "finished")
    with closing(StoreReader((host.folder / "latest").resolve() / STORE_NAME)) as store:
        assert store.stored(STEPS.name) == 40


@pytest.mark.process
def test_a_relayed_run_is_encrypted_where_tls_is_set(serving, tmp_path):
    """Between ranks and hosts, and between hosts and the center: it takes no host that speaks plain."""
    with closing(Tree(serving, tmp_path, tls=True)) as tree:
        tree.join()
        tree.send(SLOW, 0, STEPS_SENT)

        assert tree.finish_run()[5] == [*range(STEPS_SENT)]

    plain = serving("--upstream", f"127.0.0.1:{tree.center.port}", folder=tmp_path / "plain")
    with closing(plain.rank(0, 1, run="plain")) as rank:
        send_steps(rank, SLOW[0], 0, 40)
        eventually(lambda: f"waits here until 127.0.0.1:{tree.center.port} answers" in plain.log.read_text())

    assert [path.name for path in tree.center.run_dirs] == ["tree"]
