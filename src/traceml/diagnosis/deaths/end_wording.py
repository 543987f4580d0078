"""Words for the end of a rank, in a sentence or in short: what ended it, where, and in which step."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from traceml.diagnosis.facts.ends import RankExit
from traceml.formatting import (
    bytes_text,
    count_text,
    exception_line,
    parsed_place,
    phase_words,
    place_words,
    short_exception,
)
from traceml.process_ends import exit_text, signal_name, signal_text

if TYPE_CHECKING:  # it needs numpy, whose import takes as long as the rest of the card of a finished report
    from traceml.diagnosis.deaths.out_of_memory import MemoryEnd

__all__ = [
    "end_summary", "end_text", "exit_words", "in_common", "place_evidence", "seen_text", "signal_of_code", "step_text",
    "was_cut_off", "whereabouts",
]  # fmt: skip

_MAX_SIGNAL = 64
_MAX_REPORTED = 3
"""Ranks whose place in the script is reported."""
_SYSTEM_EXIT = "SystemExit"  # as the row of an end has it: `SystemExit: TEXT`
_CODES = {126: "a shell's code for 'cannot execute'", 127: "a shell's code for 'command not found'"}


def signal_of_code(code: int | None) -> int | None:
    """Return the signal that a shell's exit code stands for (128 + n); None for another code."""
    number = (code or 0) - 128
    return number if 0 < number <= _MAX_SIGNAL and number in set(signal.Signals) else None


def exit_words(ended: RankExit) -> str | None:
    """Return the text with which a script ended itself: `sys.exit('no data')`; None if it did not."""
    name, _, text = (ended.exception or "").partition(": ")
    return text if name == _SYSTEM_EXIT else None


def was_cut_off(ended: RankExit) -> bool:
    """Whether a process left with exit code 0 before its script had ended."""
    return ended.state == "lost" and ended.code == 0


def end_text(ended: RankExit, memory: MemoryEnd | None, *, many: bool) -> str:
    """Return what ended a rank: `was killed by signal 9 (SIGKILL)`."""
    was = "were" if many else "was"
    if memory is not None and memory.cause == "killed" and (ended.signal or not ended.exception):
        if memory.certain:
            return f"{was} killed by the kernel for lack of memory ({_signal_text(ended)})"

        how = "while the kernel was killing processes of the host for lack of memory"
        return f"{was} killed ({_signal_text(ended)}) {how}"

    at = f" at {ended.place}" if ended.place else ""
    if memory is not None and ended.exception:
        what = "device memory" if memory.cause == "device_allocation" else "memory"
        size = (
            "" if memory.requested_bytes is None else f": an allocation of {bytes_text(memory.requested_bytes)} failed"
        )
        kind = "" if size else f" ({short_exception(ended.exception or '')})"
        return f"ran out of {what}{kind}{size}{at}"

    # Its launcher ended it while it failed, or it crashed at its end: place and stack are those of the exception.
    was_failing = ended.exception is not None and not ended.interrupted
    if ended.signal is not None and not (was_failing and ended.stopped):
        at = f" in C code called at {ended.place}" if ended.place and ended.stack and not was_failing else ""
        return f"{was} killed by {signal_text(ended.signal)}{at}"

    if (words := exit_words(ended)) is not None:
        return f"ended by sys.exit({short_exception(words)!r}){at}"

    if ended.exception:
        return f"ended with {short_exception(ended.exception)}{at}"

    if ended.state == "lost" and ended.host_lost:
        return f"{was} lost with {'their' if many else 'its'} host: {ended.host_lost}"

    if was_cut_off(ended):
        return f"ended with exit code 0 in the middle of {'their' if many else 'its'} script"

    if ended.state == "lost" and ended.process_gone:
        return "ended without a report: by a signal or by os._exit"

    if ended.state == "lost":
        return "lost its connection without a report" if not many else "lost their connections without a report"

    return f"{exit_text(ended.code)}{_code_text(ended.code)}{at}"


def end_summary(ended: RankExit) -> str | None:
    """Return how a rank ended badly: `killed by SIGKILL, last step 36, in forward`; None if it did not."""
    if ended.state in ("running", "finished"):
        return None

    text = ended.state
    if ended.signal is not None:
        text = f"killed by {signal_name(ended.signal)}"
    elif ended.exception:  # a script that handles Ctrl-C, as Lightning does, may then exit with a code of its own
        how = "stopped" if ended.exception.startswith("KeyboardInterrupt") else "failed"
        text = f"{how} with {exception_line(ended.exception) or 'an exception'}"
    elif ended.code is not None:
        text = f"{ended.state} with exit code {ended.code}"

    when = "" if ended.last_step is None or ended.last_step < 0 else f", last step {count_text(ended.last_step)}"
    return f"{text}{when}{_phase_text(ended)}"


def step_text(ended: RankExit, *, of_one: bool = False) -> str:
    """Return when a rank ended: `, in step 42, in forward`, or `, in evaluation, after step 41`.

    A script that continues from a checkpoint may count on where that one ended: `, in step 42 of this run`.

    Args:
        of_one: whether other ranks of the sentence ended in other steps: then it is `, in step 42 on rank 1`.
    """
    if ended.untraced:
        return ""

    inside = _phase_text(ended)
    on = f" on rank {ended.rank}" * of_one
    step = f"step {count_text(ended.step)}{' of this run' * ended.counts_anew}{on}"
    if ended.in_step:
        return f", in {step}{inside}"

    arrived = " had arrived" if ended.state == "lost" and ended.unsent else ""
    if ended.step is None:
        return f"{inside}, before {'a' if arrived else 'the first'} step{arrived}{on}"

    return f"{inside}, after {step}{arrived}"


def in_common(first: RankExit, ends: Iterable[RankExit]) -> RankExit:
    """Return the end of one rank, without its phase where others were in another one."""
    if all(ended.open_phase == first.open_phase for ended in ends):
        return first

    outside = {} if first.in_step else {"open_step": None, "last_step": first.step}
    return replace(first, open_phase=None, **outside)


def seen_text(ended: RankExit) -> str:
    """Return the line in which a rank was seen last: `, last seen at train.py:23 load`; "" where it has one."""
    place = place_words(*_seen(ended))
    return f", last seen at {place}" if place else ""


def whereabouts(exits: Iterable[RankExit]) -> str:
    """Return where ranks were at their end: `rank 1 was in forward, last seen at train.py:23 test`; else ""."""
    known = [
        f"rank {each.rank} was in {phase_words(each.open_phase)}{seen_text(each)}" for each in exits if each.open_phase
    ]
    more = [f"{count_text(len(known) - _MAX_REPORTED)} more are not listed"] if len(known) > _MAX_REPORTED else []
    return ", ".join([*known[:_MAX_REPORTED], *more])


def place_evidence(ended: RankExit) -> dict[str, object]:
    """Return `file`, `line` and `function` for a finding's evidence: where a rank ended, or else was seen last."""
    file, line, function = (ended.file, ended.line, ended.function) if ended.file else _seen(ended)
    return {"file": file, "line": line, "function": function}


def _phase_text(ended: RankExit) -> str:
    return f", in {phase_words(ended.open_phase)}" if ended.open_phase else ""


def _seen(ended: RankExit) -> tuple[str | None, int | None, str | None]:
    return parsed_place(None if ended.file else ended.seen)


def _signal_text(ended: RankExit) -> str:
    return signal_name(ended.signal or signal.SIGKILL)


def _code_text(code: int | None) -> str:
    if code in _CODES:
        return f", {_CODES[code]}"

    number = signal_of_code(code)
    return f", a shell's code for {signal_text(number)}" if number is not None else ""
