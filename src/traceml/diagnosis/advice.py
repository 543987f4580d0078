"""Advice: what to do next, specific to the facts.

Here are the longer texts of `rules/`, and those that several rules share. Short ones are in the module of their rule;
advice on loading, ends and hangs has modules of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from traceml.database.schema import LINE_PHASES, LINE_THREADS
from traceml.diagnosis.facts.blamed_lines import (
    AWAITS_ANSWERS,
    DEEP_COPIES,
    PICKLING,
    TORCH,
    WAITS_FOR_OTHERS,
    WITHOUT_MODELS,
    BlamedLine,
    awaits_others,
    blamed_line,
    calls_code,
    computes_loss,
    is_of_loop,
    is_of_model,
    is_of_ranks_alone,
    main_library,
    runs_forward,
    threads_line,
)
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import busy_share, environment_share
from traceml.diagnosis.facts.topology import RankGroup
from traceml.diagnosis.steps.own_work import COMPUTE, UNNAMED_CODE
from traceml.formatting import bytes_text, capitalized, gain_text, percent_text, ranks_text

__all__ = [
    "AS_MUCH_IN_EACH_STEP", "EMPTY_DATA_SET", "EVENT_LOOP", "EVEN_BATCHES", "EVEN_OR_TOGETHER", "EXPLICIT_EXIT",
    "IN_SAME_STEPS", "SAME_COLLECTIVES", "STOP_TOGETHER", "STORE_OF_ITS_OWN", "WAITED_FOR", "WITHOUT_ANOMALIES",
    "WITHOUT_ANSWERS", "WITHOUT_PROFILER", "flush_denormals", "for_comm", "for_copies", "for_debugging",
    "for_first_batches", "for_jitter", "for_large_batches", "for_long_stage", "for_more_work", "for_own_code",
    "for_rank_without_core",
    "for_reading_ranks", "for_residual", "for_rollouts", "for_saving", "for_slow_group", "for_straggler",
    "for_unmeasured_jitter", "in_threads", "longer_limit", "reading_ahead", "waiting_text",
]  # fmt: skip


MIN_PLAYED = 0.3
"""Environments are advised on if they take this share of the time, where no line has most of it."""
EVENT_LOOP = "EpollSelector.select"
"""Library function in which asyncio's event loop waits while no task can run."""
WAITED_FOR = "for a sleep, a disk, a server, another thread or process"
"""What code that does not compute may wait for."""
WITHOUT_ANOMALIES = (
    "Turn off autograd's anomaly detection (set_detect_anomaly, detect_anomaly): it records the stack of each "
    "operation and checks each gradient, which only the search for a NaN needs."
)
WITHOUT_PROFILER = (
    "Turn off torch's profiler, or let it record some steps only (schedule=torch.profiler.schedule(wait=100, warmup=2, "
    "active=5, repeat=1)): it records each operation of every step, which makes all of them slower, and keeps it in "
    "memory."
)
STORE_OF_ITS_OWN = (
    "After a restart torchrun gives the ranks the store of the attempt before, in which some find addresses of "
    "processes that have ended. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, with --standalone on one host or "
    "--rdzv-backend=c10d on several: then each attempt has a store of its own."
)
"""For ranks that do not find each other after torchrun has restarted them."""
SAME_COLLECTIVES = (
    "Call the same collectives in the same order on every rank: look for a branch on the rank, or on data that "
    "differs between ranks."
)
"""For ranks that call different collectives."""
WITHOUT_ANSWERS = "Pass the answer as an option of the script, or in a file: nobody can answer in a job."
"""For a script that reads from its input."""
EMPTY_DATA_SET = (
    "The data set is empty: look at its folder, at the pattern of its files, and at what its filters leave. A relative "
    "path begins in the folder in which the run was started."
)
EXPLICIT_EXIT = (
    "Look for os._exit(0) in the script and its libraries, or for exit() in C code: nothing after it has run. A "
    "script that ends this way on purpose must call traceml.shutdown() first."
)
"""For a process that ended with exit code 0 without the interpreter's own end."""
IN_SAME_STEPS = " Or do it on all ranks in the same steps: now the others wait for each one that does it."
"""Further advice on work that ranks do in turns."""
AS_MUCH_IN_EACH_STEP = " Or give each rank as much of it in the same step: now the others wait for the longest."
"""Further advice on work that is uneven from step to step."""
_EVEN = (
    "give each rank the same number of batches (DistributedSampler, drop_last=True), or train under "
    "torch.distributed.algorithms.join.Join, which lets ranks end early."
)
_TOGETHER = "let all ranks decide alike whether to leave the loop (early stopping, a limit): all_reduce the condition."
EVEN_BATCHES, STOP_TOGETHER = capitalized(_EVEN), capitalized(_TOGETHER)
"""For ranks that end before the others: because their data ended first, or by a condition of their own;"""
EVEN_OR_TOGETHER = f"If the data ended there, {_EVEN} Otherwise {_TOGETHER}"
"""and where it is not known why."""
_ELSEWHERE = {
    True: "the workers of a DataLoader can prepare batches",
    False: "code that makes batches or collects experience can run ahead in other processes",
}
"""What may leave a training loop, by whether it has a DataLoader."""


