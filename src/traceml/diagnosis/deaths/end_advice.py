"""Advice on the end of a rank."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping

from traceml.database.schema import Resource
from traceml.diagnosis.advice import (
    EVEN_OR_TOGETHER,
    EXPLICIT_EXIT,
    SAME_COLLECTIVES,
    STORE_OF_ITS_OWN,
    WITHOUT_ANSWERS,
    longer_limit,
)
from traceml.diagnosis.deaths.closed_connections import failed_because_of_peer
from traceml.diagnosis.deaths.end_wording import exit_words, signal_of_code, was_cut_off, whereabouts
from traceml.diagnosis.deaths.exception_advice import for_exception, mentioned
from traceml.diagnosis.deaths.lost_loader_workers import BUS_ERROR, KILL, for_mapped_file, for_shared_memory
from traceml.diagnosis.deaths.out_of_memory import MemoryEnd
from traceml.diagnosis.facts.ends import STORE_TIME_LIMITS, RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.formatting import capitalized, count_text, ranks_text
from traceml.process_ends import CRASHES

__all__ = ["for_exit"]

_NOT_CONNECTED = ("timed out connecting", "connectfullmesh failed", "connection refused", "no route to host")
"""What process groups say when they cannot be set up."""
_TAKEN = ("eaddrinuse", "address already in use")
_PORT = re.compile(r"\bport: (\d+)")  # in what torch's store says
_MONITORED = "monitoredbarrier"
_WITH_WATCHDOG = "nccl"
_LEAST_LIMIT_S = 30.0  # a step that was open for less ended by no time limit of a collective: that is 10 min by default
_ASSERTED = "device-side assert"
_CUT = ("unexpected pos", "file write failed")
"""What torch.save says of a file that could not be written to its end, by its version."""
_DEVICE_ERRORS = (_ASSERTED, "illegal memory access", "unspecified launch failure", "misaligned address")
"""What CUDA and HIP say of an error in a kernel, some time after it was launched."""


def _is_cut(ended: RankExit) -> bool:
    """Return whether torch.save says that its file could not be written to the end."""
    is_cut = ended.exception_mentions("inline_container.cc") and ended.exception_mentions(*_CUT)
    return is_cut or (ended.open_phase == "checkpoint" and ended.exception_mentions("iostream error"))


def for_exit(ended: RankExit, facts: JobFacts, memory: MemoryEnd | None = None) -> str:
    """Return advice on a lost rank; one that lacked memory has `memory`."""
    if memory is not None:
        return _for_memory(memory, facts)

    text = _advice(ended, facts)
    return text if isinstance(text, str) else text(ended, facts)


def _cpu_limit_s(ended: RankExit, facts: JobFacts) -> int | None:
    """Return the limit of the process's CPU time that it had nearly used, in seconds; None if it had not."""
    near = [use for use in facts.limits if use.resource is Resource.CPU_TIME and use.rank == ended.rank and use.is_near]
    return near[0].limit if near else None


def _for_cpu_time(ended: RankExit, facts: JobFacts) -> str:
    limit_s = _cpu_limit_s(ended, facts)
    allowed = "" if limit_s is None else f"{count_text(limit_s)} s of "
    return (
        f"The process had used the {allowed}CPU time that its shell or host allows (ulimit -t): raise the limit, run "
        "the training as a job of the scheduler instead of on a login host, or save checkpoints to resume from."
    )


def _for_bus_error(ended: RankExit, facts: JobFacts) -> str:
    """Return advice on SIGBUS: the kernel has no page for an address of shared memory, or of a mapped file."""
    host = facts.hosts.get(ended.rank)
    known = [
        use for use in facts.limits if use.resource is Resource.SHARED_MEMORY and facts.hosts.get(use.rank) == host
    ]
    if not known:
        return for_shared_memory()

    shared = max(known, key=lambda use: use.share)
    if shared.is_near:
        return for_shared_memory(shared.limit)

    return for_mapped_file(shared.used, shared.limit, f" at {ended.place}" if ended.place else "")


