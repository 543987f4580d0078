"""Verdicts without a bottleneck: what the run does not do yet, and steps too short to judge."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Fault, Job, adds, window_of
from traceml.database.schema import GPU, IMPORTING, LINE_OTHER, LINES, PROCESS, Phase
from traceml.database.snapshots.rank_snapshot import FrameSnapshot, RankSnapshot
from traceml.diagnosis.advice import WITHOUT_ANOMALIES, WITHOUT_PROFILER
from traceml.diagnosis.facts.device_events import GpuHealthHistory
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.machine_use import MachineSamples
from traceml.diagnosis.facts.progress.rank_progress import JobProgress
from traceml.diagnosis.facts.sampled_lines import LineCounts, SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts, ModelFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.rules.no_bottleneck import for_compute
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, grouped=False)
HALF_BUSY = Job(
    ranks=1, grouped=False, own={"input_wait": 0.6, "forward": 2.0, "backward": 4.0, "optimizer": 0.5, "other": 0.6}
)
PLAIN, COMPILED = ModelFacts(dtype="torch.float32"), ModelFacts(dtype="torch.float32", compiled=True)

HALF = ModelFacts(dtype="torch.bfloat16", compiled=True)


@pytest.mark.parametrize(
    ("facts", "says", "never"),
    [
        ({"model": PLAIN}, "torch.compile", "compiled already"),
        ({"model": COMPILED}, "It is compiled already.", "torch.compile"),
        ({"model": COMPILED, "compile_s": 12.0}, "compiled already, which took 12 s", "torch.compile"),
        ({"model": PLAIN, "compile_s": 12.0}, "a smaller model or an accelerator", "compile"),  # it is not known what
        ({"threads": 1, "hosts": {0: "h"}, "cores": {"h": 8}}, "torch uses 1 of 8 cores", "bf16"),
        ({"threads": 8, "hosts": {0: "h"}, "cores": {"h": 8}}, "torch.compile", "OMP_NUM_THREADS"),
        ({"model": HALF}, "32-bit floats in place of 16-bit ones", "torch.compile"),
        ({"model": PLAIN, "autocast": True}, "To go faster: 32-bit floats in place of 16-bit ones", "compiled already"),
        ({"model": ModelFacts(dtype="torch.float64")}, "To go faster: 32-bit floats in place of 64-bit ones", "16-bit"),
        ({"model": PLAIN}, "torch.compile", "64-bit"),
        ({"model": PLAIN}, "torch.compile", "16-bit"),
        ({"model": ModelFacts(device="cuda:0"), "autocast": True}, "torch.compile", "16-bit"),
    ],
)
def test_advice_on_a_cpu_is_what_is_not_done_yet(facts, says, never):
    """Nothing is advised that the run does already."""
    text = for_compute("backward", JobFacts(**facts), device=False)

    assert says in text
    assert never not in text


@pytest.mark.parametrize(("dtype", "is_told"), [("torch.float64", True), ("torch.float32", False)])
def test_an_optimizer_of_64_bit_weights_is_told_of_them(dtype, is_told):
    """It reads and writes twice the memory; the advice on the optimizer itself stays the first."""
    text = for_compute("optimizer", JobFacts(model=ModelFacts(dtype=dtype)), device=False)

    assert text.startswith("The optimizer takes the most")
    assert ("32-bit floats in place of 64-bit ones" in text) is is_told


@pytest.mark.parametrize(
    ("facts", "is_told"),
    [({"model": PLAIN}, True), ({}, True), ({"model": COMPILED}, False), ({"model": PLAIN, "compile_s": 12.0}, False)],
)
def test_a_healthy_run_that_compiles_is_not_told_to_do_so(facts, is_told):
    """Nor one that compiles something else than the model as a whole, as its blocks."""
    own = {"forward": 10.0, "backward": 5.0, "optimizer": 1.0, "other": 1.8, "input_wait": 1.5}
    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(**facts))[0]

    assert found.kind is Kind.HEALTHY
    assert found.next.startswith("Nothing needs fixing; larger batches")
    assert ("torch.compile" in found.next) == is_told


def of_device(
    busy_pct: float, power_w: float = 150.0, reasons: int = 0, *, limit_w: int = 700, paused: int = 0
) -> JobFacts:
    """Return facts with 40 samples of one device in training; in the last ones the script did something else."""
    process, gpu = np.zeros(40, PROCESS.dtype), np.zeros(40, GPU.dtype)
    process["t_ns"] = gpu["t_ns"] = np.arange(40) * 10**9
    process["step"] = np.minimum(np.arange(40), 40 - paused) * 10
    gpu["utilization_pct"], gpu["power_w"], gpu["throttle_reasons"] = busy_pct, power_w, reasons
    gpu["utilization_pct"][41 - paused :], gpu["power_w"][41 - paused :] = 0.0, 100.0
    samples, health = MachineSamples(), GpuHealthHistory()
    samples.add(PROCESS.name, 0, process)
    samples.add(GPU.name, 0, gpu)
    health.add(0, {"index": 0, "power_limit_w": limit_w, "default_power_limit_w": limit_w})
    return JobFacts(samples=samples, health=health, model=PLAIN)


def test_a_device_that_waits_for_launches_is_named() -> None:
    """Computation by the times of the device, but it computes in a third of the time: another type changes nothing."""
    window = replace(window_of(Job(ranks=1, grouped=False)), device=True)
    found = diagnose(window, of_device(32.0))[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert found.headline == "Launching work limits the steps: the device computes 32 % of the time"
    assert found.summary.startswith("The device computes only 32 % of the time and waits for the host")
    assert found.evidence["device_busy_share"] == pytest.approx(0.32)
    assert "reduce-overhead" in found.next
    assert "bf16" not in found.next


@pytest.mark.parametrize(("model", "compiled"), [(PLAIN, False), (COMPILED, True)])
def test_a_compiled_model_may_have_that_mode(model: ModelFacts, compiled: bool) -> None:
    """The mode of torch.compile is not known."""
    facts = replace(of_device(32.0), model=model)
    found = diagnose(replace(window_of(Job(ranks=1, grouped=False)), device=True), facts)[0]

    other = ", if it has another one" * compiled
    assert f"torch.compile with mode='reduce-overhead'{other}, which launches a CUDA graph" in found.next


@pytest.mark.parametrize(
    "facts",
    [
        of_device(98.0),
        of_device(98.0, 690.0, 0x4),
        of_device(40.0, 560.0),
        of_device(99.0, 690.0, paused=22),
        of_device(99.0, 350.0, paused=14),
        of_device(40.0, limit_w=-1),
    ],
    ids=["busy", "at its power limit", "as busy as its power shows", "pauses", "few pauses", "no power limit known"],
)
def test_a_busy_device_does_not_wait_for_launches(facts: JobFacts) -> None:
    """At its power limit a device computes as fast as it can: nothing is wrong with its cooling."""
    found = diagnose(replace(window_of(Job(ranks=1, grouped=False)), device=True), facts)[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert "device_busy_share" not in found.evidence
    assert found.next == (
        "To go faster: torch.compile, or bf16 autocast, or TF32 (torch.set_float32_matmul_precision('high')), where "
        "the weights are in 32 bits."
    )


def test_short_steps_that_wait_for_launches_are_not_healthy() -> None:
    """A fifth of the step is outside the phases, as where GradScaler reads whether gradients are finite."""
    own = {"forward": 0.3, "backward": 0.7, "optimizer": 0.4, "other": 0.35}
    window = replace(window_of(Job(ranks=1, grouped=False, own=own)), device=True)

    assert diagnose(window, of_device(9.0))[0].headline.startswith("Launching work limits the steps: the device")
    assert diagnose(window, of_device(98.0))[0].kind is Kind.HEALTHY
    assert diagnose(replace(window, device=False), of_device(9.0))[0].kind is Kind.HEALTHY


def test_tf32_is_not_advised_where_it_is_on() -> None:
    """Convolutions use it unless it is turned off."""
    text = for_compute("backward", replace(of_device(98.0), tf32=True), device=True)

    assert text == "To go faster: torch.compile, or bf16 autocast, where the weights are in 32 bits."


def test_autocast_is_not_advised_where_it_is_on() -> None:
    """The weights stay in 32 bits under it."""
    text = for_compute("backward", replace(of_device(98.0), autocast=True), device=True)

    assert text == "To go faster: torch.compile."


@pytest.mark.parametrize(
    ("own", "says", "headline"),
    [
        ({"forward": 4.0, "backward": 8.0, "optimizer": 1.5}, "most of it backward", "most of it in backward"),
        (
            {"forward": 4.0, "backward": 5.0, "optimizer": 3.5},
            "the largest part backward",
            "the largest part in backward",
        ),
        ({"forward": 3.0, "backward": 3.0, "optimizer": 4.5}, "the largest part", "the largest part in optimizer"),
    ],
)
def test_most_is_said_of_half_of_the_computation(own: dict[str, float], says: str, headline: str) -> None:
    """Of three phases the heaviest may have a third."""
    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts())[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert says in found.summary
    assert found.headline == f"The model's own compute limits this run, {headline}"


@pytest.mark.parametrize(("backward_ms", "is_told"), [(0.8, True), (4.5, True), (7.0, False)])
def test_a_forward_that_is_hardly_trained_is_told(backward_ms: float, is_told: bool) -> None:
    """The forward of a teacher, or of a frozen part, has no backward."""
    own = {"forward": 16.0, "backward": backward_ms, "optimizer": 0.6}
    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts())[0]

    assert (found.kind, found.phase) == (Kind.COMPUTE_BOUND, "forward")
    assert ("where forward is not trained (a frozen part, a teacher, sampling)" in found.next) == is_told


@pytest.mark.parametrize(
    ("backward_ms", "collects", "is_told"), [(8, True, True), (8, False, False), (18, True, False)]
)
def test_rollouts_are_told_where_forward_takes_longer_than_backward(
    backward_ms: float, collects: bool, is_told: bool
) -> None:
    """A language model that generates what it is trained on is no matter of threads alone."""
    own = {"forward": 16.0, "backward": backward_ms, "optimizer": 0.6}
    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(collects=collects))[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert ("much of it may be rollouts. Make rollouts cheaper." in found.next) is is_told


@pytest.mark.parametrize("kind", [Kind.COMPUTE_BOUND, Kind.HEALTHY])
@pytest.mark.parametrize(
    ("calls", "heaviest", "is_told"), [(64, "forward", True), (0, "forward", False), (64, "optimizer", False)]
)
def test_calls_with_single_samples_are_told(calls: int, heaviest: str, is_told: bool, kind: Kind) -> None:
    """Unless the optimizer takes the most: its step is one for all samples."""
    own = {"forward": 6.0, "backward": 5.0, "optimizer": 1.0, heaviest: 10.0}
    own |= {"other": 1.8, "input_wait": 1.5} if kind is Kind.HEALTHY else {}
    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(single_calls=calls))[0]

    assert found.kind is kind
    assert found.next.startswith("The model is called with one sample at a time, 64 times for each batch: ") == is_told


@pytest.mark.parametrize(("forward_ms", "is_told"), [(16.0, True), (6.0, False)])
def test_a_forward_that_is_hardly_trained_is_told_beside_other_code(forward_ms: float, is_told: bool) -> None:
    """A bit more than a tenth of the step is no computation: a teacher that takes most of the rest is told, too."""
    own = {"forward": forward_ms, "backward": 0.9, "optimizer": 20.0 - forward_ms, "other": 1.8, "input_wait": 1.5}
    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts())[0]

    assert found.kind is Kind.HEALTHY
    assert found.next.startswith("Nothing needs fixing; larger batches")
    assert ("where forward is not trained (a frozen part, a teacher, sampling)" in found.next) == is_told


@pytest.mark.parametrize("kind", [Kind.COMPUTE_BOUND, Kind.HEALTHY])
@pytest.mark.parametrize(("function", "is_named"), [("Net.mask", True), ("Teacher.forward", False)])
def test_a_function_of_forward_that_is_hardly_trained_is_named(function: str, is_named: bool, kind: Kind) -> None:
    """A mask that is made anew in each step; of a whole module it is not known which part that is."""
    lines = [
        SampledLine(0, "forward", "/me/net.py", 12, function, None, 60),
        SampledLine(0, "other", "/me/net.py", 40, "main", None, 12),
    ]
    own = {"forward": 16.0, "backward": 0.8, "optimizer": 0.4}
    own |= {"other": 1.8, "input_wait": 1.5} if kind is Kind.HEALTHY else {}
    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(lines=lines))[0]

    assert found.kind is kind
    assert ("so net.py:12 Net.mask seems not to be trained: if it makes the same in each" in found.next) is is_named
    assert ("where forward is not trained (a frozen part, a teacher, sampling)" in found.next) is not is_named
    assert ("If it only watches (a hook), run it every n-th step." in found.next) is is_named
    assert ("What only measures the model (on other samples) can run every n-th step." in found.next) is not is_named
    assert "Nothing needs fixing" not in found.next or not is_named


ENGINE = "torch/autograd/graph.py:966 _engine_run_backward"


@pytest.mark.parametrize(("engine", "named"), [(40, True), (200, False)])
def test_a_slow_hook_of_all_ranks_is_named(engine: int, named: bool) -> None:
    """A communication hook, or the backward of a Function: not the line that calls backward()."""
    lines = [
        SampledLine(0, "backward", "/me/train.py", 22, "main", ENGINE, engine),
        SampledLine(0, "backward", "/me/train.py", 8, "quantize", None, 80),
        SampledLine(0, "forward", "/me/train.py", 21, "main", None, engine + 40),
    ]

    found = diagnose(window_of(Job(ranks=2, comm=0.0)), JobFacts(world_size=2, lines=lines))[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert ("67 % of backward is in train.py:8 quantize" in found.summary) == named
    assert ("Make train.py:8 quantize cheaper" in found.next) == named
    assert ("To go faster" in found.next) != named
    assert found.headline.endswith("of step time is spent in train.py:8 quantize") == named
    assert "of backward is in train.py:22" not in found.summary


def test_code_in_backward_is_named_although_ranks_wait_there() -> None:
    """A communication hook: samples of backward are of its own work and of waiting."""
    own = {"forward": 0.5, "backward": 15.0, "optimizer": 0.3, "other": 0.5}
    lines = [
        SampledLine(0, "backward", "/me/train.py", 8, "compress", None, 66),
        SampledLine(0, "backward", "/me/train.py", 22, "main", ENGINE, 30),
        SampledLine(0, "forward", "/me/train.py", 21, "main", None, 4),
    ]

    found = diagnose(window_of(Job(ranks=2, comm=4.5, own=own)), JobFacts(world_size=2, lines=lines))[0]

    assert found.kind is Kind.HEALTHY
    assert "69 % of backward is in train.py:8 compress" in found.summary
    assert "Nothing needs fixing" not in found.next
    assert found.headline.endswith(" % of step time is spent in train.py:8 compress")
    assert found.speedup_if_fixed == pytest.approx(1 / (1 - found.evidence["line_share"]))
    assert found.evidence["line_share"] == pytest.approx(0.66, abs=0.03)


def test_backward_without_its_own_code_gains_what_is_promised() -> None:
    """Two thirds of backward are in the backward of a Function, which loops in Python."""
    lines = [
        SampledLine(0, "backward", "/me/train.py", 8, "Quantize.backward", None, 120),
        SampledLine(0, "backward", "/me/train.py", 22, "main", ENGINE, 60),
        SampledLine(0, "forward", "/me/train.py", 21, "main", None, 40),
    ]
    slow, fixed = (window_of(ALONE, *faults) for faults in ([adds("backward", 16)], []))

    found = diagnose(slow, JobFacts(lines=lines))[0]

    assert "Make train.py:8 Quantize.backward cheaper" in found.next
    assert found.speedup_if_fixed == pytest.approx(slow.total.mean() / fixed.total.mean(), rel=0.1)


@pytest.mark.parametrize(("busy", "waited", "told"), [(0.1, 0.0, True), (0.95, 0.0, False), (0.3, 0.6, False)])
def test_code_in_forward_that_waits_is_to_be_made_cheaper(busy: float, waited: float, told: bool) -> None:
    """A hook that sleeps; code that computes may be the model's own operations, also while it waits for a core."""
    times = {"watched_ns": 400_000_000, "cpu_ns": int(400_000_000 * busy)}
    lines = [
        SampledLine(0, "forward", "/me/train.py", 8, "log", None, 120, **times),
        SampledLine(0, "forward", "/me/train.py", 22, "main", LINEAR, 60),
        SampledLine(0, "backward", "/me/train.py", 23, "main", ENGINE, 90),
    ]

    found = diagnose(window_of(ALONE, adds("forward", 14)), JobFacts(lines=lines, wait_of_ready_time={0: waited}))
    verdict = next(each for each in found if each.kind in (Kind.COMPUTE_BOUND, Kind.CPU_CONTENTION))

    assert ("Make train.py:8 log cheaper, which waits inside forward" in verdict.next) is told
    assert not told or verdict.speedup_if_fixed == pytest.approx(1.8, abs=0.15)