def for_debugging(facts: JobFacts) -> str:
    """Return advice on what finds errors and slows all steps down (anomaly detection, a profiler); else nothing."""
    return WITHOUT_ANOMALIES if facts.detects_anomalies else WITHOUT_PROFILER if facts.profiles else ""


def longer_limit(call: str = "init_process_group") -> str:
    """Return advice on waiting that is as it should be, but ended by the time limit that a call takes."""
    return f"give what takes so long more time: {call}(timeout=...)."


def flush_denormals(facts: JobFacts) -> str | None:
    """Return advice on an optimizer that computes with denormal numbers; None if the model is on a device.

    Averages of Adam decay by a tenth per step where weights get no gradient, such as rows of an embedding that are not
    in the batches. After some 800 steps they are denormal, and a CPU takes ten times as long for these.
    """
    if facts.model.device not in (None, "cpu"):
        return None

    return (
        "Try torch.set_flush_denormal(True): the averages of weights that get no gradient shrink to denormal numbers, "
        "which are slow on a CPU."
    )


_MOSTLY = 0.5


def for_copies(facts: JobFacts) -> str:
    """Return advice against copies to the device: what they do not do yet."""
    pinned, non_blocking = (
        None if share is None else share >= _MOSTLY for share in (facts.pinned_share, facts.non_blocking_share)
    )
    if pinned and non_blocking:
        return (
            "The copies are from pinned memory, with non_blocking=True: copy the next batch on a stream of its own "
            "(torch.cuda.Stream) while this one computes; send smaller types (uint8)."
        )

    if facts.loader is None:
        memory = "" if pinned else " from pinned memory (tensor.pin_memory())"
        wait = "" if non_blocking else " with non_blocking=True"
        return (
            f"Copy few large tensors instead of many small ones,{memory}{wait}, and make what is small on the device "
            "itself: torch.tensor(..., device=...)."
        )

    pins = bool(facts.loader.pin_memory)
    if pinned or (pinned is None and pins):
        already = "The loader pins memory already" if pins else "The copies are from pinned memory already"
        return f"{already}: pass non_blocking=True to .to(device), and send smaller types (uint8)."

    pinning = _PIN_BATCHES if pins else "Set pin_memory=True in the DataLoader"
    waiting = ": else non_blocking=True waits, too" if non_blocking else " and pass non_blocking=True to .to(device)"
    return f"{pinning}{waiting}; send smaller types (uint8)."


_PIN_BATCHES = (
    "Pin what is copied, which pin_memory=True of the DataLoader does not reach (a class of batches needs a method "
    "pin_memory)"
)


