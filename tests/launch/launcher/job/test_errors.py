"""Errors of a launch whose workers fail, each time while another worker would run without end."""

from __future__ import annotations

import math
import pickle
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import traceml
from tests.launch import jobs
from traceml.errors import AgentFailedError, LaunchTimeoutError, PayloadError, RemoteTracebackError, WorkerFailedError
from traceml.launch.launcher.job import job


def launched(func: Callable[..., Any], *args: Any, **options: Any) -> traceml.LaunchResult:
    """Launch on two workers of this host, whose agent stays from test to test."""
    return traceml.launch(func, args, hostnames=["localhost"], workers_per_host=2, log_handlers=None, **options)


def test_an_exception_keeps_its_type_and_tells_where() -> None:
    """The object arrives with its attributes, its rank and host as a note, and its traceback as its cause."""
    with pytest.raises(jobs.OddError) as caught:
        launched(jobs.raise_odd)

    error = caught.value
    assert (error.code, str(error)) == (7, "not like this (7)")
    assert any("rank 1 (local rank 1 on localhost)" in note for note in error.__notes__)
    assert isinstance(error.__cause__, RemoteTracebackError)
    assert "in deep" in error.__cause__.text
    assert "in deep" in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    ("func", "base", "words"),
    [
        (jobs.raise_local, OSError, "of a class that only the worker knows"),
        (jobs.raise_with_lock, LookupError, "holds a lock"),
        (jobs.raise_before_barrier, ZeroDivisionError, "the first cause"),
        (jobs.raise_decoding, UnicodeDecodeError, "can't decode byte 0xff in position 0"),
        (jobs.raise_rare, jobs.RarelySeen, "passes"),
        (jobs.read_nothing, EOFError, "Ran out of input"),
        (jobs.raise_long, ValueError, "xxx"),
    ],
)
def test_other_exceptions_arrive_too(func: Callable[[], None], base: type[BaseException], words: str) -> None:
    """A local class, an attribute that cannot be pickled, a peer's broken link, or 80 MB hides no exception."""
    with pytest.raises(base, match=words) as caught:
        launched(func)

    assert "Raised on rank" in caught.value.__notes__[0]


def test_words_of_sys_exit_are_written_once() -> None:
    """As the interpreter does, and the status is 1."""
    with pytest.raises(WorkerFailedError, match="ended with exit code 1") as caught:
        launched(jobs.leave_with_words)

    assert caught.value.log_tail == ["gone for good"]


@pytest.mark.parametrize(
    ("func", "code", "number", "words"),
    [
        (jobs.be_killed, None, signal.SIGKILL, "the last word"),
        (jobs.segfault, None, signal.SIGSEGV, "Fatal Python error: Segmentation fault"),
        (jobs.exit_now, 3, None, "ended with exit code 3. Its last lines:\n  ERROR:jobs:it exits"),
        (jobs.exit_system, 4, None, "ended with exit code 4"),
        (jobs.interrupt, 1, None, "raised KeyboardInterrupt"),
    ],
)
def test_a_death_is_reported(func: Callable[[], None], code: int | None, number: int | None, words: str) -> None:
    """Signal or exit code, host, rank and last words of a worker that died are told, and travel on if pickled."""
    with pytest.raises(WorkerFailedError) as caught:
        launched(func)

    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.host, error.rank, error.local_rank) == ("localhost", 1, 1)
        assert (error.exit_code, error.signal) == (code, number)
        assert words in str(error)
        assert "in _serve" not in str(error)  # of the thread that answers for stacks
        assert isinstance(error, RuntimeError)

    if number == signal.SIGKILL:
        assert caught.value.log_tail == ["the last word"]


def test_leaving_with_success_is_no_failure() -> None:
    """sys.exit(0) in a function is a return."""
    assert launched(jobs.leave_well).results == {"localhost": [None, None]}


