"""The coroutine in which an event loop waits, of real loops in other threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import pytest

from tests.eventually import eventually
from traceml.inspection.thread_frames import awaiting_frames, thread_frame

Program = Callable[[asyncio.Event], Coroutine[Any, Any, None]]


def is_test(frame: FrameType) -> bool:
    return frame.f_code.co_filename == __file__


async def fetch(event: asyncio.Event) -> None:
    await event.wait()


async def plain(event: asyncio.Event) -> None:
    await fetch(event)


async def with_limit(event: asyncio.Event) -> None:
    await asyncio.wait_for(fetch(event), 600)


async def together(event: asyncio.Event) -> None:
    await asyncio.gather(asyncio.sleep(0), fetch(event))


async def first(event: asyncio.Event) -> None:
    await asyncio.wait([asyncio.ensure_future(fetch(event))])


@pytest.mark.parametrize("program", [plain, with_limit, together, first])
def test_the_innermost_coroutine_is_named(program: Program) -> None:
    """Also of a task that the program waits for; its own coroutine is further out."""
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        loops.append((asyncio.get_running_loop(), asyncio.Event()))
        await program(loops[0][1])

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()

    def functions() -> list[str]:
        frames = awaiting_frames(thread_frame(thread.ident or 0), is_test)
        return [frame.f_code.co_name for frame in frames if is_test(frame)]

    try:
        eventually(lambda: functions() == ["fetch", program.__name__, "main"], "the frames of the program")
    finally:
        loop, event = loops[0]
        loop.call_soon_threadsafe(event.set)
        thread.join(240)


def test_a_loop_that_runs_the_users_code_does_not_wait() -> None:
    """The thread's own stack has the line; outside of a loop there is no coroutine."""
    ends = threading.Event()

    async def computes() -> None:
        ends.wait(600)

    thread = threading.Thread(target=lambda: asyncio.run(computes()), daemon=True)
    thread.start()

    def is_running() -> bool:
        frame = thread_frame(thread.ident or 0)
        while frame is not None and frame.f_code.co_name != "computes":
            frame = frame.f_back

        return frame is not None

    try:
        eventually(is_running, "the coroutine to run")
        assert awaiting_frames(thread_frame(thread.ident or 0), is_test) == []
        assert awaiting_frames(None, is_test) == []
    finally:
        ends.set()
        thread.join(240)
