"""Communication that costs much: what it is spent on, and what to do."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.database.schema import PROCESS, STEPS, pack_bits
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.machine_use import MachineSamples
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.trainings.models_and_loaders import ModelFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.own_work import own_work_of


def facts(backwards: float | None, reductions: float = 1.0) -> JobFacts:
    builder = JobFactsBuilder(2)
    if backwards is not None:
        row = {"kind": "reductions", "backwards_per_step": backwards, "reductions_per_step": reductions}
        builder.info(0, row)

    return builder.build()


def found(known: JobFacts, **job: float) -> Finding:
    [finding] = [
        each for each in diagnose(window_of(Job(**{"comm": 20.0, **job})), known) if each.kind is Kind.COMM_BOUND
    ]
    return finding


def test_a_reduction_per_micro_batch_is_named_with_its_gain():
    """Four reductions where one is enough: three quarters of the communication can be left out."""
    finding = found(facts(4, 4))
    step, comm = finding.evidence["step_ms"], finding.evidence["comm_ms"]

    assert "all 4 backward passes of a step average the gradients" in finding.summary
    assert "under model.no_sync()" in finding.next
    assert "all but the last of the 4 micro-batches" in finding.next
    assert finding.speedup_if_fixed == pytest.approx(step / (step - 0.75 * comm))
    assert (finding.evidence["backwards_per_step"], finding.evidence["reductions_per_step"]) == (4, 4)


def test_some_reductions_too_many():
    """An update every four micro-batches of which two average."""
    assert "2 of the 4 backward passes" in found(facts(4, 2)).summary


def test_the_mean_of_reductions_is_what_their_gain_is_of():
    """One in half of the steps, and two in the others: a third of the communication can be left out."""
    finding = found(facts(4, 1.5))
    step, comm = finding.evidence["step_ms"], finding.evidence["comm_ms"]

    assert finding.speedup_if_fixed == pytest.approx(step / (step - comm / 3))


def test_stages_that_wait_for_each_other_are_no_slow_network() -> None:
    """Ranks of a pipeline send each other messages; without communication they would wait as long."""
    window = window_of(Job(comm=20.0, steps=100))
    window.times["comm"][:] += window.wait
    builder = JobFactsBuilder(2)
    builder.info(0, {"kind": "collectives", "elements": 65, "messages": True})

    finding = next(each for each in diagnose(window, builder.build()) if each.kind is Kind.COMM_BOUND)

    assert finding.summary.startswith("Waiting for messages of other ranks takes ")
    assert finding.headline.startswith("The ranks wait for messages of each other: ")
    assert "more micro-batches" in finding.next
    assert finding.speedup_if_fixed == 1.0


def test_waiting_for_a_parameter_server_is_communication() -> None:
    """Trainers wait for its answers and not for each other, though one of them waits longer."""
    window = window_of(Job(ranks=2, steps=100), adds("other", 20.0, (1,)))
    window.backward_own[:] = np.nan
    window.times["comm"][:] = window.times["other"] + 30e6
    window.times["other"][:] = 0
    window.total[:] = sum(window.times.values())
    builder = JobFactsBuilder(2)
    builder.info(0, {"kind": "rpc"})
    lines = [SampledLine(0, part, "train.py", 9, "pull", None, 40) for part in ("comm", "comm", "comm", "backward")]

    finding = diagnose(window, replace(builder.build(), lines=lines))[0]

    assert (finding.kind, finding.ranks, finding.phase) == (Kind.COMM_BOUND, (), "comm")
    assert finding.summary.startswith("Calls of functions in other processes (RPC) take ")
    assert finding.headline.startswith("Training waits for functions in other processes (RPC): ")
    assert finding.evidence["function"] == "pull"
    assert finding.speedup_if_fixed == 1.0


@pytest.mark.parametrize(("newest", "parallel", "apart"), [(7, None, True), (8, None, False), (7, "ddp", False)])
def test_ranks_without_collectives_wait_for_nobody(newest: int, parallel: str | None, apart: bool) -> None:
    """On busy cores backward may end milliseconds after its last gradient, which is no communication."""
    builder = JobFactsBuilder(2)
    rows = np.zeros(2, STEPS.dtype)
    rows["bits"] = [pack_bits(1, 0, sequence) for sequence in (7, newest)]
    for rank in range(2):
        builder.info(rank, {"kind": "group", "group_size": 2})
        builder.info(rank, {"kind": "model", "parameters": 100, "parallel": parallel})
        builder.batches.group.steps(rows)

    assert own_work_of(window_of(Job(ranks=2)), builder.build()).grouped is not apart


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_the_backend_is_that_of_the_models_device(device: str, backend: str) -> None:
    """A process group may have one for each type of device; the advice on hooks depends on it."""
    builder = JobFactsBuilder(2)
    builder.info(0, {"kind": "group", "group_size": 2, "backends": "cpu:gloo,cuda:nccl"})
    builder.info(0, {"kind": "model", "parameters": 100, "device": device})

    assert builder.build().backend == backend


@pytest.mark.parametrize("known", [facts(None), facts(1, 1), facts(4, 1), facts(2.3, 1)])
def test_one_reduction_is_not_blamed(known):
    """Without accumulation, with no_sync, and where nothing is known."""
    finding = found(known)

    assert "average the gradients" not in finding.summary
    assert "all but the last" not in finding.next


def test_who_accumulates_is_not_told_to():
    """With no_sync in use, the advice is more of it."""
    assert "gradient accumulation under model.no_sync()" in found(facts(1, 1)).next
    assert "more micro-batches per step" in found(facts(4, 1)).next


@pytest.mark.parametrize(("parallel", "keep"), [("fsdp2", "reshard_after_forward=False"), ("fsdp", "SHARD_GRAD_OP")])
def test_a_sharded_model_has_advice_of_its_own(parallel, keep):
    """The script calls no collective that it could call less often: the model gathers its parameters."""
    builder = JobFactsBuilder(2)
    for rank in range(2):
        builder.info(rank, {"kind": "model", "parallel": parallel})

    advice = found(builder.build()).next

    assert keep in advice
    assert "no_sync" not in advice


@pytest.mark.parametrize("parallel", ["fsdp2", "fsdp"])
def test_a_sharded_model_that_keeps_its_parameters_is_not_told_to(parallel: str) -> None:
    """It gathers them once in a step."""
    builder = JobFactsBuilder(2)
    for rank in range(2):
        builder.info(rank, {"kind": "model", "parallel": parallel, "trainable": 1000, "reshards": False})

    assert "use larger batches; or, if the model fits in each rank" in found(builder.build()).next


@pytest.mark.parametrize("parallel", ["ddp", "dtensor", None])
def test_other_models_have_no_advice_on_sharding(parallel):
    """Their parameters are not gathered."""
    builder = JobFactsBuilder(2)
    for rank in range(2):
        builder.info(rank, {"kind": "model", "parallel": parallel})

    assert "sharded" not in found(builder.build()).next


def test_collectives_of_the_script_are_another_cause():
    """Time in collectives that the script calls is not DDP's."""
    window = window_of(Job(), adds("comm", 30))
    assert all("average the gradients" not in each.summary for each in diagnose(window, facts(4, 4)))