def test_the_model_that_is_called_beside_a_wait_stays() -> None:
    """A training step of Lightning waits in one line, and calls the model and the loss in another one."""
    times = {"watched_ns": 400_000_000, "cpu_ns": 20_000_000}
    lines = [
        SampledLine(0, "forward", "/me/train.py", 9, "Net.training_step", None, 120, **times),
        SampledLine(0, "forward", "/me/train.py", 8, "Net.training_step", None, 60, **times),
        SampledLine(0, "backward", "/me/train.py", 23, "main", ENGINE, 90),
    ]
    slow, fixed = (window_of(ALONE, *faults) for faults in ([adds("forward", 14)], []))

    found = diagnose(slow, JobFacts(lines=lines))[0]

    assert "Make train.py:9 Net.training_step cheaper, which waits inside forward" in found.next
    assert 1.0 < found.speedup_if_fixed <= 1.05 * slow.total.mean() / fixed.total.mean()


def test_activations_that_are_computed_again_are_not_to_be_made_cheaper() -> None:
    """With checkpointing the model's forward runs in backward, and its operations have no frames of their own."""
    lines = [
        SampledLine(0, "forward", "/me/net.py", 12, "Block.forward", None, 60),
        SampledLine(0, "backward", "/me/net.py", 12, "Block.forward", None, 90),
        SampledLine(0, "backward", "/me/train.py", 22, "main", ENGINE, 30),
    ]

    found = diagnose(window_of(ALONE), JobFacts(lines=lines))[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert "To go faster" in found.next
    assert found.speedup_if_fixed == 1.0


@pytest.mark.parametrize(("engine", "named"), [(40, False), (0, True)])
def test_modules_of_torch_that_are_computed_again_are_no_code_of_the_script(engine: int, named: bool) -> None:
    """A script that checkpoints `nn.TransformerEncoderLayer`: no function of torch has half of backward."""
    dropout, linear = (f"torch/nn/functional.py:{number} {name}" for number, name in ((1467, "dropout"), (9, "linear")))
    lines = [
        SampledLine(0, "backward", "/me/train.py", 22, "main", library, samples)
        for library, samples in ((ENGINE, engine), (dropout, 30), (linear, 35), (None, 25))
    ]
    lines.append(SampledLine(0, "forward", "/me/net.py", 21, "Net.forward", LINEAR, 80))

    found = diagnose(window_of(ALONE), JobFacts(lines=lines))[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert ("Make train.py:22 main cheaper" in found.next) == named
    assert ("of backward is in train.py:22 main" in found.summary) == named


LINEAR = "torch/nn/modules/linear.py:130 Linear.forward"


@pytest.mark.parametrize(
    ("other_ms", "library", "samples", "kind", "named"),
    [
        (0.9, None, 80, Kind.HEALTHY, True),
        (0.3, None, 80, Kind.COMPUTE_BOUND, True),
        (0.9, LINEAR, 80, Kind.HEALTHY, False),
        (0.9, None, 30, Kind.HEALTHY, False),
        (0.9, None, 800, Kind.HEALTHY, False),
    ],
    ids=["healthy", "compute", "calls torch", "a part of it", "not its share"],
)
def test_own_code_in_forward_is_named_in_healthy_runs(other_ms, library, samples, kind, named) -> None:
    """A hook of a module, or a loop in Python; not where it calls torch, nor what has too many samples."""
    own = {"input_wait": other_ms, "forward": 8.0, "backward": 4.0, "optimizer": 0.5, "other": other_ms}
    lines = [
        SampledLine(0, "forward", "/me/train.py", 8, "watch", library, samples),
        SampledLine(0, "forward", "/me/train.py", 12, "Net.forward", LINEAR, 20),
        SampledLine(0, "backward", "/me/train.py", 22, "main", ENGINE, 60),
    ]

    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(lines=lines))[0]

    assert found.kind is kind
    assert (found.evidence.get("function") == "watch") == named
    assert ("80 % of forward is in train.py:8 watch" in found.summary) == named


@pytest.mark.parametrize(("samples", "named"), [(25, True), (4, False)])
@pytest.mark.parametrize(("other_ms", "kind"), [(0.3, Kind.COMPUTE_BOUND), (1.7, Kind.HEALTHY)])
def test_a_hook_with_a_small_part_of_forward_is_named(samples, named, other_ms, kind) -> None:
    """Beside the line that calls the model, from a tenth of the step on; it may be the model's own code: no advice."""
    own = {"input_wait": other_ms, "forward": 8.0, "backward": 8.0, "optimizer": 1.0, "other": 0.3}
    lines = [
        SampledLine(0, "forward", "/me/train.py", 14, "main", LINEAR, 50),
        SampledLine(0, "forward", "/me/train.py", 6, "watch", None, samples),
        SampledLine(0, "backward", "/me/train.py", 22, "main", ENGINE, 75),
    ]

    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(lines=lines))[0]

    assert found.kind is kind
    assert ("33 % of" in found.summary and "in train.py:6 watch" in found.summary) == named
    assert (found.evidence.get("line") == 6) == named
    assert "watch" not in found.next


