"""Advice against waiting for data, and what following it gains."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from traceml.database.schema import LINE_OUTSIDE, LINE_PHASES
from traceml.diagnosis.advice import in_threads
from traceml.diagnosis.facts.blamed_lines import (
    LOADERS,
    WAITS_FOR_OTHERS,
    BlamedLine,
    awaits_others,
    calls_code,
    is_of_loop,
    main_library,
)
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_shares import (
    NAMED_SHARE,
    dataset_share,
    lock_share,
    number_share,
    ordering_share,
    receives,
    unpickling_share,
    worker_wait_share,
    workers_at_work,
)
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.rules.restarted_workers import begins_each_step, keeping_workers
from traceml.diagnosis.steps.loading import COUNTS, IDLE_SHARE, TAKE_NS, Pipeline, RareWaits, fetch_cpu, share_at_work
from traceml.diagnosis.steps.speedup import speedup_of_share
from traceml.formatting import cores_text, count_text, gain_text, ns_text, percent_text, plural

__all__ = [
    "LoadingAdvice", "for_evaluation", "for_input", "for_iterator", "of_new_iterators", "of_sampler",
    "with_waited_loader",
]  # fmt: skip

CHEAP_SAMPLE_NS = 50e3
"""A sample that is fetched in less time was in memory: workers would only add copies."""
WORTHWHILE = 1.05
"""Advice with a smaller gain is not given."""
AWAITED_SHARE = 1 / 3
"""Another loader is waited for if its workers make batches in this many samples of those in which training waits."""
UNPICKLING_SHARE = 1 / 3
"""Batches are mostly Python objects if unpickling them takes this share of taking them over."""
COMPUTES = 0.5
"""A training process that waits for its workers computes for a smaller share of the time."""
_PART = "input_wait"
_CONTAINERS = ("list", "tuple", "dict", "range")
_TAKEN_AHEAD = (
    "The script takes all batches of an epoch before it trains on the first one, as list(loader) does. Iterate over "
    "the loader in the training loop"
)
_MUCH_MORE = 1.25
"""Further advice has to gain this factor more."""
_RECEIVES = ("_MultiProcessing", "_BaseDataLoader", "Connection", "rebuild_")
"""Names of library functions that take batches from the workers, and do not order samples, begin so."""
_BY_INDEX = "indexing its tensors (data[indices]) instead of collating single samples"
_BUSY = 0.02  # a worker with a smaller share of the busiest one's work has nearly none
_EVEN = 0.8  # the others share the work evenly if so large a part of them would suffice
_OF_BATCH = ".__getitems__"  # method of a data set that fetches the samples of a batch at once
_WHOLE_BATCH = 0.1  # a batch that is taken by one index costs this share of single samples


class LoadingAdvice(NamedTuple):
    """Advice on loading."""

    text: str
    gain: float | None = None  # old / new step time if it is done; None if unknown
    workers: int | None = None  # advised number of loader workers; None if the advice is another


def for_input(facts: JobFacts, pipeline: Pipeline | RareWaits, line: BlamedLine | None = None) -> LoadingAdvice:
    """Return advice against waiting for data."""
    loader = facts.loader or LoaderFacts()
    if isinstance(pipeline, RareWaits):
        return _against_pauses(facts, loader, pipeline, line)

    if loader.num_workers is None:
        return _prefetch(pipeline)

    if pipeline.worker_cores and pipeline.gain(worker_cores=None) >= WORTHWHILE:
        return _all_cores(pipeline)

    cores = _on(pipeline, facts)
    in_memory = is_in_memory(loader, pipeline, facts.wait_share, facts.micro_batches)
    if pipeline.is_handover and not in_memory:
        return _fewer_handovers(facts, loader, pipeline, cores)

    if pipeline.first_wait_ns > NAMED_SHARE * (pipeline.fetch_ns + pipeline.first_wait_ns):
        return _cheaper_first(loader, pipeline)

    if pipeline.workers and loader.sharing_workers is not None:
        return _even_shares(loader, pipeline, loader.sharing_workers)

    if (numbers := number_share(facts.worker_lines if pipeline.workers else facts.lines)) >= NAMED_SHARE:
        return _of_numbers(loader, pipeline, numbers)

    if pipeline.workers > 1 and (locked := lock_share(facts.worker_lines)) >= NAMED_SHARE:
        return _shorter_lock(pipeline, line, locked)

    if not pipeline.workers and line is not None and awaits_others(facts.lines, _PART, line):
        return _for_pool(pipeline, line)

    if in_memory:
        is_own = line is not None and not calls_code(facts.lines, _PART, line, LOADERS)
        return _whole_batches(loader, pipeline, line if is_own else None)

    if line is not None and line.function.endswith(_OF_BATCH):
        loader = replace(loader, takes_batches=True)

    return _more_workers(facts, loader, pipeline, cores, line) or _cheaper_samples(facts, loader, pipeline, line, cores)


def for_iterator(
    facts: JobFacts, wait_ns: float, step_ns: float, called: str | None = None, *, runs_model: bool = False
) -> LoadingAdvice:
    """Return advice against waiting for an iterator that is not a DataLoader, or for a queue.

    Args:
        called: the library function that takes most of the time.
        runs_model: whether the iterator calls a model, as one that collects experience does.
    """
    if runs_model:
        gain = step_ns / max(step_ns - wait_ns / 2, 1.0)
        return LoadingAdvice(
            "The iterator calls a model. If that is the one in training, collect from more environments or prompts at "
            "once, in several processes, or less often; if it is not trained, store what it gives for the next epochs. "
            f"Half the time makes the run {gain_text(gain)}.",
            gain,
        )

    rest_ns = max(step_ns - wait_ns, 1.0)
    if called in WAITS_FOR_OTHERS:
        threads, gain = in_threads(facts), step_ns / max(step_ns / 2, rest_ns)
        seen = f" ({threads})" if threads else ""
        return LoadingAdvice(
            f"The threads or processes that make the batches do not keep up: make batches cheaper{seen}, or let more "
            "processes make them (a DataLoader with num_workers). Half the time for a batch makes the run "
            f"{gain_text(gain, 'at most')}.",
            gain,
        )

    computes = fetch_cpu(facts)
    made = Pipeline(
        fetch_ns=wait_ns,
        fetch_cpu=1.0 if computes is None else computes,
        rest_ns=rest_ns,
        wait_ns=wait_ns,
        cores=facts.cores_per_rank,
    )
    workers = made.best_workers()
    gain = made.gain(workers)
    # Two threads that run Python code take turns: one of them gains nothing where making a batch computes.
    unless = ", if making a batch waits (for a disk, a network)," if made.takes_cpu else ""
    return LoadingAdvice(
        f"Make batches in other processes: an IterableDataset in a DataLoader with num_workers={workers}; "
        f"{gain_text(gain, 'at most')}{_on(made, facts)}. Or{unless} fetch the next batch in a thread while the model "
        "computes.",
        gain,
    )


def for_evaluation(facts: JobFacts, time: RunTime, share: float, line: BlamedLine | None) -> LoadingAdvice | None:
    """Return advice on an evaluation that mostly waits for data that its process makes itself; None for others.

    Its gain is old / new time of the run.

    Args:
        share: share of the run's time in evaluation.
        line: its function, if known.
    """
    loader, parts = _evaluated(facts), time.evaluation_parts
    part, wait_ns = LINE_PHASES[LINE_OUTSIDE], parts.input_share * parts.batch_ns
    if parts.input_share < NAMED_SHARE or loader is None or loader.num_workers != 0:
        return None

    if line is not None and awaits_others(facts.lines, part, line):
        return None

    of_line = [each for each in facts.lines if line and line.is_function_of(each)]
    computes, cores = fetch_cpu(facts, of_line, part), facts.cores_per_rank
    made = Pipeline(
        fetch_ns=wait_ns,
        fetch_cpu=1.0 if computes is None else computes,
        rest_ns=max(parts.batch_ns - wait_ns, 1.0),
        rest_cores=float(min(facts.threads or 1, cores or 1)),
        wait_ns=wait_ns,
        cores=cores,
        epoch_steps=max(parts.batches, 1.0),
    )
    if is_in_memory(loader, made, facts.wait_share):
        saved = share * (1 - 1 / made.gain_with(_WHOLE_BATCH))
        text = f"{_data(loader, begins=True)} is in memory: take whole batches by {_BY_INDEX}"
        return LoadingAdvice(f"{text}; {_saves(saved)}.", speedup_of_share(saved))

    workers = made.best_workers()
    if made.gain(workers) < WORTHWHILE:
        return None

    saved = share * (1 - 1 / made.gain(workers))
    kept = f" and {loader.option('persistent_workers')}=True" if time.evaluations > 1 else ""
    return LoadingAdvice(
        f"{_data(loader, begins=True)} is read there by the process itself ({loader.option('num_workers')}=0): set "
        f"{loader.option('num_workers')}={workers}{kept} for its DataLoader; {_saves(saved)}{_on(made, facts)}.",
        speedup_of_share(saved),
        workers,
    )


def _for_pool(pipeline: Pipeline, line: BlamedLine) -> LoadingAdvice:
    """Return advice where the training process makes a batch by other threads or processes.

    Workers would inherit a pool whose threads are in the training process alone, and never get an answer from it.
    """
    gain = pipeline.gain_with(0.5)
    return LoadingAdvice(
        f"{line.place} waits for other threads or processes, as those of a pool: let more of them do it, or give them "
        f"the next batch while the model computes. Half the time for a batch makes the run {gain_text(gain, 'at most')}"
        ". Loader workers (num_workers) cannot use a pool of the training process, and would hang: with them, do the "
        "work without it.",
        gain,
    )


def _saves(share: float) -> str:
    return f"that saves at most {percent_text(share)} of the run"


def _evaluated(facts: JobFacts) -> LoaderFacts | None:
    """Return the loader of evaluations; None if there is none, or it may be one of several with other workers."""
    others = facts.other_loaders or ([facts.loader] if facts.loader else [])
    if len({each.num_workers for each in others}) != 1:
        return None

    is_one = len(others) == 1
    return others[0] if is_one else LoaderFacts(num_workers=others[0].num_workers, trainer=others[0].trainer)


def with_waited_loader(facts: JobFacts, waits: float) -> JobFacts:
    """Return the facts with the loader that the training waits for, if it reads several.

    By default that is the first loader of a step. If its workers keep up, while those of another one make batches in a
    third of the time that the training waits, it is the other one. If samples show that the training waits in the data
    set of another loader, or for workers, which the first one does not have, it is that other loader. One that is read
    before it comes last: an evaluation before the training has a loader, but so has a data set that reads one, as
    TorchIO's queue.

    Args:
        waits: share of the steps in which the ranks wait for data.
    """
    if facts.loader is None:
        return facts

    has_workers = bool(facts.loader.num_workers)
    if has_workers and (busier := _with_busier_workers(facts)) is not None:
        return replace(facts, loader=busier)

    number = facts.loader.number or 0
    others = [loader for loaders in facts.loaders.values() for loader in loaders if loader.number != number]
    others = [each for each in others if not (has_workers and each.num_workers)]
    others.sort(key=lambda loader: loader.number is not None and loader.number < number)
    evaluated = _evaluation_share(facts, waits)
    waited = (each for each in others if _share_of(each, facts) - evaluated >= NAMED_SHARE * (1 - evaluated))
    return replace(facts, loader=next(waited, facts.loader))


def _with_busier_workers(facts: JobFacts) -> LoaderFacts | None:
    """Return another loader, whose workers make batches most of the time while those of the training's are idle."""
    at_work = share_at_work(facts)
    if facts.other_loader is None or at_work is None or at_work >= IDLE_SHARE:
        return None

    loader, lines = facts.other_loader
    made = sum(each.samples for each in lines if not each.is_idle) / (loader.num_workers or 1)
    waits = sum(each.samples for each in facts.lines if receives(each))  # the first samples are denser than those
    return loader if workers_at_work(lines).is_most and made >= AWAITED_SHARE * waits else None


