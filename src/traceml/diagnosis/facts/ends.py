"""Ends of ranks, of loader workers and of the job, as processes, launchers and flight files report them."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import msgspec
from msgspec.structs import replace

from traceml.formatting import count_text, line_text, ranks_text

if TYPE_CHECKING:  # it needs numpy
    from traceml.database.store.records import StreamRecord

__all__ = [
    "ATTEMPT", "END", "STORE_TIME_LIMITS", "EndingSignal", "LostWorker", "RankExit", "ReadData", "UnevenData",
    "ended_badly", "ending_signal_of", "lost_worker_of", "merged_exits", "scheduler_words", "uneven_data", "worker_in",
]  # fmt: skip

ATTEMPT = "attempt"
"""Kind of the event at the begin of each attempt of a job but the first: `{"attempt"}`."""
END = "end"
"""Kind of the event at the end of a run: `{"state", "status", "ended_by"}`, see `ending_signal_of`."""
STORE_TIME_LIMITS = ("waiting for clients", "wait timeout after")
"""What the store of a process group says when the others have not come to the group in time."""
_TIME_LIMITS = (
    "timed out waiting", "monitoredbarrier in", "in monitoredbarrier after", "collective operation timeout",
    *STORE_TIME_LIMITS,
)  # fmt: skip
"""What process groups say when the others have not come in time."""
_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pid>\d+)[^)]*\) (?P<how>is killed by signal|exited)")
_SIGNAL = re.compile(r"is killed by signal: (?P<words>[^.]+)")
_STATUS = re.compile(r"with exit code (?P<code>\d+)")
_SCHEDULER = ("time_limit", "preempted", "warned", "requeued", "cancelled")
_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that ask for the end; by SIGINT a user stops the job by hand."""


class ReadData(NamedTuple):
    """Progress of a rank through the data that it trains on."""

    batches: int  # in all epochs; -1 without a data loader
    epoch: int
    is_over: bool  # whether it has no batch left in that epoch


class UnevenData(msgspec.Struct, frozen=True):
    """Ranks whose data has ended, and the batches of all."""

    ranks: tuple[int, ...]
    batches: tuple[int, int]  # least and most batches of these ranks
    others: tuple[int, int] | None = None  # least and most batches of the others; they may get more; None if unknown

    @property
    def text(self) -> str:
        """`51 batches, the others 52`."""
        unit = "batch" if self.batches[1] == 1 else "batches"
        others = "" if self.others is None else f", the others {_range(self.others)}"
        return f"{_range(self.batches)} {unit}{others}"

    @property
    def sentence(self) -> str:
        """A sentence: the data of which ranks had ended, after how many batches."""
        return f"The data of {ranks_text(self.ranks)} had ended ({self.text})."

    @property
    def evidence(self) -> dict[str, int]:
        """The batches as a finding has them."""
        others = {} if self.others is None else {"batches_of_others": min(self.others)}
        return {"batches": max(self.batches), **others}


def uneven_data(data: Mapping[int, ReadData]) -> UnevenData | None:
    """Return the ranks whose data has ended, if each of the others has had more batches, and is in no later epoch.

    One that is in the next epoch has come past the end of its own data. Ranks without a data loader, as in a pipeline,
    do not count.
    """
    known = {rank: each for rank, each in data.items() if each.batches >= 0}
    over = {rank: each for rank, each in known.items() if each.is_over}
    others = [each for each in known.values() if not each.is_over]
    if not over or not others or max(each.epoch for each in others) > min(each.epoch for each in over.values()):
        return None

    batches, more = [sorted(each.batches for each in some) for some in (over.values(), others)]
    if batches[-1] >= more[0]:
        return None

    return UnevenData(tuple(sorted(over)), (batches[0], batches[-1]), (more[0], more[-1]))


def _range(counts: tuple[int, int]) -> str:
    """Return `51`, or `51 to 53`."""
    least, most = counts
    return count_text(least) + (f" to {count_text(most)}" if least < most else "")