@pytest.mark.parametrize(
    ("library", "is_named"),
    [
        ("/lib/torch/distributed/distributed_c10d.py:3155 all_reduce", True),
        ("/lib/torch/distributed/_functional_collectives.py:170 wait_tensor", False),
    ],
)
def test_the_line_that_calls_the_collectives_is_named(library: str, is_named: bool) -> None:
    """A parallel model calls its own, in the line that calls the model."""
    window = window_of(Job(comm=20.0, steps=100))
    window.times["comm"][:] += window.wait
    lines = (
        SampledLine(0, "comm", "/me/train.py", 13, "sync_metrics", library, 60),
        SampledLine(0, "backward", "/me/train.py", 30, "train", None, 40),
    )

    finding = next(
        each for each in diagnose(window, JobFacts(world_size=2, lines=lines)) if each.kind is Kind.COMM_BOUND
    )

    assert ("in collectives, all of it in train.py:13 sync_metrics, and no rank" in finding.summary) is is_named
    assert ("Call the collectives of train.py:13 sync_metrics less often" in finding.next) is is_named
    assert (finding.evidence.get("function") == "sync_metrics") is is_named


@pytest.mark.parametrize(("called", "found"), [("all_reduce", True), (None, False)])
def test_short_collectives_are_reported_where_the_script_calls_them(called: str | None, found: bool) -> None:
    """Six metrics reduced one by one, 2 ms of a step of 4 ms; averaging gradients by gloo takes as long in any run."""
    own = {"forward": 0.6, "backward": 1.0, "optimizer": 0.2, "other": 0.2}
    window = window_of(Job(comm=2.0, leave_ms=0.1, steps=100, own=own))
    window.times["comm"][:] += window.wait
    library = f"/lib/torch/distributed/distributed_c10d.py:3155 {called}"
    lines = (SampledLine(0, "comm", "/me/train.py", 13, "sync_metrics", library, 60),) if called else ()
    rest = SampledLine(0, "backward", "/me/train.py", 30, "train", None, 40)

    said = diagnose(window, JobFacts(world_size=2, lines=(*lines, rest)))

    assert any(each.kind is Kind.COMM_BOUND for each in said) is found