QUANTILE = "/site-packages/numpy/lib/_function_base_impl.py:4714 _quantile"


@pytest.mark.parametrize(
    ("library", "named"), [(QUANTILE, True), ("/site-packages/timm/layers/mlp.py:9 Mlp.forward", False)]
)
@pytest.mark.parametrize("samples", [25, 48])
def test_a_hook_that_calls_numpy_is_code_of_the_script(library: str, named: bool, samples: int) -> None:
    """Statistics of activations, which take as long as the model or less; another library may be the model."""
    own = {"input_wait": 0.3, "forward": 8.0, "backward": 8.0, "optimizer": 1.0, "other": 0.3}
    lines = [
        SampledLine(0, "forward", "/me/train.py", 14, "main", LINEAR, 50),
        SampledLine(0, "forward", "/me/train.py", 6, "watch", library, samples),
        SampledLine(0, "backward", "/me/train.py", 22, "main", ENGINE, 50 + samples),
    ]

    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(lines=lines))[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert ("in train.py:6 watch" in found.summary) is named


@pytest.mark.parametrize(("other_ms", "kind"), [(0.3, Kind.COMPUTE_BOUND), (1.7, Kind.HEALTHY)])
def test_a_hook_that_calls_numpy_is_to_be_made_cheaper(other_ms: float, kind: Kind) -> None:
    """No operations of the model have frames in NumPy; what else the function does may be some."""
    own = {"input_wait": other_ms, "forward": 12.0, "backward": 4.0, "optimizer": 0.5, "other": other_ms}
    lines = [
        SampledLine(0, "forward", "/me/train.py", 6, "watch", QUANTILE, 60),
        SampledLine(0, "forward", "/me/train.py", 7, "watch", None, 20),
        SampledLine(0, "forward", "/me/train.py", 14, "main", LINEAR, 20),
        SampledLine(0, "backward", "/me/train.py", 22, "main", ENGINE, 33),
    ]

    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(lines=lines))[0]

    assert found.kind is kind
    assert "Make train.py:6 watch cheaper, which calls other libraries than torch (NumPy, PIL) inside" in found.next
    assert "Nothing needs fixing" not in found.next
    assert "train.py:6 watch" in found.headline
    step = sum(own.values())
    assert found.speedup_if_fixed == pytest.approx(step / (step - 0.6 * 12.0), rel=0.1)