def _share_of(loader: LoaderFacts, facts: JobFacts) -> float:
    """Return a loader's share of the waiting for data, by samples."""
    if loader.num_workers:
        return worker_wait_share(facts.lines)

    return 0.0 if loader.dataset is None else dataset_share(facts.lines, loader.dataset)


def _evaluation_share(facts: JobFacts, waits: float) -> float:
    """Return the share of the sampled waiting that may belong to evaluations: these are recognized after one batch."""
    if facts.time is None:
        return 0.0

    evaluation, waiting = facts.time.share("evaluation"), waits * facts.time.share("steps")
    return evaluation / (evaluation + waiting) if evaluation > 0 else 0.0


def is_in_memory(loader: LoaderFacts, pipeline: Pipeline, waited: float = 0.0, batches: float = 1.0) -> bool:
    """Return whether samples are in memory, and fetching one costs next to nothing.

    Args:
        waited: share of its ready time in which the training process waited for a core: a fetch would be as much
            shorter on a core of its own.
        batches: number of batches that a fetch is for.
    """
    samples = batches * (loader.batch_size or 1)
    per_sample_ns = pipeline.fetch_ns * (1 - min(pipeline.fetch_cpu, 1.0) * waited) / samples
    return bool(loader.in_memory) and per_sample_ns <= CHEAP_SAMPLE_NS