class RankExit(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a rank, usually a failure."""

    rank: int
    state: str = "finished"  # finished, failed (exception or exit code), killed (signal), lost (gone without a message)
    code: int | None = None
    signal: int | None = None
    exception: str | None = None  # `Type: message` of the exception that ended the script
    raised_as: str | None = None  # the same of the exception as which it was raised again
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
    # what the scheduler said of the job when it ended: `time_limit`, `preempted`, `warned`, `requeued`,
    # `cancelled`
    scheduler: str | None = None
    limit_s: float | None = None  # the job's time limit, seconds, where the scheduler reported it
    host_lost: str | None = None  # reason for which the launcher gave up its host
    skipped_exit: bool | None = None  # whether it ended without the interpreter's own end: by a signal, or `os._exit`
    in_loop: bool | None = None  # whether a loop over a data loader was open, of a process that ended at once
    returned: bool | None = None  # whether only the launched function has ended: its process waits for the other ranks
    batches: int | None = None  # with `epoch` and `data_ended`: how far it had read its data; see `ReadData`
    epoch: int | None = None
    data_ended: bool | None = None
    samples: int | None = None  # of the model's input in the step in which it ended, where the model had one
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

    @classmethod
    def of_stream(cls, stream: StreamRecord) -> RankExit:
        """Return how the process of a stored stream has ended, as far as is known."""
        return cls.from_facts(stream.rank, stream.state, stream.facts.get("exit", {}), stream.host)

    def with_last_step(self, latest: Sequence[int]) -> RankExit:
        """Return it with the last step of its rank, where it has none."""
        if self.last_step is not None or self.rank >= len(latest) or latest[self.rank] < 0:
            return self

        return replace(self, last_step=int(latest[self.rank]))

    @property
    def interrupted(self) -> bool:
        """Whether the user ended it by Ctrl-C: by its signal, a shell's exit code for it, or the exception."""
        is_signal = signal.SIGINT in (self.signal, (self.code or 0) - 128)
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


def ended_badly(exits: Iterable[RankExit]) -> list[RankExit]:
    """Return the exits that are failures."""
    return [ended for ended in exits if ended.state in ("failed", "killed", "lost")]


class LostWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A loader worker that died."""

    pid: int
    worker: int | None = None  # its number in the loader, from 0
    workers: int | None = None  # how many there were
    signal: int | None = None
    code: int | None = None
    step: int | None = None
    oom_kills: int | None = None  # processes that the out-of-memory killer had ended since the start of the rank
    shm_bytes: int | None = None  # shared memory of the host
    shm_used_bytes: int | None = None  # its use after the death, without the worker's own
    memory_limit_bytes: int | None = None


_FIELDS = LostWorker.__struct_fields__


def lost_worker_of(row: Mapping[str, Any]) -> LostWorker | None:
    """Return the worker of an `info` row; None if the row is not a valid one."""
    known = {name: row[name] for name in _FIELDS if isinstance(row.get(name), int)}
    if "pid" not in known:
        return None

    reported = worker_in(str(row.get("message", "")))
    if reported is not None and "signal" not in known and "code" not in known:
        known |= {"signal": reported.signal, "code": reported.code}

    return LostWorker(**known)


def worker_in(exception: str) -> LostWorker | None:
    """Return the worker whose death an exception of torch's loader reports; None for another exception."""
    found = _DIED.search(exception)
    if found is None:
        return None

    status, words = _STATUS.search(exception), _SIGNAL.search(exception)
    return LostWorker(
        pid=int(found["pid"]),
        signal=_number_of(words["words"].strip()) if words else None,
        code=int(status["code"]) if status else None,
    )


def _number_of(words: str) -> int | None:
    """Return the signal that the C library calls so: 9 for `Killed`."""
    return next((int(number) for number in signal.valid_signals() if signal.strsignal(number) == words), None)


class EndingSignal(NamedTuple):
    """A signal that ended a job, or 0 if its launcher ended without a word, as by SIGKILL."""

    number: int
    at_s: float  # epoch seconds at which the launcher received it
    sender: str = ""  # name of the program that sent it; empty if unknown
    sender_pid: int | None = None  # its process, 0 if it is outside of this container; None if unknown
    waited_s: float = 0.0  # time from the signal to the end of the job, seconds
    from_terminal: bool = False  # whether it came because the launcher's terminal was closed
    launcher_pid: int | None = None  # the launcher that ended without a word; None if it received a signal
    # why the scheduler ended the job, as `RankExit` has it; None if it did not, or did not say
    scheduler: str | None = None
    limit_s: float | None = None  # the job's time limit, seconds; None if unknown


def ending_signal_of(facts: object) -> EndingSignal | None:
    """Return the signal that a launcher has reported: `{signal, time, sender, sender_pid, from_terminal, waited_s}`.

    It may have what the scheduler said, too: see `scheduler_words`. None if it reported no signal, or one by which
    nobody ends a job. Of a launcher that is gone, its aggregator reports `{launcher_pid, time}`.
    """
    if isinstance(facts, Mapping) and isinstance(pid := facts.get("launcher_pid"), int):
        return EndingSignal(0, _seconds(facts.get("time")), launcher_pid=pid)

    if not isinstance(facts, Mapping) or facts.get("signal") not in _ENDING:
        return None

    sender, pid = facts.get("sender"), facts.get("sender_pid")
    return EndingSignal(
        number=int(facts["signal"]),
        at_s=_seconds(facts.get("time")),
        sender=sender if isinstance(sender, str) else "",
        sender_pid=pid if isinstance(pid, int) else None,
        waited_s=_seconds(facts.get("waited_s")),
        from_terminal=facts.get("from_terminal") is True,
        **scheduler_words(facts),
    )


def scheduler_words(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a launcher's report has of the scheduler: `scheduler` and `limit_s`; empty if it ended nothing."""
    if facts.get("scheduler") not in _SCHEDULER:
        return {}

    limit_s = _seconds(facts.get("limit_s"))
    return {"scheduler": facts["scheduler"]} | ({"limit_s": limit_s} if limit_s > 0 else {})


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
