"""Every logged row is stored, also when the process, the aggregator or the disk fails."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.aggregator.conftest import Serving
from tests.eventually import eventually
from tests.ports import free_port
from tests.track.conftest import Script, Stored, ended_run, finish, runs_in
from traceml.aggregator.unfinished_runs import finish_flights
from traceml.runs.run import load_run


def test_back_to_back_then_stop(script: Script, tmp_path: Path) -> None:
    """2,000 values without a pause, then shutdown: all are stored, in order, at their steps; no init is needed."""
    finish(
        script("""
        import traceml
        for i in range(2000):
            traceml.log_metric("loss", i / 7, step=i)
        traceml.log_params({"lr": 0.1, "model": {"width": 8}})
        traceml.log_text("note", "gr\\u00fc\\u00dfe")
        traceml.shutdown()
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    assert stored.values("loss") == [i / 7 for i in range(2000)]
    assert stored.steps("loss") == list(range(2000))
    assert stored.of("params")[0]["params"] == {"lr": 0.1, "model": {"width": 8}}
    assert stored.of("text")[0]["text"] == "grüße"


def test_the_end_of_the_script_is_enough(script: Script, tmp_path: Path) -> None:
    """Nothing is stopped by hand; steps are counted per name where none is given."""
    finish(
        script("""
        import traceml
        for i in range(1000):
            traceml.log_metrics({"a": i, "b": -i})
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    assert stored.values("a") == [float(i) for i in range(1000)]
    assert stored.steps("a") == stored.steps("b") == list(range(1000))


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="no thread can be started then")
def test_the_first_value_may_be_logged_at_the_end_of_the_script(script: Script, tmp_path: Path) -> None:
    """While the functions of `atexit` run, no other is registered: the value stayed in the flight file."""
    finish(
        script("""
        import atexit, traceml
        atexit.register(lambda: traceml.log_metric("last", 1.0))
        """)
    )

    assert ended_run(tmp_path / "traceml_runs").values("last") == [1.0]


def test_a_signal_handler_may_log_while_our_modules_are_imported(script: Script, tmp_path: Path) -> None:
    """Its value is lost, as they are not there yet; an AttributeError ended the script."""
    finish(
        script("""
        import signal, sys, traceml

        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "traceml.track.rank.logger":
                    signal.raise_signal(signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, lambda *_: traceml.log_metric("x", 0.0))
        sys.meta_path.insert(0, Interrupting())
        traceml.log_metric("x", 1.0)
        """)
    )

    assert ended_run(tmp_path / "traceml_runs").values("x") == [1.0]


def test_what_is_too_large_to_send_stops_nothing_else(script: Script, tmp_path: Path) -> None:
    """It is told in a warning and in the run; the other parameters of the call, and all later values, are stored."""
    process = script("""
        import traceml
        traceml.log_params({"lr": 0.1, "confusion": [[0.5] * 1000 for _ in range(1000)], "batch": 3})
        traceml.log_metric("embedding", [[0.5] * 1000 for _ in range(1000)])
        traceml.log_metric("x", 1.0)
        assert traceml.flush(120)
        """)
    _, words = process.communicate(timeout=240)

    assert process.returncode == 0, words
    stored = ended_run(tmp_path / "traceml_runs")
    assert [row["params"] for row in stored.of("params")] == [{"lr": 0.1}, {"batch": 3}]
    assert [(row["what"], row["name"]) for row in stored.of("refused")] == [
        ("params", "confusion"),
        ("value", "embedding"),
    ]
    assert stored.values("x") == [1.0]
    assert "params 'confusion' is not logged: it has 9.0 MB, and a row at most 6.3 MB" in words


def test_a_killed_script_loses_nothing(script: Script, tmp_path: Path) -> None:
    """SIGKILL while it logs at 1 kHz: every value whose call had returned is stored."""
    process = script("""
        import os, time, traceml
        i = 0
        while True:
            traceml.log_metric("x", i, i)
            i += 1
            os.write(1, b"%d\\n" % i)
            time.sleep(0.001)
        """)
    assert process.stdout is not None
    logged = 0
    while logged < 1000:
        logged = int(process.stdout.readline())
    process.kill()
    logged = int((process.stdout.read().splitlines() or [logged])[-1])

    values = ended_run(tmp_path / "traceml_runs").values("x")
    assert values == [float(i) for i in range(len(values))]
    assert len(values) in (logged, logged + 1)


def test_forked_children_log_to_their_parents_run(script: Script, tmp_path: Path) -> None:
    """100 values of each of 4 children of multiprocessing, and of one that ends by os._exit right after them."""
    finish(
        script("""
        import multiprocessing, os, traceml

        def child(number):
            for i in range(100):
                traceml.log_metric(f"child{number}", i)

        with traceml.Experiment("forked", backend=()) as experiment:
            traceml.log_metric("parent", 1.0)
            context = multiprocessing.get_context("fork")
            children = [context.Process(target=child, args=(number,)) for number in range(4)]
            for process in children:
                process.start()
            pid = os.fork()
            if pid == 0:
                child(4)
                os._exit(0)
            for process in children:
                process.join()
                assert process.exitcode == 0
            os.waitpid(pid, 0)
            traceml.log_metric("parent", 2.0)
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    for number in range(5):
        assert stored.values(f"child{number}") == [float(i) for i in range(100)]
    assert stored.values("parent") == [1.0, 2.0]
    assert stored.state == "finished"
    assert len({experiment for experiment, _ in stored.metrics}) == 1
    assert len([stream for stream in stored.streams if stream.facts.get("helps")]) == 5


def test_spawned_children_log_to_their_parents_run(script: Script, tmp_path: Path) -> None:
    """They inherit nothing but the environment: not the module's state, nor where the parent was told to record."""
    finish(
        script("""
        import multiprocessing, traceml

        def child(number):
            for i in range(100):
                traceml.log_metric(f"child{number}", i)

        if __name__ == "__main__":
            with traceml.Experiment("spawning", backend=["jsonl"]) as experiment:
                traceml.log_metric("parent", 1.0)
                with multiprocessing.get_context("spawn").Pool(2) as pool:
                    pool.map(child, range(2), chunksize=1)
                    pool.close()
                    pool.join()
                traceml.log_metric("parent", 2.0)
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    for number in range(2):
        assert stored.values(f"child{number}") == [float(i) for i in range(100)]
    assert stored.values("parent") == [1.0, 2.0]
    assert len({experiment for experiment, _ in stored.metrics}) == 1
    assert len(list((tmp_path / "traceml_runs").glob("2*"))) == 1


def test_the_aggregator_may_be_away(script: Script, serving: Serving) -> None:
    """50,000 values and 2,000 maps while it is gone: more than memory holds; all arrive, in order."""
    process = script(
        """
        import traceml
        traceml.init()
        traceml.log_metric("x", -1)
        print("ready", flush=True)
        input()
        for i in range(50_000):
            traceml.log_metric("x", i)
        for i in range(2_000):
            traceml.log_params({"number": i, "filler": "f" * 300})
        print("logged", flush=True)
        input()
        """,
        serving=serving,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    eventually(lambda: runs_in(serving.folder) and Stored(runs_in(serving.folder)[0]).values("x"))
    serving.kill()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "logged\n"
    serving.start()
    finish(process.communicate("\n") and process)

    stored = ended_run(serving.folder)
    assert stored.values("x") == [float(i) for i in range(-1, 50_000)]
    assert [row["params"]["number"] for row in stored.of("params")] == list(range(2_000))


def test_without_any_aggregator_the_rows_wait(script: Script, tmp_path: Path) -> None:
    """Nobody ever answers: what was logged stays on disk, a file too, and is brought into a run later."""
    (tmp_path / "model.bin").write_bytes(b"weights" * 1000)
    finish(
        script(
            """
        import traceml
        traceml.init(on_missing="warn", connect_timeout=0.1, run_name="lonely")
        for i in range(40_000):
            traceml.log_metric("x", i)
        traceml.log_artifact("model.bin")
        """,
        )
    )

    assert runs_in(tmp_path / "traceml_runs") == []
    (run_dir,) = finish_flights(tmp_path / "traceml_runs").runs

    stored = Stored(run_dir)
    assert "lonely" in run_dir.name
    assert stored.values("x") == [float(i) for i in range(40_000)]
    (row,) = stored.of("artifact")
    assert (run_dir / row["path"]).read_bytes() == b"weights" * 1000
    assert finish_flights(tmp_path / "traceml_runs").runs == []
    assert not list((tmp_path / "traceml_runs" / ".flights").iterdir())


def test_an_aggregator_that_cannot_start_is_reported_at_the_end(script: Script, tmp_path: Path) -> None:
    """The runs folder cannot be made: the script's end says why nothing was stored, and what becomes of it."""
    (tmp_path / "traceml_runs").write_text("a file")
    process = script("""
        import traceml
        with traceml.Experiment("x", backend="jsonl") as experiment:
            experiment.log_metric("loss", 1.0)
        """)
    _, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    assert "traceml_runs" in err
    assert "They are kept in" in err
    assert "traceml sync" in err


@pytest.mark.parametrize("native", ["1", "0"])  # values are appended in C, and in Python
def test_any_value_is_kept(script: Script, tmp_path: Path, native: str) -> None:
    """Numbers of every kind arrive as numbers, NaN and infinities too; anything else is kept as what it is."""
    finish(
        script(
            """
        import decimal, fractions, numpy, torch, traceml
        numbers = {
            "int": 3, "bool": True, "big": 2**60, "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"),
            "float32": numpy.float32(0.1), "int64": numpy.int64(-5), "bool_": numpy.bool_(True),
            "0-d": numpy.array(2.5), "decimal": decimal.Decimal("1.25"), "fraction": fractions.Fraction(1, 4),
            "tensor": torch.tensor(1.5), "grad": torch.tensor([7.0], requires_grad=True),
            "double": torch.tensor(0.1, dtype=torch.float64),
        }
        others = {"text": "warm", "none": None, "huge": 10**400, "array": numpy.zeros(3), "complex": 1j,
                  "list": [1, "a"]}
        for name, value in (numbers | others).items():
            traceml.log_metric(name, value, step=numpy.int64(4))
        traceml.log_metric("\\u00fcn\\u00ef/\\u00e7\\u00f6d\\u00e9 \\U0001f389", 1.0)
        traceml.log_params({"path": __import__("pathlib").Path("/a"), 3: {"deep": object}, "array": numpy.arange(3)})
        for value in (1.5, 2, True, None, 2**60, float("-inf"), 10**400, "text"):
            for step in (7, None, True, 2**62, numpy.int8(1)):
                traceml.log_metric("again", value, step)
                traceml.log_metrics({"again": value}, step)
        for wrong, step in (("again", 2**63), ("again", 1.5), ("again", "x"), (b"name", 1)):
            try:
                traceml.log_metric(wrong, 1.0, step)
            except traceml.TraceMLError as error:
                traceml.log_text("refused", f"{type(error).__name__}: {error}")
        """,
            TRACEML_NATIVE=native,
        )
    )

    stored = ended_run(tmp_path / "traceml_runs")
    values = {metric.name: metric.value for _, metric in stored.metrics if metric.name != "again"}
    assert math.isnan(values.pop("nan"))
    assert values == {
        "int": 3.0, "bool": 1.0, "big": 2.0**60, "inf": math.inf, "-inf": -math.inf, "float32": 0.10000000149011612,
        "int64": -5.0, "bool_": 1.0, "0-d": 2.5, "decimal": 1.25, "fraction": 0.25, "tensor": 1.5, "grad": 7.0,
        "double": 0.1, "ünï/çödé 🎉": 1.0,
    }  # fmt: skip
    others = {row["name"]: row["value"] for row in stored.of("value") if row["name"] != "again"}
    assert others == {
        "text": "warm", "none": None, "huge": str(10**400), "array": [0.0, 0.0, 0.0], "complex": "1j", "list": [1, "a"],
    }  # fmt: skip
    assert {row["step"] for row in stored.of("value") if row["name"] != "again"} == {4}
    assert stored.of("params")[0]["params"] == {"path": "/a", "3": {"deep": "<class 'object'>"}, "array": [0, 1, 2]}
    again = iter(stored.steps("again"))
    for count in (0, 2, 4, 8, 10):  # None, kept as text, has taken two steps of the counter
        expected = [7, 7, count, count + 1, 1, 1, 2**62, 2**62, 1, 1]
        assert [next(again) for _ in expected] == expected

    assert stored.values("again") == [value for value in (1.5, 2.0, 1.0, 2.0**60, -math.inf) for _ in range(10)]

    assert [row["text"].partition(":")[0] for row in stored.of("text")] == [
        "UsageError", "ArgumentTypeError", "ArgumentTypeError", "ArgumentTypeError"
    ]  # fmt: skip


def test_a_hundred_thousand_names(script: Script, tmp_path: Path) -> None:
    """Each value is found under its own name."""
    finish(
        script("""
        import traceml
        for i in range(100_000):
            traceml.log_metric(f"layer.{i}/norm", i, 0)
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    assert len(stored.metrics) == 100_000
    assert all(metric.name == f"layer.{int(metric.value)}/norm" for _, metric in stored.metrics)


@pytest.mark.parametrize("native", ["1", "0"])
def test_threads_and_a_signal_handler_log_at_once(script: Script, tmp_path: Path, native: str) -> None:
    """8 threads, and a timer's signal handler that logs whatever it interrupts: every value is there once."""
    out = finish(
        script(
            """
        import itertools, signal, threading, traceml
        ticks = itertools.count()
        def tick(*_):
            traceml.log_metric("tick", next(ticks))
            signal.setitimer(signal.ITIMER_REAL, 0.0005)  # once: ticks that come while one runs would nest
        def work(number):
            for i in range(10_000):
                traceml.log_metric(f"thread{number}", i)
        traceml.log_metric("first", 0)
        signal.signal(signal.SIGALRM, tick)
        signal.setitimer(signal.ITIMER_REAL, 0.0005)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        work(8)
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        print(next(ticks))
        """,
            TRACEML_NATIVE=native,
        )
    )

    stored = ended_run(tmp_path / "traceml_runs")
    for number in range(9):
        assert stored.values(f"thread{number}") == [float(i) for i in range(10_000)]
    assert sorted(stored.values("tick")) == [float(i) for i in range(int(out))]
    assert int(out) > 10


def test_the_first_values_of_many_threads(script: Script, tmp_path: Path) -> None:
    """What a thread logs while another one's first value, or its `init`, starts the recorder is not lost."""
    finish(
        script("""
        import threading, traceml
        barrier = threading.Barrier(9)
        def work(number):
            barrier.wait()
            traceml.log_metric("value", number)
        def start():
            barrier.wait()
            traceml.init(local=True)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in [*threads, threading.Thread(target=start)]:
            thread.start()
        """)
    )

    assert sorted(ended_run(tmp_path / "traceml_runs").values("value")) == [float(number) for number in range(8)]


def test_after_an_init_that_failed(script: Script) -> None:
    """A value logged after it is not recorded, and the warning says that `init` failed, not that a run has ended."""
    out = finish(
        script("""
        import logging, sys, traceml
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        try:
            traceml.init(port=1, connect_timeout=0)
        except traceml.AggregatorUnavailableError:
            pass
        traceml.log_metric("value", 1)
        """)
    )

    assert "not recorded: tracing could not be started" in out
    assert "has ended" not in out


def test_two_ranks_at_once(script: Script, tmp_path: Path) -> None:
    """Both ranks' values are in one run, under one experiment, each with its rank."""
    ranks = [
        script(
            """
        import os, traceml
        with traceml.Experiment("both", backend=()):
            for i in range(500):
                traceml.log_metric("loss", i + 1000 * int(os.environ["RANK"]))
        """,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            TORCHELASTIC_RUN_ID="job",
            MASTER_PORT="1",
        )
        for rank in range(2)
    ]
    for process in ranks:
        finish(process)

    stored = ended_run(tmp_path / "traceml_runs")
    assert len({experiment for experiment, _ in stored.metrics}) == 1
    for rank in range(2):
        values = [metric.value for _, metric in stored.metrics if metric.rank == rank]
        assert values == [float(i + 1000 * rank) for i in range(500)]


def test_a_full_disk_costs_only_what_has_no_room(script: Script, tmp_path: Path) -> None:
    """The journal cannot be written: training goes on, it is said once, and what memory still holds is kept."""
    process = script("""
        import os, resource, signal, traceml
        traceml.init(on_missing="warn", connect_timeout=0.1, max_queue_size=1024)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for i in range(20_000):
            traceml.log_metric("x", i)
        print(traceml.Orchestrator().health()["appended"] >= 20_000)
        """)
    out, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    assert out == "True\n"
    assert err.count("cannot be written") == 1
    (run_dir,) = finish_flights(tmp_path / "traceml_runs").runs
    values = Stored(run_dir).values("x")
    assert values[-1000:] == [float(i) for i in range(19_000, 20_000)]
    assert values[:1000] == [float(i) for i in range(1000)]
    assert len(set(values)) == len(values) < 20_000


def test_off_means_nothing_happens(script: Script, tmp_path: Path) -> None:
    """With TRACEML_ENABLED=0 each call returns at once, starts no thread, and leaves nothing behind."""
    out = finish(
        script(
            """
        import threading, traceml
        with traceml.Experiment("none") as experiment:
            traceml.log_metric("x", 1)
            experiment.log_params({"a": 1})
            traceml.log_artifact("there is no such file")
            traceml.log_image("i", "nor that")
        print(threading.active_count())
        """,
            TRACEML_ENABLED="0",
        )
    )

    assert out == "1\n"
    assert not (tmp_path / "traceml_runs").exists()


def test_an_init_after_one_that_was_off_records(script: Script, tmp_path: Path) -> None:
    """While tracing is off a call does not look for a recorder again; the next init is noticed, on all paths."""
    finish(
        script("""
        import traceml
        traceml.init(enabled=False)
        for _ in range(3):
            traceml.log_metric("x", 1)
            traceml.log_params({"a": 1})
        traceml.log_text("t", "off")
        traceml.init(local=True)
        traceml.log_metric("x", 2)
        traceml.log_metrics({"y": 3})
        traceml.log_params({"a": 2})
        traceml.log_text("t", "on")
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    assert (stored.values("x"), stored.values("y")) == ([2.0], [3.0])
    assert [row["params"] for row in stored.of("params")] == [{"a": 2}]
    assert [row["text"] for row in stored.of("text")] == ["on"]


def test_init_after_logging_adds_tracing(script: Script, tmp_path: Path) -> None:
    """Values logged before `init` and steps traced after it are in one run; values then have the training step."""
    finish(
        script("""
        import traceml
        traceml.log_metric("before", 1)
        recorder = traceml.init(local=True)
        assert recorder.tracing
        for i in range(5):
            with traceml.trace_step():
                traceml.log_metric("inside", i)
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    assert stored.values("before") == [1.0]
    assert stored.steps("inside") == list(range(5))
    assert len(stored.streams) == 1
    rows = load_run(stored.run_dir).log("info")
    assert [row.get("tracing") for row in rows if row["kind"] in ("process", "tracing")] == [False, None]


def test_a_local_aggregator_that_dies_is_replaced(script: Script, tmp_path: Path) -> None:
    """A script that started one by logging goes on when it is killed: another continues the same run."""
    process = script("""
        import time, traceml
        i = 0
        while True:
            traceml.log_metric("x", i)
            i += 1
            time.sleep(0.001)
        """)
    runs = tmp_path / "traceml_runs"
    eventually(lambda: runs_in(runs) and Stored(runs_in(runs)[0]).values("x"))
    from traceml.database.store.reader import StoreReader

    with StoreReader(runs_in(runs)[0] / "store.db") as reader:
        pid = reader.meta()["aggregator"]["pid"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: reader.meta()["aggregator"]["pid"] != pid)

    so_far = len(Stored(runs_in(runs)[0]).values("x"))
    eventually(lambda: len(Stored(runs_in(runs)[0]).values("x")) > so_far)
    process.kill()

    values = ended_run(runs).values("x")
    assert values == [float(i) for i in range(len(values))]


OF_BOTH_RANKS = """
import datetime, sys, torch, torch.distributed as dist, traceml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
mesh = init_device_mesh("cpu", (2,))
norm, weight = torch.tensor(2.0), torch.ones(4)
if dist.get_rank() == 0:  # a collective operation here would wait for the other rank
    traceml.log_metric("whole", DTensor.from_local(norm, mesh, [Replicate()], run_check=False), 0)
    for step in range(2):
        traceml.log_metric("part", DTensor.from_local(norm, mesh, [Partial()], run_check=False), step)
    traceml.log_histogram("whole", DTensor.from_local(weight, mesh, [Replicate()], run_check=False), 0, bins=2)
    pixels = weight.reshape(2, 2)
    traceml.log_image("whole", DTensor.from_local(pixels, mesh, [Replicate()], run_check=False), 0)
    for log in traceml.log_histogram, traceml.log_image:
        try:
            log("part", DTensor.from_local(pixels, mesh, [Shard(0)], run_check=False), 0)
        except TypeError as error:
            print(error)
dist.barrier()
traceml.log_metric("end", 1)
dist.destroy_process_group()
"""


def test_a_distributed_tensor_is_read_without_the_other_ranks(script: Script, tmp_path: Path) -> None:
    """One with a copy on each rank as a number; of one in parts, as FSDP has norms, the way to the number is said."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = (script(OF_BOTH_RANKS, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2))
    out, err = first.communicate(timeout=240)
    finish(second)

    assert first.returncode == 0, err
    assert out.count("of which each rank has a part: full_tensor() makes one") == 2
    assert err.count("a DTensor of which each rank has a part is logged as text") == 1
    stored = ended_run(tmp_path / "traceml_runs")
    assert stored.values("whole") == [2.0]
    assert [row["value"].startswith("DTensor(") for row in stored.of("value")] == [True, True]
    assert [sum(row["counts"]) for row in stored.of("histogram")] == [4]
    assert len(stored.of("image")) == 1
