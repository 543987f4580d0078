from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import psutil
import pytest

from tests.aggregator.conftest import ROOT, TOKEN, step_rows, wait_for_acks
from tests.eventually import eventually
from tests.processes import command_of
from traceml.aggregator.active_run import ABANDONED_S
from traceml.database.schema import STEPS
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.facts.ends import END
from traceml.errors import AggregatorRefusedError, TraceMLError
from traceml.run_folder import STORE_NAME
from traceml.transport.client import connect
from traceml.transport.hello import Hello


def end_of(connection, reason="finished") -> None:
    assert connection.finish(reason, timeout_s=60)


def kill_rank(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def job(request):
    """A job key of this test alone: flight files of other tests are none of its business."""
    return f"{request.node.name}-{os.getpid()}-{time.time_ns()}"


@pytest.fixture
def rank_process(job):
    """Start ranks in processes of their own; return (process, flight file) once they wait."""
    started = []

    def start(port: int, *arguments: int):
        command = [sys.executable, "-m", "tests.aggregator.ranks", str(port), job, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        flight = Path(process.stdout.readline().strip())
        started.append((process, flight))
        assert flight.is_file()
        return process, flight

    yield start
    for process, flight in started:
        kill_rank(process)
        flight.unlink(missing_ok=True)


def test_ranks_of_one_job_become_one_run(serving):
    """Ranks with the same job key share a folder, which `latest` points at; the run ends when all have said bye."""
    aggregator = serving()
    ranks = [aggregator.rank(rank, 3) for rank in range(3)]

    for rank in ranks:
        rank.send_rows("steps", 0, 50, step_rows(0, 50))
        end_of(rank)

    eventually(lambda: aggregator.state() == "finished")
    assert [path.name for path in aggregator.run_dirs] == [Path(ranks[0].welcome["run_dir"]).name]
    assert {rank.welcome["run_id"] for rank in ranks} == {(aggregator.folder / "latest").resolve().name}
    assert aggregator.run_facts()["world_size"] == 3
    with aggregator.store() as store:
        assert store.stored("steps") == 150
        assert [(record.rank, record.state) for record in store.streams()] == [(rank, "finished") for rank in range(3)]


def test_acks_come_after_the_commit(serving):
    """Acknowledged rows can be read from the store by another process."""
    aggregator = serving()
    rank = aggregator.rank()

    rank.send_rows("steps", 0, 10, step_rows(0, 10))
    wait_for_acks(rank, "steps", 10)

    with aggregator.store() as store:
        assert store.stored("steps") == 10

    rank.close()


def test_rows_that_come_again_are_stored_once_and_gaps_are_counted(serving):
    """Whole and partial repeats are cut, also of logs; a jump counts as lost."""
    aggregator = serving()
    rank = aggregator.rank()
    names = [msgpack.packb({"id": number, "name": f"n{number}"}) for number in range(6)]

    for start, count in ((0, 10), (0, 10), (5, 10), (20, 5)):
        rank.send_rows("steps", start, count, step_rows(start, count))

    rank.send_rows("names", 0, 3, b"".join(names[:3]))
    rank.send_rows("names", 1, 5, b"".join(names[1:]))
    end_of(rank)

    with aggregator.store() as store:
        assert store.rows("steps")["step"].tolist() == [*range(15), *range(20, 25)]
        assert store.lost("steps") == 5
        assert [row["id"] for _, row in store.log_rows("names")] == [*range(6)]


def test_reconnected_rank_goes_on_in_its_stream(serving):
    """After a lost connection the welcome says where to go on, and nothing is stored twice."""
    aggregator = serving()
    first = aggregator.rank()
    first.send_rows("steps", 0, 10, step_rows(0, 10))
    wait_for_acks(first, "steps", 10)
    first.close()

    second = aggregator.rank()

    assert second.acked["steps"] == 10
    assert second.welcome["stream"] == first.welcome["stream"]
    second.send_rows("steps", 10, 10, step_rows(10, 10))
    end_of(second)
    with aggregator.store() as store:
        assert len(store.streams()) == 1
        assert store.rows("steps")["step"].tolist() == [*range(20)]


def test_second_connection_of_a_recorder_replaces_the_first(serving):
    """The new connection counts, even if TCP has not noticed that the old one is dead."""
    aggregator = serving()
    old = aggregator.rank()
    new = aggregator.rank()

    new.send_rows("steps", 0, 5, step_rows(0, 5))
    wait_for_acks(new, "steps", 5)

    with pytest.raises(ConnectionError):
        eventually(lambda: old.receive(0.1))

    old.close()
    end_of(new)


def test_two_runs_at_once(serving):
    """Jobs with different keys are stored apart, at the same time."""
    aggregator = serving()
    ranks = {(run, rank): aggregator.rank(rank, 2, run=run) for run in ("a", "b") for rank in range(2)}

    for (run, _), rank in ranks.items():
        count = 10 if run == "a" else 20
        rank.send_rows("steps", 0, count, step_rows(0, count))

    for rank in ranks.values():
        end_of(rank)

    assert len(aggregator.run_dirs) == 2
    for run, rows in (("a", 20), ("b", 40)):
        folder = Path(ranks[run, 0].welcome["run_dir"])
        assert folder == Path(ranks[run, 1].welcome["run_dir"])
        with _store(folder) as store:
            assert store.stored("steps") == rows


def _store(folder: Path):
    from traceml.database.store.reader import StoreReader
    from traceml.run_folder import STORE_NAME

    return StoreReader(folder / STORE_NAME)


def test_given_run_id_names_the_folder(serving):
    """A run id is used as it is, but for what cannot be in a folder's name."""
    aggregator = serving()
    end_of(aggregator.rank(run="my run", run_id="../exp 1/β"))

    assert [path.name for path in aggregator.run_dirs] == ["exp-1-β"]
    with pytest.raises(AggregatorRefusedError, match="cannot be the name"):
        aggregator.rank(run="x", run_id="..")


def test_given_run_id_that_comes_again_is_the_next_attempt(serving):
    """A second job under the same id goes into the same folder, as another attempt."""
    aggregator = serving()
    end_of(aggregator.rank(run="exp", run_id="exp", recorder="first"))
    eventually(lambda: aggregator.state() == "finished")
    reports = [aggregator.run_dirs[0] / name for name in ("report.json", "report.html")]
    eventually(lambda: all(path.exists() for path in reports))

    second = aggregator.rank(run="exp", run_id="exp", recorder="second")
    eventually(lambda: aggregator.state() == "running")
    assert not any(path.exists() for path in reports)  # they were those of the first one's end
    end_of(second)

    eventually(lambda: aggregator.state() == "finished")
    eventually(lambda: all(path.exists() for path in reports))
    assert len(aggregator.run_dirs) == 1
    assert aggregator.run_facts()["attempt"] == 1


def test_job_key_that_another_job_uses_after_the_end_is_a_new_run(serving):
    """torchrun's default address is the same for each job: the next job gets a folder of its own."""
    aggregator = serving()
    end_of(aggregator.rank(run="torchrun@localhost:29500", recorder="first"))
    eventually(lambda: aggregator.state() == "finished")

    end_of(aggregator.rank(run="torchrun@localhost:29500", recorder="second"))

    assert len(aggregator.run_dirs) == 2


def test_rank_that_comes_back_after_the_end_makes_no_second_folder(serving):
    """A run that was over is opened again by a rank of it, takes the rest, and ends again."""
    aggregator = serving()
    rank = aggregator.rank()
    rank.send_rows("steps", 0, 5, step_rows(0, 5))
    end_of(rank)
    eventually(lambda: aggregator.state() == "finished")

    late = aggregator.rank()
    eventually(lambda: aggregator.state() == "running")
    late.send_rows("steps", 5, 5, step_rows(5, 5))
    end_of(late)

    eventually(lambda: aggregator.state() == "finished")
    assert len(aggregator.run_dirs) == 1
    with aggregator.store() as store:
        assert store.stored("steps") == 10


def test_restart_by_torchrun_is_a_second_attempt(serving):
    """Workers that torchrun starts again belong to the same run, and the state is that of the last attempt."""
    aggregator = serving()
    for rank in [aggregator.rank(rank, 2, recorder="a", restarts_left=1) for rank in range(2)]:
        rank.send_rows(
            "info", 0, 1, msgpack.packb({"kind": "exit", "t_ns": 1, "code": 1, "exception": "ValueError: x"})
        )
        end_of(rank, "failed")

    for rank in [aggregator.rank(rank, 2, attempt=1, recorder="b") for rank in range(2)]:
        rank.send_rows("steps", 0, 5, step_rows(0, 5))
        end_of(rank)

    eventually(lambda: aggregator.state() == "finished")
    assert len(aggregator.run_dirs) == 1
    assert aggregator.run_facts()["attempt"] == 1
    with aggregator.store() as store:
        assert [(record.attempt, record.rank, record.state) for record in store.streams()] == [
            (0, 0, "failed"), (0, 1, "failed"), (1, 0, "finished"), (1, 1, "finished"),
        ]  # fmt: skip
        assert store.streams()[0].facts["exit"]["exception"] == "ValueError: x"


def test_killed_rank_loses_no_row_and_is_explained(serving, rank_process, job):
    """Rows that a rank had not sent when SIGKILL came are read from its flight file once, with what was open."""
    aggregator = serving("--run-id", job)
    process, flight = rank_process(aggregator.port, 0, 1, 500, 200)

    kill_rank(process)

    def record():
        with aggregator.store() as store:
            return next((each for each in store.streams() if each.state != "running"), None)

    assert eventually(record).state == "lost"
    eventually(lambda: not flight.exists())
    exits = [{"rank": 0, "local_rank": 0, "pid": process.pid, "exitcode": -9}]
    aggregator.ask("exits", {"exits": exits}, run=job)
    aggregator.ask("finish", {"status": 137}, run=job)

    assert aggregator.state() == "failed"
    end = record()
    assert end.state == "killed"
    assert end.facts["exit"]["signal"] == 9
    assert end.facts["exit"]["open_step"] == 500
    assert end.facts["exit"]["open_phase"] == "backward"
    with aggregator.store() as store:
        assert store.rows("steps")["step"].tolist() == [*range(500)]
        assert store.lost("steps") == 0
        assert store.stored("info") == 1


def test_rank_that_died_while_the_aggregator_was_away(serving, rank_process):
    """An aggregator that comes back finds the dead rank's file and ends the run properly."""
    aggregator = serving()
    process, flight = rank_process(aggregator.port, 0, 1, 500, 200)
    aggregator.kill()
    kill_rank(process)

    aggregator.start()

    eventually(lambda: aggregator.state() == "lost")
    assert not flight.exists()
    with aggregator.store() as store:
        assert store.rows("steps")["step"].tolist() == [*range(500)]
        assert store.streams()[0].facts["exit"]["process_gone"]


def test_rank_that_died_before_it_could_connect(serving, rank_process, job):
    """The flight file of a rank that never connected is found at the end of its run."""
    aggregator = serving()
    present = aggregator.rank(1, 2, run=job)
    process, flight = rank_process(0, 0, 2, 50, 0)
    kill_rank(process)

    exits = [{"rank": 0, "local_rank": 0, "pid": process.pid, "exitcode": -9}]
    aggregator.ask("exits", {"exits": exits}, run=job)
    aggregator.ask("finish", {"status": 137}, run=job)

    present.close()
    assert not flight.exists()
    with aggregator.store() as store:
        assert store.stored("steps") == 50
        ends = {record.rank: record for record in store.streams()}
        assert ends.keys() == {0, 1}
        assert ends[0].state == "killed"
        assert ends[0].facts["exit"]["signal"] == 9


def test_rank_that_lives_but_lost_its_connection_is_waited_for(serving, rank_process):
    """A rank of this host whose process lives is not given up, however long it is silent."""
    aggregator = serving()
    process, _ = rank_process(aggregator.port, 0, 1, 5, 5)
    process.send_signal(signal.SIGSTOP)
    aggregator.kill()
    aggregator.start()
    time.sleep(1.5)  # longer than a dead rank needs to be noticed; nothing to poll for: nothing may happen

    with aggregator.store() as store:
        assert [record.state for record in store.streams()] == ["running"]

    process.send_signal(signal.SIGCONT)


def test_finish_takes_what_is_still_on_the_way(serving):
    """A launcher's `finish` does not overtake rows that are in the socket; its reply comes when all is stored."""
    aggregator = serving("--run-id", "job", "--exit-when-idle")
    rank = aggregator.rank()
    for number in range(200):
        rank.send_rows("steps", number * 100, 100, step_rows(number * 100, 100))
    assert rank.flush(60)  # into the socket: what it has not taken would be lost
    reply = aggregator.ask("finish", {"status": 0}, run="job")
    rank.close()  # not before: to close it with acknowledgments unread discards what the aggregator has not read

    assert reply["state"] == "finished"
    assert aggregator.process.wait(240) == 0
    with aggregator.store() as store:
        assert store.stored("steps") == 20_000


def test_report_is_written_when_the_run_is_over(serving):
    """`finish` is answered when the report is there."""
    aggregator = serving("--run-id", "job", "--exit-when-idle")
    rank = aggregator.rank()
    rank.send_rows("steps", 0, 100, step_rows(0, 100))
    end_of(rank)

    aggregator.ask("finish", {"status": 0}, run="job")

    assert (aggregator.folder / "job" / "report.json").is_file(), aggregator.log.read_text()


def test_a_report_that_cannot_be_made_concerns_no_other_run(serving):
    """While one run's report hangs, another run is stored and diagnosed; a killed one is told in one line."""
    aggregator = serving("--exit-when-idle")
    first, second = (aggregator.rank(run=name) for name in "ab")
    making = eventually(lambda: report_process(aggregator))
    os.kill(making, signal.SIGSTOP)
    end_of(first)
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(aggregator.ask, "finish", {"status": 0}, run="a")
        run_a, run_b = eventually(lambda: ended_first(aggregator))
        second.send_rows("steps", 0, 100, step_rows(0, 100))
        wait_for_acks(second, "steps", 100)
        with StoreReader(run_b / STORE_NAME) as store:
            eventually(lambda: store.last_event("verdict"))

        assert not finished.done()
        os.kill(making, signal.SIGKILL)
        assert finished.result()["state"] == "finished"

    end_of(second)
    aggregator.ask("finish", {"status": 0}, run="b")
    assert (run_b / "report.json").is_file()
    told = [line for line in aggregator.log.read_text().splitlines() if "no report" in line]
    assert len(told) == 1
    assert "SIGKILL" in told[0]
    assert f"`traceml report {run_a}`" in told[0]


def report_process(aggregator) -> int | None:
    """Return the id of the process that waits to write a report: a fork with a command line of its own."""
    children = psutil.Process(aggregator.process.pid).children()
    return next((child.pid for child in children if "traceml.display.report_main" in command_of(child)), None)


def ended_first(aggregator) -> list[Path] | None:
    """Return the folders of two runs, once the first one is over."""
    for run in aggregator.run_dirs:
        with StoreReader(run / STORE_NAME) as store:
            if store.meta().get("run", {}).get("state") == "finished":
                return [run, *(other for other in aggregator.run_dirs if other != run)]

    return None


def test_local_aggregator_ends_after_the_last_rank(serving):
    """Started for one job, it closes the run and ends by itself."""
    aggregator = serving("--exit-when-idle")
    ranks = [aggregator.rank(rank, 2) for rank in range(2)]

    for rank in ranks:
        end_of(rank)

    assert aggregator.process.wait(240) == 0
    assert aggregator.state() == "finished"


def test_a_signal_to_all_processes_of_a_job_is_no_good_end(serving, rank_process):
    """As at a scheduler's time limit: the aggregator sees its ranks end before it ends itself."""
    aggregator = serving("--exit-when-idle")
    process, _ = rank_process(aggregator.port, 0, 1, 500, 200)

    aggregator.process.send_signal(signal.SIGTERM)
    kill_rank(process)

    assert aggregator.process.wait(90) == 0
    assert aggregator.state() == "lost"
    with aggregator.store() as store:
        assert store.streams()[0].facts["exit"]["process_gone"]


def test_a_signal_to_the_aggregator_alone_ends_no_run(serving, rank_process):
    """Its rank goes on: the run is left to the next aggregator."""
    aggregator = serving("--exit-when-idle")
    rank_process(aggregator.port, 0, 1, 500, 200)

    assert aggregator.stop() == 0
    assert aggregator.state() == "running"


def test_aggregator_of_a_launcher_waits_for_it(serving):
    """Between the bye of the last rank and the launcher's word the run stays open: ranks may be started again."""
    aggregator = serving("--run-id", "job", "--exit-when-idle")
    end_of(aggregator.rank())
    time.sleep(1.5)  # longer than an aggregator without a launcher waits; nothing may happen

    assert aggregator.process.poll() is None
    assert aggregator.state() == "running"
    aggregator.ask("finish", {"status": 0}, run="job")
    assert aggregator.process.wait(240) == 0


def test_aggregator_of_a_launcher_that_was_killed_at_once_ends_with_the_run(serving):
    """The parent that it starts with is then init, which reports no end."""
    launcher = subprocess.Popen(["true"])
    launcher.wait()

    aggregator = serving("--run-id", "job", "--exit-when-idle", "--launcher-pid", str(launcher.pid))
    end_of(aggregator.rank())

    assert aggregator.process.wait(240) == 0
    assert aggregator.state() == "finished"


def test_aggregator_whose_launcher_was_killed_before_its_ranks_connected_ends(serving):
    """They end with it: none will come, and a run that began is lost."""
    launcher = subprocess.Popen(["true"])
    launcher.wait()

    aggregator = serving("--run-id", "job", "--exit-when-idle", "--launcher-pid", str(launcher.pid))

    assert aggregator.process.wait(ABANDONED_S - 1) == 0
    assert aggregator.state() == "lost"
    with aggregator.store() as store:
        assert store.last_event(END).data["ended_by"]["launcher_pid"] == launcher.pid


def test_verdict_is_reported_while_the_run_goes_on(serving):
    """About once a second the windows are diagnosed, and the verdict is in the store."""
    aggregator = serving()
    rank = aggregator.rank()
    rank.send_rows("steps", 0, 100, step_rows(0, 100))

    def verdict():
        with aggregator.store() as store:
            return store.last_event("verdict")

    event = eventually(verdict)
    assert event.data["verdict"]["kind"] == "HEALTHY"
    assert event.data["step"] == 99
    rank.close()


def test_status_counts(serving):
    """`status` reports connections, rows and refusals."""
    aggregator = serving()
    rank = aggregator.rank()
    rank.send_rows("steps", 0, 10, step_rows(0, 10))
    wait_for_acks(rank, "steps", 10)
    with pytest.raises(AggregatorRefusedError):
        connect("127.0.0.1", aggregator.port, Hello(), "wrong", timeout_s=60)

    status = aggregator.ask("status")

    assert status["server"]["refused"] == 1
    assert status["runs"][0]["connected"] == 1
    assert status["runs"][0]["rows"] == 10
    rank.close()


def test_a_command_of_another_form_gets_an_answer(serving):
    """Arguments that are no map are the client's mistake, not an internal error."""
    aggregator = serving()
    client = connect("127.0.0.1", aggregator.port, Hello(role="client"), TOKEN)
    client.send({"t": "command", "id": 5, "name": "status", "args": ["not", "a", "map"]})

    (reply,) = eventually(lambda: client.receive(0.1))
    assert reply == {"t": "reply", "id": 5, "error": "the command's args are a map, not a list"}
    client.close("done")


def test_commands_reach_the_ranks_and_their_replies_come_back(serving):
    """A command that is not the aggregator's own is passed on, and the answers are gathered."""
    aggregator = serving()
    ranks = [aggregator.rank(rank, 2) for rank in range(2)]
    client = connect("127.0.0.1", aggregator.port, Hello(run="job"), TOKEN)
    client.send({"t": "command", "id": 5, "name": "echo", "args": {"word": "hi"}})

    for number, rank in enumerate(ranks):
        asked = eventually(lambda rank=rank: rank.receive(0.1))[0]
        assert (asked["name"], asked["args"]) == ("echo", {"word": "hi"})
        rank.send({"t": "reply", "id": asked["id"], "result": number})

    reply = eventually(lambda: client.receive(0.1))[0]
    assert reply["replies"] == [{"rank": 0, "result": 0}, {"rank": 1, "result": 1}]
    assert reply["missing"] == []
    for each in (*ranks, client):
        each.close()


def test_commands_that_cannot_be_done_say_why(serving):
    """No connected rank, and no such run, are errors."""
    aggregator = serving()
    with pytest.raises(TraceMLError, match="no run here yet"):
        aggregator.ask("finish")

    with pytest.raises(TraceMLError, match="no run 'other' here"):
        aggregator.ask("exits", {"exits": []}, run="other")


def test_unknown_table_ends_only_that_connection(serving):
    """A rank that sends rows of an unheard-of table is refused with its name; the other goes on."""
    aggregator = serving()
    bad, good = aggregator.rank(0, 2), aggregator.rank(1, 2)
    bad.send_rows("unheard_of", 0, 1, b"x")

    with pytest.raises(AggregatorRefusedError, match="unknown table 'unheard_of'"):
        eventually(lambda: bad.receive(0.1))

    good.send_rows("steps", 0, 5, step_rows(0, 5))
    wait_for_acks(good, "steps", 5)
    assert "unknown table" in aggregator.log.read_text()
    bad.close()
    good.close()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ({"table": "steps", "seq": 0, "n": 2, "data": bytes(STEPS.row_bytes)}, f"not {STEPS.row_bytes}"),
        ({"table": "steps", "seq": -1, "n": 1, "data": bytes(STEPS.row_bytes)}, "no proper seq"),
        ({"table": "steps", "seq": 0, "n": 0, "data": b""}, "no proper seq"),
        ({"table": "steps", "seq": 0, "n": True, "data": bytes(STEPS.row_bytes)}, "no proper seq"),
        ({"table": ["steps"], "seq": 0, "n": 1, "data": bytes(STEPS.row_bytes)}, "unknown table"),
        ({"table": "names", "seq": 0, "n": 2, "data": msgpack.packb({"id": 0})}, "does not hold 2 maps"),
        ({"table": "names", "seq": 0, "n": 1, "data": b"\xc1"}, "not msgpack"),
        ({"table": "steps"}, "no proper seq"),
    ],
)
def test_rows_that_do_not_fit_are_refused(serving_once, rows, why):
    """Numbers and data that contradict each other are refused with what is wrong."""
    rank = serving_once.rank()
    rank.send({"t": "rows", **rows})

    with pytest.raises(AggregatorRefusedError, match=why):
        eventually(lambda: rank.receive(0.1))

    rank.close()


