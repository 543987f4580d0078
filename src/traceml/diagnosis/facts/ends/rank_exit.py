"""The end of a rank, merged from the reports of the rank, its launcher and its flight file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from signal import SIGINT
from typing import Any, get_args

import msgspec
from msgspec.structs import replace

from traceml.diagnosis.facts.progress.uneven_data import ReadData
from traceml.formatting import line_text

__all__ = ["STORE_TIME_LIMITS", "RankExit", "ended_badly", "merged_exits", "with_last_step"]

STORE_TIME_LIMITS = ("waiting for clients", "wait timeout after")
"""What the store of a process group says when the others have not come to the group in time."""
_TIME_LIMITS = (
    "timed out waiting", "monitoredbarrier in", "in monitoredbarrier after", "collective operation timeout",
    *STORE_TIME_LIMITS,
)  # fmt: skip
"""What process groups say when the others have not come in time."""


class RankExit(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a rank, usually a failure."""

    rank: int
    state: str = "finished"  # finished, failed (exception or exit code), killed (signal), lost (gone without a message)
    code: int | None = None
    signal: int | None = None
    exception: str | None = None  # `Type: message` of the exception that ended the script
    caught: bool | None = None  # whether the script caught it, and then ended itself by sys.exit
    file: str | None = None  # the user's code that raised it, with `line` and `function`
    line: int | None = None
    function: str | None = None
    seen: str | None = None  # the user's line that was seen last in the phase that was open, `FILE:LINE FUNCTION`
    last_step: int | None = None  # last step that ended
    open_phase: str | None = None  # the phase that was open
    open_step: int | None = None  # its step
    stack: str | None = None
    # epoch seconds of the end, to separate the first from those that followed; of a process that could not tell it,
    # those of its recorder's last sign of life
    at_s: float | None = None
    reported_s: float | None = None  # epoch seconds of its launcher's report that the process had ended
    host: str | None = None
    stopped: bool | None = None  # whether its launcher ended it, because of others
    process_gone: bool | None = None  # whether the process of a lost rank has ended; else only its connection did
    open_s: float | None = None  # age of the open step at the end, seconds
    oom: str | None = None  # where the kernel counted an out-of-memory kill meanwhile: `group` (its cgroup) or `host`
    address_limit_bytes: int | None = None  # limit of its address space, where it had one
    saved_steps: int | None = None  # steps in its last checkpoint; None if it saved none
    # what the scheduler said of the job when it ended: `time_limit`, `preempted`, `warned`, `requeued`
    scheduler: str | None = None
    limit_s: float | None = None  # the job's time limit, seconds, where the scheduler reported it
    host_lost: str | None = None  # reason for which the launcher gave up its host
    skipped_exit: bool | None = None  # whether it ended without the interpreter's own end: by a signal, or `os._exit`
    in_loop: bool | None = None  # whether a loop over a data loader was open, of a process that ended at once
    returned: bool | None = None  # whether only the launched function has ended: its process waits for the other ranks
    batches: int | None = None  # with `epoch` and `data_ended`: how far it had read its data; see `ReadData`
    epoch: int | None = None
    data_ended: bool | None = None
    untraced: bool = False  # whether the script only logs: then nothing is known of its steps
    unsent: bool = False  # whether it may have gone on after its last rows: its flight file was not read
    # whether it read a checkpoint before its first step, and its steps are counted from 0 nevertheless
    counts_anew: bool = False

    def exception_mentions(self, *words: str) -> bool:
        """Return whether its exception has any of these words, in lower case."""
        text = (self.exception or "").lower()
        return any(word in text for word in words)

    @property
    def data(self) -> ReadData | None:
        """Its progress through the data that it trained on; None if unknown."""
        if self.batches is None or self.epoch is None or self.data_ended is None:
            return None

        return ReadData(self.batches, self.epoch, self.data_ended)

    @property
    def gone_s(self) -> float | None:
        """Epoch seconds from which the process certainly was gone; None if unknown."""
        return max((at_s for at_s in (self.at_s, self.reported_s) if at_s is not None), default=None)

    @property
    def reached_time_limit(self) -> bool:
        """Whether it waited for other ranks until the time limit of a collective, or of the group."""
        return self.exception_mentions(*_TIME_LIMITS)

    @property
    def in_step(self) -> bool:
        """Whether it ended in a step: the time of an evaluation, and that after the training, is in none."""
        is_open = self.open_step is not None and self.open_step != self.last_step
        return is_open and self.open_phase not in ("evaluation", "exit")

    @property
    def step(self) -> int | None:
        """The step in which it ended, or after which; None before the first."""
        if self.in_step or self.last_step is not None:
            return self.open_step if self.in_step else self.last_step

        return self.open_step - 1 if self.open_step else None

    @property
    def place(self) -> str:
        """The user's line that ended it, in words: `train.py:23 load`; empty if unknown."""
        return line_text(self.file, self.line, self.function or "<module>") if self.file and self.line else ""

    @property
    def steps(self) -> int:
        """Steps of a rank that has ended well: its end has closed the one that was open."""
        return max(-1 if step is None else step for step in (self.last_step, self.open_step)) + 1

    @classmethod
    def from_facts(cls, rank: int, state: str, reported: Mapping[str, Any], host: str | None = None) -> RankExit:
        """Return an exit from the facts of a stream, which the rank, its launcher and its flight file reported."""
        step = reported.get("open_step")
        given = {**reported, "open_step": reported.get("step") if step is None else step}
        # A script may have replaced `time.time`, and a row may come from another program.
        known = {name: given[name] for name, types in _COPIED.items() if isinstance(given.get(name), types)}
        if known.get("exception") and reported.get("message"):
            known["exception"] = f"{known['exception']}: {reported['message']}"

        if known.get("signal") and known.pop("code", None) == 0:
            known.setdefault("open_phase", "exit")  # the rank had reported a good end, which the signal replaced

        if known.get("last_step", 0) < 0:
            del known["last_step"]  # it counts appended rows: there were none

        return cls(rank=rank, state=state, host=host, **known)

    @property
    def interrupted(self) -> bool:
        """Whether the user ended it by Ctrl-C: by its signal, a shell's exit code for it, or the exception."""
        is_signal = SIGINT in (self.signal, (self.code or 0) - 128)
        return is_signal or (self.exception or "").startswith("KeyboardInterrupt")


