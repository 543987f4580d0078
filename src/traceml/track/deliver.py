"""A delivery process: follows one run's store and gives what was logged to one backend.

`python -m traceml.track.deliver RUN_DIR BACKEND` is started by the aggregator and by `traceml sync`, one per backend;
it is the only place where a tracker's library is imported. It takes little: lowest priority, one batch in memory.

The cursor moves when the backend has confirmed a batch. When something fails that a second try in this process would
not mend, the process ends and is started again: a new one reads keys anew, and nothing half done is left in a library.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from traceml.database.reader import StoreReader
from traceml.database.store_file import STORE_NAME
from traceml.errors import PluginError, TraceMLError
from traceml.privacy import Masker
from traceml.settings import Config
from traceml.track.audit import Audit
from traceml.track.background import step_back
from traceml.track.derived import FOLLOWED
from traceml.track.keys import read_key_file
from traceml.track.plan import Experiment, Plan
from traceml.track.policy import Failure, FailureKind, Policy, classify, succeeded
from traceml.track.records import Batch, Records, position
from traceml.track.rules import Rules
from traceml.track.sender import Sender
from traceml.track.session import RewindError, Session
from traceml.track.state import (
    EXIT_AGAIN,
    EXIT_BROKEN,
    EXIT_DONE,
    EXIT_TAKEN,
    Phase,
    TrackerState,
    locked,
)
from traceml.track.watchdog import Watchdog

__all__ = ["Delivery", "main"]

_LEAST_ROWS, _FIRST_ROWS, _BATCH_ROWS = 100, 1_000, 5_000
_SLOW_BATCH_S = 2.0
_LOOK_S = 0.5
_TIMEOUT_S = 60.0
_STOP_S = 10.0
_EARLY_S = 5.0
# A backend that refuses so many rows one after another is taken for broken, and those rows are kept.
_REFUSED_IN_A_ROW = 50
_REASONS = 20
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger("traceml")


class Delivery:
    """Delivers one run to one backend.

    Args:
        run_dir: the run's folder.
        backend: a backend's name or import path.
        once: deliver what is there and end, whether or not the run says that it is over.
        options: of the backend, over those that the run's experiments give; given, every experiment is delivered.

    Raises:
        TraceMLError: the store cannot be read, or the settings are wrong.
    """

    def __init__(
        self, run_dir: Path, backend: str, *, once: bool = False, options: dict[str, Any] | None = None
    ) -> None:
        self._run_dir = run_dir
        self._once = once
        self._stop = threading.Event()
        self._state = TrackerState.load(run_dir, backend)
        self._state.pid = os.getpid()
        self._told_unsaved = False
        self._undo: Callable[[], None] | None = None
        self._unknown: dict[int, float] = {}  # number of an experiment -> until when its announcement is waited for
        self._reader = StoreReader(run_dir / STORE_NAME)
        self._plan = Plan(self._reader, run_dir)
        self._plan.refresh()
        asking = self._plan.backends().get(backend)
        self._config: Config = asking.settings() if asking is not None else Config()
        self._options = options if options is not None else asking.options(backend) if asking is not None else {}
        self._everything = options is not None or asking is None
        self._given_options = options
        self._policy = Policy(self._config.max_retries, self._config.backoff_factor, self._config.max_backoff)
        self._masker = Masker(self._config.mask)
        self._masked_before = self._state.masked
        self._watchdog = Watchdog(self._hangs)

    def stop(self, *_: object) -> None:
        """End soon: after the batch that is under way, and in any case after some seconds."""
        self._stop.set()
        self._watchdog.end_within(_STOP_S)

    def run(self) -> int:
        """Deliver until all is done or something needs a new process; return the exit status."""
        try:
            self._prepare()
            return self._follow()
        except RewindError:
            self._rewind()
            return EXIT_AGAIN
        except Exception as error:  # noqa: BLE001 - a library may raise anything; what it was decides what comes next
            return self._failed(error)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        key_file = self._options.get("api_key_file")
        if key_file:
            os.environ.update(read_key_file(self._state.backend, Path(str(key_file))))

        first = next((each.row for each in self._plan.experiments.values()), {})
        sys.path.extend(path for path in first.get("sys_path") or () if path not in sys.path)
        with contextlib.suppress(OSError):  # paths among the options are meant from where the script was started
            os.chdir(str(first.get("folder") or "."))

        self._records = Records(self._reader, FOLLOWED)
        self._sender = Sender(
            self._state,
            self._reader,
            self._records,
            self._plan,
            Rules.of(self._config.include, self._config.exclude, self._options),
            self._run_dir,
            everything=self._everything,
            interval_s=self._config.metrics_interval,
            system=self._config.track_system,
        )
        self._session = self._make_session()
        self._audit = Audit(self._run_dir, self._state)

    def _make_session(self) -> Session:
        """Connect to the backend, or to the one that takes its place while it fails."""
        state, fallback = self._state, str(self._options.get("fallback") or "")
        stands_in = bool(fallback) and state.phase in {Phase.OPEN, Phase.UNAUTHORIZED} and time.time() < state.retry_at
        timeout_s = float(self._options.get("timeout_s") or _TIMEOUT_S)
        self._stands_in = stands_in
        state.stood_in = False
        return Session(
            fallback if stands_in else state.backend,
            self._run_dir,
            state,
            self._save,
            self._watchdog,
            self._masker,
            timeout_s=timeout_s,
            options=None if stands_in else self._given_options,
            is_fallback=stands_in,
        )

    def _follow(self) -> int:
        while True:
            is_over = self._once or self._is_over()  # asked before the rows: what came before it is read then
            batch = self._next_batch()
            self._plan.refresh()
            if not is_over and self._is_early(batch):
                self._stop.wait(_LOOK_S)
                continue

            is_empty = batch.cursor == self._cursor()
            if is_empty and is_over:
                return self._finish()
            if is_empty and self._stop.is_set():
                return self._stopped()
            if self._stands_in and time.time() >= self._state.retry_at:
                return EXIT_AGAIN  # for a probe of the one that failed
            if is_empty:
                self._look_alive()
                self._stop.wait(_LOOK_S)
                continue

            if (status := self._deliver(batch)) is not None:
                return status
            if self._stop.is_set():
                return self._stopped()
            if batch.is_last and not is_over:
                self._stop.wait(_LOOK_S)

    def _next_batch(self) -> Batch:
        """Read on, up to where a batch has to end: where refused rows are, and where an experiment was ended."""
        state, here = self._state, position(self._cursor())
        suspect = state.memory.get("suspect")
        stops = [kept["end"] for kept in state.experiments.values() if kept.get("end")]
        limit = state.batch_rows or _FIRST_ROWS
        if suspect is not None:
            stops += [suspect["from"], suspect["to"], *(bad["to"] for bad in suspect["bad"])]
            if position(suspect["from"]) <= here < position(suspect["to"]):
                limit = suspect["rows"]

        ahead = [stop for stop in stops if position(stop) > here]
        return self._records.read(state.cursor, limit, min(ahead, key=position, default=None))

    def _is_early(self, batch: Batch) -> bool:
        """Whether values have come before the announcement of their experiment, which is another table: it is near."""
        unknown = {number for stream, number in batch.metrics if self._plan.of(stream, number) is None}
        now_s = time.monotonic()
        return any(now_s < self._unknown.setdefault(number, now_s + _EARLY_S) for number in unknown)

    def _deliver(self, batch: Batch) -> int | None:
        """Deliver one batch; return an exit status when this process should end over it."""
        began_s = time.monotonic()
        if not self._is_bad(batch):
            try:
                with self._undone():
                    self._sender.give(batch, self._session, self._audit, self._is_done)
                    self._session.confirm()
            except RewindError:
                raise
            except Exception as error:  # noqa: BLE001 - see run()
                is_refusal = classify(error).kind is FailureKind.REFUSED
                return self._refused(batch, error) if is_refusal else self._again(error)

        self._passed(batch, time.monotonic() - began_s)
        self._save()
        with self._undone():
            self._sender.end_some(self._session, self._audit)

        self._audit.write(self._state.target, dict(self._masker.counts))
        self._save()
        return None

    def _is_bad(self, batch: Batch) -> bool:
        """Whether a batch is a row that was refused before: a backend that starts over comes by it again."""
        suspect = self._state.memory.get("suspect")
        if suspect is None or not any(bad["to"] == batch.cursor for bad in suspect["bad"]):
            return False

        self._state.failed += batch.rows
        return True

    def _is_done(self, experiment: Experiment) -> bool:
        """Whether an experiment was ended with all that came up to here: it needs nothing when others start over."""
        end = self._session.kept(experiment).get("end")
        return end is not None and position(self._cursor()) < position(end)

    def _passed(self, batch: Batch, took_s: float) -> None:
        """Move the cursor over a batch that is confirmed."""
        state = self._state
        state.cursor, state.passed = dict(batch.cursor), state.passed + batch.rows
        took_ms = 1e3 * took_s
        state.latency_ms = took_ms if state.latency_ms is None else 0.8 * state.latency_ms + 0.2 * took_ms
        if (suspect := state.memory.get("suspect")) is not None:
            suspect["in_a_row"] = 0

        # A slow tracker gets less at a time, so that one sees it getting on and loses little to a death.
        rows = state.batch_rows or _FIRST_ROWS
        if took_s > _SLOW_BATCH_S:
            state.batch_rows = max(rows // 2, _LEAST_ROWS)
        elif took_s < _SLOW_BATCH_S / 4:
            state.batch_rows = min(rows * 2, _BATCH_ROWS)

        if self._stands_in:
            state.fallback += batch.rows
        else:
            succeeded(state)

    def _finish(self) -> int:
        """Give what was held back, end the experiments, and say that all is done."""
        try:
            with self._undone():
                self._sender.finish(self._session, self._audit)
                self._session.confirm()

            self._save()
            self._sender.end(self._session, str(self._reader.meta().get("run", {}).get("state") or "finished"))
        except RewindError:
            raise
        except Exception as error:  # noqa: BLE001 - see run()
            status = self._again(error, in_place=False)
            return EXIT_AGAIN if status is None else status

        self._audit.write(self._state.target, dict(self._masker.counts), force=True)
        if self._stands_in:
            self._state.stood_in = True
            self._save()
            return EXIT_AGAIN

        succeeded(self._state)
        self._state.phase = Phase.DONE
        self._save()
        return EXIT_DONE

    def _stopped(self) -> int:
        self._audit.write(self._state.target, dict(self._masker.counts), force=True)
        if self._state.phase in {Phase.DELIVERING, Phase.STARTING}:
            self._state.phase = Phase.STOPPED

        self._save()
        return EXIT_AGAIN

    # --- failures ----------------------------------------------------------------------------------------------------

    def _again(self, error: Exception, *, in_place: bool = True) -> int | None:
        """Note a failure; wait and return None where this process may try again, else its exit status."""
        failure = classify(error)
        _log.warning("%s: %s", self._state.backend, failure.text, exc_info=_log.isEnabledFor(logging.DEBUG))
        wait_s = self._note(failure)
        if failure.kind is FailureKind.BROKEN:
            return EXIT_BROKEN

        may = in_place and self._state.phase is Phase.WAITING and self._session.is_idempotent
        if not may or self._stop.wait(wait_s):
            return EXIT_AGAIN

        return None

    def _failed(self, error: Exception) -> int:
        """Note what went wrong outside of a batch; return the exit status."""
        status = self._again(error, in_place=False)
        return EXIT_AGAIN if status is None else status

    def _refused(self, batch: Batch, error: Exception) -> int | None:
        """Find the row that is refused by halving, count it, and leave it out; then all others go on."""
        state, failure = self._state, classify(error)
        before = dict(self._cursor())
        suspect = state.memory.setdefault("suspect", {"bad": [], "in_a_row": 0})
        suspect |= {"from": before, "to": dict(batch.cursor), "rows": max(batch.rows // 2, 1)}
        if batch.rows > 1 or (batch.rows == 1 and batch.frames):
            self._save()
            return None if self._session.is_idempotent else EXIT_AGAIN

        suspect["bad"].append({"from": before, "to": dict(batch.cursor), "why": failure.text})
        suspect["in_a_row"] += 1
        if suspect["in_a_row"] > _REFUSED_IN_A_ROW:
            self._take_back(suspect)
            self._note(Failure(FailureKind.BROKEN, f"it refuses everything: {failure.text}"))
            return EXIT_BROKEN

        _log.warning("%s refuses a row: %s", state.backend, failure.text)
        if batch.rows and (failure.text in state.reasons or len(state.reasons) < _REASONS):
            state.reasons[failure.text] = state.reasons.get(failure.text, 0) + 1

        state.failed += batch.rows
        state.cursor, state.passed = dict(batch.cursor), state.passed + batch.rows
        self._save()
        return None if self._session.is_idempotent else EXIT_AGAIN

    def _take_back(self, suspect: dict[str, Any]) -> None:
        """Forget the last refusals of a backend that refuses everything: its rows wait until it is mended."""
        state, n = self._state, suspect["in_a_row"]
        state.cursor = suspect["bad"][-n]["from"]
        state.failed -= n - 1
        state.passed -= n - 1
        state.reasons.clear()
        del suspect["bad"][-n:]
        if not suspect["bad"]:
            del state.memory["suspect"]

    def _hangs(self, call: str, allowed_s: float) -> None:
        """Note that a call did not return; the process ends right after this."""
        _log.error("%s: %s did not return within %.0f s", self._state.backend, call, allowed_s)
        if self._undo is not None:
            self._undo()

        self._note(Failure(FailureKind.TRANSIENT, f"{call} did not return within {allowed_s:.0f} s"))

    def _note(self, failure: Failure) -> float:
        wait_s = self._policy.note(self._state, failure)
        self._save()
        return wait_s

    def _rewind(self) -> None:
        """Start the backend's runs over, except for those that were ended: they are complete."""
        _log.info("%s goes on from the run's first row", self._state.backend)
        state = self._state
        ended = {key: kept for key, kept in state.experiments.items() if kept.get("ended")}
        memory = {"suspect": state.memory["suspect"]} if "suspect" in state.memory else {}
        fresh = TrackerState(state.backend, pid=state.pid, experiments=ended, memory=memory)
        fresh.target, fresh.retries, fresh.reasons = state.target, state.retries, state.reasons
        fresh.masked = state.masked
        fresh.save(self._run_dir)

    # --- inside ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Undo what a failed attempt changed in the state, but for what stands at the tracker."""
        state = self._state
        counts = {name: getattr(state, name) for name in ("delivered", "derived", "filtered")}
        memory = copy.deepcopy(state.memory)

        def undo() -> None:
            state.memory = memory
            for name, value in counts.items():
                setattr(state, name, value)

        self._undo = undo
        try:
            yield
        except BaseException:
            undo()
            raise
        finally:
            self._undo = None

    def _cursor(self) -> dict[str, int]:
        return {"frame": self._state.cursor.get("frame", 0), "row": self._state.cursor.get("row", 0)}

    def _is_over(self) -> bool:
        return self._reader.meta().get("run", {}).get("ended") is not None

    def _look_alive(self) -> None:
        """Say that all is well where there was nothing to do since the start."""
        if self._state.phase not in {Phase.DELIVERING, Phase.OPEN, Phase.UNAUTHORIZED}:
            succeeded(self._state)
            self._save()

    def _save(self) -> None:
        """Write the state; without space on the disk delivery goes on, and what is exact by marks stays exact."""
        self._state.masked = self._masked_before + self._masker.counts.total()
        try:
            self._state.save(self._run_dir)
            self._told_unsaved = False
        except OSError as error:
            if not self._told_unsaved:
                _log.error("the state of %s cannot be saved: %s", self._state.backend, error)

            self._told_unsaved = True