def _for_memory(memory: MemoryEnd, facts: JobFacts) -> str:
    if memory.is_too_large:
        return (
            "That one allocation is larger than all the memory that there is: look at the sizes that the line makes it "
            "of, such as each sample by each other one."
        )
    if memory.cause == "device_allocation":
        return (
            "Use a smaller batch, activation checkpointing, or shard the model; a batch or evaluation that is larger "
            "than usual needs more at its peak (torch.no_grad() in evaluation)."
        )
    if memory.grows:
        return (
            "Something holds on to memory: look for tensors or batches that are appended to a list, a cache "
            "without bound, or losses kept with their graph (use loss.item())."
        )
    if memory.cause == "killed":
        fewer = "fewer loader workers, a smaller prefetch_factor, " if facts.has_loader_workers else "a smaller "
        return (
            f"Use {fewer}batch or data set in memory, or ask for more memory (--mem of Slurm, the container's limit)."
        )

    return "Allocate less at once, or raise the limit: ulimit -v, the container's or the job's memory limit."


def _for_device_error(ended: RankExit, _: JobFacts) -> str:
    usual = (
        "As a rule an index is out of range: a token or a label that is not below the size of the embedding or of the "
        "output; on the CPU the same batch raises an IndexError."
        if ended.exception_mentions(_ASSERTED)
        else "compute-sanitizer names the kernel and the address; custom kernels and extensions are the usual cause."
    )
    return (
        f"The device reports errors late: run it with CUDA_LAUNCH_BLOCKING=1 to get the line that launched it. {usual}"
    )


def _for_files(ended: RankExit, facts: JobFacts) -> str:
    limits = [use.limit for use in facts.limits if use.resource is Resource.OPEN_FILES and use.rank == ended.rank]
    limit = limits[0] if limits else None
    now = "" if limit is None else f" of {count_text(limit)}"
    return (
        "Close what the script opens (files in a Dataset, loggers), call "
        "torch.multiprocessing.set_sharing_strategy('file_system') before loaders with workers, or raise the "
        f"limit{now}: ulimit -n."
    )


def _for_time_limit(ended: RankExit, facts: JobFacts) -> str:
    """Return advice on a rank that waited in a collective until its time limit, with those that were elsewhere."""
    others = (each for each in facts.exits if each.rank != ended.rank and each.open_phase != ended.open_phase)
    unseen = f"nothing was seen of {ranks_text(facts.unseen_ranks)}" if facts.unseen_ranks else ""
    elsewhere = ", ".join(filter(None, [whereabouts(others), unseen]))
    where = f": {elsewhere}" if elsewhere else ""
    what = "process group" if ended.exception_mentions(*STORE_TIME_LIMITS) else "collective"
    has_own_limit = ended.exception_mentions(_MONITORED)
    limit = longer_limit("monitored_barrier") if has_own_limit else longer_limit()
    return (
        f"Rank {ended.rank} waited for other ranks until the time limit of its {what}{where}. Let all ranks come to "
        f"it, or {limit}"
    )


def _for_taken_port(ended: RankExit, _: JobFacts) -> str:
    """Return advice on a server whose port another program has: the store of a group, or the script's own."""
    found = _PORT.search(ended.exception or "")
    has = f"Port {found[1]} is taken" if found else "The port is taken"
    return (
        f"{has}: by an earlier job that is still running, another job on this host, or the launcher's own store "
        "(`ss -ltnp` names the process). End that, or take another port: MASTER_PORT, or --standalone of torchrun, "
        "which takes a free one."
    )


