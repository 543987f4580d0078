"""Clocks: a monotonic one for durations, the wall clock for dates; and randomness for waits.

Every duration and every stamp in a row is CLOCK_MONOTONIC in nanoseconds, which no clock adjustment changes. The pair
(monotonic, epoch) in a rank's hello converts its stamps to dates.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

if TYPE_CHECKING:
    import time as own_time
else:
    # Another instance of the module: freezegun, gevent and tests replace the functions of `time` in all modules, and
    # the recorder would then end, or mix their times with those of the hooks in C.
    from _frozen_importlib import BuiltinImporter, module_from_spec

    own_time = module_from_spec(BuiltinImporter.find_spec("time"))
    BuiltinImporter.exec_module(own_time)

__all__ = [
    "TICKS_PER_S",
    "SteadyClock",
    "boot_id",
    "boot_time_s",
    "clock_pair",
    "jittered",
    "machine_name",
    "monotonic_ns",
    "own_time",
    "pid_namespace",
    "process_start_ticks",
    "random_share",
]

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
"""Kernel clock ticks per second: the unit of times in `/proc/PID/stat`."""

# On Linux perf_counter_ns is CLOCK_MONOTONIC too. The hooks use it, and one name keeps stamps comparable.
monotonic_ns = own_time.perf_counter_ns


# Two readings of the clocks take less, unless the thread loses its core between them.
_TOGETHER_NS, _MAX_READINGS = 20_000, 20


def clock_pair() -> tuple[int, int]:
    """Return (monotonic_ns, epoch_ns), read together: a thread that loses its core in between reads again."""
    best_ns, pair = 1 << 62, (0, 0)
    for _ in range(_MAX_READINGS):
        before_ns, epoch_ns, after_ns = monotonic_ns(), own_time.time_ns(), monotonic_ns()
        if after_ns - before_ns < best_ns:
            best_ns, pair = after_ns - before_ns, ((before_ns + after_ns) // 2, epoch_ns)

        if best_ns < _TOGETHER_NS:
            break

    return pair


@cache
def boot_id() -> str:
    """Return an id of this boot of the machine; stamps of different boots cannot be compared."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def pid_namespace() -> str:
    """Return an id of the numbers of processes here; those of a container are others."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - it is no path
    except OSError:
        return "unknown"


class SteadyClock(NamedTuple):
    """Dates of one activity: the wall clock at its start, and the monotonic clock since, which nothing sets."""

    mono_ns: int  # both clocks at the start
    epoch_ns: int
    boot: str  # the machine's boot; another one starts its monotonic clock anew

    @classmethod
    def start(cls) -> Self:
        """Return a clock that starts now."""
        return cls(*clock_pair(), boot_id())

    @classmethod
    def from_facts(cls, facts: Any) -> Self | None:
        """Return the clock of `facts`, None if there is none of this form."""
        try:
            mono_ns, epoch_ns, boot = facts
            return cls(int(mono_ns), int(epoch_ns), str(boot))
        except (TypeError, ValueError):
            return None

    @property
    def facts(self) -> list[Any]:
        """The clock as it is stored."""
        return [self.mono_ns, self.epoch_ns, self.boot]

    def epoch_s(self, mono_ns: int) -> float:
        """Return the epoch seconds of a stamp of the same boot."""
        return (self.epoch_ns + mono_ns - self.mono_ns) / 1e9

    def now_s(self) -> float:
        """Return the epoch seconds of this moment; by the wall clock after another boot, and never before the start."""
        if self.boot == boot_id():
            return self.epoch_s(monotonic_ns())

        return max(own_time.time(), self.epoch_ns / 1e9)


def boot_time_s() -> float:
    """Return the epoch second at which this machine was booted, 0 if that is unknown."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0.0

    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), 0.0)


def machine_name() -> str:
    """Return a name that this machine keeps over a reboot: its host name and machine id."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""

    return f"{os.uname().nodename}/{machine}"


def process_start_ticks(pid: int | Literal["self"]) -> int | None:
    """Return the kernel's start time of a process in clock ticks since boot, or None when it is gone.

    A pid can be reused; (boot id, pid, start ticks) is unique.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command name is in parentheses and may contain any characters, so fields are counted from the last one.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] == b"Z" else int(fields[19])


def random_share() -> float:
    """Return a random number from 0 to 1, for waits that must not have the same end or the period of something else.

    The functions of the module `random` would take it from the sequence that a script has seeded. Importing that costs
    a rank 2 ms.
    """
    return int.from_bytes(os.urandom(2), "little") / 0xFFFF


def jittered(longest_s: float) -> float:
    """Return a random wait of half of `longest_s` to all of it: a thousand ranks must not try again in one instant."""
    return longest_s * (0.5 + 0.5 * random_share())