_ALSO_TAKEN = {float: (int, float)}
_COPIED = {
    field.name: _ALSO_TAKEN.get(kind := (get_args(field.type) or (field.type,))[0], kind)
    for field in msgspec.structs.fields(RankExit)
    if field.name not in ("rank", "state", "host")
}
"""Facts of a stream that are copied, and the types of their values."""
_EXIT_FIELDS = tuple(name for name in RankExit.__struct_fields__ if name != "rank")


def merged_exits(before: RankExit, after: RankExit) -> RankExit:
    """Return the later report of an exit, with what only the earlier one knows."""
    newer = {name: getattr(after, name) for name in _EXIT_FIELDS}
    known = {name: getattr(before, name) if value is None else value for name, value in newer.items()}
    if known["signal"]:
        known["code"] = None

    return RankExit(rank=after.rank, **known)


def with_last_step(ended: RankExit, latest: Sequence[int]) -> RankExit:
    """Return an exit with the last step of its rank, where it has none."""
    if ended.last_step is not None or ended.rank >= len(latest) or latest[ended.rank] < 0:
        return ended

    return replace(ended, last_step=int(latest[ended.rank]))


def ended_badly(exits: Iterable[RankExit]) -> list[RankExit]:
    """Return the exits that are failures."""
    return [ended for ended in exits if ended.state in ("failed", "killed", "lost")]