@pytest.mark.parametrize(("of_others", "in_collectives"), [(1.0, True), (0.2, False)])
def test_waiting_of_the_other_ranks_in_a_collective_is_for_it(of_others: float, in_collectives: bool) -> None:
    """Who broadcasts goes on at once, and waits in backward for those that still unpickle."""
    window = window_of(Job(ranks=3, comm=20.0, steps=100))
    window.times["comm"][1:] += of_others * window.wait[1:]
    lines = (
        SampledLine(
            1, "comm", "/me/train.py", 13, "share", "/lib/torch/distributed/distributed_c10d.py:9 broadcast", 60
        ),
        SampledLine(1, "backward", "/me/train.py", 30, "train", None, 40),
    )

    finding = next(
        each for each in diagnose(window, JobFacts(world_size=3, lines=lines)) if each.kind is Kind.COMM_BOUND
    )

    assert ("in collectives, " in finding.summary) is in_collectives
    assert ("while backward waits for gradients" in finding.summary) is not in_collectives


@pytest.mark.parametrize(("library", "is_told"), [("3424 _tensor_to_object", True), ("4191 all_gather", False)])
def test_objects_that_are_pickled_are_told(library: str, is_told: bool) -> None:
    """all_gather_object cannot begin earlier; a collective of tensors can."""
    window = window_of(Job(comm=20.0, steps=100))
    window.times["comm"][:] += window.wait
    c10d = "/lib/torch/distributed/distributed_c10d.py"
    lines = (
        SampledLine(0, "comm", "/me/train.py", 13, "gather", f"{c10d}:4191 all_gather", 50),
        SampledLine(0, "comm", "/me/train.py", 13, "gather", f"{c10d}:{library}", 10),
        SampledLine(0, "backward", "/me/train.py", 30, "train", None, 40),
    )
    known = JobFacts(world_size=2, lines=lines)

    finding = next(each for each in diagnose(window, known) if each.kind is Kind.COMM_BOUND)

    assert finding.next.startswith("train.py:13 gather sends Python objects") is is_told
    assert ("async_op=True" in finding.next) is not is_told


@pytest.mark.parametrize(
    ("library", "is_told"),
    [
        ("nn/parallel/distributed.py:2360 DistributedDataParallel._distributed_broadcast_coalesced", True),
        ("distributed/distributed_c10d.py:9 broadcast", False),
    ],
)
def test_buffers_that_are_broadcast_are_no_collectives_of_the_script(library: str, is_told: bool) -> None:
    """DDP sends the statistics of BatchNorm before each forward; the script calls no collective."""
    window = window_of(Job(comm=20.0, steps=100))
    window.times["comm"][:] += window.wait
    lines = (
        SampledLine(0, "comm", "/me/train.py", 13, "train", f"/lib/torch/{library}", 60),
        SampledLine(0, "backward", "/me/train.py", 30, "train", None, 40),
    )

    found = diagnose(window, JobFacts(world_size=2, lines=lines))
    finding = next(each for each in found if each.kind is Kind.COMM_BOUND)

    assert ("in DDP's broadcast of buffers, and no rank is late" in finding.summary) is is_told
    assert ("broadcast_buffers=False" in finding.next) is is_told
    assert ("Call the collectives" in finding.next) is not is_told