_PASSING = "With in_order=False (torch 2.6) other batches overtake a late one, which changes their order."


def _against_pauses(facts: JobFacts, loader: LoaderFacts, pauses: RareWaits, line: BlamedLine | None) -> LoadingAdvice:
    if pauses.are_whole_epochs:
        gain = pauses.gain_with_overlap
        return LoadingAdvice(
            f"{_TAKEN_AHEAD}: the workers then make batches while it trains; {gain_text(gain, 'at most')}.", gain
        )

    keeping = keeping_workers(facts)
    if loader.num_workers and pauses.first_share >= NAMED_SHARE and keeping is not None:
        return LoadingAdvice(
            f"{keeping.action}: {keeping.because}, and they fetch the first batches while training waits."
        )

    what = f"what {line.place} does for the samples" if line is not None and line.of_workers else "the samples"
    look = f"Look at {what} of the steps that wait: larger files, or a slow disk or network at times."
    may_pass = (loader.num_workers or 0) > 1 and pauses.short_epoch is None and loader.in_order is not False
    passing = f" {_PASSING}" * may_pass
    if pauses.prefetch_factor is None:
        return LoadingAdvice(f"{look} No usual prefetch_factor covers a wait as long as these.{passing}")

    ahead = f"{loader.option('prefetch_factor')}={pauses.prefetch_factor}"
    if pauses.short_epoch is not None:
        return LoadingAdvice(
            f"{look} Workers begin an epoch only when the training does, and an epoch of "
            f"{plural(pauses.short_epoch, 'batch')} is too short for them to get ahead of such a wait: in longer "
            f"epochs (the data set several times, or a sampler that continues) {ahead} would cover it."
        )

    return LoadingAdvice(
        f"{look} With {ahead} the workers would be far enough ahead for such a wait, if they are fast enough "
        f"otherwise.{passing}"
    )