def waiting_for_device(facts: JobFacts, *, is_timed: bool) -> str:
    """Return what a sentence says of CPU time in which a thread may have waited for a device; empty for other times.

    Where the device's times are not known, whatever reads from it next seems to take the time of what it computes.

    Args:
        is_timed: whether the times are those of the device.
    """
    if is_timed or facts.accelerator is None:
        return ""

    return f"; part of it may be waiting for the device ({facts.accelerator}), whose time is not measured"


def in_threads(facts: JobFacts) -> str:
    """Return in which line other threads of the process are for most of their time; empty if that is not known."""
    line = threads_line(facts.thread_lines)
    return "" if line is None else f"other threads of the process are mostly in {line.place}"


def for_rollouts(part: str, line: BlamedLine | None, facts: JobFacts) -> str:
    """Return advice on time in which the model collects what it trains on."""
    if answers := _for_answers(part, line, facts):  # the environments are in processes of their own already
        return answers

    cheaper = "Make rollouts cheaper" if line is None else f"Make {line.place} cheaper"
    how = (
        _OF_TEXTS
        if _generates_texts(part, facts)
        else "Several environments can be stepped at once, so that one call of the model takes all their states, in "
        "processes of their own (gymnasium's AsyncVectorEnv), or while the model trains."
    )
    return f"{cheaper}. {how} `traceml report --lines` shows all lines."


_OF_TEXTS = (
    "If the model generates texts there, give it more prompts in one call, let it end them sooner, or use an inference "
    "engine (vLLM), which can also run while the model trains."
)
"""Advice on rollouts of a language model."""


def _generates_texts(part: str, facts: JobFacts) -> bool:
    """Return whether what is collected may be texts, as in RLHF: the model reads texts, and no environment was seen."""
    return facts.batches.tokens and not environment_share(facts.lines, part)


def _for_answers(part: str, line: BlamedLine | None, facts: JobFacts) -> str | None:
    """Return advice on a line that waits for what other processes compute; None if it does not.

    Without a line it is the one that most of the part is in: that of a trainer, which is not blamed.
    """
    line = line or blamed_line(facts.lines, part, 1.0)
    if line is None or main_library(facts.lines, part, line) not in AWAITS_ANSWERS:
        return None

    # Beside processes that take all cores it waits for these as well, and may not be seen to sleep.
    busy = busy_share([each for each in facts.lines if line.is_line_of(each)], part)
    if not facts.waits_in(part, line) and (busy is None or busy >= _COPIES):
        return None

    return (
        f"{line.place} waits there for answers from other processes: make their work cheaper, divide it among more "
        f"processes where cores are free, or send the requests ahead of the step that needs the answers, so that "
        f"these processes work while the model trains."
    )


def waiting_text(line: BlamedLine) -> str:
    """Return the sentence on a line that waits, to which the advice is added."""
    return f"{line.place} waits there ({WAITED_FOR}), and does not compute: find out for what."


def for_residual(
    part: str,
    line: BlamedLine | None,
    facts: JobFacts,
    called: str | None = None,
    *,
    has_forward: bool = False,
    is_update: bool = False,
    makes_graph: bool = False,
    trainer: BlamedLine | None = None,
    two: Sequence[BlamedLine] = (),
    of: str = "it",
) -> str:
    """Return advice on time in the user's own code.

    Args:
        called: library function that this line has called most of the time.
        has_forward: whether the model's forward is in this time, as no module was called.
        is_update: whether the update of the weights is in this time, as no optimizer was called.
        makes_graph: whether backward follows operations outside of the model.
        trainer: the line that only calls a trainer, whose code takes this time.
        two: the two lines that most of it is spent in, where no line alone is known.
        of: what they are that most of, in words.
    """
    if called == EVENT_LOOP:
        return (
            "Look at what the training awaits (a queue of batches that another task fills, a reply): let several "
            "tasks, threads or processes produce it ahead of the step that needs it."
        )

    if (collecting := _for_collecting(part, line, facts)) is not None:
        return collecting

    if has_forward:
        place = "this code" if line is None else line.place
        ways = ["torch.compile"] * (not facts.compiles) + ["a lower precision"] * facts.may_lower_precision
        how = f" ({', '.join(ways)})" if ways else ""
        return (
            f"No call of a module was seen, so the model's forward is in this time, too. If {place} is the forward, "
            f"make it cheaper{how}; otherwise take it out of the training loop. `traceml report --lines` shows all "
            "lines."
        )

    if line is not None:
        return _for_line(part, line, facts, called, makes_graph=makes_graph, is_update=is_update)

    if part not in UNNAMED_CODE:
        return (
            f"Profile what runs inside traceml.phase('{part}'), or take it out of the step (every n-th step, a thread)."
        )

    return _for_several_lines(trainer, two, of, _collecting_words(part, facts))