@pytest.mark.parametrize(("messages", "how"), [(False, "in collectives"), (True, "for messages of other ranks")])
def test_a_rank_without_steps_may_be_what_the_others_wait_for(messages: bool, how: str) -> None:
    """Rank 0 plays and broadcasts or sends its games; a faster network, or micro-batches, would gain nothing."""
    window = window_of(Job(comm=20.0, steps=100))
    window.times["comm"][:] += window.wait
    builder = JobFactsBuilder(3)
    builder.info(1, {"kind": "collectives", "elements": 65, "messages": messages})
    known = replace(builder.build(), backend="nccl", latest=(-1, 99, 99))

    finding = next(each for each in diagnose(window, known) if each.kind is Kind.COMM_BOUND)

    assert finding.summary.startswith(f"The ranks that train wait {how} for ")
    assert "Rank 0 has no training steps: they may wait for what it does." in finding.summary
    assert finding.next.startswith("Look at what rank 0 does meanwhile")
    assert finding.headline.startswith("The ranks that train wait for others: ")
    assert finding.evidence["ranks_without_steps"] == [0]
    assert finding.speedup_if_fixed == 1.0


@pytest.mark.parametrize(
    ("world_size", "unseen", "text"), [(3, [2], "rank 2"), (8, [*range(2, 8)], "one of ranks 2-7")]
)
def test_a_rank_that_is_not_in_the_run_may_be_late(world_size: int, unseen: list[int], text: str) -> None:
    """Each node's `traceml run --nnodes` has a run of its own: no rank of it is late, and yet it waits for one."""
    window = window_of(Job(comm=20.0, steps=100))
    builder = JobFactsBuilder(world_size)
    for rank in range(2):
        builder.host(rank, "node1")

    known = replace(builder.build(), backend="nccl", latest=(99, 99))
    finding = next(each for each in diagnose(window, known) if each.kind is Kind.COMM_BOUND)

    assert finding.headline.startswith("The ranks of this run wait for others: ")
    assert f" for others: for communication, or because {text} is late, which this run cannot show." in finding.summary
    assert "no rank is late" not in finding.summary
    assert finding.next.startswith("Trace all ranks in one run")
    assert finding.evidence["unseen_ranks"] == unseen
    assert finding.speedup_if_fixed == 1.0

    both = replace(known, world_size=2)
    assert "no rank is late" in next(each for each in diagnose(window, both) if each.kind is Kind.COMM_BOUND).summary


@pytest.mark.parametrize("parallel", [None, "ddp"])
def test_ranks_that_meet_every_eighth_step_wait_there_for_a_late_one(parallel: str | None) -> None:
    """Local SGD: what rank 1 is late in eight steps is waited for in one of them, and the network is not slow.

    That of Accelerate wraps the model in DDP, and runs each step under `no_sync()`.
    """
    window = window_of(Job(ranks=2, steps=200, comm=0.1, meets_every=8), adds("other", 20.0, (1,)))
    batches = BatchHistory()
    batches.model(0, {"parallel": parallel})
    batches.reduction_facts({"backwards_per_step": 1.0, "reductions_per_step": 0.0})

    kinds = {each.kind for each in diagnose(window, JobFacts(world_size=2, batches=batches))}

    assert Kind.STRAGGLER in kinds
    assert Kind.JITTER not in kinds


def test_an_average_in_each_measured_step_is_none_of_each_step() -> None:
    """Local SGD averages in every eighth step, and short steps are measured at multiples of eight."""
    own = {"input_wait": 0.1, "forward": 0.4, "backward": 0.8, "optimizer": 0.15}
    window = window_of(Job(steps=400, own=own, comm=16, meets_every=8))
    measured = np.where(window.steps % 8 == 7, window.backward_own, np.float32(np.nan))

    found = diagnose(replace(window, backward_own=measured), JobFacts(world_size=2))

    assert [each.kind for each in found] == [Kind.HEALTHY]
    assert "waiting for the rank that works longest" not in found[0].summary