def _prefetch(pipeline: Pipeline) -> LoadingAdvice:
    gain = pipeline.gain(1)
    return LoadingAdvice(
        "Fetch the next batch while the model computes, in another process (a DataLoader with num_workers=1): that "
        f"makes the run {gain_text(gain, 'at most')}.",
        gain,
        1,
    )


def _all_cores(pipeline: Pipeline) -> LoadingAdvice:
    gain, allowed = pipeline.gain(worker_cores=None), cores_text(pipeline.worker_cores or 0)
    return LoadingAdvice(
        f"The {plural(pipeline.workers, 'worker')} may use only {allowed} of {pipeline.cores}: the "
        "training process was bound to it when it started them (taskset, OMP_PROC_BIND, KMP_AFFINITY). Call "
        f"os.sched_setaffinity(0, range(os.cpu_count())) in worker_init_fn: {gain_text(gain, 'about')}.",
        gain,
    )


def _whole_batches(loader: LoaderFacts, pipeline: Pipeline, line: BlamedLine | None) -> LoadingAdvice:
    gain = pipeline.gain_with(_WHOLE_BATCH, workers=0)
    instead = "use no workers, which add copies, and " if loader.num_workers else ""
    by_index = f"take whole batches by {_BY_INDEX}"
    own = "" if line is None else f", {line.place} for all samples of a batch at once"
    return LoadingAdvice(
        f"{_data(loader, begins=True)} is in memory: {instead}{by_index}{own}; "
        f"{gain_text(gain, 'about' if line is None else 'at most')}.",
        gain,
        0 if loader.num_workers else None,
    )