def _collecting_words(part: str, facts: JobFacts) -> str:
    """Return what a training loop does besides to collect what it trains on, for a list; empty if it does not."""
    if not facts.collects:
        return ""

    return "generated texts, rewards, " if _generates_texts(part, facts) else "environments, a buffer of their steps, "


def _for_several_lines(trainer: BlamedLine | None, two: Sequence[BlamedLine], of: str, collecting: str) -> str:
    if trainer is not None:
        return (
            f"The training loop is inside {trainer.place}: look at what it does besides the model ({collecting}loss "
            "function, callbacks, metrics, logging). `traceml report --lines` shows the functions that it called."
        )

    if two:
        share = percent_text(sum(each.share for each in two))
        return (
            f"Look at {' and '.join(each.place for each in two)}, which have {share} of {of}: make them cheaper, or "
            "run them every n-th step if they only measure or log. `traceml report --lines` shows the other lines."
        )

    return (
        f"Look at what else the training loop does ({collecting}loss function, metrics, logging, .item()); `traceml "
        "report --lines` shows the lines in which it was seen."
    )


def _for_line(
    part: str, line: BlamedLine, facts: JobFacts, called: str | None, *, makes_graph: bool, is_update: bool
) -> str:
    if answers := _for_answers(part, line, facts):
        return answers

    if facts.waits_in(part, line):
        if called in WAITS_FOR_OTHERS and (threads := in_threads(facts)):
            return (
                f"{line.place} waits there for another thread or process, and does not compute. {capitalized(threads)}"
                ": if it waits for them, make that cheaper, or begin it ahead of the step that needs it. Processes (a "
                "DataLoader with num_workers) do not wait for each other's Python code, as threads do."
            )

        # It polls, as by time.sleep until one has come; threads that mostly wait may be those of a progress bar.
        busy = busy_share(facts.thread_lines, LINE_PHASES[LINE_THREADS]) or 0.0
        if called is None and busy >= _COMPUTES and (threads := in_threads(facts)):
            return (
                f"{waiting_text(line)} Meanwhile {threads}: if it waits for them, make that cheaper, or let processes "
                "do it (a DataLoader with num_workers)."
            )

        return (
            f"{waiting_text(line)} If it is for batches, make them faster, or in more processes (a DataLoader with "
            "num_workers); otherwise begin it ahead of the step that needs it, in a thread."
        )

    out = f"out of the training loop: {_ELSEWHERE[bool(facts.loader)]}; metrics and logs can run every n-th step."
    if role := _CHANGES if is_update else _role_in_step(part, line, facts, makes_graph=makes_graph):
        cheaper_too = "backward follows these operations, and gets cheaper with them"
        more = "an optimizer of torch.optim does so" if role == _CHANGES else cheaper_too
        how = f"use fewer operations, on whole tensors in place of loops, or torch.compile: {more}"
        rest = f"Otherwise take it {out}" if is_update else "If it only measures or logs, run it every n-th step."
        return f"Make {line.place} cheaper. If it {role}, {how}. {rest} `traceml report --lines` shows the other lines."

    if calls_code(facts.lines, part, line, DEEP_COPIES):
        return (
            f"{line.place} mostly copies objects (copy.deepcopy): copy weights into tensors that exist (Tensor.copy_), "
            "or less often, as after an evaluation. `traceml report --lines` shows the other lines."
        )

    unless = ", unless it computes the loss or updates weights," if is_of_loop(facts.lines, line) else ""
    calls_torch, is_on_cuda = calls_code(facts.lines, part, line, TORCH), "cuda" in (facts.model.device or "")
    loss = ": fewer calls of torch's functions, on larger tensors, or torch.compile" if calls_torch else ""
    return (
        f"Make {line.place} cheaper{loss}, or{unless} take it {out} "
        f"{_READS if is_on_cuda else ''}`traceml report --lines` shows the other lines."
    )


