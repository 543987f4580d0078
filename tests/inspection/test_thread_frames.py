"""Reading the frames of a thread leaves the interpreter whole, and the collector as it was."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest

from tests.eventually import eventually
from traceml.gc_pause import gc_pause
from traceml.inspection import thread_frames as thread_frames_module
from traceml.inspection.thread_frames import running_line, stack_frames, thread_frame, thread_frames, thread_stack

STRESS = """
import gc, json, os, random, sys, threading, time
from traceml.inspection.thread_frames import thread_frame

def give_way(when, info):
    time.sleep(0)  # the GIL passes to the other thread, as it may at any call

class Late:
    def __del__(self):
        [i for i in range(3)]

def down(n):
    late, texts = Late(), json.loads(json.dumps({"a": [1, {"b": n}]}))
    ring = [late, texts]
    ring.append(ring)
    return sorted({i: [i] for i in range(n)}, key=lambda i: -i) and down(n - 1) if n else texts

def walk(ident):
    while True:
        frame = thread_frame(ident)
        while frame is not None:
            frame.f_code, frame.f_lineno
            frame = frame.f_back

        walks.append(1)
        time.sleep(0)

walks = []
gc.set_threshold(50)
gc.callbacks.append(give_way)
sys.setswitchinterval(1e-4)
threading.excepthook = lambda args: (sys.stderr.write(repr(args.exc_value)), sys.stderr.flush(), os._exit(9))
threading.Thread(target=walk, args=(threading.get_ident(),), daemon=True).start()
end = time.monotonic() + 8
while time.monotonic() < end or len(walks) < 1000:
    down(random.randrange(25))

os._exit(0)
"""


def test_a_generator_that_yields_during_the_walk_has_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frame has none then; the walk is done again."""
    goes_on, has_yielded, ends = threading.Event(), threading.Event(), threading.Event()

    def items() -> Iterator[None]:
        goes_on.wait()
        yield

    def takes() -> None:
        for _ in items():
            has_yielded.set()
            ends.wait()

    def yields_meanwhile(frame: FrameType | None, most: int) -> Iterator[FrameType]:
        for each in stack_frames(frame, most):
            yield each
            if each.f_code is items.__code__:
                goes_on.set()
                has_yielded.wait()

    thread = threading.Thread(target=takes)
    thread.start()
    eventually(lambda: "items" in [each.f_code.co_name for each in thread_stack(thread.ident or 0)])
    monkeypatch.setattr(thread_frames_module, "stack_frames", yields_meanwhile)
    functions = [each.f_code.co_name for each in thread_stack(thread.ident or 0, 100)]
    ends.set()
    thread.join()
    assert "takes" in functions
    assert "items" not in functions


@pytest.mark.parametrize(("at", "line"), [(0, 10), (4, 11), (8, 11), (12, 12), (20, 12)])
def test_an_instruction_without_a_line_has_that_before_it(at: int, line: int) -> None:
    """The compiler's jumps have none, in some versions of Python."""
    lines = [(0, 2, 10), (2, 8, 11), (8, 12, None), (12, 18, 12), (18, 22, None)]
    code = SimpleNamespace(co_firstlineno=10, co_lines=lambda: iter(lines))

    assert running_line(SimpleNamespace(f_lineno=None, f_lasti=at, f_code=code)) == line


def test_frames_of_threads_are_read_here_only() -> None:
    """Elsewhere nothing would keep the collector off."""
    sources = Path(thread_frames_module.__file__).parents[1].rglob("*.py")
    reading = [path.name for path in sources if "_current_frames(" in path.read_text()]

    assert reading == ["thread_frames.py"]


@pytest.mark.process
def test_walks_beside_collections_that_give_way() -> None:
    """Neither a crash nor a frame that is none: without a pause of the collector it takes seconds in Python 3.11."""
    ended = subprocess.run([sys.executable, "-c", STRESS], capture_output=True, text=True, timeout=240, check=False)

    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_is_left_as_it_was(is_on: bool) -> None:
    """On or off, and also where a read is interrupted by another."""
    was_on = gc.isenabled()
    try:
        (gc.enable if is_on else gc.disable)()
        frame = thread_frame(threading.get_ident())
        assert threading.get_ident() in thread_frames()
        assert gc.isenabled() == is_on
    finally:
        (gc.enable if was_on else gc.disable)()

    assert frame is not None
    assert thread_frame(-1) is None


@pytest.mark.process
def test_a_child_that_is_forked_meanwhile_collects() -> None:
    """The thread that reads is not in the child: the pause ends there, and frames can be read."""
    reading, done = threading.Event(), threading.Event()

    def read() -> None:
        with gc_pause:
            reading.set()
            done.wait(240)

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(240)
    child = os.fork()
    if child == 0:
        os._exit(0 if gc.isenabled() and thread_frame(threading.get_ident()) is not None else 1)

    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()