def test_a_result_that_cannot_be_sent_is_named() -> None:
    """The place of the object is told, and which rank returned it."""
    with pytest.raises(PayloadError, match=r"the result: cannot pickle '_thread.lock'") as caught:
        launched(jobs.return_lock)

    assert "Raised on rank" in caught.value.__notes__[0]
    assert isinstance(caught.value, TypeError)


def test_an_argument_that_cannot_be_sent_is_named_before_anything_starts() -> None:
    """No host is connected to for a call that cannot be sent."""
    import threading

    with pytest.raises(PayloadError, match=r"argument 'b': cannot pickle '_thread.lock'"):
        traceml.launch(lambda a, b: None, (1, [2, threading.Lock()]), hostnames=["no-such-host.invalid"])


def test_who_misses_a_collective_is_named() -> None:
    """The timeout of a collective names the rank that did not come, with the line at which it is."""
    launched(jobs.nothing)  # torch is imported now
    with pytest.raises(RuntimeError, match=r"[Tt]imed out|timeout") as caught:
        launched(jobs.miss_the_barrier, timeout=25)  # the time for start-up too, on a busy machine

    notes = "\n".join(caught.value.__notes__)
    assert "Rank 0 was waiting in a collective" in notes
    assert "rank 1 (local rank 1 on localhost)" in notes
    assert "in dawdle" in notes
    assert "worker.py" not in notes


def test_start_up_has_a_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is not ready in time is named, with its state and what to try: at the limit, and once before."""
    launched(jobs.nothing)  # the agent runs now
    caplog.clear()  # of its start, which may have taken long
    monkeypatch.setattr(job, "_SLOW_S", 0.25)
    endless = tmp_path / "env.sh"
    endless.write_text("sleep 86200\n")

    with pytest.raises(LaunchTimeoutError, match=r"timeout of 2 s\. Still waiting for: host localhost") as caught:
        launched(jobs.nothing, timeout=2, env_file=endless)

    late = "host localhost (preparing; try `ps ax -o pid,stat,wchan:20,args | grep traceml-`)"
    assert caught.value.absent == ["host localhost"]
    assert late in caught.value.__notes__
    assert caplog.messages == [f"the launch has waited 0.25 s for {late}"]
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), TimeoutError)


@pytest.mark.parametrize("timeout", [math.inf, 1e12])
def test_start_up_may_have_no_limit(timeout: float) -> None:
    """A timeout that is longer than torch and faulthandler accept changes neither the group nor an exit status."""
    with pytest.raises(WorkerFailedError) as caught:
        launched(jobs.exit_system, timeout=timeout)

    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "gluu"}, "got 'gluu'"),
        ({"timeout": 0}, "timeout must be a number of seconds greater than 0, got 0"),
        ({"timeout": "5"}, "got '5'"),
        ({"workers_per_host": 1.5}, "workers_per_host has 1.5"),
        ({"log_handlers": "file"}, "log_handlers must be 'auto', a list of logging.Handler, or None, got 'file'"),
        ({"log_handlers": [7]}, "log_handlers has 7"),
        ({"default_env_vars": "PATH"}, "default_env_vars='PATH'"),
        ({"func_args": "one"}, "func_args is a str: give a tuple"),
        ({"func_kwargs": ["one"]}, "func_kwargs is a list"),
        ({"func": "main"}, "func='main': it is not callable"),
    ],
)
def test_bad_arguments_are_reported(options: dict[str, Any], words: str) -> None:
    """A value that cannot be is a ValueError which names it."""
    with pytest.raises(ValueError, match=words):
        traceml.launch(**{"func": jobs.nothing, "hostnames": ["localhost"], **options})


def test_an_env_file_that_fails_is_reported(tmp_path: Path) -> None:
    """Bash's message is in the error, with the host's name; so is a missing file."""
    broken = tmp_path / "env.sh"
    broken.write_text("echo 'module: command not found'; exit 5\n")
    for path in (broken, tmp_path / "missing.sh"):
        with pytest.raises(AgentFailedError, match="host localhost: env_file cannot be sourced there") as caught:
            launched(jobs.nothing, env_file=path)

        assert ("command not found" if path == broken else "missing.sh") in str(caught.value)
