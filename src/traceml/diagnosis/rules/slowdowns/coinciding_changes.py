"""Changes at the same time as that of the steps: batches, cores, clocks, disks, memory."""

from __future__ import annotations

from typing import NamedTuple

from traceml.diagnosis.facts.machine_use import MachineUse
from traceml.formatting import bytes_text, cores_text, factor_text, percent_text

__all__ = ["CORE_WAITS", "SideChange", "changes", "core_wait", "larger_batches"]

WAITED = 0.10
"""A share of time without a core that is higher by this much is a change,"""
LOST_TIME = 0.20
"""or where this share of the time with a core is lost: from waiting 73 % to 80 %, steps take 1.35 times as long."""
OTHERS_CORES = 0.5
"""Other programs that use more by this many cores are a change."""
CLOCK_FACTOR = 0.9
"""A clock below this factor of before is a change."""
MEMORY_SHARE = 0.15
"""More use of memory by this share of it is a change."""
DISK_BYTES, DISK_FACTOR = 5e6, 3.0
"""More bytes per second from disks by this factor, and at least this many, are a change."""
MAJOR_FAULTS = 20.0
"""So many pages per second that are read back from a disk are a change."""


CORE_WAITS = ("cpu_wait_share", "workers_wait_share")
"""Names of the shares of time that the training, or its loader workers, waited for a core."""


class SideChange(NamedTuple):
    """A change at the same time as that of the steps."""

    name: str  # key of the evidence
    text: str  # in words
    before: float  # value outside the slow part
    then: float  # value inside it
    advice: str
    takes_cores: bool = False  # whether it makes all code slower, as it runs less
    is_work: bool = False  # whether longer steps only have more work


_CORES = "End or move what else runs on the host then (`top` names it), or give the training cores of its own."


def changes(
    before: MachineUse,
    then: MachineUse,
    *,
    memory_of: str = "host",
    use_of: str = "the training",
    may_read: bool = True,
) -> list[SideChange]:
    """Return what else changed with the steps, the likeliest cause first.

    Args:
        may_read: whether what became longer may wait for disks.
    """
    waited = core_wait("cpu_wait_share", use_of, before.waited, then.waited)
    read = _disk(before, then) if may_read else None
    found = (waited, _others(before, then), _clock(before, then), _swap(before, then), read)
    return [each for each in (*found, _memory(before, then, memory_of)) if each is not None]


def larger_batches(before: float, then: float, *, explains_all: bool = False) -> SideChange:
    """Return by how much batches were larger, given their elements."""
    text = f"batches were {factor_text(then / before)} as large"
    if explains_all:
        text += ", which explains it"

    advice = (
        "If larger batches are meant (a curriculum, longer sequences), nothing needs fixing. Otherwise let each batch "
        "have as many elements (tokens, pixels, nodes), not as many samples."
    )
    return SideChange("batch_elements", text, before, then, advice, is_work=explains_all)


def core_wait(name: str, who: str, before: float | None, then: float | None) -> SideChange | None:
    """Return that some waited longer for a core, given the shares of their time; None if not, or if unknown.

    Args:
        name: one of `CORE_WAITS`.
        who: in words.
    """
    if before is None or then is None:
        return None

    more = then - before
    if more < WAITED and more < LOST_TIME * (1.0 - before):
        return None

    text = f"{who} waited for a CPU core for {percent_text(then)} of the time (otherwise {percent_text(before)})"
    return SideChange(name, text, before, then, _CORES, True)


def _others(before: MachineUse, then: MachineUse) -> SideChange | None:
    usual, now = before.others_cores(), then.others_cores()
    if usual is None or now is None or now - usual < OTHERS_CORES:
        return None

    text = f"other processes used {cores_text(now)} (otherwise {cores_text(usual)})"
    return SideChange("others_cores", text, usual, now, _CORES, True)


def _clock(before: MachineUse, then: MachineUse) -> SideChange | None:
    if not before.clock_mhz or not then.clock_mhz or then.clock_mhz > CLOCK_FACTOR * before.clock_mhz:
        return None

    hot = "" if then.temperature_c is None else f", at {then.temperature_c:.0f} degrees"
    text = f"the device's clock was {then.clock_mhz:.0f} MHz (otherwise {before.clock_mhz:.0f} MHz){hot}"
    advice = "Look at the device's cooling and its power limit (nvidia-smi -q -d PERFORMANCE)."
    return SideChange("clock_mhz", text, before.clock_mhz, then.clock_mhz, advice)


def _swap(before: MachineUse, then: MachineUse) -> SideChange | None:
    usual, now = before.major_faults, then.major_faults
    if usual is None or now is None or now < max(MAJOR_FAULTS, DISK_FACTOR * usual):
        return None

    text = f"{now:.0f} pages per second were read back from a disk (otherwise {usual:.0f})"
    return SideChange("major_faults_per_s", text, usual, now, "Memory ran short: use less, or ask for more.")


def _disk(before: MachineUse, then: MachineUse) -> SideChange | None:
    usual, now = before.disk_read_bytes, then.disk_read_bytes
    if usual is None or now is None or now < max(DISK_BYTES, DISK_FACTOR * usual):
        return None

    text = f"the host read {bytes_text(int(now))}/s from its disks (otherwise {bytes_text(int(usual))}/s)"
    advice = "Files were read from disks and no longer from the page cache: smaller files, or more memory."
    return SideChange("disk_read_bytes_per_s", text, usual, now, advice)


def _memory(before: MachineUse, then: MachineUse, owner: str) -> SideChange | None:
    usual, now = before.memory_share, then.memory_share
    if usual is None or now is None or now - usual < MEMORY_SHARE:
        return None

    text = f"{percent_text(now)} of the {owner}'s memory was in use (otherwise {percent_text(usual)})"
    return SideChange("memory_share", text, usual, now, f"Look at what takes the {owner}'s memory then.")