def _more_workers(
    facts: JobFacts, loader: LoaderFacts, pipeline: Pipeline, cores: str, line: BlamedLine | None
) -> LoadingAdvice | None:
    workers = pipeline.best_workers()
    gain = pipeline.gain(workers)
    if workers <= pipeline.workers or gain < WORTHWHILE:
        return None

    before = f"{_data(loader, begins=True)} is read by the training process itself ({loader.option('num_workers')}=0)"
    if pipeline.workers:
        several = len({each.dataset for loaders in facts.loaders.values() for each in loaders}) > 1
        whose = f" of {_data(loader)}" if several else ""
        do = "do" if pipeline.workers > 1 else "does"
        before = f"{plural(pipeline.workers, 'worker')}{whose} {do} not keep up"

    ahead = ", and iterate over the loader in the training loop, not before it" if pipeline.is_taken_ahead else ""
    keeping = keeping_workers(facts)
    kept = "" if keeping is None else f" and {keeping.setting}"
    setting = f"{loader.option('num_workers')}={workers}{kept}{ahead}"
    text = f"{before}: set {setting}; {gain_text(gain, 'about' if pipeline.takes_cpu else 'at most')}{cores}."
    # Several may have it divided for them, or read a random stream.
    if facts.epochs_of_repeats or (loader.is_undivided and pipeline.workers <= 1):
        text += (
            " It is an iterable data set: divide it among the workers (torch.utils.data.get_worker_info), or each of "
            "them reads all of it."
        )

    text += _in_longer_epochs(facts, pipeline, workers, gain)
    cached = _cached(loader, pipeline, gain, line)
    return LoadingAdvice(text + (cached or _waits(loader, pipeline, workers)), gain, workers)


def _in_longer_epochs(facts: JobFacts, pipeline: Pipeline, workers: int, gain: float) -> str:
    """Return further advice where epochs are so short that workers are not ahead; else nothing."""
    longer = 0.0 if pipeline.epoch_steps is None else pipeline.gain(workers, epoch_steps=None)
    if pipeline.is_taken_ahead or longer < _MUCH_MORE * gain:
        return ""

    batches = plural(round((pipeline.epoch_steps or 1) * facts.micro_batches), "batch")
    return (
        f" Workers begin an epoch only when the training does, and it has {batches}: in longer epochs (the data set "
        f"several times, or a sampler that continues) {gain_text(longer, 'at most')}."
    )


def _even_shares(loader: LoaderFacts, pipeline: Pipeline, sharing: float) -> LoadingAdvice:
    """Return advice where an iterable data set gives some of the workers much more than the others."""
    gain, busiest = pipeline.gain_with(sharing / pipeline.workers), max(loader.worker_samples)
    busy = sum(each >= _BUSY * busiest for each in loader.worker_samples)
    if busy < pipeline.workers and sharing >= _EVEN * busy:
        have = "have" if busy > 1 else "has"
        what = f"Only {busy} of the {pipeline.workers} workers {have} samples of {_data(loader)} to make"
    else:
        share = percent_text(busiest / sum(loader.worker_samples))
        whose = f"one of the {pipeline.workers} workers does {share} of their work"
        what = f"{_data(loader, begins=True)} divides its samples unevenly: {whose}"

    return LoadingAdvice(
        f"{what}. Give all of them as much: at least as many shards as workers, of the same size, or single samples in "
        f"turns; {gain_text(gain, 'at most')}. More workers will not help before.",
        gain,
    )


def _of_numbers(loader: LoaderFacts, pipeline: Pipeline, share: float) -> LoadingAdvice:
    gain = pipeline.gain_with(1 - share)
    return LoadingAdvice(
        f"Keep each sample of {_data(loader)} as one tensor or NumPy array: of samples that are lists of numbers, the "
        f"loader makes a tensor for each position of the list; {gain_text(gain, 'at most')}.",
        gain,
    )


def _shorter_lock(pipeline: Pipeline, line: BlamedLine | None, share: float) -> LoadingAdvice:
    gain = pipeline.gain_with(1 - share)
    where = "" if line is None else f", in {line.place}"
    return LoadingAdvice(
        f"The {pipeline.workers} workers wait for each other: {percent_text(share)} of the time in which they make "
        f"batches is waiting for a lock{where}. Hold it for less, or do without it, as with a file that each worker "
        f"opens for itself (worker_init_fn); {gain_text(gain, 'at most')}. More workers will not help before.",
        gain,
    )


