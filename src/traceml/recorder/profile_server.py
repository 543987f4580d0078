"""Profiles of this rank on request: the command `profile` of the aggregator's clients."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from traceml.clock import monotonic_ns
from traceml.clock import own_time as time
from traceml.database.profile_states import MAX_PROFILE_STEPS, ProfileState
from traceml.database.schema import STEPS
from traceml.errors import TraceMLError
from traceml.fail_open import fail_open
from traceml.formatting import bytes_text
from traceml.inspection.thread_frames import thread_frame
from traceml.inspection.user_files import display_path
from traceml.recorder.user_code import user_line

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.instrument.profile_window import ProfileWindow
    from traceml.instrument.step_clock import StepClock

__all__ = ["ProfileServer"]

_log = logging.getLogger("traceml")

_CHUNK_BYTES = 4 << 20  # half of the largest frame
_READ_BYTES = 1 << 20
_SAMPLE_S, _LEAVE_S = 0.005, 0.05
_FETCH_S = 120.0  # a trace that nobody has read from for this long is removed
_RECENT_STEPS = 16
_MAX_SAMPLES = 20_000
_TOTAL = STEPS.index["total_ns"]


class CallSampler:
    """Samples of the line of the user's code that the training thread runs, each with its time.

    Operators release the GIL, so most samples are taken inside them.
    """

    def __init__(self, thread: Callable[[], int], contains: Callable[[FrameType], bool]) -> None:
        self._thread, self._contains = thread, contains
        self._samples: list[tuple[int, int]] = []
        self._places: dict[tuple[str, int, str], int] = {}

    def sample(self) -> None:
        """Take a sample."""
        if len(self._samples) >= _MAX_SAMPLES:
            return

        code, line = user_line(thread_frame(self._thread()), self._contains)
        if code is None:
            return

        place = (display_path(code.co_filename), line, code.co_qualname)
        self._samples.append((time.time_ns(), self._places.setdefault(place, len(self._places))))

    def to_row(self) -> dict[str, Any]:
        """Return `places` (file, line, function), and `samples` (epoch nanoseconds, number of the place)."""
        return {"places": [list(place) for place in self._places], "samples": self._samples}


class _Profile:
    """One profile: its window, its thread, and the file of its trace."""

    def __init__(self, window: ProfileWindow, calls: CallSampler, *, limit_s: float, limit_bytes: int) -> None:
        self.window, self.calls = window, calls
        self.folder = Path(tempfile.mkdtemp(prefix="traceml-profile-"))
        self.trace = self.folder / "trace.json.gz"
        self.size = 0
        self.state, self.why = ProfileState.WAITING, ""
        self._limit_s, self._limit_bytes = limit_s, limit_bytes
        self._used_s = time.monotonic()
        self._closed = threading.Event()

    @property
    def is_busy(self) -> bool:
        """Whether the profiler may still run, or its trace is still wanted."""
        return not self.window.is_over or self.state is not ProfileState.FAILED

    def start(self) -> None:
        """Start its thread, which ends by itself."""
        threading.Thread(target=self._run, name="traceml-profile", daemon=True).start()

    def read(self, offset: int) -> bytes:
        """Return a piece of the compressed trace."""
        self._used_s = time.monotonic()
        with self.trace.open("rb") as file:
            file.seek(offset)
            return file.read(_CHUNK_BYTES)

    def close(self, why: str) -> None:
        """End it, and remove its trace."""
        self.window.cancel(why)
        self._closed.set()

    def _run(self) -> None:
        try:
            with fail_open(_log, "recorder", "a profile is abandoned"):
                try:
                    self._follow_window()
                    self._save()
                finally:
                    self.window.release()

                while self.state == ProfileState.RECORDED and not self._closed.wait(1.0):
                    if time.monotonic() - self._used_s > _FETCH_S:
                        break
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.state, self.why = ProfileState.FAILED, self.why or self.window.why or "its trace was not fetched"

    def _follow_window(self) -> None:
        """Wait until the window has ended, also where nobody waits for it any longer."""
        deadline_s = time.monotonic() + self._limit_s
        while not self.window.is_over:
            if self._closed.wait(_SAMPLE_S):  # also before it opens: five steps may take 10 ms
                self.window.cancel("it is not wanted any longer")
                time.sleep(_LEAVE_S)  # the event stays set
            elif time.monotonic() > deadline_s:
                self._fail(f"its steps did not end within {self._limit_s:g} s")
                self.window.cancel(self.why)
            else:
                self.state = self.window.state

            self.window.ask()
            if self.window.state is ProfileState.OPEN:
                self.calls.sample()

    def _save(self) -> None:
        """Write the trace and compress it; the GIL is released for nearly all of it."""
        if self.window.why or self._closed.is_set():
            self._fail(self.window.why or "it is not wanted any longer")
            return

        self.state = ProfileState.SAVING
        plain = self.folder / "trace.json"
        self.window.save(plain)
        size = plain.stat().st_size
        if size > self._limit_bytes:
            self._fail(
                f"its trace has {bytes_text(size)}, and the limit is {bytes_text(self._limit_bytes)}: profile fewer "
                "steps, or raise --limit-mb"
            )
        else:
            _compress(plain, self.trace)
            self.size, self._used_s = self.trace.stat().st_size, time.monotonic()
            self.state = ProfileState.RECORDED

        plain.unlink()

    def _fail(self, why: str) -> None:
        self.state, self.why = ProfileState.FAILED, why


class ProfileServer:
    """Opens profiles of this rank, one at a time, and hands out their traces; on the recorder's thread.

    Args:
        clock: returns the training's steps, None if they are not traced.
        thread: returns the id of the training thread.
        contains: whether the user wrote the code of a frame.
    """

    def __init__(
        self,
        flight: FlightFile,
        *,
        clock: Callable[[], StepClock | None],
        thread: Callable[[], int],
        contains: Callable[[FrameType], bool],
    ) -> None:
        self._steps = flight.ring("steps")
        self._clock, self._thread, self._contains = clock, thread, contains
        self._profile: _Profile | None = None
        self._asked_ns = 0
        self._do: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "state": self._state, "open": self._open, "calls": self._calls, "read": self._read, "close": self._close,
        }  # fmt: skip

    @property
    def is_used(self) -> bool:
        """Whether a client is at it: then the recorder's thread answers quickly."""
        return monotonic_ns() - self._asked_ns < 5 * 10**9 if self._asked_ns else False

    def answer(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a part of the command: `do` is state, open, calls, read or close.

        Raises:
            TraceMLError: it is not possible now.
        """
        self._asked_ns = monotonic_ns()
        part = self._do.get(str(args.get("do")))
        if part is None:
            raise TraceMLError(f"unknown profile command {args.get('do')!r}; known: {', '.join(self._do)}")

        return part(args)

    def abandon(self) -> None:
        """Stop a profiler that is open, as the training ends; on the training thread."""
        if self._profile is not None:
            self._profile.window.abandon("the training ended")

    def close(self) -> None:
        """Remove the trace of the last profile."""
        if self._profile is not None:
            self._profile.close("the training ended")
            shutil.rmtree(self._profile.folder, ignore_errors=True)

    def _state(self, _args: Mapping[str, Any]) -> dict[str, Any]:
        clock, profile = self._clock(), self._profile
        found = {"step": clock.step if clock is not None and clock.open else -1, "step_ns": self._step_ns()}
        if profile is None:
            return {**found, "state": str(ProfileState.NONE)}

        window = profile.window
        return {
            **found, "state": str(profile.state), "why": profile.why, "first": window.first_step, "steps": window.steps,
            "clock": list(window.clock_pair), "size": profile.size, "pid": os.getpid(),
        }  # fmt: skip

    def _open(self, args: Mapping[str, Any]) -> dict[str, Any]:
        clock = self._clock()
        if clock is None or not clock.thread:
            raise TraceMLError("its steps are not traced")

        if self._profile is not None and self._profile.is_busy:
            raise TraceMLError("it is being profiled already: try again when that has ended")

        from traceml.instrument.profile_window import ProfileWindow

        steps = min(max(int(args["steps"]), 1), MAX_PROFILE_STEPS)
        window = ProfileWindow(
            clock, first_step=int(args["first"]), steps=steps, with_stacks=args.get("stacks") is True
        )
        calls = CallSampler(self._thread, self._contains)
        self._profile = _Profile(window, calls, limit_s=float(args["limit_s"]), limit_bytes=int(args["limit_bytes"]))
        self._profile.start()
        return {"step": clock.step}

    def _calls(self, _args: Mapping[str, Any]) -> dict[str, Any]:
        return self._recorded().calls.to_row()

    def _read(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return {"data": self._recorded().read(int(args["offset"]))}

    def _close(self, _args: Mapping[str, Any]) -> dict[str, Any]:
        if self._profile is not None:
            self._profile.close("it is not wanted any longer")

        return {}

    def _recorded(self) -> _Profile:
        if self._profile is None or self._profile.state != ProfileState.RECORDED:
            raise TraceMLError("there is no trace of it")

        return self._profile

    def _step_ns(self) -> int:
        """Return the mean duration of the last steps, 0 before there are two."""
        found = self._steps.read_from(max(self._steps.appended - _RECENT_STEPS, 0), _RECENT_STEPS)
        totals = [row[_TOTAL] for row in STEPS.struct.iter_unpack(found.data)]
        return sum(totals) // len(totals) if len(totals) > 1 else 0


def _compress(source: Path, target: Path) -> None:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)  # 31: as gzip
    with source.open("rb") as plain, target.open("wb") as packed:
        while data := plain.read(_READ_BYTES):
            packed.write(packer.compress(data))

        packed.write(packer.flush())