def _role_in_step(part: str, line: BlamedLine, facts: JobFacts, *, makes_graph: bool) -> str:
    """Return what a function may be that no training step can do without; empty if unknown.

    Args:
        makes_graph: whether backward follows operations outside of the model.
    """
    if makes_graph or _LOSS in line.function.lower() or computes_loss(facts.lines, part, line):
        return _COMPUTES_LOSS

    if is_of_loop(facts.lines, line):
        return ""

    if (line.file, line.function) in facts.own_updates:
        return _CHANGES

    if is_of_model(facts.lines, line):
        return _COMPUTES_LOSS

    # What mostly calls a tokenizer, and the model with its result, makes batches.
    may_compute = not calls_code(facts.lines, part, line, WITHOUT_MODELS)
    return "is a part of the model" * (may_compute and runs_forward(facts.lines, part, line))


_COMPUTES_LOSS = "computes the loss"
_CHANGES = "changes gradients or weights"
_LOSS = "loss"
_COPIES = 0.5  # of the time in which a line receives: its messages are large
_COMPUTES = 0.25  # of the time in which a thread is watched
_READS = "Each value that is read from the device (.item(), .cpu()) waits for it: read many at once. "


def _for_collecting(part: str, line: BlamedLine | None, facts: JobFacts) -> str | None:
    """Return advice on user code of a script that collects what it trains on; None if unknown."""
    if not facts.collects or part not in UNNAMED_CODE:
        return None

    if answers := _for_answers(part, line, facts):
        return answers

    played, are_texts = environment_share(facts.lines, part), _generates_texts(part, facts)
    if line is not None and calls_code(facts.lines, part, line, TORCH):
        how = "" if are_texts else " (for example by stepping several environments at once: gymnasium's SyncVectorEnv)"
        return (
            f"Make {line.place} cheaper; most of its time is in torch's functions: call them less often, on larger "
            f"tensors{how}, or use torch.compile. `traceml report --lines` shows all lines."
        )

    if line is not None and are_texts:
        return for_rollouts(part, line, facts)

    if line is not None and not played:  # the environment may be the script's own
        return (
            f"Make {line.place} cheaper. If it steps environments, step several at once in processes of their own "
            "(gymnasium's AsyncVectorEnv), or while the model trains; if it makes batches of what was collected, keep "
            "that in preallocated tensors, from which one indexing operation takes a batch. `traceml report --lines` "
            "shows all lines."
        )

    return for_rollouts(part, line, facts) if played is None or played >= MIN_PLAYED else None


def for_saving(half: float, line: BlamedLine | None = None, *, asynchronous: bool) -> str:
    """Return advice on saving checkpoints.

    Args:
        half: the gain of saving half as often.
        line: code of the script that most of saving is in, other than the call that saves.
    """
    if line is not None:
        return f"Make {line.place} cheaper, or save half as often: {gain_text(half)}."

    if asynchronous:
        return (
            f"Save half as often: {gain_text(half)}. async_save copies all tensors before it returns: save only what a "
            "restart needs, and use the memory of the copies again "
            "(async_stager=BlockingAsyncStager(cache_staged_state_dict=True), the same one for each save)."
        )

    return (
        f"Save half as often: {gain_text(half)}. Or save in the background "
        "(torch.distributed.checkpoint.async_save), and only what a restart needs."
    )


_GRADIENT_BYTES, _OF_16_BITS = 4, 2
_SLOW_NETWORK_BYTES_PER_S = 125e6  # 1 Gbit/s
_OF_LATENCY = 0.1  # what takes less of the time to be sent there is not what takes the time