def _for_peer(ended: RankExit, facts: JobFacts) -> str:
    if ended.exception_mentions(*_NOT_CONNECTED):
        if facts.store_restarts and ended.step is None:
            return STORE_OF_ITS_OWN

        return (
            f"Rank {ended.rank} could not reach another rank: look in the output for one that ended, or that started "
            "later than the time limit of init_process_group allows; between hosts, check the interface "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and the firewall."
        )

    if ended.reached_time_limit:
        return _for_time_limit(ended, facts)

    look = (
        "look for destroy_process_group(), an early return or a caught exception on the others; "
        f"{_traceback_text(ended)}"
    )
    known = {each.rank for each in facts.exits}
    if unknown := [rank for rank in range(facts.world_size) if rank not in known]:
        look_at = "whether it runs, and at its host" if len(unknown) == 1 else "whether they run, and at their hosts"
        return (
            f"Another rank closed its connection. The end of {ranks_text(unknown)} is not known: look {look_at} and "
            f"output. If all others still run, {look}."
        )

    return f"Another rank closed its connection while it still ran: {look}."


def _traceback_text(ended: RankExit) -> str:
    """Return where the traceback of a rank is: the interpreter prints that of an exception which nobody catches."""
    if ended.caught:
        return (
            f"the script of rank {ended.rank} caught its exception and ended itself: the run's output has the "
            "traceback only if the script printed it"
        )

    return f"the full traceback of rank {ended.rank} is in the run's output"


def _for_sizes(ended: RankExit, facts: JobFacts) -> str:
    """Return advice on a process that its backend ended because another rank sent more or less than it expects."""
    reason = f"The output of rank {ended.rank} gives the reason (`terminate called`)."
    if uneven := _for_left_loop(facts):
        return f"{uneven} {reason}"

    in_backward = [each.rank for each in facts.exits if each.open_phase == "backward"]
    if not in_backward:
        return (
            "Compare the sizes and types of that collective on all ranks, and whether all ranks call it: where these "
            "differ, the backend ends the process. The same happens where a thread uses the training's process group, "
            f"as that of async_save without a group of its own. {reason}"
        )

    be = "was" if len(in_backward) == 1 else "were"
    return (
        f"Call that collective on every rank, or on none: {ranks_text(in_backward)} {be} in backward. Its sizes and "
        f"types must be equal too: where they differ, the backend ends the process. {reason}"
    )


def _for_watchdog(ended: RankExit, facts: JobFacts) -> str:
    """Return advice on a process that NCCL's watchdog may have ended, as far as its signal tells."""
    if ended.open_s is not None and ended.open_s < _LEAST_LIMIT_S:
        return (
            f"Read `terminate called` in the output of rank {ended.rank}: NCCL's watchdog ends a process after an "
            f"error of the device. If it does not name that: {_for_crash(ended)}"
        )

    return _for_left_loop(facts) or (
        "As a rule NCCL's watchdog does that, after a time limit or an error of the device: `terminate called` in the "
        f"output of rank {ended.rank} tells which. If it was the limit: {_for_time_limit(ended, facts)}"
    )


def _for_left_loop(facts: JobFacts) -> str:
    """Return advice where the loop over the data of some ranks was over, and others were in backward; else ""."""
    left = [each.rank for each in facts.exits if each.in_loop is False and each.open_phase != "backward"]
    training = [each.rank for each in facts.exits if each.open_phase == "backward"]
    if not left or not training or facts.loader is None:
        return ""

    their, be = "its" if len(left) == 1 else "their", "was" if len(training) == 1 else "were"
    return (
        f"{capitalized(ranks_text(left))} had left {their} loop over the data, and {ranks_text(training)} {be} in "
        f"backward. {EVEN_OR_TOGETHER}"
    )


def _for_abort(ended: RankExit, _facts: JobFacts) -> str:
    """Return advice on an abort outside of the script's collectives: in backward, or perhaps in a thread."""
    call = f"the call at {ended.place}" if ended.place else "native code"
    return (
        f"Read `terminate called` in the output of rank {ended.rank}. If it names gloo, the ranks gave one collective "
        "different sizes, or called collectives in different orders: look at communication hooks, at parameters that "
        "only some ranks use, and at threads that call collectives beside the training, as those of async_save, which "
        f"need a process group of their own. Otherwise {call} crashed in an extension, or in a library of another "
        "version."
    )