def test_a_slow_network_is_told_beside_a_late_rank() -> None:
    """All ranks wait in 16 steps, for none of them."""
    window = window_of(Job(ranks=4, steps=400), adds("other", 6.0, (1,)))
    window.total[:, np.random.default_rng(1).random(window.total.shape[1]) < 0.04] += 60e6

    kinds = {each.kind: each.phase for each in diagnose(window, JobFacts(world_size=4))}

    assert kinds == {Kind.STRAGGLER: "other", Kind.JITTER: "comm"}


@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_meet_every_tenth_step_wait_there_for_what_they_wander(seed: int) -> None:
    """Local SGD: none of them is always late, and what they wait is of all ten steps, not of the network."""
    window = window_of(Job(ranks=4, steps=400, meets_every=10, wander=0.2, wander_steps=40), seed=seed)

    assert diagnose(window, JobFacts(world_size=4))[0].kind is Kind.HEALTHY


def test_little_communication_is_no_finding():
    """Reductions that cost next to nothing are not worth a word."""
    assert all(each.kind is not Kind.COMM_BOUND for each in diagnose(window_of(Job(comm=0.8)), facts(4, 4)))


@pytest.mark.parametrize(("core_wait", "verdict"), [(0.05, Kind.COMM_BOUND), (0.5, Kind.CPU_CONTENTION)])
def test_waiting_for_a_rank_that_has_no_core_is_no_communication(core_wait: float, verdict: Kind) -> None:
    """Rank 1 shares its core with another program: in backward it waits for the core, and rank 0 for it."""
    waits = {"wait_of_ready_time": {0: 0.02, 1: core_wait}, "wait_of_wall_time": {0: 0.02, 1: core_wait}}

    first = diagnose(window_of(Job(comm=20.0)), JobFacts(world_size=2, **waits))[0]

    assert verdict is Kind.COMM_BOUND or first.headline == "Rank 1 waits for a CPU core: 50 % of step time"
    assert (first.kind, first.ranks) == (verdict, (1,) if verdict is Kind.CPU_CONTENTION else ())


@pytest.mark.parametrize(("core_wait", "is_told"), [(0.3, True), (0.6, False)])
def test_communication_that_leads_is_told_where_cores_are_too_few(core_wait: float, is_told: bool) -> None:
    """Waiting for a core may be all of the waiting for other ranks, but no more than that."""
    waits = dict.fromkeys(range(2), core_wait)
    known = replace(facts(4, 4), world_size=2, wait_of_ready_time=waits, wait_of_wall_time=waits)

    found = diagnose(window_of(Job(comm=30.0)), known)

    assert Kind.CPU_CONTENTION in {each.kind for each in found}
    assert (found[0].kind is Kind.COMM_BOUND) is is_told
    assert not is_told or "under model.no_sync()" in found[0].next


def busy(used: float, ranks: int = 4) -> MachineSamples:
    """Return samples of ranks whose main threads use 0.2 cores, and the others of each so many."""
    samples = MachineSamples()
    for rank in range(ranks):
        rows = np.zeros(20, PROCESS.dtype)
        rows["t_ns"], rows["step"] = np.arange(20) * 1e9, np.arange(20) * 10
        rows["main_run_ns"], rows["cpu_ns"] = rows["t_ns"] * 0.2, rows["t_ns"] * (0.2 + used)
        samples.add(PROCESS.name, rank, rows)

    return samples


SIDE = SampledLine(0, "threads", "/me/train.py", 9, "monitor", None, 60, 20 * 10**9, 4 * 10**9)


@pytest.mark.parametrize(
    ("used", "threads", "lines", "is_told"),
    [(0.2, 1, (), False), (0.02, 1, (), True), (0.2, 2, (), True), (0.2, 1, (SIDE,), True)],
    ids=["wait for cores", "wait for the network", "torch's own", "of the script"],
)
def test_threads_that_communicate_wait_for_cores_as_the_main_one_does(
    used: float, threads: int, lines: tuple[SampledLine, ...], is_told: bool
) -> None:
    """Of 36 % of a step, beside programs that take the cores, 11 % were such waits of the threads of gloo."""
    known = JobFacts(
        world_size=4,
        threads=threads,
        samples=busy(used),
        thread_lines=lines,
        wait_of_ready_time=dict.fromkeys(range(4), 0.37),
        wait_of_wall_time=dict.fromkeys(range(4), 0.11),
    )
    job = Job(ranks=4, own={"forward": 1.0, "backward": 3.0, "optimizer": 1.5}, comm=4.0, leave_ms=0.1)

    first = diagnose(window_of(job), known)[0]

    assert first.kind is (Kind.COMM_BOUND if is_told else Kind.CPU_CONTENTION)


