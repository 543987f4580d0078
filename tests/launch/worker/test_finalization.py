"""The end of a worker's process: what the interpreter does at its own, within a limited time."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from tests.launch.driver import Driver, alive


def test_handlers_at_exit_run_and_threads_are_waited_for(driver: Driver) -> None:
    """A worker ends as a process does."""

    def register() -> None:
        import atexit
        import threading

        atexit.register(print, "at exit")
        threading.Timer(0.3, print, ["a thread's last words"]).start()

    driver.run(register)

    assert driver.text(0) == "a thread's last words\nat exit\n"


def test_files_of_a_function_are_flushed(driver: Driver, tmp_path: Path) -> None:
    """A file in a global, in a reference cycle or held by a daemon thread has all bytes afterwards."""

    def write(folder: str) -> None:
        import threading

        global kept

        class Cycle:
            def __init__(self) -> None:
                self.me, self.file = self, open(f"{folder}/cycle", "w")  # noqa: SIM115
                self.file.write("cycle")

        def hold() -> None:
            file = open(f"{folder}/thread", "w")  # noqa: SIM115
            file.write("thread")
            written.set()
            threading.Event().wait()

        kept = open(f"{folder}/global", "w")  # type: ignore[name-defined]  # noqa: SIM115
        kept.write("global")  # type: ignore[name-defined]
        Cycle()
        written = threading.Event()
        threading.Thread(target=hold, daemon=True).start()
        written.wait()

    driver.run(write, str(tmp_path))

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {n: n for n in ("global", "cycle", "thread")}


@pytest.mark.parametrize(
    ("last", "status"), [("", 0), ("raise ValueError", 1), ("sys.exit(5)", 5), ("raise KeyboardInterrupt", None)]
)
def test_a_script_loses_no_bytes(driver: Driver, tmp_path: Path, last: str, status: int | None) -> None:
    """Its module-level files are written and closed, also by their finalizers, however it ends."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import csv, gzip, sys
            import helper
            plain = open("plain.csv", "w")
            csv.writer(plain).writerow("ab")
            packed = gzip.open("packed.gz", "wt")
            packed.write("text")
            class Last:
                def __del__(self):
                    print("finalized", words(), flush=True)
            def words():
                return helper.WORD
            last = Last()
            {last}
            """
        )
    )
    (tmp_path / "helper.py").write_text("WORD = 'with globals'\nlog = open('helper.log', 'w')\nlog.write('helper')\n")
    driver.prepare(need_torch=True, cwd=str(tmp_path))
    driver.start(None, script={"path": str(script), "argv": []})
    if status == 0:
        driver.wait("done")
        driver.release()

    assert driver.wait("exited")["code"] == status
    driver.wait("idle")  # output may come after the message
    assert driver.text(0) == "finalized with globals\n"
    assert (tmp_path / "plain.csv").read_text() == "a,b\n"
    assert (tmp_path / "helper.log").read_text() == "helper"

    import gzip

    assert gzip.decompress((tmp_path / "packed.gz").read_bytes()) == b"text"


def test_a_function_that_raised_is_cleaned_up_after(driver: Driver) -> None:
    """Its threads and exit handlers end before the job does; a process that these need lives until then."""

    def fail() -> None:
        import atexit
        import subprocess
        import threading

        service = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(lambda: print(service.communicate("from its service")[0]))
        threading.Timer(0.3, print, ["from its thread"]).start()
        raise ValueError("failed")

    driver.start(fail)
    driver.wait("raised")
    driver.stop(exit_s=60)

    assert driver.text(0) == "from its thread\nfrom its service\n"
    assert driver.of("exited")[0]["code"] == 1


def test_a_handler_that_never_ends_does_not_keep_the_job(driver: Driver) -> None:
    """After the time for exit handlers the worker is ended with everything it has started."""

    def fail() -> None:
        import atexit
        import subprocess
        import threading

        print(subprocess.Popen(["sleep", "86300"], start_new_session=True).pid, flush=True)
        atexit.register(threading.Event().wait)
        raise ValueError("failed")

    driver.start(fail)
    driver.wait("raised")
    driver.stop(exit_s=0.2)

    assert driver.of("exited")[0]["signal"] in {9, 15}
    assert not alive(int(driver.text(0)))


@pytest.mark.parametrize("hang", ["threading.Event().wait", "lambda: ctypes.PyDLL(None).sleep(600)"])
def test_a_failed_script_that_never_ends_is_ended(driver: Driver, tmp_path: Path, hang: str) -> None:
    """Its handlers get the time of the group's collectives, with and without the GIL; then all stacks are printed."""
    script = tmp_path / "job.py"
    script.write_text(f"import atexit, ctypes, threading\natexit.register({hang})\nraise ValueError\n")
    driver.start(None, script={"path": str(script), "argv": []}, timeout_s=1)

    exited = driver.wait("exited")
    assert exited["code"] == 1, exited
    driver.wait("idle")  # output may come after the message
    assert re.search(
        r"Timeout \(0:00:(01|06)\)!\nThread .*, line \d+ in end_process\n", driver.text(0, "err"), re.DOTALL
    )


@pytest.mark.parametrize("stream", ["closed", "missing", "a writer without flush"])
def test_a_stream_that_cannot_be_flushed_changes_nothing_else(driver: Driver, stream: str) -> None:
    """A worker that has closed or replaced its standard output waits to be released, and ends well."""

    def work(stream: str) -> int:
        import atexit
        import sys

        class Writer:
            def write(self, text: str) -> None:
                sys.stderr.write(text)

        atexit.register(lambda: sys.stderr.write("at exit\n"))
        sys.stderr.write("returns\n")
        if stream == "closed":
            sys.stdout.close()
        else:
            sys.stdout = None if stream == "missing" else Writer()  # type: ignore[assignment]

        return 5

    driver.start(work, stream)
    driver.wait("done")
    driver.release()

    assert driver.of("exited")[0]["code"] == 0
    assert driver.text(0, "err").startswith("returns\nat exit\n")


def test_the_end_of_a_failed_job_waits_for_no_process_group(driver: Driver) -> None:
    """A rank that has returned ends although another has raised and will not leave the group."""

    def work() -> None:
        import os

        if os.environ["RANK"] == "1":
            raise ValueError("failed")

    driver.start(work, workers=2, backend="gloo")
    driver.wait("done")
    driver.wait("raised")
    driver.stop(exit_s=60)

    assert sorted(each["code"] for each in driver.of("exited")) == [0, 1]
    assert "timed out after 5000ms" not in driver.text(0, "err")  # of rank 0, which holds the group's store