def for_comm(facts: JobFacts, grad_phase: str, cost_ns: float, line: BlamedLine | None = None) -> str:
    """Return advice against waiting for the network.

    Args:
        cost_ns: time of a step that it costs.
    """
    sharding = facts.batches.sharding
    if sharding is not None:
        how = "reshard_after_forward=False" if sharding == "fsdp2" else "ShardingStrategy.SHARD_GRAD_OP"
        keep = f"keep the parameters after forward if memory allows ({how}); " * (facts.model.reshards is not False)
        return (
            f"Each step gathers the sharded parameters and reduces the gradients: use larger batches; {keep}or, if the "
            "model fits in each rank, train it with DistributedDataParallel."
        )

    if grad_phase == "comm":
        if line is not None and calls_code(facts.lines, grad_phase, line, PICKLING):
            return (
                f"{line.place} sends Python objects (all_gather_object), which are pickled and unpickled: send tensors "
                "instead, or call it less often."
            )

        which = "collectives" if line is None else f"the collectives of {line.place}"
        return (
            f"Call {which} less often, on one flattened tensor, or begin them earlier (async_op=True) and wait for "
            "them later."
        )

    known = facts.batches.reductions
    accumulates = known is not None and known[0] > known[1] > 0
    more = "more micro-batches per step" if accumulates else "gradient accumulation under model.no_sync()"
    less = f"Synchronize less per sample: larger batches or {more}"
    size = (_OF_16_BITS if facts.model.has_16_bits else _GRADIENT_BYTES) * (facts.model.trainable or 0)
    if facts.model.comm_hook is None and 0 < size / _SLOW_NETWORK_BYTES_PER_S < _OF_LATENCY * cost_ns / 1e9:
        return f"{less}. Smaller gradients would gain little: these are {bytes_text(size)}, so the time is the latency."

    *others, last = [less, *_faster_reductions(facts)]
    return f"{', '.join([*others, 'or ' * bool(others) + last])}."


def _faster_reductions(facts: JobFacts) -> list[str]:
    """Return what averages the same gradients in less time; DDP takes one hook, and one of the script may do so."""
    found = []
    if facts.model.comm_hook is None and not facts.model.has_16_bits:
        # The hook for bf16 needs NCCL or XCCL.
        hook = "fp16_compress_hook" if facts.backend == "gloo" else "bf16_compress_hook"
        found.append(f"gradients in 16 bits (DDP's {hook})")

    if facts.backend != "gloo":
        found += ["a gradient-compression hook"] * (facts.model.comm_hook is None)
    elif not facts.is_on_one_host:
        found.append("a faster backend than gloo between hosts")
    elif facts.accelerator is not None:  # between processes on a CPU there is none
        found.append("a faster backend than gloo")

    return found


def for_unmeasured_jitter(facts: JobFacts) -> str:
    """Return advice on rare long steps of which backward or communication is most."""
    return (
        f"Look at {_what_connects(facts)}, and for inputs of unusual size in these steps: few of them have measured "
        "whether their backward computed or waited."
    )


def _what_connects(facts: JobFacts) -> str:
    """Return where to look for what made communication longer at times."""
    if facts.is_on_one_host:
        return "the host's load (`top` names what takes its cores)"

    return "the network (other jobs, retries) and the hosts' load"


def for_jitter(part: str | None, rank: int | None, line: BlamedLine | None, facts: JobFacts) -> str:
    """Return advice on rare long steps, by the part and the rank that make them long, if it is one."""
    where = f" on rank {rank}" if rank is not None else ""
    if part == "input_wait":
        what = "the data of these steps" if line is None else line.place
        return f"Look{where} at {what}: the first batch of an epoch, a file that is read slowly.{reading_ahead(facts)}"

    if line is not None:
        return (
            f"Look{where} at {line.place}: do less often what it does in these steps, or do it in the background, in "
            "a thread or another process."
        )

    if part in (*UNNAMED_CODE, None):
        return (
            f"Look{where} for what runs only occasionally (logging, metrics, garbage collection, other programs); "
            "`traceml report --lines` shows the lines."
        )

    if part == "comm":
        return f"No rank's own work is longer then: look at {_what_connects(facts)}."

    if part == "optimizer":
        return f"Look{where} for work that the optimizer does only occasionally, and for other processes on the host."

    return (
        f"Look{where} for inputs of unusual size or shape in those steps, more calls of the model (evaluation, "
        "sampling), recompilation, and other processes on the host."
    )