@pytest.mark.parametrize(("used", "is_told"), [(0.2, False), (0.02, True)])
def test_long_waits_for_threads_that_lack_cores_are_no_jitter(used: float, is_told: bool) -> None:
    """4 of 150 steps took 143 ms in communication, in ranks that had no core for 56 % of their ready time."""
    known = JobFacts(
        world_size=4,
        threads=1,
        samples=busy(used),
        wait_of_ready_time=dict.fromkeys(range(4), 0.56),
        wait_of_wall_time=dict.fromkeys(range(4), 0.13),
    )
    window = window_of(Job(ranks=4, steps=400), adds("backward", 30.0, every=40))
    for times in (window.total, window.times["backward"], window.wait):
        times[:, window.steps % 40 == 20] += 120e6

    assert any(each.kind is Kind.JITTER for each in diagnose(window, known)) is is_told


@pytest.mark.parametrize(("parameters", "is_latency"), [(4_000, True), (4_000_000, False), (None, False)])
def test_smaller_gradients_are_no_advice_where_the_latency_takes_the_time(
    parameters: int | None, is_latency: bool
) -> None:
    """16 KB take 20 ms on a network with a long way; 16 MB would take 128 ms at 1 Gbit/s."""
    advised = found(JobFacts(world_size=2, model=ModelFacts(trainable=parameters))).next

    assert ("Smaller gradients would gain little: these are 16 KiB" in advised) is is_latency
    assert ("16 bits" in advised) is not is_latency
    assert advised.startswith("Synchronize less per sample: larger batches or gradient accumulation")


LARGE = {"trainable": 40_000_000}
LESS = "Synchronize less per sample: larger batches or gradient accumulation under model.no_sync()"
BF16, FP16 = (f"gradients in 16 bits (DDP's {name}_compress_hook)" for name in ("bf16", "fp16"))
HOOK = "a gradient-compression hook"
BACKEND = "a faster backend than gloo between hosts"


@pytest.mark.parametrize(
    ("model", "backend", "advised"),
    [
        ({"dtype": "torch.float32"}, "nccl", f"{LESS}, {BF16}, or {HOOK}."),
        ({"dtype": "torch.float32"}, "gloo", f"{LESS}, {FP16}, or {BACKEND}."),  # bf16_compress_hook refuses gloo
        ({"dtype": "torch.bfloat16"}, "nccl", f"{LESS}, or {HOOK}."),
        ({"dtype": "torch.float16"}, "gloo", f"{LESS}, or {BACKEND}."),
        ({"comm_hook": "bf16_compress_hook"}, "nccl", f"{LESS}."),
        ({"comm_hook": "fp16_compress_hook"}, "gloo", f"{LESS}, or {BACKEND}."),
    ],
)
def test_gradients_of_16_bits_are_not_to_be_made_such(model: dict[str, str], backend: str, advised: str) -> None:
    """Those of a model in 16 bits, and those that a hook of the script sends: DDP takes no second one."""
    known = JobFacts(world_size=2, model=ModelFacts(**LARGE, **model), backend=backend)

    assert found(known).next == advised


@pytest.mark.parametrize(
    ("hosts", "accelerator", "advised"),
    [
        ({0: "a", 1: "b"}, None, f", or {BACKEND}."),
        ({0: "a", 1: "a"}, "cuda", ", or a faster backend than gloo."),
        ({0: "a", 1: "a"}, None, f", or {FP16}."),
    ],
)
def test_ranks_of_one_host_have_no_network(hosts: dict[int, str], accelerator: str | None, advised: str) -> None:
    """On a CPU they have no faster backend than gloo."""
    known = JobFacts(
        world_size=2, model=ModelFacts(**LARGE), backend="gloo", hosts=hosts, cores={"a": 64}, accelerator=accelerator
    )

    assert found(known).next.endswith(advised)