def _for_no_batch(_ended: RankExit, facts: JobFacts) -> str:
    dataset = (facts.loader and facts.loader.dataset) or "the data set"
    return (
        f"No loader worker had a batch in that time: look for a sample that {dataset} takes so long to read (while "
        "the run waits, `traceml stacks` shows the line of each worker), or raise the loader's timeout."
    )


def _for_exit_code(ended: RankExit, _facts: JobFacts) -> str:
    if not ended.file:
        return f"Read rank {ended.rank}'s output for why it ended with exit code {ended.code}."

    return (
        f"The script ended itself with exit code {ended.code}: look at the condition that leads to {ended.place}, and "
        f"at rank {ended.rank}'s output."
    )


def _for_kill(ended: RankExit, facts: JobFacts) -> str:
    if _cpu_limit_s(ended, facts):
        return _for_cpu_time(ended, facts)

    return (
        "SIGKILL comes from outside the process: look for the kernel's out-of-memory killer (dmesg, the scheduler's "
        "log), the job's memory limit, or a kill command."
    )


def _for_broken_pipe(ended: RankExit, _: JobFacts) -> str:
    wrote = f"{ended.place} wrote" if ended.place else "It wrote"
    return (
        f"{wrote} to a pipe or a connection that its reader had closed. If that line prints, the reader of the job's "
        "output had ended (`| head`, `| less`): let it read to the end, or write the output to a file; "
        f"{_traceback_text(ended)}."
    )


_Text = str | Callable[[RankExit, JobFacts], str]

_TIMER = "A timer that the script or a library has set (signal.alarm, setitimer) ran out, and nothing handled it."
_TOO_LARGE = (
    "A file became larger than its shell or host allows (ulimit -f): raise the limit, or save in several files."
)
_NO_ROOM = (
    "Make room on the disk of that file (df -h, df -i, the user's quota), and keep fewer checkpoints; where there is "
    "room, look at the limit of a file's size (ulimit -f). The last file is not complete: resume from the one before."
)
_BY_SIGNAL: Mapping[int | None, _Text] = {
    signal.SIGXCPU: _for_cpu_time,
    KILL: _for_kill,
    signal.SIGHUP: (
        "The terminal or the ssh session was closed: start the run in tmux or screen, or with setsid; nohup does not "
        "protect the ranks of torchrun."
    ),
    signal.SIGPIPE: (
        "The script wrote to a pipe or a connection that its reader had closed (`| head`, a server that ended). Python "
        "raises BrokenPipeError there, unless the script resets the signal (signal.SIG_DFL)."
    ),
    signal.SIGALRM: _TIMER,
    signal.SIGVTALRM: _TIMER,
    signal.SIGPROF: _TIMER,
    signal.SIGXFSZ: _TOO_LARGE,
    BUS_ERROR: _for_bus_error,
}
# What the exception says of a resource that ran out, whatever ended the process then.
_BY_RESOURCE: Mapping[tuple[str, ...], _Text] = {
    ("file too large",): _TOO_LARGE,
    # The second is what multiprocessing says when the kernel drops the descriptors of a batch.
    ("too many open files", "items of ancdata"): _for_files,
    ("out of resource: shared memory",): (
        "A kernel of Triton needs more shared memory of the GPU than there is (the message has both sizes): choose "
        "smaller blocks or a lower num_stages."
    ),
    ("shared memory", "bus error", "/dev/shm"): for_shared_memory(),  # noqa: S108 - a message
    ("no space left", "disk quota exceeded"): _NO_ROOM,
    _TAKEN: _for_taken_port,
}
_BY_WORDS: Mapping[tuple[str, ...], _Text] = {
    ("collective mismatch",): f"{SAME_COLLECTIVES} Their tensors must have equal sizes and types, too.",
    ("expected to have finished reduction",): (
        "Some parameters got no gradient in the step before: leave them out of the model or of its gradients "
        "(requires_grad_(False)), or pass find_unused_parameters=True to DistributedDataParallel. The message has "
        "their numbers, and with TORCH_DISTRIBUTED_DEBUG=DETAIL their names."
    ),
    ("eoferror: eof when reading a line",): WITHOUT_ANSWERS,
    ("brokenpipeerror: ",): _for_broken_pipe,
    ("dataloader timed out after",): _for_no_batch,
    _DEVICE_ERRORS: _for_device_error,
}


