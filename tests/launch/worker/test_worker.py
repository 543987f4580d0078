"""A worker: what it is, what it runs, and what is heard of it at its end."""

from __future__ import annotations

import logging
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.launch.driver import Driver
from traceml.launch.shared.log_records import RecordDecoder
from traceml.launch.worker import worker_main


def test_the_zygote_stays_and_has_one_thread(driver: Driver) -> None:
    """A second job is served by the process that has imported torch already, which never computes."""

    def parent() -> tuple[int, int]:
        import torch

        assert not torch.cuda._is_in_bad_fork()
        return os.getppid(), len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))

    first = driver.run(parent)
    driver.prepare(need_torch=True)
    second = driver.run(parent)

    assert first == second
    assert first[0][1] == 1


def test_workers_know_their_place(driver: Driver) -> None:
    """Each worker has its ranks in the environment, cores of its own, and threads for these."""

    def describe() -> dict[str, Any]:
        import torch

        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "ODD")
        return {
            "env": {name: os.environ.get(name) for name in names},
            "cores": sorted(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "session": os.getsid(0) == os.getpid(),
            "gloo": os.environ["GLOO_SOCKET_IFNAME"],
        }

    own = os.sched_getaffinity(0)
    found = driver.run(describe, workers=2, env={"ODD": "ä = $x"})

    assert [each["env"] for each in found] == [
        {
            "RANK": str(i),
            "LOCAL_RANK": str(i),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "ODD": "ä = $x",
        }
        for i in range(2)
    ]
    assert [each["session"] for each in found] == [True, True]
    assert [each["gloo"] for each in found] == ["lo", "lo"]
    if len(own) >= 2:
        assert not set(found[0]["cores"]) & set(found[1]["cores"])
        assert set(found[0]["cores"]) | set(found[1]["cores"]) == own

    assert [each["threads"] for each in found] == [max(1, len(each["cores"]) if len(own) >= 2 else 1) for each in found]


def test_cores_and_threads_can_be_left_alone(driver: Driver) -> None:
    """Without `cpu_affinity` all workers may run everywhere; OMP_NUM_THREADS of the user stands."""

    def describe() -> tuple[list[int], str | None]:
        return sorted(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")

    found = driver.run(describe, workers=2, cpu_affinity=False, env={"OMP_NUM_THREADS": "7"})

    assert found == [(sorted(os.sched_getaffinity(0)), "7")] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_matrix_products_of_numpy_use_the_cores_of_their_worker(driver: Driver, workers: int) -> None:
    """The zygote keeps numpy's threads back; each worker has as many as it has cores."""

    def multiply() -> tuple[int, int]:
        import numpy as np

        a = np.ones((500, 500))
        assert float((a @ a)[0, 0]) == 500
        return len(list(Path("/proc/self/task").iterdir())), len(os.sched_getaffinity(0))

    for threads, cores in driver.run(multiply, workers=workers):
        assert threads - 1 == min(cores, 64 // workers)  # one more reports stacks


def test_a_worker_computes_as_a_new_process_does(driver: Driver) -> None:
    """The group works; random numbers differ between ranks where they would in processes of their own."""

    def compute() -> tuple[Any, ...]:
        import random

        import numpy as np
        import torch
        import torch.distributed as dist

        total = torch.full((64, 64), float(dist.get_rank() + 1))
        dist.all_reduce(total)
        product = (torch.ones(256, 256, requires_grad=True) @ torch.ones(256, 256)).sum()
        product.backward()
        return float(total[0, 0]), float(product), random.random(), np.random.rand(), float(torch.rand(()))

    found = driver.run(compute, workers=3, backend="gloo")

    assert [each[:2] for each in found] == [(6.0, 256.0**3)] * 3
    assert len({each[2] for each in found}) == 3
    assert len({each[3] for each in found}) == 3
    assert len({each[4] for each in found}) == 1  # torch's seed is fixed until somebody sets it


def test_arguments_are_one_memory_for_all_workers(driver: Driver) -> None:
    """Workers map the received arguments; what one writes to them no other sees."""

    def change(values: Any, rank_of: Any) -> tuple[float, bool]:
        import torch.distributed as dist

        rank = rank_of()
        mapped = any("traceml-payload" in line for line in Path("/proc/self/maps").read_text().splitlines())
        values += rank
        dist.barrier()
        return float(values.sum()), mapped

    import torch

    found = driver.run(change, torch.zeros(1_000_000), lambda: int(os.environ["RANK"]), workers=2, backend="gloo")

    assert found == [(0.0, True), (1_000_000.0, True)]


def test_everything_that_is_written_arrives(driver: Driver) -> None:
    """print, stderr, C's printf without a flush, a child's output and log records reach the launcher."""

    def talk() -> None:
        import ctypes
        import subprocess

        print("from print, no newline", end="")
        print("from stderr", file=sys.stderr)
        ctypes.CDLL(None).printf(b"from printf, no newline either")
        sys.stdout.flush()
        subprocess.run(["echo", "from a child"], check=True)
        logging.getLogger("mine").warning("from %s", "logging")
        for i in range(20_000):
            print("line", i)

    driver.run(talk)
    out, err = driver.text(0), driver.text(0, "err")
    records = [each.getMessage() for each in RecordDecoder().feed(bytes(driver.said[0, "records"]))]

    assert "from print, no newline" in out
    assert "from printf, no newline either" in out
    assert "from a child" in out
    assert [line for line in out.splitlines() if line.startswith("line ")] == [f"line {i}" for i in range(20_000)]
    assert "from stderr" in err
    assert records == ["from logging"]


def test_an_exception_travels_with_its_words(driver: Driver) -> None:
    """The exception itself, its traceback without our frames, its notes."""

    class OddError(ValueError):
        def __init__(self, code: int) -> None:
            super().__init__(f"odd {code}")
            self.code = code

    def fail() -> None:
        error = OddError(7)
        error.add_note("a note")
        raise error

    driver.start(fail)
    told = driver.wait("raised")
    error = driver.error(0)
    driver.release()

    assert type(error).__name__ == "OddError"
    assert (error.code, str(error), error.__notes__) == (7, "odd 7", ["a note"])  # type: ignore[attr-defined]
    assert told["message"] == "odd 7"
    assert told["notes"] == ["a note"]
    assert "in fail" in told["traceback"]
    assert "traceml/launch/worker/worker_main.py" not in told["traceback"]
    assert "builtins.ValueError" in told["bases"]
    assert driver.of("exited")[0]["code"] == 1


def test_what_cannot_be_sent_back_is_reported(driver: Driver) -> None:
    """A result that cannot be pickled is an error that names it."""

    def lock() -> dict[str, Any]:
        import threading

        return {"a": [threading.Lock()]}

    driver.start(lock)
    told = driver.wait("raised")
    driver.release()

    assert told["type"] == "traceml.errors.PayloadError"
    assert "the result: cannot pickle" in told["message"]


def test_an_exception_that_cannot_be_sent_is_reported_in_words(driver: Driver) -> None:
    """The exception is made of what cannot be pickled: its words come all the same."""

    def fail() -> None:
        import threading

        raise RuntimeError("text", threading.Lock())

    driver.start(fail)
    told = driver.wait("raised")
    driver.release()

    assert "error" not in told
    assert told["type"] == "builtins.RuntimeError"
    assert told["message"].startswith("('text', <unlocked")


@pytest.mark.parametrize(
    ("how", "code", "signal"),
    [
        ("os._exit(3)", 3, None),
        ("sys.exit(4)", 4, None),
        ("sys.exit('words')", 1, None),
        ("os.kill(os.getpid(), 9)", None, 9),
        ("import ctypes; ctypes.string_at(0)", None, 11),
        ("os.abort()", None, 6),
    ],
)
def test_how_a_worker_ended_is_reported(driver: Driver, how: str, code: int | None, signal: int | None) -> None:
    """Exit codes, signals, and the last words: also those of C's buffers and faulthandler."""

    def end(how: str) -> None:
        print("the last line")
        exec(how, {"os": os, "sys": sys})

    driver.start(end, how)
    told = driver.wait("exited")
    driver.stop()

    assert (told["code"], told["signal"], told["oom"]) == (code, signal, None)
    assert "the last line" in told["tail"]
    assert not driver.of("done")
    assert not driver.of("raised")
    if signal in {6, 11}:
        assert any(line.startswith("Fatal Python error") for line in told["tail"])
        assert any(" in end" in line for line in told["tail"])
        assert told["crash"].startswith("Fatal Python error")
        assert " in end" in told["crash"]
        assert "Fatal Python error" in driver.text(0, "err")
    else:
        assert told["crash"] == ""

    if "words" in how:
        assert told["tail"][-1] == "words"


def test_leaving_with_success_is_a_result(driver: Driver) -> None:
    """`sys.exit(0)` in a function is no failure."""
    assert driver.run(lambda: sys.exit(0)) == [None]


def test_a_script_runs_as_main(driver: Driver, tmp_path: Path) -> None:
    """A script has its arguments, its name and its folder; its status is told."""
    (tmp_path / "helper.py").write_text("WORD = 'helped'\n")
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, os, helper
            if __name__ == "__main__":
                print(sys.argv[1:], helper.WORD, os.environ["RANK"])
                sys.exit(int(sys.argv[1]))
            """
        )
    )
    driver.start(None, script={"path": str(script), "argv": ["0", "--x"]})
    driver.wait("done")
    driver.release()

    assert driver.text(0) == "['0', '--x'] helped 0\n"

    driver.prepare(need_torch=True)
    driver.start(None, script={"path": str(script), "argv": ["5"]})

    assert driver.wait("exited")["code"] == 5


def test_a_function_that_is_not_there_is_reported(driver: Driver, tmp_path: Path) -> None:
    """A function of a module that the host does not have: the error names the module."""
    (tmp_path / "only_here.py").write_text("def work():\n    pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import only_here  # type: ignore[import-not-found]

        driver.start(only_here.work)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("only_here", None)

    told = driver.wait("raised")
    driver.release()

    assert told["type"] == "traceml.errors.PayloadError"
    assert "only_here" in told["message"]


def test_a_further_worker_costs_little_memory(driver: Driver) -> None:
    """A worker adds only unshared pages to its host's memory before the function allocates."""

    def private() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        return sizes["Private_Dirty"] + sizes["Private_Clean"]

    found = driver.run(private, workers=4, backend="gloo")

    assert max(found) < 20_000


@pytest.mark.parametrize(
    ("version", "can"), [("2.4.1+cu121", False), ("2.7.1", False), ("2.8.0", True), ("2.10.0a0+git1", True)]
)
def test_the_store_of_each_torch(version: str, can: bool) -> None:
    """The store with libuv refuses a bound port up to torch 2.7, in which the older form is used."""
    assert worker_main._takes_listener_with_libuv(version) is can


def test_a_function_that_closes_all_descriptors_goes_on(driver: Driver, tmp_path: Path) -> None:
    """As code of daemons does. Its records follow on standard error, its own files get nothing of ours."""

    def work(folder: str, ends: str) -> int:
        os.closerange(3, 1 << 16)
        files = [open(f"{folder}/{number}", "wb") for number in range(40)]  # noqa: SIM115
        logging.getLogger("mine").warning("first of %d", len(files))
        logging.getLogger("mine").warning("second")
        print("worked")
        if ends == "raises":
            raise ValueError("text")

        return 1

    for ends in ("returns", "raises"):
        driver.prepare(need_torch=False)
        driver.start(work, str(tmp_path), ends)
        told = driver.wait("exited")
        driver.stop()
        err = driver.text(0, "err")

        assert (told["code"], driver.text(0)) == (1, "worked\n")
        assert err.count("has closed the pipe for its logging records") == 1
        assert "first of 40\nsecond\n" in err
        assert err.count("has closed the connection to its launcher") == 1
        assert ("ValueError: text" in err) == (ends == "raises")
        assert ("Traceback" in err) == (ends == "raises")
        assert {each.stat().st_size for each in tmp_path.iterdir()} == {0}


def test_a_script_that_closes_all_descriptors_has_its_exit_status(driver: Driver, tmp_path: Path) -> None:
    """It has no result to send. (The recorder's thread may say that a folder was closed while it read that.)"""
    script = tmp_path / "job.py"
    for ends, status in (("", 0), ("sys.exit(4)", 4)):
        script.write_text(f"import os, sys\nos.closerange(3, 1 << 16)\nprint('worked')\n{ends}\n")
        driver.prepare(need_torch=False)
        driver.start(None, script={"path": str(script), "argv": []})
        told = driver.wait("exited")
        driver.stop()

        err = driver.text(0, "err")

        assert (told["code"], driver.text(0)) == (status, "worked\n")
        assert "Traceback" not in err
        assert "connection to its launcher" not in err


@pytest.mark.parametrize("ends", ["returns", "raises"])
def test_a_forked_child_that_leaves_the_function_is_no_rank(driver: Driver, ends: str) -> None:
    """It ends as at the end of a script, and its parent alone reports."""

    def work(ends: str) -> int:
        if (child := os.fork()) == 0:
            if ends == "raises":
                raise ValueError("of the child")

            return -1

        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert driver.run(work, ends) == [int(ends == "raises")]
    assert driver.of("exited")[0]["code"] == 0
    assert ("ValueError: of the child" in driver.text(0, "err")) == (ends == "raises")
