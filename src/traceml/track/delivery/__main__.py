"""Delivery process: follows one run's store and sends what was logged to one backend.

The aggregator and `traceml sync` start `python -m traceml.track.delivery RUN_DIR BACKEND`, one per backend. Only these
processes import a tracker's library. They run at a low priority with one batch in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from traceml.errors import TraceMLError
from traceml.helper_programs import lower_priority, search_working_directory
from traceml.process_ends import die_with_parent
from traceml.track.delivery.delivery_loop import DeliveryLoop
from traceml.track.tracker_state import EXIT_AGAIN, EXIT_TAKEN, TrackerState, locked

__all__ = ["main"]

_log = logging.getLogger("traceml")


def main(argv: list[str] | None = None) -> int:
    """Deliver; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m traceml.track.delivery")
    parser.add_argument("run_dir", type=lambda path: Path(path).absolute())
    parser.add_argument("backend")
    parser.add_argument("--once", action="store_true", help="deliver what is there and end")
    parser.add_argument("--options", type=json.loads, help="options of the backend as JSON")
    parser.add_argument("--settings", type=json.loads, help="current settings as JSON, with --options")
    parser.add_argument("--installed-only", action="store_true", help="import nothing that the run names")
    parser.add_argument("--nice", type=int, default=0, help="niceness of the process")
    parser.add_argument("--profile", action="store_true", help="write a profile of this process next to its state")
    parser.add_argument("--parent", type=int, help="process id; end when that process ends")
    arguments = parser.parse_args(argv)
    if arguments.parent is not None:
        die_with_parent(arguments.parent, signal.SIGTERM)

    lower_priority(arguments.nice)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("traceml").setLevel(logging.INFO)
    if not arguments.installed_only:
        search_working_directory()

    with locked(arguments.run_dir, arguments.backend) as is_locked:
        if not is_locked:
            return EXIT_TAKEN

        try:
            delivery = DeliveryLoop(
                arguments.run_dir,
                arguments.backend,
                once=arguments.once,
                options=arguments.options,
                settings=arguments.settings,
                installed_only=arguments.installed_only,
            )
        except TraceMLError as error:
            _log.error("%s", error)
            return EXIT_AGAIN

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, delivery.stop)

        with _profiled(arguments.run_dir, arguments.backend) if arguments.profile else contextlib.nullcontext():
            return delivery.run()


@contextlib.contextmanager
def _profiled(run_dir: Path, backend: str) -> Iterator[None]:
    """Write a profile of this process next to its state."""
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
    # Everything is confirmed and saved: exit handlers of libraries may take long, or write once more.
    os._exit(status)
