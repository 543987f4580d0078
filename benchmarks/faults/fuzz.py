"""Generated input with new seeds, and stores whose writer is killed at any point, for as long as wanted.

    python benchmarks/faults/fuzz.py [--minutes 10] [--only TEXT] [--seed N]

The targets are those of tests/generated, in turns of a few seconds. Of each it prints the number of inputs, and of one
that fails the smallest input. Exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hypothesis import HealthCheck, Phase, given, seed, settings
from tests.database.store.crash_points import MODES, check_points, recorded
from tests.generated.all_targets import ALL_TARGETS
from tests.generated.targets import Target

_EXAMPLES = 60
_POINTS = 100
_MAX_BYTES = 4 << 30  # of address space beside that at the start: an input that asks for more is a defect
_PHASES = (Phase.generate, Phase.shrink)


@dataclass
class FuzzedTarget:
    """A target, and what became of its inputs.

    Attributes:
        name: its name.
        turn: checks inputs of a seed, and returns how many; raises where a property does not hold.
        inputs: number of inputs so far.
        seconds: time that they took.
        failure: what failed, with the smallest input.
    """

    name: str
    turn: Callable[[int], int]
    inputs: int = 0
    seconds: float = 0.0
    failure: str = ""

    def go_on(self, number: int) -> None:
        """Check inputs of a seed."""
        began = time.monotonic()
        try:
            self.inputs += self.turn(number)
        except Exception as error:  # whatever it is: a defect
            notes = "\n".join(getattr(error, "__notes__", ()))
            frames = "".join(traceback.format_exception(error, limit=-6))
            self.failure = f"seed {number}: {frames}{notes}"

        self.seconds += time.monotonic() - began


def generated(target: Target, number: int) -> int:
    """Check inputs of a target; the last one that fails is the smallest."""
    count = 0
    smallest: Any = None

    def check(value: Any) -> None:
        nonlocal count, smallest
        count += 1
        try:
            target.run(value)
        except BaseException:
            smallest = value
            raise

    quick = settings(
        max_examples=_EXAMPLES, deadline=None, database=None, phases=_PHASES, suppress_health_check=list(HealthCheck)
    )
    try:
        quick(seed(number)(given(target.inputs)(check)))()
    except BaseException as error:
        error.add_note(f"smallest input of {target.name!r}: {smallest!r}")
        raise

    return count


def killed(mode: str, number: int) -> int:
    """Check a store whose writer is killed at any point."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "points")
        place.mkdir()
        return check_points(recorded(mode, Path(folder), number, commits=40), _POINTS, number, place)


def fuzz(targets: list[FuzzedTarget], minutes: float, first_seed: int) -> None:
    """Check inputs of the targets in turns; one that failed gets no more."""
    deadline = time.monotonic() + minutes * 60
    number = first_seed
    while time.monotonic() < deadline and any(not target.failure for target in targets):
        for target in targets:
            if not target.failure and time.monotonic() < deadline:
                target.go_on(number)
                if target.failure:
                    print(f"FAILED {target.name}\n{target.failure}", flush=True)

        number += 1


def main() -> int:
    """Fuzz, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--only", default="", help="the targets whose name contains this")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="of the first turn")
    options = parser.parse_args()
    logging.disable()
    targets = [FuzzedTarget(each.name, partial(generated, each)) for each in ALL_TARGETS]
    targets += [FuzzedTarget(f"killed writer of a store: {mode}", partial(killed, mode)) for mode in MODES]
    targets = [target for target in targets if options.only in target.name]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    fuzz(targets, options.minutes, options.seed)
    for target in targets:
        mark = "FAILED" if target.failure else "ok    "
        print(f"{mark} {target.name:38} {target.inputs:>9,} inputs {target.seconds:7.1f} s")

    failed = sum(bool(target.failure) for target in targets)
    total = sum(target.inputs for target in targets)
    print(
        f"{total:,} inputs from seed {options.seed}, "
        f"{len(targets) - failed} of {len(targets)} targets as they should be"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