def reading_ahead(facts: JobFacts) -> str:
    """Return the sentence that workers read ahead of data that is slow at times, for a loader without any."""
    may_read_ahead = facts.loader is not None and not facts.loader_workers
    return " Loader workers (num_workers) can read ahead meanwhile." if may_read_ahead else ""


def for_first_batches(what: str, facts: JobFacts) -> str:
    """Return advice on data that is waited for in the first steps alone.

    Args:
        what: a data set, or the line that reads it.
    """
    cached = (
        f"If {what} fills a cache then, or the files are in memory afterwards, its share is smaller in a longer run"
    )
    other = "Otherwise look at what it does only then."
    if facts.loader_workers:
        return f"{cached}. {other}"

    return (
        f"{cached}, and loader workers (num_workers) would fetch samples while the model computes. Each of them fills "
        f"a cache of its own, and without persistent_workers=True anew in each epoch. {other}"
    )


def for_straggler(part: str | None, ranks: tuple[int, ...], facts: JobFacts, line: BlamedLine | None = None) -> str:
    """Return advice on ranks that slow the others down in a part of their step; None: in all of it."""
    names, is_one = ranks_text(ranks), len(ranks) == 1
    do, their, on_those = ("does", "its", "on that rank") if is_one else ("do", "their", "on those ranks")
    at = _at(ranks, facts)
    if part is None:
        return (
            f"Look at the host of {names}{at}: clocks, cores shared with other processes, thread settings; and whether "
            f"{their} batches are larger than the others'."
        )

    if part == "input_wait" and line is None:
        return (
            f"Compare the data of {names}{at} with another rank's: shard, file system, worker processes; time "
            f"{their} loader alone."
        )

    if part == "h2d":
        return f"Compare {names}{at} with the others: pinned memory, batch size, and the PCIe slot of {their} device."

    if part == "checkpoint":
        return (
            f"The others wait while {names}{at} {'saves' if is_one else 'save'}: save less often, only what a restart "
            "needs, or a part on each rank (torch.distributed.checkpoint)."
        )

    reasons = f"code that runs {on_those} only, longer or larger batches, a slower device"
    if line is not None:
        spend, wait = ("spends", "waits") if is_one else ("spend", "wait")
        if part in UNNAMED_CODE and awaits_others(facts.lines, part, line):
            it = "it" if is_one else "they"
            return (
                f"{capitalized(names)}{at} {wait} in {line.place} for another thread or process: make what {it} {wait} "
                "for, as the batches of a queue, as fast as on the other ranks."
            )

        if part in UNNAMED_CODE and is_of_ranks_alone(facts.lines, part, line, ranks):
            return for_own_code(ranks, facts, (line,))

        why = f": {reasons}" if part in COMPUTE else ""
        return f"Find out why {names}{at} {spend} more time in {line.place} than the other ranks{why}."

    if part in COMPUTE:
        return f"Compare what {names}{at} {do} in {their} {part} with the others: {reasons}."

    if part == "other":
        return (
            f"Look for code between the phases that runs only on {names}{at}: logging, saving, branches on "
            f"rank == {ranks[0]}."
        )

    return f"Look at what {names}{at} {do} in {their} {part} phase that the others do not."