@pytest.mark.parametrize(("passes", "is_told"), [(40, True), (200, False)])
def test_code_that_costs_more_than_the_cause_is_told_beside_it(passes: int, is_told: bool) -> None:
    """The backward of a Function takes half of the step, and waiting for data a fifth: that alone gains little."""
    lines = [
        SampledLine(0, "backward", "/me/ops.py", 8, "Quantize.backward", None, 100),
        SampledLine(0, "backward", "/me/train.py", 22, "main", ENGINE, passes),
        SampledLine(0, "forward", "/me/train.py", 21, "main", LINEAR, 40),
    ]
    own = {"input_wait": 4.0, "forward": 2.0, "backward": 12.0, "optimizer": 0.5, "other": 0.3}

    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(lines=lines))[0]

    assert found.kind is Kind.INPUT_BOUND
    assert ("of step time is spent in ops.py:8 Quantize.backward, which backward calls" in found.next) is is_told


def test_own_code_of_less_than_a_millisecond_is_not_to_be_made_cheaper() -> None:
    """In phases that short the samples do not tell waiting from computing, as in a LightningModule that logs."""
    times = {"watched_ns": 25_000_000, "cpu_ns": 100_000}
    lines = [
        SampledLine(0, "forward", "/me/train.py", 8, "Model.training_step", None, 80, **times),
        *(SampledLine(0, part, "/me/train.py", 22, "main", ENGINE, 60) for part in ("backward", "optimizer", "other")),
    ]
    own = {"forward": 0.9, "backward": 0.6, "optimizer": 0.6, "other": 0.6}

    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(lines=lines))[0]

    assert found.kind is Kind.HEALTHY
    assert "own_code" not in found.evidence
    assert "cheaper" not in found.next