def _cheaper_first(loader: LoaderFacts, pipeline: Pipeline) -> LoadingAdvice:
    gain, first = pipeline.gain(first_ns=0.0), ns_text(pipeline.first_ns + pipeline.fetch_ns)
    return LoadingAdvice(
        f"Most of the waiting is for the first batch of an epoch, {first}, and workers would not begin it sooner. Make "
        f"what {_data(loader)} or its sampler does first cheaper (filling a "
        f"shuffle buffer, listing or opening files), or keep it from epoch to epoch; {gain_text(gain, 'at most')}.",
        gain,
    )


def _fewer_handovers(facts: JobFacts, loader: LoaderFacts, pipeline: Pipeline, cores: str) -> LoadingAdvice:
    gain = pipeline.gain(0)
    who, their = ("The worker keeps", "its") if pipeline.workers == 1 else ("The workers keep", "their")
    received, fewer = "tensor by tensor", "Put a batch into fewer tensors (collate_fn), if it has several"
    if unpickling_share(facts.lines) >= UNPICKLING_SHARE:
        received, fewer = "and unpickles their objects", "Return tensors in place of many Python objects (collate_fn)"

    waits = f"{who} up: training waits to receive {their} batches, {received}"
    if gain < WORTHWHILE:
        how = f"{fewer}, or use larger batches"
        most = pipeline.gain(take_ns=TAKE_NS)
        if most < WORTHWHILE and share_at_work(facts) is None:  # how much the workers do is not known
            many = pipeline.workers > (pipeline.cores or pipeline.workers)
            crowd = f"{plural(pipeline.workers, 'worker')} for {plural(pipeline.cores or 1, 'core')}"
            fewer = f"=0, or 1: there are {crowd}" if many else "=0"
            return LoadingAdvice(f"{waits}. Try {loader.option('num_workers')}{fewer}. Otherwise put{how[3:]}.")

        return LoadingAdvice(f"{waits}. {how}: {gain_text(most, 'at most')}.", most)

    instead = f"{loader.option('num_workers')}=0: a step's data takes {ns_text(pipeline.fetch_ns)} in the training"
    return LoadingAdvice(f"{waits}. Set {instead} process; {gain_text(gain, 'about')}{cores}.", gain, 0)


def _cheaper_samples(
    facts: JobFacts, loader: LoaderFacts, pipeline: Pipeline, line: BlamedLine | None, cores: str
) -> LoadingAdvice:
    of_workers = line if line is not None and line.of_workers else None
    share = 1.0 if of_workers is None else of_workers.share
    gain, cached = pipeline.gain_with(1 - share / 2), pipeline.gain_with(1 - share)
    what, how = f"the samples of {_data(loader)}", "larger files, a faster or local disk, a cache in memory"
    if loader.in_memory:
        what, how = f"what is done with {what}", "transforms, collate_fn"
    elif pipeline.takes_cpu:
        how = "decode once and cache, smaller samples, transforms on the device"

    what = what if of_workers is None else of_workers.place
    # Workers of short epochs are gone before they were watched for long enough.
    unless = "" if pipeline.is_cpu_known else ", unless making a sample waits (for a disk, a network)"
    even = ", even" if cores.startswith(" if ") else ""
    crowd = f"; more workers will not help{even}{cores}{unless}" if pipeline.workers or pipeline.cores else ""
    crowd = _at_once(loader, pipeline) or crowd
    longer = _in_longer_epochs(facts, pipeline, pipeline.workers, gain) if pipeline.workers else ""
    return LoadingAdvice(
        f"Make {what} cheaper ({how}){crowd}. Half its time makes the run {gain_text(gain)}, a "
        f"cache {gain_text(cached, 'at most')}.{longer}",
        gain,
    )


def _at_once(loader: LoaderFacts, pipeline: Pipeline) -> str:
    """Return further advice where more workers than are advised would help: on free cores, or as they only wait."""
    more, computes = 2 * pipeline.workers, pipeline.takes_cpu
    if computes:
        more = min(more, pipeline.cores or more)

    gain = pipeline.gain(more)
    if gain < WORTHWHILE or (computes and pipeline.workers < COUNTS[-1]):
        return ""

    threads = "" if computes else _threads(loader)
    fewer = f"{threads}, or " if threads else ""
    return f", or have more fetches at once ({fewer}{count_text(more)} workers: {gain_text(gain, 'at most')})"