def for_own_code(ranks: tuple[int, ...], facts: JobFacts, lines: Sequence[BlamedLine]) -> str:
    """Return advice on lines that only late ranks run."""
    spend, places = "spends" if len(ranks) == 1 else "spend", " and ".join(each.place for each in lines)
    return (
        f"Only {ranks_text(ranks)}{_at(ranks, facts)} {spend} time in {places}: do it less often, or in a thread or "
        "another process, or share it among all ranks."
    )


def _at(ranks: tuple[int, ...], facts: JobFacts) -> str:
    """Return the host of late ranks, ` (node3)`; empty where they are on several, or the job is on one."""
    host = _host_of(ranks, facts)
    return f" ({host})" if host is not None and len(set(facts.hosts.values())) > 1 else ""


def _host_of(ranks: tuple[int, ...], facts: JobFacts) -> str | None:
    hosts = {facts.hosts[rank] for rank in ranks if rank in facts.hosts}
    return hosts.pop() if len(hosts) == 1 else None


_SENT = "what the others send to {}, such as the tokens of an expert (all_to_all)"


def for_more_work(ranks: tuple[int, ...], *, is_known: bool) -> str:
    """Return advice on ranks that compute far longer than the others.

    Args:
        is_known: whether it is more work, by their CPU time; else a slower host may be a cause, too.
    """
    has, its, it = ("has", "its", "it") if len(ranks) == 1 else ("have", "their", "them")
    sent = _SENT.format(it)
    if is_known:
        return (
            f"{capitalized(ranks_text(ranks))} {has} more to compute: compare the sizes of {its} batches with the "
            f"others', and {sent}. Give all ranks the same amount."
        )

    return (
        f"See whether {ranks_text(ranks)} {has} more to compute: larger or longer batches, other layers, or {sent}. "
        f"Otherwise look at {its} number of threads (OMP_NUM_THREADS), and at what shares {its} cores."
    )


def for_large_batches(ranks: tuple[int, ...]) -> str:
    """Return advice on ranks that have larger batches than the others, or more of them, in each step."""
    its, it, s = ("its", "it", "") if len(ranks) == 1 else ("their", "them", "s")
    return (
        f"Give {ranks_text(ranks)} as much data per step as the others have: look at {its} batch size{s}, {its} number "
        f"of batches per step (gradient accumulation), {its} sampler{s} and data, and {_SENT.format(it)}."
    )


def for_long_stage(ranks: tuple[int, ...]) -> str:
    """Return advice on ranks that are the longest stages of a pipeline."""
    return (
        f"Divide the model more evenly: move layers from {ranks_text(ranks)} to the other ranks. Split the batch into "
        "more micro-batches, too: with a single one, each stage waits while another computes, however the model is "
        "divided."
    )


def for_reading_ranks(ranks: tuple[int, ...], facts: JobFacts) -> str:
    """Return advice on ranks that read the batches of all."""
    reads, its = ("reads", "its") if len(ranks) == 1 else ("read", "their")
    more = "more workers" if facts.loader_workers else "workers"
    return (
        f"Only {ranks_text(ranks)} {reads} batches: let {more} of {its} DataLoader make them ahead (num_workers), or "
        "let each rank read its own part (DistributedSampler)."
    )


def for_slow_group(group: RankGroup) -> str:
    """Return advice on a group of which all ranks slow the others down."""
    if group.level == "host":
        return (
            f"Look at {group.name}, as its ranks are slow together: clocks and temperature of its devices, cores that "
            "other programs use, its file system and its network."
        )

    if group.level == "mesh":
        return (
            f"Compare the work of {group.name} with that of the others: its layers, its data, and code that runs only "
            "there."
        )

    return f"Look at what the hosts of {group.name} share: its links, power and cooling, and the storage behind it."


def for_rank_without_core(ranks: tuple[int, ...], facts: JobFacts) -> str:
    """Return advice on late ranks that waited for a core."""
    host = _host_of(ranks, facts)
    at = "" if host is None else f" on {host}"
    return (
        f"Something else uses the cores of {ranks_text(ranks)}{at} (`top` names it): end or move it, or give each rank "
        "cores of its own (taskset, Slurm's --cpus-per-task). The code of the rank is not the cause."
    )