def _advice(ended: RankExit, facts: JobFacts) -> _Text:
    """Return the first advice that applies: what is known for certain stands above what is usual."""
    if ended.signal in _BY_SIGNAL:
        return _BY_SIGNAL[ended.signal]

    if _is_cut(ended):
        return _NO_ROOM

    if text := mentioned(ended, _BY_RESOURCE):
        return text

    if ended.signal is not None:
        return _for_signal(ended, facts)

    if exit_words(ended) is not None:
        return f"The script ended itself with this text: look at the condition that leads to {ended.place or 'it'}."

    if facts.world_size > 1 and failed_because_of_peer(ended):
        return _for_peer

    if ended.open_phase == "checkpoint" and ended.exception_mentions("pickle"):
        return (
            "Save state_dict() of the model and the optimizer instead of the objects: a lambda, a local class or "
            "function, a lock or an open file in them cannot be pickled."
        )

    if text := mentioned(ended, _BY_WORDS):
        return text

    if text := for_exception(ended, facts):
        return text

    if ended.exception:
        look = f"Read {ended.place}" if ended.file else "Look at that exception"
        return f"{look}; {_traceback_text(ended)}."

    return _without_report(ended)


def _for_signal(ended: RankExit, facts: JobFacts) -> _Text:
    is_abort = ended.signal == signal.SIGABRT and facts.world_size > 1
    is_in_script = ended.exception is None and ended.open_phase not in (None, "exit")
    if is_abort and is_in_script and facts.backend == _WITH_WATCHDOG:
        return _for_watchdog

    if is_abort and (is_in_script or ended.open_phase in ("comm", "backward")):
        return _for_sizes if ended.open_phase == "comm" else _for_abort

    if ended.signal not in CRASHES:
        return "Find out what sent the signal: the scheduler's time limit, a preemption, or a kill command."

    if ended.open_phase == "exit":
        return (
            "The script had ended, and its process crashed while the interpreter did. As a rule a daemon thread (which "
            "prefetches, logs or uploads) still calls torch or another extension then: stop and join it before the "
            "script ends."
        )

    return capitalized(_for_crash(ended))


def _for_crash(ended: RankExit) -> str:
    """Return advice on a crash in native code, without a capital."""
    if ended.file:
        return f"look at the call at {ended.place}: an extension, or a library of another version, crashed."

    return "run that rank with faulthandler (python -X faulthandler) to see the line in native code that crashed."


def _without_report(ended: RankExit) -> _Text:
    """Return advice on an end of which only a code is known, or that its connection was lost."""
    if was_cut_off(ended):
        return EXPLICIT_EXIT

    host = f" {ended.host}" if ended.host else ""
    if ended.state == "lost" and ended.host_lost:
        return (
            f"Look at the host{host}: whether it or its network was down, and whether the launch agent there was "
            "killed or stopped; the launcher ends a job whose agent is silent for 15 s."
            + (" If it shares the runs folder, `traceml sync` there stores what had not arrived." * ended.unsent)
        )

    if ended.state == "lost" and ended.process_gone:
        return (
            f"Look for what ended rank {ended.rank}'s process: the kernel's out-of-memory killer (dmesg), the job's "
            "memory or time limit, or a kill command; the output of `traceml run`, torchrun or srun names the signal."
        )

    if ended.state == "lost":
        return f"Look at the host{host} of rank {ended.rank} and its network: the connection ended without a report."

    if signal_of_code(ended.code) is not None:
        return f"The rank is a wrapper; a signal ended the program that it started: read rank {ended.rank}'s output."

    return _for_exit_code