@pytest.fixture(scope="module")
def serving_once(tmp_path_factory):
    """One aggregator for many small tests."""
    from tests.aggregator.conftest import Serving

    folder = tmp_path_factory.mktemp("once")
    aggregator = Serving(folder / "runs", folder / "log")
    yield aggregator
    assert "Traceback" not in aggregator.log.read_text()
    aggregator.close()


def test_steady_memory_and_no_torch(serving):
    """With 8 ranks the aggregator stays within 125 MB, and has imported neither torch nor pydantic.

    It takes 70 to 95 MB, by when its threads allocate, and more on a busy host; with torch it would be 250 MB.
    """
    aggregator = serving()
    ranks = [aggregator.rank(rank, 8) for rank in range(8)]
    for number in range(20):
        for rank in ranks:
            rank.send_rows("steps", number * 500, 500, step_rows(number * 500, 500))

    for rank in ranks:
        wait_for_acks(rank, "steps", 10_000)

    maps = Path(f"/proc/{aggregator.process.pid}/maps").read_text()
    pages = int(Path(f"/proc/{aggregator.process.pid}/statm").read_text().split()[1])
    assert pages * os.sysconf("SC_PAGE_SIZE") < 125e6
    assert "libtorch" not in maps
    assert "pydantic_core" not in maps
    assert STEPS.row_bytes == STEPS.struct.size
    for rank in ranks:
        rank.close()