def test_the_size_of_gradients_is_that_of_their_type() -> None:
    """With a hook it is not known."""
    of_types = (ModelFacts(trainable=4_000, dtype=dtype) for dtype in ("torch.float32", "torch.bfloat16"))
    whole, half = (found(JobFacts(world_size=2, model=each)).next for each in of_types)
    hooked = found(JobFacts(world_size=2, model=ModelFacts(trainable=4_000, comm_hook="powerSGD_hook"))).next

    assert "these are 16 KiB" in whole
    assert "these are 8 KiB" in half
    assert "these are" not in hooked


@pytest.mark.parametrize(("cores", "of_ready_time", "is_told"), [(2, 0.37, True), (4, 0.37, False), (2, 0.1, False)])
def test_ranks_that_share_cores_communicate_more_slowly(cores: int, of_ready_time: float, is_told: bool) -> None:
    """Gloo's ring of 4 ranks takes 9 of 11 ms on 2 cores; without it a step takes 1.2 ms, of 2 ranks 3.3 ms."""
    waits = {"wait_of_ready_time": dict.fromkeys(range(4), of_ready_time)}
    waits["wait_of_wall_time"] = dict.fromkeys(range(4), 0.1)
    known = JobFacts(world_size=4, hosts=dict.fromkeys(range(4), "node1"), cores={"node1": cores}, **waits)
    job = Job(ranks=4, own={"forward": 0.4, "backward": 1.3, "optimizer": 0.3}, comm=8.0, leave_ms=0.1)

    first = diagnose(window_of(job), known)[0]

    assert first.kind is Kind.COMM_BOUND
    assert (" 4 ranks share 2 cores, which the threads that communicate need, too." in first.summary) is is_told
    assert ("fewer ranks on a host" in first.next) is is_told
    assert "Synchronize less per sample" in first.next


@pytest.mark.parametrize(("of_ready_time", "is_told"), [(0.8, True), (0.32, False)])
def test_waits_for_a_core_while_a_rank_computes_are_no_waits_for_other_ranks(
    of_ready_time: float, is_told: bool
) -> None:
    """Of the 39 % of a step that it computes, a main thread ran 8 %: the rest of its waits for a core is in these."""
    waits = dict.fromkeys(range(2), of_ready_time), dict.fromkeys(range(2), 0.32)
    known = JobFacts(world_size=2, wait_of_ready_time=waits[0], wait_of_wall_time=waits[1])

    found = diagnose(window_of(Job(comm=18.0)), known)

    assert (Kind.COMM_BOUND in {each.kind for each in found}) is is_told


@pytest.mark.parametrize(("of_ready_time", "of_wall_time", "is_told"), [(0.2, 0.2, True), (0.27, 0.3, False)])
def test_a_short_wait_for_cores_is_a_cost_of_communication(
    of_ready_time: float, of_wall_time: float, is_told: bool
) -> None:
    """Two ranks on two cores wait for these a little, as gloo has threads, too; more is a lack of cores."""
    known = JobFacts(
        world_size=2,
        wait_of_ready_time=dict.fromkeys(range(2), of_ready_time),
        wait_of_wall_time=dict.fromkeys(range(2), of_wall_time),
    )

    found = diagnose(window_of(Job(comm=13.0)), known)

    assert (Kind.COMM_BOUND in {each.kind for each in found}) is is_told


@pytest.mark.parametrize(("part", "ms"), [("checkpoint", 300.0), ("other", 500.0)])
def test_communication_costs_a_share_of_all_step_time(part: str, ms: float) -> None:
    """Each 25th step saves, or plots: the others are most of the steps, and not of their time."""
    rare = adds(part, ms, every=25)
    window, without = (window_of(Job(steps=400, comm=ms), rare) for ms in (10.0, 0.0))

    findings = diagnose(window, JobFacts(world_size=2))

    (comm,) = (each for each in findings if each.kind is Kind.COMM_BOUND)
    assert comm.speedup_if_fixed == pytest.approx(float(window.total.mean() / without.total.mean()), abs=0.03)
    assert comm.evidence["step_ms"] == pytest.approx(float(window.total.mean()) / 1e6)
    assert sum(each.cost_share for each in findings) < 1