def _threads(loader: LoaderFacts) -> str:
    """Return how a worker fetches the samples of a batch at once; nothing for a data set that is iterated over."""
    is_by_index = loader.length is not None and not loader.is_undivided and not loader.takes_batches
    by_threads = "threads in __getitems__ that fetch the samples of a batch at once"
    return by_threads if is_by_index and (loader.batch_size or 1) > 1 else ""


def _cached(loader: LoaderFacts, pipeline: Pipeline, gain: float, line: BlamedLine | None) -> str:
    cached = pipeline.gain_with(0.0, workers=0)
    if not pipeline.takes_cpu or cached < WORTHWHILE * gain:
        return ""

    # Where the time goes into making batches of samples, as the slices of a TensorDataset, no cache of these saves it.
    of_batches = loader.dataset == "TensorDataset" or (line is not None and "collate" in line.function.lower())
    what = "batches (what collate_fn returns)" if of_batches else "samples"
    return f" With {what} that are the same in each epoch, made once and cached, {gain_text(cached, 'at most')}."


def _waits(loader: LoaderFacts, pipeline: Pipeline, workers: int) -> str:
    if pipeline.takes_cpu or pipeline.cores is None or workers <= pipeline.cores:
        return ""

    waits, threads = percent_text(1 - pipeline.fetch_cpu), _threads(loader)
    instead = f", or {threads}" if threads else ""
    return (
        f" A fetch spends {waits} of its time waiting, so there may be more workers than cores{instead}; they gain "
        "nothing if they wait for each other (a lock, a server's limit)."
    )


def _on(pipeline: Pipeline, facts: JobFacts) -> str:
    """Return the cores that a gain is for; while others use them, it is not to be had."""
    if pipeline.cores is None:
        return ""

    cores = f"{pipeline.cores} core{'s' if pipeline.cores > 1 else ''}"
    return f" if the run has {cores} to itself" if facts.oversubscribed else f" on {cores}"


def _data(loader: LoaderFacts, *, begins: bool = False) -> str:
    """Return the name of the data set's class; that of a plain container says nothing."""
    if loader.dataset and loader.dataset not in _CONTAINERS:
        return loader.dataset

    return "The dataset" if begins else "the dataset"


def of_new_iterators(facts: JobFacts, pipeline: Pipeline | None) -> LoadingAdvice | None:
    """Return advice on an iterator in each step, which orders all samples for one batch; None if it is not that."""
    loader = facts.loader or LoaderFacts()
    share = ordering_share(facts.lines)
    if loader.num_workers or pipeline is None or share < NAMED_SHARE or not begins_each_step(facts):
        return None

    gain = pipeline.gain_with(1 - share)
    samples = f"{count_text(loader.length)} samples" if loader.length else "samples"
    return LoadingAdvice(
        f"Keep one iterator of the loader: iter(loader) in each step draws a new order of all {samples}, for one "
        f"batch; {gain_text(gain, 'about')}.",
        gain,
    )


def of_sampler(facts: JobFacts, line: BlamedLine | None) -> LoadingAdvice | None:
    """Return advice on a sampler that takes most of the waiting; None if it does not."""
    loader = facts.loader
    if loader is None or line is None:
        return None

    is_its_code = line.function.startswith(tuple(f"{name}." for name in loader.samplers))
    # Beside workers the training process has no other code of the data set; what surrounds the loader may have its own.
    if not is_its_code and not (_all_have_workers(facts, loader) and _computes_beside_workers(facts, line)):
        return None

    more = "more workers" if loader.num_workers else "workers"
    return LoadingAdvice(
        f"The sampler runs in the training process, so {more} will not help: make {line.place} cheaper, or draw the "
        "indices of many batches at once."
    )


def _all_have_workers(facts: JobFacts, loader: LoaderFacts) -> bool:
    """Return whether the training's loader has workers on each rank; without them a process has the data set's code."""
    of_ranks = (facts.loader_of(rank, loader.number or 0) for rank in facts.loaders)
    return bool(loader.num_workers) and all(each is None or each.num_workers for each in of_ranks)


def _computes_beside_workers(facts: JobFacts, line: BlamedLine) -> bool:
    """Return whether the training process computes while it waits for data, and not in taking it from the workers."""
    computes, called = fetch_cpu(facts), main_library(facts.lines, _PART, line) or ""
    if computes is None or computes < COMPUTES or called.startswith(_RECEIVES):
        return False

    return ordering_share(facts.lines) >= NAMED_SHARE or not is_of_loop(facts.lines, line)