@pytest.mark.parametrize(
    ("model", "says", "never"),
    [
        (PLAIN, "bf16 autocast", "larger"),
        (HALF, "(batch_size is 8)", "bf16"),
    ],
)
def test_advice_on_a_device_looks_at_the_dtype(model, says, never):
    """A model in 16 bits is not told to use them."""
    text = for_compute("forward", JobFacts(model=model, loader=LoaderFacts(batch_size=8)), device=True)

    assert says in text
    assert never not in text


@pytest.mark.parametrize(
    ("tables", "parallel", "advised"), [(900, None, True), (400, None, False), (0, None, False), (900, "ddp", False)]
)
def test_sparse_gradients_are_advised_for_large_tables(tables, parallel, advised):
    """Not where other parameters are the most, or gradients are joined over ranks."""
    model = ModelFacts(trainable=1000, dense_embeddings=tables, parallel=parallel)
    text = for_compute("optimizer", JobFacts(fused=False, model=model), device=False)

    assert ("90 % of the parameters are tables of embeddings: with sparse=True" in text) == advised
    assert ("fused=True" in text) != advised


def test_a_fused_form_is_advised_to_those_that_have_it():
    """The others step less often, on larger batches."""
    assert "fused=True" in for_compute("optimizer", JobFacts(fused=False), device=False)
    for fused in (True, None):  # fused already; LBFGS, or one of the user's own
        assert "fused=True" not in for_compute("optimizer", JobFacts(fused=fused), device=False)