def main(argv: list[str] | None = None) -> int:
    """Deliver; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m traceml.track.deliver")
    parser.add_argument("run_dir", type=lambda path: Path(path).absolute())
    parser.add_argument("backend")
    parser.add_argument("--once", action="store_true", help="deliver what is there and end")
    parser.add_argument("--options", type=json.loads, help="options of the backend as JSON")
    parser.add_argument("--nice", type=int, default=19, help="how far to step back behind the training")
    parser.add_argument("--parent", type=int, help="end with this process")
    given = parser.parse_args(argv)
    _tie_to(given.parent)
    step_back(given.nice)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("traceml").setLevel(logging.INFO)
    with locked(given.run_dir, given.backend) as is_ours:
        if not is_ours:
            return EXIT_TAKEN

        try:
            delivery = Delivery(given.run_dir, given.backend, once=given.once, options=given.options)
        except (TraceMLError, PluginError) as error:
            _log.error("%s", error)
            return EXIT_AGAIN

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, delivery.stop)

        with _profiled(given.run_dir, given.backend):
            return delivery.run()


def _tie_to(parent: int | None) -> None:
    """End with the process that started us, however that ends."""
    if parent is None:
        return

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_AGAIN)


@contextlib.contextmanager
def _profiled(run_dir: Path, backend: str) -> Iterator[None]:
    """Write a profile of this process next to its state when TRACEML_DEBUG is set."""
    if os.environ.get("TRACEML_DEBUG", "").lower() in {"", "0", "false", "no", "off"}:
        yield
        return

    import cProfile

    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        path = TrackerState.path_in(run_dir, backend)
        profile.dump_stats(path.with_name(path.name.replace(".state.json", f".{os.getpid()}.prof")))


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # All that counts is confirmed and saved: what libraries want to do at exit may take long, or write once more.
    os._exit(status)