def test_the_code_that_takes_most_of_forward_is_named():
    """The user's line, and the library function that it calls."""
    library = "/lib/torch/nn/modules/conv.py:541 Conv2d._conv_forward"
    lines = [SampledLine(0, "forward", "/me/net.py", 12, "Net.forward", library, 60)]
    rest = SampledLine(0, "backward", "/me/net.py", 40, "main", None, 120)
    found = diagnose(window_of(ALONE), JobFacts(lines=(*lines, rest)))[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert "net.py:12 Net.forward, which calls Conv2d._conv_forward" in found.summary


@pytest.mark.parametrize(
    ("library", "anomalies", "is_told"),
    [
        (None, False, True),
        ("/lib/torch/nn/modules/conv.py:541 Conv2d._conv_forward", False, False),
        (None, True, False),
    ],
)
def test_a_loop_in_forward_is_told_before_threads_that_would_not_help(library, anomalies, is_told):
    """Nodes of a graph are gathered one by one: each operation is too small for a second core."""
    own = {"forward": 30.0, "backward": 20.0, "optimizer": 1.0, "other": 0.2}
    lines = [
        SampledLine(0, "forward", "/me/net.py", 12, "Aggregate.forward", library, 60),
        SampledLine(0, "backward", "/me/net.py", 40, "main", ENGINE, 40),
    ]

    found = diagnose(
        window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(lines=lines, detects_anomalies=anomalies)
    )[0]

    assert found.kind is Kind.COMPUTE_BOUND
    assert found.next.startswith("If net.py:12 Aggregate.forward loops in Python, use operations on") is is_told
    assert ("loops in Python" in found.next) is is_told


@pytest.mark.parametrize(
    ("library", "may_be_fused"),
    [("torch/optim/_functional.py:24 sparse_adam", False), ("torch/optim/adam.py:347 _single_tensor_adam", True)],
)
def test_no_fused_form_is_advised_where_another_optimizer_takes_the_time(library: str, may_be_fused: bool) -> None:
    """Of a sparse one for a table and Adam for the rest, only Adam may be fused."""
    lines = [
        SampledLine(0, "optimizer", "/x/train.py", 9, "main", library, 40),
        SampledLine(0, "optimizer", "/x/train.py", 9, "main", "torch/optim/adamw.py:1 adamw", 3),
    ]
    facts = JobFacts(fused=False, lines=lines)

    assert ("fused=True" in for_compute("optimizer", facts, device=False)) is may_be_fused


@pytest.mark.parametrize(("function", "may_watch"), [("histogram", True), ("Block.forward", False)])
def test_a_hook_of_forward_may_run_less_often(function: str, may_watch: bool) -> None:
    """Its operations may be on whole tensors already; those of a module's forward are the model's."""
    lines = [
        SampledLine(0, "forward", "/me/net.py", 12, function, None, 60),
        SampledLine(0, "backward", "/me/net.py", 40, "main", ENGINE, 40),
    ]
    own = {"forward": 30.0, "backward": 20.0, "optimizer": 1.0, "other": 0.2}

    found = diagnose(window_of(Job(ranks=1, grouped=False, own=own)), JobFacts(lines=lines))[0]

    assert f"If net.py:12 {function} loops in Python" in found.next
    assert ("if it only watches (a hook), run it every n-th step." in found.next) is may_watch


def test_steps_too_short_to_judge_are_said_to_be():
    """The loop's overhead is named, and nothing \"needs no fixing\"."""
    tiny = Job(
        ranks=1, grouped=False, steps=400,
        own={"input_wait": 0.3, "forward": 0.1, "backward": 0.15, "optimizer": 0.1, "other": 0.2},
    )  # fmt: skip
    found = diagnose(window_of(tiny), JobFacts(loader=LoaderFacts(batch_size=4)))[0]

    assert found.kind is Kind.HEALTHY
    assert found.headline.endswith("are too short to judge")
    assert "too short to judge" not in found.summary
    assert "the loop's own overhead (35 % data loading" in found.summary
    assert "larger batches (batch_size is 4)" in found.next
    assert "Nothing needs fixing" not in found.next


@pytest.mark.parametrize(("other_ms", "kind"), [(9.0, Kind.HEALTHY), (0.1, Kind.COMPUTE_BOUND)])
def test_one_step_that_takes_most_of_the_time_is_reported(other_ms, kind):
    """A single pause is no pattern, but something that needs to be looked at."""
    job = Job(ranks=1, grouped=False, own={"forward": 8.0, "backward": 8.0, "other": other_ms})
    (found, *_) = diagnose(window_of(job, adds("other", 30_000.0, every=job.steps)), JobFacts())

    assert found.kind is kind
    assert "One step took" in found.summary
    assert "Nothing needs fixing" not in found.next


def test_the_long_step_of_one_rank_is_told_by_its_work():
    """The other ranks wait in this step or in the next one: the mean over ranks has half of it."""
    job = Job(ranks=2, steps=80, own={"forward": 3.0, "backward": 3.0, "other": 1.0})
    (found, *_) = diagnose(window_of(job, adds("other", 15_000.0, (1,), every=job.steps)), JobFacts(world_size=2))

    assert found.kind is Kind.HEALTHY
    (said_s,) = re.findall(r"One step took ([\d.]+) s", found.summary)
    assert float(said_s) == pytest.approx(15.0, rel=0.1)


@pytest.mark.parametrize(("pause_ms", "named"), [(60_000.0, True), (7_000.0, False)])
def test_the_line_of_that_step_is_named(pause_ms, named):
    """Where it is most of its phase: samples do not tell which step they are of."""
    job = Job(ranks=1, grouped=False, steps=600, own={"forward": 9.0, "backward": 9.0})
    seen = (SampledLine(0, "forward", "/x/train.py", 9, "Net.forward", None, 300),)
    (found, *_) = diagnose(window_of(job, adds("forward", pause_ms, every=job.steps)), JobFacts(lines=seen))

    assert "One step took" in found.summary
    assert ("times the mean of the others, mostly in train.py:9 Net.forward." in found.summary) == named


@pytest.mark.parametrize(("samples", "named"), [(300, True), (30, False)])
def test_imports_of_that_step_are_named(samples, named):
    """A function that is called in the 60th step only imports what it needs; imports count for no other line."""
    job = Job(ranks=1, grouped=False, own={"forward": 8.0, "backward": 8.0, "other": 1.0})
    seen = (
        SampledLine(0, "other", "/x/train.py", 9, "metrics", f"{IMPORTING}1207 _handle_fromlist", samples),
        SampledLine(0, "backward", "/x/train.py", 12, "main", None, 60),
    )
    (found, *_) = diagnose(window_of(job, adds("other", 20_000.0, every=job.steps)), JobFacts(lines=seen))

    assert ("times the mean of the others, mostly in imports of train.py:9 metrics." in found.summary) is named
    assert found.next.startswith("Import these modules at the start of the script") is named


def test_the_line_of_that_step_is_to_be_looked_at():
    """It may be in code outside the known phases, and nothing else is wrong."""
    job = Job(ranks=1, grouped=False, own={"forward": 8.0, "backward": 8.0, "other": 9.0})
    seen = (SampledLine(0, "other", "/x/train.py", 9, "save", None, 300),)
    (found, *_) = diagnose(window_of(job, adds("other", 60_000.0, every=job.steps)), JobFacts(lines=seen))

    assert found.next.startswith("Find out what train.py:9 save did in that step")


PAUSED = Job(ranks=1, grouped=False, steps=400, own={"forward": 6.0, "backward": 9.0, "optimizer": 3.0, "other": 12.0})


def sampled_by_second(in_pause: int | None) -> JobFacts:
    """Return the samples of twelve seconds before the pause, in line 4, and of its twenty seconds.

    Args:
        in_pause: the line that is seen in it; None if it hides from samples.
    """
    counts = LineCounts({0: {line: f"/x/train.py:{line} main" for line in (4, 5, 6)}})
    for second in range(1, 33):
        line = 4 if second <= 12 else in_pause
        rows = np.zeros(3, LINES.dtype)
        rows["t_ns"], rows["step"], rows["samples"] = second * 1_000_000_000, min(17 * second, 200), [4, 3, 3]
        rows["phase"], rows["line_id"] = [LINE_OTHER, Phase.FORWARD, Phase.BACKWARD], [line or 0, 6, 6]
        if line is not None:
            counts.add(0, rows[: 3 if second <= 12 else 1])

    latest, ends = [399], [60 * 1_000_000_000]
    return JobFacts(
        lines=counts.lines(ends),
        divided_lines=partial(counts.divided, latest, ends),
        lines_apart=partial(counts.apart_from, latest, ends),
        wait_of_ready_time={0: 0.0},
    )


def test_the_lines_of_the_other_steps_are_without_those_of_the_pause():
    """Line 5 has most samples of the run, and only the pause."""
    facts = sampled_by_second(in_pause=5)
    (found, *_) = diagnose(window_of(PAUSED, adds("other", 20_000.0, every=PAUSED.steps)), facts)

    assert found.kind is Kind.RESIDUAL_HEAVY
    assert found.evidence["line"] == 4
    assert "mostly in train.py:5 main. It is not counted here." in found.summary


@pytest.mark.parametrize(("step", "is_known"), [(200, True), (120, False)])
def test_a_pause_that_hides_from_samples_has_the_line_of_its_snapshot(step, is_known):
    """C code held the GIL in it: the samples are of other steps, and so is the line that has most of them."""
    frame = FrameSnapshot(file="/x/train.py", line=8, function="main", is_user=True)
    stuck = RankSnapshot(at_ns=1, rank=0, quiet_s=15.0, step=step, in_step=True, phase="other", frames=(frame,))
    facts = replace(sampled_by_second(in_pause=None), progress=JobProgress(longest_pauses={0: stuck}))
    (found, *_) = diagnose(window_of(PAUSED, adds("other", 20_000.0, every=PAUSED.steps)), facts)

    assert ("mostly in train.py:8 main." in found.summary) is is_known
    assert "mostly in train.py:4" not in found.summary


def test_the_part_of_a_long_step_is_named():
    """A single checkpoint that took 30 s, as measured by the hooks."""
    window = window_of(ALONE, adds("checkpoint", 30_000.0, every=ALONE.steps))
    (found, *_) = diagnose(window, JobFacts())

    assert found.kind in (Kind.HEALTHY, Kind.COMPUTE_BOUND)
    assert "times the mean of the others, mostly in checkpoint saving." in found.summary


@pytest.mark.parametrize(("ms", "waited", "told"), [(300.0, 0.0, False), (4_000.0, 0.0, True), (4_000.0, 0.3, False)])
def test_a_short_pause_is_reported_where_cores_were_free(ms, waited, told):
    """Other programs on the host cause such pauses, and in a long run they are nothing."""
    (found, *_) = diagnose(
        window_of(ALONE, adds("other", ms, every=ALONE.steps)), JobFacts(wait_of_ready_time={0: waited})
    )

    assert ("One step took" in found.summary) is told


def test_two_snapshots_are_told_with_their_line():
    """They are no pattern, and yet most of the time in steps: steps are not fine as a whole."""
    job = Job(ranks=1, grouped=False, steps=400, own={"forward": 3.0, "backward": 3.0, "other": 1.0})
    seen = (
        SampledLine(0, "other", "/x/train.py", 9, "snapshot", None, 300),
        SampledLine(0, "forward", "/x/train.py", 12, "main", None, 120),
    )
    (found, *_) = diagnose(window_of(job, adds("other", 3_000.0, every=180)), JobFacts(lines=seen))

    assert found.kind is Kind.HEALTHY
    assert "Two steps took 3.0" in found.summary
    assert "mostly in train.py:9 snapshot." in found.summary
    assert found.next == "Find out what train.py:9 snapshot did in these steps, and whether it needs to."
    assert found.headline.startswith("2 steps take 70 % of all step time")
    assert found.evidence["pause_share"] == pytest.approx(6_000 / (6_000 + 390 * 7), rel=0.05)


def test_a_pause_comes_before_the_compute_of_the_other_steps():
    """The run is limited by one wait of 6 s as much as by its compute."""
    job = Job(ranks=1, grouped=False, steps=400, own={"forward": 9.0, "backward": 9.0, "other": 0.1})
    (found, *_) = diagnose(window_of(job, adds("other", 6_000.0, every=job.steps)), JobFacts())

    assert found.kind is Kind.COMPUTE_BOUND
    assert found.headline == "One step takes 48 % of all step time; compute limits the others"
    assert found.next.startswith("Find out what that step did")


@pytest.mark.parametrize(("other_ms", "kind"), [(0.1, Kind.COMPUTE_BOUND), (4.0, Kind.HEALTHY)])
def test_no_gain_of_a_line_is_promised_for_the_advice_on_a_pause(other_ms: float, kind: Kind) -> None:
    """A hook that sleeps in each step could be cheaper, too, but the advice is about the one long step."""
    job = Job(ranks=1, grouped=False, own={"forward": 20.0, "backward": 6.0, "other": other_ms})
    times = {"watched_ns": 400_000_000, "cpu_ns": 40_000_000}
    lines = [
        SampledLine(0, "forward", "/me/train.py", 8, "log", None, 120, **times),
        SampledLine(0, "forward", "/me/train.py", 22, "main", LINEAR, 60),
        SampledLine(0, "backward", "/me/train.py", 23, "main", ENGINE, 90),
    ]
    facts = JobFacts(lines=lines, wait_of_ready_time={0: 0.0})
    paused, usual = (
        diagnose(window_of(job, *pauses), facts)[0] for pauses in ([adds("other", 9_000.0, every=job.steps)], [])
    )

    assert (paused.kind, usual.kind) == (kind, kind)
    assert paused.next.startswith("Find out what that step did")
    # What limits the other steps is told, too; of a healthy run nothing else needs to be done.
    assert paused.next.endswith(usual.next) is (kind is Kind.COMPUTE_BOUND)
    assert paused.speedup_if_fixed == 1.0 < usual.speedup_if_fixed


@pytest.mark.parametrize(
    ("for_debugging", "advice"),
    [({"detects_anomalies": True}, WITHOUT_ANOMALIES), ({"profiles": True}, WITHOUT_PROFILER)],
)
def test_what_searches_for_errors_is_turned_off_first(for_debugging, advice):
    """It makes each step slower, and is left on by mistake."""
    by_compute = diagnose(window_of(ALONE), JobFacts(**for_debugging))[0]
    by_health = diagnose(window_of(HALF_BUSY), JobFacts(**for_debugging))[0]

    assert (by_compute.kind, by_health.kind) == (Kind.COMPUTE_BOUND, Kind.HEALTHY)
    assert by_compute.next == by_health.next == advice
    assert advice not in (each.next for each in diagnose(window_of(ALONE), JobFacts()))


@pytest.mark.parametrize(
    ("for_debugging", "advice"),
    [({"detects_anomalies": True}, WITHOUT_ANOMALIES), ({"profiles": True}, WITHOUT_PROFILER)],
)
def test_what_searches_for_errors_is_told_beside_another_cause(for_debugging, advice):
    """The steps save often, or have too few cores."""
    saves = [adds("checkpoint", 200.0, every=10)]
    for faults, known in ((saves, {}), ([], {"wait_of_ready_time": {0: 0.5}})):
        told, untold = (diagnose(window_of(ALONE, *faults), JobFacts(**known, **on))[0] for on in (for_debugging, {}))

        assert told.kind is untold.kind is (Kind.CHECKPOINT_STALLS if faults else Kind.CPU_CONTENTION)
        assert told.next == f"{untold.next} {advice}"


@pytest.mark.parametrize(
    ("optimizer_ms", "fused", "is_told"),
    [(30.0, False, True), (30.0, True, False), (30.0, None, False), (5.0, False, False)],
)
def test_an_optimizer_that_may_be_fused_is_named_beside_another_cause(optimizer_ms, fused, is_told):
    """A loop that saves often is told so, and that most of the step is an optimizer that has a quicker form."""
    job = Job(ranks=1, grouped=False, own={"forward": 4.0, "backward": 8.0, "optimizer": optimizer_ms, "other": 0.3})
    found = diagnose(window_of(job, adds("checkpoint", 120.0, every=20)), JobFacts(fused=fused))[0]

    assert found.kind is Kind.CHECKPOINT_STALLS
    assert ("step (61 %): use its fused form (fused=True)." in found.next) is is_told
    assert ("optimizer" in found.next) is is_told


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("part", ["other", "forward", "input_wait"])
def test_what_the_other_steps_wait_for_is_found_beside_a_pause(part: str, ranks: int) -> None:
    """Of the mean of all steps it is a twentieth, of each of the others a third."""
    job = Job(ranks=ranks, grouped=ranks > 1, own={"forward": 8.0, "backward": 8.0, "other": 0.3})
    faults = [adds("input_wait", 8.0), adds(part, 30_000.0, (0,), every=job.steps)]
    found, *more = diagnose(window_of(job, *faults), JobFacts(world_size=ranks))

    assert (found.kind, more) == (Kind.INPUT_BOUND, [])
    assert 0.29 < found.cost_share < 0.34
    assert found.headline.endswith(" % of step time, not counting one step of 32.8 s") or ranks > 1
    assert re.search(
        r"One step took 3\d\.\d s, 1,3\d\d times the mean of the others.*\. It is not counted here\.", found.summary
    )
    assert found.next.endswith("shows the lines in which the training was seen.")


@pytest.mark.parametrize(
    ("kind", "says"), [(Kind.INPUT_BOUND, True), (Kind.HEALTHY, False), (Kind.COMPUTE_BOUND, False)]
)
def test_a_remark_that_leaves_a_pause_out_says_so(kind: Kind, says: bool) -> None:
    """Beside waiting for cores a finding may be a remark; verdicts without a bottleneck are about all steps."""
    evidence = {"pauses": 1, "pause_ms": 16_000.0, "pause_share": 0.7, "share_by_phase": {}}
    found = Finding.of(kind, summary="", next="", evidence=evidence, severity=Severity.INFO, cost_share=0.3)

    assert found.headline.endswith(", not counting one step of 16.0 s") is says


def test_more_long_steps_are_no_pauses() -> None:
    """All of them are of one finding."""
    job = Job(ranks=1, grouped=False, own={"forward": 8.0, "backward": 8.0, "input_wait": 8.0})
    found, *_ = diagnose(window_of(job, adds("forward", 5_000.0, every=44)), JobFacts())

    assert found.headline.startswith("Every 44th step is long, in forward")
    assert "not counted" not in found.summary


def test_long_steps_that_are_explained_are_no_pauses() -> None:
    """They are counted: each tenth step saves, and one takes much longer."""
    job = Job(ranks=1, grouped=False, own={"forward": 8.0, "backward": 8.0, "other": 0.3})
    faults = [adds("checkpoint", 80.0, every=10), adds("checkpoint", 30_000.0, every=job.steps)]
    found, *_ = diagnose(window_of(job, *faults), JobFacts())

    assert found.kind is Kind.CHECKPOINT_STALLS
    assert "not counted" not in found.summary


@pytest.mark.parametrize("at", [(200,), (100, 300)])
@pytest.mark.parametrize(
    ("others", "says"),
    [
        (adds("other", 120.0, every=10), "Every 10th step takes 13"),
        (adds("other", 140.0, chance=0.03), " steps take 15"),
        (adds("forward", 140.0, chance=0.03), " steps take 15"),
    ],
)
def test_a_pause_is_none_of_far_shorter_long_steps(others: Fault, says: str, at: tuple[int, ...]) -> None:
    """No step takes the mean of 134 ms in each tenth and of 4 s in one; two pauses are at no distance of each other."""

    def pauses(own, random):
        own["other"][:, at] += 4000.0

    found, *more = diagnose(window_of(Job(ranks=1, grouped=False, steps=400), others, pauses), JobFacts())

    assert says in found.summary
    assert f"{'One step' if len(at) == 1 else 'Two steps'} took 4.0" in found.summary
    assert "not counted here." in found.summary
    assert not more


SLOW_UPDATE = Job(ranks=1, grouped=False, own={"forward": 4.0, "backward": 4.0, "optimizer": 9.0, "other": 0.3})


@pytest.mark.parametrize(("library", "named"), [(None, True), ("/torch/optim/adam.py:347 _single_tensor_adam", False)])
def test_an_optimizer_of_the_script_is_named_with_its_line(library: str | None, named: bool) -> None:
    """What is written in Python there is the script's; a call of torch's step is none."""
    lines = [
        SampledLine(0, "optimizer", "/me/train.py", 9, "Lion.step", library, 110),
        SampledLine(0, "forward", "/me/train.py", 22, "main", LINEAR, 60),
        SampledLine(0, "backward", "/me/train.py", 23, "main", ENGINE, 60),
    ]
    found = diagnose(window_of(SLOW_UPDATE), JobFacts(lines=lines))[0]

    assert (found.kind, found.phase) == (Kind.COMPUTE_BOUND, "optimizer")
    assert (" of optimizer is in train.py:9 Lion.step" in found.summary) is named
    assert (found.evidence.get("function") == "Lion.step") is named
    assert found.speedup_if_fixed == 1.0


@pytest.mark.parametrize(
    ("own", "fused", "told"),
    [
        ({"optimizer": 3.0, "forward": 2.0}, False, True),
        ({"optimizer": 3.0, "forward": 2.0}, True, False),
        ({"optimizer": 3.0, "forward": 2.0}, None, False),
        ({"optimizer": 2.0, "forward": 3.0}, False, False),
    ],
)
def test_a_healthy_run_is_told_of_the_fused_form_where_the_optimizer_takes_most(own, fused, told) -> None:
    """Adam of 1.3 million weights on a CPU: a step of 13 ms takes 4 ms then."""
    job = Job(ranks=1, grouped=False, own={"backward": 2.0, "other": 0.9, **own})
    found = diagnose(window_of(job), JobFacts(fused=fused))[0]

    assert found.kind is Kind.HEALTHY
    assert ("fused=True" in found.next) is told
    assert found.next.startswith("Nothing needs fixing; ")


@pytest.mark.parametrize(("sigma", "is_told"), [(0.4, True), (0.1, False)])
def test_waiting_for_another_rank_in_each_step_is_uneven_work(sigma: float, is_told: bool) -> None:
    """No rank is late on average; larger batches alone are no remedy for it."""
    found = diagnose(window_of(Job(ranks=8, steps=200, sigma=sigma).scaled(2)), JobFacts(world_size=8))[0]

    assert found.kind is Kind.HEALTHY
    assert (" is waiting for the rank that works longest, in each step another one." in found.summary) is is_told
    assert found.next.startswith("No rank is slower than the others, but they work unevenly") is is_told


@pytest.mark.parametrize("slow", [(5,), (5, 20)], ids=str)
def test_ranks_whose_cores_are_slower_are_not_another_one_in_each_step(slow: tuple[int, ...]) -> None:
    """They are slower all the time, in everything, by less than what is reported of single ranks."""

    def slower(own, random):
        for part in ("forward", "backward", "optimizer"):
            own[part][list(slow)] *= 1.4

    found, *_ = diagnose(window_of(Job(ranks=64, steps=200), slower), JobFacts(world_size=64))

    assert found.kind is Kind.HEALTHY
    names = "rank 5" if len(slow) == 1 else "ranks 5, 20"
    assert f"is waiting for the rank that works longest, mostly {names}." in found.summary
    assert found.next.startswith(f"Look at the host of {names}: clocks, cores shared with other processes")


@pytest.mark.parametrize("ranks", [4, 8])
def test_a_rank_that_is_slow_for_a_while_is_not_another_one_in_each_step(ranks: int) -> None:
    """In 200 of 800 steps it computes longer, for less than 10 s: a program may have taken its cores."""

    def slow(own, random):
        own["forward"][1, 200:400] += 30.0

    found, *_ = diagnose(window_of(Job(ranks=ranks, steps=800), slow), JobFacts(world_size=ranks))

    assert found.kind is Kind.HEALTHY
    assert "is waiting for the rank that works longest, mostly rank 1." in found.summary
    assert found.next.startswith("Look at the batches of rank 1, and at what else runs on its host")
