"""Verdicts of fabricated runs: kind, ranks and phase of the injected fault, and none without a fault."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs

from tests.diagnosis.fabricated import Fault, Job, adds, at_once, rows_of, takes_turns, window_of
from traceml.database.schema import IMPORTING, STEPS, StepFlag, pack_bits
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts, ModelFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.kept_steps import KeptSteps

TINY = Job(
    own={"input_wait": 0.15, "forward": 0.1, "backward": 0.15, "optimizer": 0.1, "other": 0.15},
    comm=0.4,
    leave_ms=0.3,
    sigma=0.3,
    steps=400,
)
ALONE = Job(ranks=1, grouped=False)
GAME = (
    SampledLine(0, "other", "/me/game.py", 35, "simulate", None, 80),
    SampledLine(0, "forward", "/me/game.py", 5, "forward", None, 40),
)


def verdict(job: Job, *faults: Fault, seed: int = 0, **facts: object) -> Finding:
    return diagnose(window_of(job, *faults, seed=seed), JobFacts(world_size=job.ranks, **facts))[0]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("input_wait", Kind.INPUT_STRAGGLER),
        ("h2d", Kind.H2D_STRAGGLER),
        ("forward", Kind.COMPUTE_STRAGGLER),
        ("backward", Kind.COMPUTE_STRAGGLER),
        ("optimizer", Kind.COMPUTE_STRAGGLER),
        ("other", Kind.STRAGGLER),
    ],
)
def test_a_late_rank_is_named_with_its_phase(ranks, part, kind):
    """Twenty milliseconds in one part of one rank give its kind, rank, phase and gain."""
    found = verdict(Job(ranks=ranks, callback_every=4), adds(part, 20, (1,)))

    assert (found.kind, found.ranks, found.phase) == (kind, (1,), part)
    assert found.severity is Severity.CRITICAL
    assert found.speedup_if_fixed == pytest.approx(35 / 15, rel=0.15)
    assert "Rank 1" in found.summary


@pytest.mark.parametrize("part", ["forward", "backward", "input_wait"])
def test_a_fault_in_every_fifth_step_is_found(part):
    """Sums over the window find a fault that the median of a phase hides."""
    found = verdict(Job(ranks=4), adds(part, 60, (2,), every=5))

    assert (found.ranks, found.phase) == ((2,), part)


@pytest.mark.parametrize("seed", range(5))
def test_a_weak_fault_is_found_in_a_quiet_run(seed):
    """A rank whose forward takes a fifth of a step more is reported."""
    found = verdict(Job(ranks=4), adds("forward", 3.0, (1,)), seed=seed)

    assert (found.kind, found.ranks, found.phase) == (Kind.COMPUTE_STRAGGLER, (1,), "forward")
    assert found.severity is Severity.WARNING


@pytest.mark.parametrize("part", ["input_wait", "h2d", "forward", "backward", "optimizer", "other"])
def test_a_weak_fault_is_found_in_a_noisy_run(part):
    """A rank that is late by a sixth of a step is named, though seven noisy ranks hide most of the gain."""
    found = verdict(Job(ranks=8, sigma=0.35, steps=400), adds(part, 3.0, (5,)))

    assert (found.ranks, found.phase) == ((5,), part)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_a_busy_host_is_not_blamed_on_a_rank(ranks, seed):
    """Ranks whose speed wanders, and whose cores other programs take for a while, are no stragglers."""
    job = Job(ranks=ranks, wander=0.2, wander_steps=15, stolen=0.5, sigma=0.2)

    assert not verdict(job, seed=seed).kind.rule.is_straggler


def test_two_late_ranks_are_named_together():
    """Two ranks late by the same cause are one finding."""
    found = verdict(Job(ranks=4), adds("input_wait", 30, (1, 3)))

    assert (found.kind, found.ranks) == (Kind.INPUT_STRAGGLER, (1, 3))


def test_two_causes_are_two_findings_the_larger_first():
    """Two ranks that are late for different causes give two findings."""
    findings = diagnose(
        window_of(Job(ranks=4), adds("input_wait", 40, (1,)), adds("forward", 20, (2,))), JobFacts(world_size=4)
    )

    assert [(finding.kind, finding.ranks) for finding in findings] == [
        (Kind.INPUT_STRAGGLER, (1,)),
        (Kind.COMPUTE_STRAGGLER, (2,)),
    ]


def test_ranks_that_take_turns_are_named():
    """Nobody is late on average, and yet all wait in every step: some of the ranks by number, all by none."""
    some = verdict(Job(ranks=4), takes_turns("forward", 30, (1, 3)))
    both = verdict(Job(ranks=2), takes_turns("forward", 30, (0, 1)))

    assert (some.kind, some.ranks, some.phase) == (Kind.COMPUTE_STRAGGLER, (1, 3), "forward")
    assert (both.kind, both.ranks, both.phase) == (Kind.COMPUTE_STRAGGLER, (), "forward")
    assert "turns" in both.summary
    assert some.cost_share == pytest.approx(1 - 1 / some.speedup_if_fixed, abs=0.01)


def test_a_users_phase_on_one_rank_is_named():
    """A user's phase is reported by its name."""
    job = Job()
    window = window_of(job, adds("user", 20, (0,)))
    named = structs.replace(window, user={"augment": window.times["user"]})

    found = diagnose(named, JobFacts(world_size=2))[0]

    assert (found.kind, found.ranks, found.phase) == (Kind.STRAGGLER, (0,), "augment")
    assert "'augment'" in found.summary


@pytest.mark.parametrize("name", ["augment", "", "forward"])
@pytest.mark.parametrize(("late", "ranks"), [((0,), (0,)), ((0, 1), ())])
def test_headline_and_sentence_name_the_same_phase(name, late, ranks):
    """Also one without a name, and one that is called like a known phase, which the report keeps apart."""
    window = window_of(Job(), adds("user", 20, late))
    named = structs.replace(window, user={name: window.times["user"]})

    found = diagnose(named, JobFacts(world_size=2))[0]

    assert found.ranks == ranks
    assert f"phase '{name}'" in found.summary
    assert f"phase '{name}'" in found.headline


@pytest.mark.parametrize(
    ("part", "kind"), [("input_wait", Kind.INPUT_BOUND), ("h2d", Kind.H2D_BOUND), ("other", Kind.RESIDUAL_HEAVY)]
)
@pytest.mark.parametrize("job", [Job(), Job(ranks=4), ALONE], ids=["two", "four", "alone"])
def test_what_costs_all_ranks_names_no_rank(part, kind, job):
    """A cost on all ranks is no straggler's."""
    found = verdict(job, adds(part, 10))

    assert (found.kind, found.ranks, found.phase) == (kind, (), part)


@pytest.mark.parametrize(
    ("loader", "says", "never"),
    [
        (None, "make what is small on the device itself", "DataLoader"),
        (LoaderFacts(pin_memory=False), "Set pin_memory=True in the DataLoader", "torch.tensor"),
        (LoaderFacts(pin_memory=True), "pins memory already", "Set pin_memory"),
    ],
    ids=["without a loader", "pageable", "pinned"],
)
def test_copies_are_named_with_their_line(loader, says, never):
    """A script that copies its own tensors has no DataLoader to change."""
    line, rest = (
        SampledLine(0, part, "/a/train.py", at, "<module>", None, 40) for part, at in (("h2d", 11), ("forward", 12))
    )
    facts = JobFacts(loader=loader, lines=(line, rest))
    found = diagnose(window_of(ALONE, adds("h2d", 10)), facts)[0]

    assert found.kind is Kind.H2D_BOUND
    assert "of it in train.py:11; without them" in found.summary
    assert says in found.next
    assert never not in found.next


PINS, PAGEABLE = LoaderFacts(pin_memory=True), LoaderFacts(pin_memory=False)


@pytest.mark.parametrize(
    ("loader", "pinned", "non_blocking", "says", "never"),
    [
        (PINS, 1.0, 1.0, "on a stream of its own (torch.cuda.Stream) while this one computes", "pass non_blocking"),
        (None, 1.0, 1.0, "on a stream of its own (torch.cuda.Stream) while this one computes", "tensor.pin_memory()"),
        (PINS, 1.0, 0.0, "pins memory already: pass non_blocking=True", "stream"),
        (PAGEABLE, 1.0, 0.0, "The copies are from pinned memory already: pass non_blocking=True", "Set pin_memory"),
        (PINS, 0.0, 1.0, "(a class of batches needs a method pin_memory): else non_blocking=True waits", "pass non_bl"),
        (PAGEABLE, 0.0, 1.0, "Set pin_memory=True in the DataLoader: else non_blocking=True waits", "pass non_block"),
        (PAGEABLE, 0.1, 0.2, "Set pin_memory=True in the DataLoader and pass non_blocking=True", "stream"),
        (None, 0.0, 1.0, "ones, from pinned memory (tensor.pin_memory()), and make", "non_blocking"),
        (None, 1.0, 0.0, "many small ones, with non_blocking=True, and make", "pin_memory"),
    ],
)
def test_copies_are_told_what_they_do_not_do_yet(loader, pinned, non_blocking, says, never):
    """By what was seen of some copies."""
    builder = JobFactsBuilder()
    builder.info(0, {"kind": "copies", "pinned": pinned, "non_blocking": non_blocking})
    found = diagnose(window_of(ALONE, adds("h2d", 10)), structs.replace(builder.build(), loader=loader))[0]

    assert found.kind is Kind.H2D_BOUND
    assert says in found.next
    assert never not in found.next


@pytest.mark.parametrize(("device", "reads"), [("cuda:0", True), ("cpu", False), (None, False)])
def test_values_that_are_read_from_a_device_wait_for_it(device, reads):
    """A metric in a loop over `.item()`: each call waits for all that was launched before."""
    facts = JobFacts(model=ModelFacts(device=device), lines=GAME)
    found = diagnose(window_of(ALONE, adds("other", 30)), facts)[0]

    assert found.kind is Kind.RESIDUAL_HEAVY
    assert ("read many at once" in found.next) == reads


@pytest.mark.parametrize(
    ("lines", "words"),
    [((), "Make rollouts cheaper. Several environments"), (GAME, "Make game.py:35 simulate cheaper.")],
)
def test_a_script_that_plays_is_advised_on_its_environment(lines, words):
    """Rollouts are no batches that a loader's workers could prepare; a phase of the user's own stays what it is."""
    window = window_of(Job(ranks=1, grouped=False), adds("other", 30))
    playing, supervised = (
        next(each for each in diagnose(window, JobFacts(lines=lines, collects=collects)) if each.phase == "other")
        for collects in (True, False)
    )

    assert playing.next.startswith(words)
    assert "AsyncVectorEnv" in playing.next
    assert ("if it makes batches" in playing.next) == bool(lines), "of a line it is not known what it does"
    assert "AsyncVectorEnv" not in supervised.next


@pytest.mark.parametrize("lines", [(), GAME])
@pytest.mark.parametrize("every", [1, 10])
def test_rollouts_of_a_language_model_step_no_environments(every, lines):
    """They are texts that it generates, as in RLHF: in each step, or in every n-th one."""
    batches = BatchHistory()
    batches.input(0, {"dtype": "torch.int64", "dimensions": 2, "tokens": True})
    window = window_of(Job(ranks=1, grouped=False), adds("other", 30 * every, every=every))
    texts, games = (
        next(each for each in diagnose(window, facts) if each.phase == "other").next
        for facts in (
            JobFacts(lines=lines, collects=True, batches=batches),
            JobFacts(lines=lines, collects=True),
        )
    )

    assert "inference engine" in texts
    assert "AsyncVectorEnv" not in texts
    assert "inference engine" not in games


@pytest.mark.parametrize(
    ("library", "samples", "says", "never"),
    [
        ("/lib/torch/distributions/categorical.py:144 sample", 80, "torch's functions", "AsyncVectorEnv"),
        ("/lib/gymnasium/envs/cartpole.py:165 CartPoleEnv.step", 80, "AsyncVectorEnv", "torch's functions"),
    ],
)
def test_the_policy_of_a_script_that_plays_is_no_environment(library, samples, says, never):
    """Environments in other processes leave the cost of the model's calls where it is."""
    rest = SampledLine(0, "forward", "/me/ppo.py", 5, "forward", None, 40)
    lines = (SampledLine(0, "other", "/me/ppo.py", 70, "select_action", library, samples), rest)
    window = window_of(Job(ranks=1, grouped=False), adds("other", 30))
    found = next(each for each in diagnose(window, JobFacts(lines=lines, collects=True)) if each.phase == "other")

    assert says in found.next
    assert never not in found.next


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize(("on_core", "waits"), [(0.1, True), (0.9, False)])
def test_environments_in_other_processes_are_not_advised_to_be_there(every, on_core, waits):
    """The script waits for what they send, in each step or in every n-th one; a large message is copied."""
    second = 1_000_000_000
    step = SampledLine(
        0, "other", "/me/ppo.py", 21, "VecEnv.step", "/lib/multiprocessing/connection.py:390 Connection._recv", 80,
        watched_ns=second, cpu_ns=int(on_core * second),
    )  # fmt: skip
    rest = SampledLine(0, "backward", "/me/ppo.py", 50, "main", None, 40)
    window = window_of(Job(ranks=1, grouped=False), adds("other", 30 * every, every=every))
    found = next(
        each for each in diagnose(window, JobFacts(lines=(step, rest), collects=True)) if each.phase == "other"
    )

    assert found.next.startswith("ppo.py:21 VecEnv.step waits there for answers from other processes") is waits
    assert ("AsyncVectorEnv" in found.next) is not waits


@pytest.mark.parametrize(
    ("library", "is_told"),
    [
        ("/lib/torch/functional.py:1 cdist", True),
        ("/lib/torch/_tensor.py:1130 Tensor.__iter__", True),
        ("/lib/torch/_tensor.py:1136 Tensor.__format__", False),  # as text, of a tensor that is logged
        ("/lib/torch/_tensor_str.py:214 _Formatter.format", False),
        (None, False),
    ],
)
def test_computation_can_only_become_cheaper(library, is_told):
    """A line whose time is in torch's functions may be a part of the training, which runs in each step."""
    rest = SampledLine(0, "forward", "/me/train.py", 5, "forward", None, 40)
    lines = (SampledLine(0, "other", "/me/train.py", 70, "compare", library, 80), rest)
    window = window_of(Job(ranks=1, grouped=False), adds("other", 30))
    found = next(each for each in diagnose(window, JobFacts(lines=lines)) if each.phase == "other")

    assert found.next.startswith("Make train.py:70 compare cheaper")
    assert ("fewer calls of torch's functions" in found.next) == is_told


@pytest.mark.parametrize(
    "library",
    [
        "/lib/copy.py:128 deepcopy",
        "/lib/torch/nn/parameter.py:74 Parameter.__deepcopy__",
        "/lib/torch/storage.py:253 _StorageBase.clone",  # of the tensors of a state_dict()
    ],
)
def test_a_copied_model_is_to_be_copied_into_tensors_that_exist(library):
    """To keep the best weights so far is no work that workers of a loader could do."""
    rest = SampledLine(0, "forward", "/me/train.py", 5, "forward", None, 40)
    lines = (SampledLine(0, "other", "/me/train.py", 70, "keep", library, 80), rest)
    window = window_of(Job(ranks=1, grouped=False), adds("other", 30))
    found = next(each for each in diagnose(window, JobFacts(lines=lines)) if each.phase == "other")

    assert found.next.startswith("train.py:70 keep mostly copies objects (copy.deepcopy): copy weights into tensors")


@pytest.mark.parametrize("loader", [LoaderFacts(num_workers=0), None])
def test_a_script_without_a_loader_is_told_of_no_loader(loader):
    """Its line may step an environment that it has made itself."""
    rest = SampledLine(0, "forward", "/me/a2c.py", 5, "forward", None, 40)
    lines = (SampledLine(0, "other", "/me/a2c.py", 70, "Env.step", None, 80), rest)
    window = window_of(Job(ranks=1, grouped=False), adds("other", 30))
    found = next(each for each in diagnose(window, JobFacts(lines=lines, loader=loader)) if each.phase == "other")

    assert ("the workers of a DataLoader" in found.next) == (loader is not None)
    assert ("collects experience can run ahead in other processes" in found.next) == (loader is None)


@pytest.mark.parametrize("functions", [1, 8])
@pytest.mark.parametrize(("played", "is_told"), [(5, False), (40, True)])
def test_environments_that_take_little_are_not_advised_on(functions, played, is_told):
    """The updates of a DQN take most of the time, in one function or many, and its environment next to none."""
    update = [SampledLine(0, "other", "/me/dqn.py", 190 + at, f"update{at % functions}", None, 10) for at in range(8)]
    step = SampledLine(0, "other", "/me/dqn.py", 20, "play", "/lib/gymnasium/envs/cartpole.py:165 step", played)
    window = window_of(Job(ranks=1, grouped=False), adds("other", 30))
    rest = SampledLine(0, "forward", "/me/dqn.py", 5, "forward", None, 30)
    facts = JobFacts(lines=(*update, step, rest), collects=True)
    found = next(each for each in diagnose(window, facts) if each.phase == "other")

    assert ("AsyncVectorEnv" in found.next) == is_told
    if not is_told:
        assert found.next.startswith("Make dqn.py:19" if functions == 1 else "Look at what else the training loop does")


def test_a_users_heavy_phase_is_residual_under_its_name():
    """The user's phase that takes the time is named."""
    window = window_of(ALONE, adds("user", 10))

    found = diagnose(structs.replace(window, user={"metrics": window.times["user"]}), JobFacts())[0]

    assert (found.kind, found.phase) == (Kind.RESIDUAL_HEAVY, "metrics")


def test_the_numbers_of_a_sentence_agree():
    """A pause of a second, as between a notebook's cells, is in the mean step but not in the gain."""
    window = window_of(ALONE, adds("other", 10))
    window.times["other"][0, -1] += 1_000 * 1e6
    window.total[0, -1] += 1_000 * 1e6

    found = next(each for each in diagnose(window, JobFacts()) if each.kind is Kind.RESIDUAL_HEAVY)

    cost, step, share = re.match(
        r"([\d.]+) ms of each ([\d.]+) ms step \(([\d.]+) %, not counting rare long steps\)", found.summary
    ).groups()
    assert 100 * float(cost) / float(step) == pytest.approx(float(share), abs=1.5)


def test_what_ranks_have_in_turns_costs_what_the_step_loses():
    """Half of the steps each, 20 ms: a step loses 20 ms, and each rank spends 10."""
    found = verdict(Job(sigma=0.05), takes_turns("other", 20, (0, 1)))

    cost, step, share = re.match(r"([\d.]+) ms of each ([\d.]+) ms step \(([\d.]+) %\)", found.summary).groups()
    assert found.kind is Kind.RESIDUAL_HEAVY
    assert 100 * float(cost) / float(step) == pytest.approx(float(share), abs=1.5)
    assert float(cost) == pytest.approx(20, abs=1.5)


def test_communication_is_found_when_nobody_is_late():
    """The least waiting over ranks is communication."""
    found = verdict(Job(ranks=4, comm=20.0), backend="gloo")

    assert (found.kind, found.ranks, found.phase) == (Kind.COMM_BOUND, (), "comm")
    assert found.evidence["comm_ms"] == pytest.approx(20, rel=0.1)


def test_a_late_rank_is_not_taken_for_communication():
    """The others' waiting for a late rank is no communication."""
    kinds = {
        finding.kind
        for finding in diagnose(window_of(Job(comm=4.0), adds("backward", 20, (0,))), JobFacts(world_size=2))
    }

    assert kinds == {Kind.COMPUTE_STRAGGLER}


def test_without_own_backward_communication_is_never_claimed():
    """The verdict says that slow computation and slow communication cannot be separated."""
    window = window_of(Job(comm=20.0, callback_every=0))
    window.times["comm"] += 0.01  # the collective of a logged loss

    found = diagnose(window, JobFacts(world_size=2))[0]

    assert (found.kind, found.phase) == (Kind.INSUFFICIENT_DATA, "backward")
    assert "backward or communication" in found.summary


def test_without_own_backward_other_stragglers_are_still_named():
    """The parts outside backward show which rank is late."""
    window = window_of(Job(callback_every=0), adds("forward", 20, (1,)))
    window.times["comm"] += 0.01  # the collective of a logged loss

    found = diagnose(window, JobFacts(world_size=2))[0]

    assert (found.kind, found.ranks, found.phase) == (Kind.COMPUTE_STRAGGLER, (1,), "forward")


def test_rare_long_steps_are_jitter():
    """Three percent of the steps hold a large part of all time."""
    found = verdict(replace(ALONE, steps=400), at_once("forward", 200, 0.03))

    assert (found.kind, found.phase) == (Kind.JITTER, "forward")
    assert found.evidence["usual_ms"] == pytest.approx(14, rel=0.1)


def test_rare_long_steps_that_save_are_explained():
    """Saving now and then is no jitter."""
    found = verdict(replace(ALONE, steps=400), at_once("checkpoint", 200, 0.03))

    assert found.kind is Kind.CHECKPOINT_STALLS
    assert found.evidence["saves"] >= 8
    assert found.evidence["save_ms"] == pytest.approx(200, rel=0.05)


def test_saving_at_the_end_is_no_stall():
    """One checkpoint, in the last step."""

    def saves(own, random):
        own["checkpoint"] = np.zeros_like(own["forward"])
        own["checkpoint"][:, -1] = 2000

    assert verdict(ALONE, saves).kind is Kind.COMPUTE_BOUND


def test_one_long_step_is_no_verdict():
    """A single pause, and the long last step of a script that saves, are events and not habits."""

    def pauses(own, random):
        own["other"][:, 150] += 2000
        own["other"][:, -1] += 5000

    assert verdict(ALONE, pauses).kind is Kind.COMPUTE_BOUND
    assert verdict(Job(), pauses).kind in (Kind.COMPUTE_BOUND, Kind.HEALTHY)


def test_a_long_optimizer_step_is_left_out_whole():
    """An optimizer's work counts in the step after its own: without the step, it is left out as well."""

    def pauses(own, random):
        own["optimizer"][:, 150] += 2000

    shares = verdict(Job(), pauses).evidence["share_by_phase"]
    assert sum(shares.values()) < 1.05
    assert shares["optimizer"] < 0.5


def test_a_run_that_computes_all_the_time_is_compute_bound():
    """Ninety percent of computation, and the heaviest phase is named."""
    found = verdict(ALONE)

    assert (found.kind, found.severity, found.phase) == (Kind.COMPUTE_BOUND, Severity.INFO, "backward")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_a_tiny_healthy_run_is_not_blamed(ranks, seed):
    """Sub-millisecond steps on data in memory: input, Python and gloo take their share, and that is no fault."""
    job = replace(TINY, ranks=ranks, grouped=ranks > 1, spikes=0.02, spike_ms=5.0)

    assert verdict(job, seed=seed).kind in (Kind.HEALTHY, Kind.COMPUTE_BOUND)


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_healthy_run_is_not_blamed_whatever_its_noise(sigma, ranks):
    """Ten runs of each kind, with contention spikes in half of them."""
    for seed in range(10):
        job = Job(
            ranks=ranks, sigma=sigma, spikes=0.02 * (seed % 2), grouped=ranks > 1, callback_every=1 + 3 * (seed % 2)
        )

        assert verdict(job, seed=seed).kind in (Kind.HEALTHY, Kind.COMPUTE_BOUND)


@pytest.mark.parametrize("skew", [1.1, 1.2, 1.3])
def test_a_core_that_is_slower_in_everything_is_not_blamed(skew):
    """One rank faster in all it computes is how some healthy runs are."""
    for seed in range(5):
        assert verdict(Job(skew=skew, skew_from=0.4), seed=seed).kind in (Kind.HEALTHY, Kind.COMPUTE_BOUND)


def test_a_rank_that_is_far_slower_in_everything_is_named():
    """Twice the time in every computing part is reported for the rank, not for one phase."""
    found = verdict(Job(skew=2.2))

    assert (found.kind, found.ranks) == (Kind.COMPUTE_STRAGGLER, (1,))
    assert "every part" in found.summary


def test_too_few_cores_withhold_blame():
    """Where ranks stand ready without a core, waiting and weak lateness are chance."""
    oversubscribed = dict.fromkeys(range(4), 0.4)
    job = Job(ranks=4, comm=10.0)

    assert verdict(job).kind is Kind.COMM_BOUND
    found = verdict(job, wait_of_ready_time=oversubscribed)
    assert found.kind is Kind.CPU_CONTENTION
    assert "waited for a CPU core for 40 %" in found.summary
    assert (
        verdict(Job(ranks=4), adds("forward", 3.0, (1,)), wait_of_ready_time=oversubscribed).kind is Kind.CPU_CONTENTION
    )


def test_too_few_cores_explain_code_that_no_sample_shows():
    """Code between the phases that takes no longer than the wait for cores is a finding if its line is known."""
    oversubscribed = {"wait_of_ready_time": {0: 0.45}, "wait_of_wall_time": {0: 0.4}}

    assert verdict(ALONE, adds("other", 7)).kind is Kind.RESIDUAL_HEAVY
    assert verdict(ALONE, adds("other", 7), **oversubscribed).kind is Kind.CPU_CONTENTION
    assert verdict(ALONE, adds("other", 20), **oversubscribed).kind is Kind.RESIDUAL_HEAVY
    lines = (structs.replace(GAME[0], samples=35), structs.replace(GAME[1], samples=65))
    assert verdict(ALONE, adds("other", 7), **oversubscribed, lines=lines).kind is Kind.RESIDUAL_HEAVY


def test_a_strong_fault_is_named_even_with_too_few_cores():
    """Twenty milliseconds on an oversubscribed host are no chance."""
    found = verdict(Job(ranks=4), adds("forward", 20, (1,)), wait_of_ready_time=dict.fromkeys(range(4), 0.4))

    assert (found.kind, found.ranks) == (Kind.COMPUTE_STRAGGLER, (1,))


def test_a_rank_that_lacks_a_core_is_not_blamed_for_its_code():
    """A rank that alone waits for a core is slow because of its host."""
    found = verdict(Job(ranks=4), adds("forward", 3.0, (1,)), wait_of_ready_time={0: 0.01, 1: 0.2, 2: 0.01, 3: 0.02})

    assert found.kind is Kind.HEALTHY


@pytest.mark.parametrize(("ms", "share"), [(9.0, 0.3), (2.5, 0.12)])
def test_time_without_a_core_is_no_work(ms, share):
    """A rank whose excess is mostly waiting for a core is not late by its code: strongly or weakly."""
    waits = {0: 0.02, 1: 0.02 + share}

    assert verdict(Job(), adds("backward", ms, (1,)), wait_of_wall_time=waits).kind in (
        Kind.HEALTHY,
        Kind.COMPUTE_BOUND,
    )
    assert verdict(Job(), adds("backward", ms, (1,)), wait_of_wall_time={0: share, 1: share}).ranks == (1,)


@pytest.mark.parametrize(("ready", "wall", "told"), [(0.21, 0.02, False), (0.8, 0.39, True)])
def test_a_rank_that_sleeps_is_not_told_to_lack_a_core(ready, wall, told):
    """Of the little time that it has work it may wait for a core for a fifth, and so for a fiftieth of the step."""
    waits = {"wait_of_ready_time": {0: 0.09, 1: ready}, "wait_of_wall_time": {0: 0.01, 1: wall}}

    found = verdict(Job(), adds("backward", 40.0, (1,)), **waits)

    assert (found.kind, found.ranks) == (Kind.COMPUTE_STRAGGLER, (1,))
    assert ("waited for a CPU core" in found.summary) is told
    assert ("is not the cause" in found.next) is told


def test_a_rank_that_computes_more_waits_more_for_a_core():
    """On a busy host that is due to its code: four times the work, as the kernel counts, waits four times as long."""
    starved = {"wait_of_ready_time": {0: 0.85, 1: 0.85}, "wait_of_wall_time": {0: 0.6, 1: 0.15}}
    slowed = {"wait_of_ready_time": {0: 0.85, 1: 0.4}, "wait_of_wall_time": {0: 0.6, 1: 0.07}}

    found = verdict(Job(), adds("other", 20.0, (0,)), **starved)

    assert (found.kind, found.ranks, found.phase) == (Kind.STRAGGLER, (0,), "other")
    assert verdict(Job(), adds("other", 20.0, (0,)), **slowed).kind is Kind.CPU_CONTENTION


def test_waiting_for_a_core_while_others_are_awaited_costs_nothing():
    """Two ranks that compute alike, by the kernel's count: one waits for a core at its work, the other beside it."""
    beside = {"wait_of_ready_time": {0: 0.84, 1: 0.77}, "wait_of_wall_time": {0: 0.8, 1: 0.5}}
    alike = {"wait_of_ready_time": {0: 0.5, 1: 0.5}, "wait_of_wall_time": {0: 0.2, 1: 0.2}}
    job = Job(own={"forward": 2.0, "backward": 5.0, "optimizer": 0.5, "other": 1.0})

    assert verdict(job, adds("backward", 27.0, (0,)), **beside).kind is Kind.CPU_CONTENTION
    assert verdict(job, adds("backward", 27.0, (0,)), **alike).ranks == (0,)


@pytest.mark.parametrize(("ms", "told"), [(9.0, False), (30.0, True)])
def test_the_forward_of_a_training_without_modules_is_no_residual(ms, told):
    """Plain tensors: no module tells when forward runs, which takes about as long as backward."""
    job = Job(ranks=1, grouped=False, own={"backward": 10.0, "optimizer": 1.0, "other": ms})

    found = verdict(job)

    assert (found.kind is Kind.RESIDUAL_HEAVY) is told
    assert ("the model's forward is in this time, too" in found.next) is told


@pytest.mark.parametrize(("ms", "told"), [(6.0, False), (30.0, True)])
def test_an_update_by_hand_is_no_residual(ms, told):
    """Weights that `p -= lr * p.grad` changes: no optimizer tells when."""
    job = Job(ranks=1, grouped=False, own={"forward": 5.0, "backward": 10.0, "other": ms})

    found = verdict(job)

    assert (found.kind is Kind.RESIDUAL_HEAVY) is told
    assert ("not counting the update" in found.summary) is told


@pytest.mark.parametrize(("function", "told"), [("confusion", True), ("sgd", False)])
def test_other_code_beside_an_update_by_hand_is_named(function, told):
    """The functions that read gradients are known; the other one takes a quarter of the step, less than backward."""
    job = Job(ranks=1, grouped=False, own={"forward": 5.0, "backward": 10.0, "other": 8.0})
    lines = (
        SampledLine(0, "other", "/x/train.py", 8, "sgd", None, 30),
        SampledLine(0, "other", "/x/train.py", 14, function, None, 70),
        SampledLine(0, "backward", "/x/train.py", 30, "train", None, 200),
    )

    found = verdict(job, lines=lines, own_updates=frozenset({("/x/train.py", "sgd")}))

    assert (found.kind is Kind.RESIDUAL_HEAVY) is told
    assert ("not counting the update)" in found.summary) is told
    assert (found.evidence.get("function") == "confusion") is told
    assert found.speedup_if_fixed == pytest.approx(23 / (23 - 5.6) if told else 1.0, rel=0.05)


def test_a_line_that_may_be_the_update_leaves_the_loop_only_if_it_is_not():
    """An Adam by hand that takes longer than backward: it is no waste, though an optimizer may be quicker."""
    job = Job(ranks=1, grouped=False, own={"forward": 5.0, "backward": 10.0, "other": 30.0})
    lines = (
        SampledLine(0, "other", "/x/train.py", 8, "adam", None, 200),
        SampledLine(0, "backward", "/x/train.py", 30, "train", None, 100),
    )

    found = verdict(job, lines=lines)
    by_optimizer = verdict(replace(job, own={**job.own, "optimizer": 1.0}), lines=lines)

    assert "step (67 %)" in found.summary
    assert "which may be the update" in found.summary
    assert "torch.optim" in found.next
    assert "Otherwise take it out of the training loop" in found.next
    assert found.speedup_if_fixed == 1.0
    assert "update" not in by_optimizer.summary
    assert by_optimizer.speedup_if_fixed == pytest.approx(46 / 16, rel=0.05)


def test_a_line_that_waits_is_no_update():
    """It is hardly on a core: no optimizer does that quicker."""
    job = Job(ranks=1, grouped=False, own={"forward": 5.0, "backward": 10.0, "other": 30.0})
    fetch = SampledLine(0, "other", "/x/train.py", 8, "fetch", None, 200, watched_ns=2 * 10**9, cpu_ns=2 * 10**7)
    backward = SampledLine(0, "backward", "/x/train.py", 30, "train", None, 100)

    found = verdict(job, lines=(fetch, backward))

    assert "update:" not in found.summary
    assert "waits there" in found.next


def test_nothing_is_left_out_for_an_update_that_may_be_the_named_line():
    """Functions that read gradients have a twentieth: the update is elsewhere."""
    job = Job(ranks=1, grouped=False, own={"forward": 5.0, "backward": 10.0, "other": 30.0})
    lines = (
        SampledLine(0, "other", "/x/train.py", 8, "adam", None, 190),
        SampledLine(0, "other", "/x/train.py", 20, "main", None, 10),
        SampledLine(0, "backward", "/x/train.py", 30, "train", None, 100),
    )

    found = verdict(job, lines=lines, own_updates=frozenset({("/x/train.py", "main")}))

    assert "step (67 %) is spent" in found.summary


def test_the_gain_is_that_of_the_named_line():
    """It has 60 % of the part: the rest stays."""
    rest = SampledLine(0, "other", "/x/train.py", 9, "other", None, 40)
    line = SampledLine(0, "other", "/x/train.py", 12, "append", None, 60)
    backward = SampledLine(0, "backward", "/x/train.py", 30, "train", None, 100)
    job = Job(ranks=1, grouped=False, own={"forward": 5.0, "backward": 10.0, "optimizer": 5.0, "other": 20.0})

    found = verdict(job, lines=(line, rest, backward))

    assert "60 % of it in train.py:12 append; without that part steps would be 1.43x faster" in found.summary
    assert found.speedup_if_fixed == pytest.approx(40 / 28, rel=0.05)


@pytest.mark.parametrize(("others", "gain"), [(10, 5.0), (0, 9.0)])
def test_what_is_beside_the_named_line_stays(others, gain):
    """A metric has 90 % of code that takes most of the step, or all of it."""
    lines = [
        SampledLine(0, "other", "/x/train.py", 12, "metric", None, 100 - others),
        SampledLine(0, "other", "/x/train.py", 9, "log", None, others),
        SampledLine(0, "backward", "/x/train.py", 30, "train", None, 12),
    ]
    job = Job(ranks=1, grouped=False, own={"forward": 2.0, "backward": 2.0, "optimizer": 1.0, "other": 40.0})

    found = verdict(job, lines=[each for each in lines if each.samples])

    assert found.speedup_if_fixed == pytest.approx(gain, rel=0.05)


def test_ranks_without_a_group_do_not_wait_for_each_other():
    """Separate processes are no stragglers."""
    found = verdict(Job(grouped=False, ranks=2), adds("forward", 20, (1,)))

    assert found.kind in (Kind.COMPUTE_BOUND, Kind.HEALTHY)


def test_few_steps_are_insufficient():
    """The verdict has the number of steps and the number needed."""
    found = verdict(Job(steps=15))

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert "20 are needed" in found.summary


def test_few_long_steps_say_what_took_their_time():
    """A step of gradient accumulation may take seconds, and a run have a dozen of them."""
    lines = [SampledLine(0, "input_wait", "/me/train.py", 8, "Files.__getitem__", None, 90)]
    lines.append(SampledLine(0, "forward", "/me/train.py", 22, "main", None, 10))
    window = window_of(Job(ranks=1, grouped=False, steps=8), adds("input_wait", 3000))
    found = diagnose(window, JobFacts(lines=lines, state="finished"))[0]

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert "20 are needed. On average each of them took 2.99 s: 99.5 % data loading" in found.summary
    assert "of data loading is in train.py:8 Files.__getitem__." in found.summary


@pytest.mark.parametrize(
    ("steps", "lines", "advice"),
    [
        (15, [], "Wait for more steps: 12 of 20 so far, after the first ones."),
        (0, [], "Wait for the first step."),
        (
            0,
            [SampledLine(0, "startup", "/x/train.py", 3, "<module>", f"{IMPORTING}:1 _find_and_load", 40)],
            "Wait for the first step; so far the start-up is mostly imports in train.py:3.",
        ),
        (
            0,
            [SampledLine(0, "startup", "/x/train.py", 9, "read_files", None, 40)],
            "Wait for the first step; so far the start-up is mostly in train.py:9 read_files.",
        ),
    ],
)
def test_a_running_job_says_what_it_does_until_there_is_a_verdict(steps, lines, advice):
    """How many of the needed steps there are; before the first one, where the start-up was seen."""
    found = diagnose(window_of(Job(steps=steps)), JobFacts(state="running", lines=lines))

    assert [each.next for each in found] == [advice]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("state", ["finished", "failed", "stopped"])
def test_the_first_steps_alone_are_not_no_steps(ranks, state):
    """They include set-up and are left out; to mark the steps, or to say that there was none, would be wrong."""
    found = diagnose(window_of(Job(steps=3, ranks=ranks)), JobFacts(state=state))[0]

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert "after the first ones; 20 are needed" in found.summary
    assert "30 training steps" in found.next


def test_no_steps_at_all_say_how_to_mark_them():
    """A run that ended without a step gets a way out."""
    found = diagnose(KeptSteps(128).aligned(), JobFacts(state="finished"))[0]

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert "trace_step" in found.next


@pytest.mark.parametrize("state", ["running", "finished"])
def test_a_script_that_only_logs_learns_how_to_be_traced(state):
    """To mark its steps would change nothing, and no step will come."""
    found = diagnose(KeptSteps(128).aligned(), JobFacts(state=state, only_logs=True))[0]

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert "the script only logs" in found.summary
    assert "traceml.init(local=True)" in found.next
    assert "trace_step" not in found.next


@pytest.mark.parametrize("facts", [{"state": "failed", "only_logs": True}, {"state": "finished"}])
def test_other_runs_without_steps_are_not_told_to_trace(facts):
    """A script that failed comes first; one that is traced is traced already."""
    found = diagnose(KeptSteps(128).aligned(), JobFacts(**facts))[0]

    assert "traceml.init" not in found.next


@pytest.mark.parametrize(
    ("library", "is_told"),
    [
        ("/usr/lib/python3.11/subprocess.py:2001 Popen._try_wait", True),
        ("/usr/lib/python3.11/socket.py:720 recv", False),
    ],
)
def test_a_program_that_was_not_traced_is_told(library: str, is_told: bool) -> None:
    """Such as torchrun with an environment of its own: its ranks start no recorder."""
    lines = [SampledLine(0, "startup", "/me/start.py", 2, "main", library, 40)]
    found = diagnose(KeptSteps(128).aligned(), JobFacts(state="finished", lines=lines))[0]

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert ("waits for a program that it starts" in found.next) is is_told
    assert ("If that one trains, it was not traced" in found.next) is is_told
    assert ("trace_step()" in found.next) is not is_told


def test_a_process_that_was_started_has_a_run_of_its_own() -> None:
    """Its parent has no step to be marked, and does not work where it waits."""
    library = "/usr/lib/python3.11/multiprocessing/popen_fork.py:28 Popen.poll"
    lines = [SampledLine(0, "startup", "/me/start.py", 2, "main", library, 40)]
    found = diagnose(KeptSteps(128).aligned(), JobFacts(state="finished", lines=lines))[0]

    assert found.next.startswith("start.py:2 main waits for a process that the script has started. If that one trains,")
    assert "trace_step()" not in found.next


@pytest.mark.parametrize("launches", [True, False])
def test_a_script_that_launches_functions_is_told_to_trace_these(launches: bool) -> None:
    """It trains nothing itself: no steps of its own are to be marked."""
    found = diagnose(KeptSteps(128).aligned(), JobFacts(state="finished", launches=launches))[0]

    assert ("by traceml.launch: with trace=True" in found.next) is launches
    assert ("trace_step()" in found.next) is not launches


@pytest.mark.parametrize(
    ("length", "batch_size", "drop_last", "ranks", "words"),
    [
        (0, 8, False, 1, "The data set is empty"),
        (50, 64, True, 1, "50 samples of the data set make no whole batch of 64"),
        (100, 64, True, 2, "50 samples of the data set make no whole batch of 64"),
        (100, 64, True, 1, "trace_step()"),
        (50, 64, False, 1, "trace_step()"),
        (None, 64, True, 1, "trace_step()"),
        (50, None, True, 1, "trace_step()"),
    ],
)
def test_a_loader_without_a_batch_is_the_reason_for_no_step(
    length: int | None, batch_size: int | None, drop_last: bool, ranks: int, words: str
) -> None:
    """The script's loop ends at once, and so does the script, without an error."""
    loader = LoaderFacts(length=length, batch_size=batch_size, drop_last=drop_last)
    found = diagnose(KeptSteps(128).aligned(), JobFacts(state="finished", loader=loader, world_size=ranks))[0]

    assert words in found.next


def test_a_logging_script_that_calls_init_is_traced():
    """Its recorder only logged at first; a store of an earlier version does not tell."""
    builder = JobFactsBuilder()
    builder.info(0, {"kind": "process", "cores": 8})
    assert not builder.build().only_logs

    builder.info(0, {"kind": "process", "tracing": False})
    assert builder.build().only_logs

    builder.info(0, {"kind": "tracing"})
    assert not builder.build().only_logs


def test_a_job_that_failed_before_it_trained_is_no_matter_of_steps():
    """Without any rank, as torchrun could not start them, the advice is to read the job's output."""
    found = diagnose(KeptSteps(128).aligned(), JobFacts(state="failed"))[0]

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert "output" in found.next
    assert "trace_step" not in found.next


@pytest.mark.parametrize("steps", [0, 15])
def test_a_run_without_its_aggregator_is_not_waited_for(steps):
    """Its steps may be in the memory of the host; more will not come."""
    window = window_of(Job(steps=steps)) if steps else KeptSteps(128).aligned()
    found = diagnose(window, JobFacts(state="lost"))[0]

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert "traceml sync" in found.next
    assert "Wait" not in found.next


@pytest.mark.parametrize("end", [{"signal": 2}, {"code": 130}, {"exception": "KeyboardInterrupt"}])
def test_a_job_that_was_interrupted_before_it_trained_was_stopped(end):
    """Ctrl-C is no failure to look into."""
    ended = RankExit(rank=0, state="killed", **end)
    found = diagnose(KeptSteps(128).aligned(), JobFacts(state="stopped", exits=(ended,)))[0]

    assert found.kind is Kind.INSUFFICIENT_DATA
    assert "the run was stopped before its first step" in found.summary
    assert "output" not in found.next


def test_a_job_that_was_stopped_in_its_start_up_is_told_what_that_was():
    """Nothing says that its script trains in an unusual way."""
    lines = [SampledLine(0, "startup", "/x/train.py", 3, "<module>", f"{IMPORTING}:1 _find_and_load", 40)]
    found = diagnose(KeptSteps(128).aligned(), JobFacts(state="stopped", lines=lines))[0]

    assert found.next == "Let the run come to its training: the start-up was mostly imports in train.py:3."


def test_a_lost_rank_outranks_timing():
    """A rank killed by a signal is the verdict; the timing finding comes after it."""
    lost = RankExit(rank=1, state="killed", signal=9, last_step=99, open_step=100, open_phase="backward")
    findings = diagnose(window_of(Job(), adds("forward", 20, (0,))), JobFacts(world_size=2, exits=(lost,)))

    assert [finding.kind for finding in findings] == [Kind.RANK_LOST, Kind.COMPUTE_STRAGGLER]
    assert (findings[0].ranks, findings[0].phase, findings[0].evidence["signal"]) == ((1,), "backward", 9)


def test_findings_are_plain_json():
    """Findings can be written as JSON and read back."""
    found = verdict(Job(), adds("forward", 20, (1,)))

    assert Finding.from_dict(found.to_dict()).kind is Kind.COMPUTE_STRAGGLER
    assert all(not isinstance(value, np.generic) for value in found.to_dict()["evidence"].values())


@pytest.mark.parametrize(
    ("loader", "says", "never"),
    [
        (LoaderFacts(dataset="Digits", in_memory=True, num_workers=0, batch_size=256), "index", "num_workers"),
        (LoaderFacts(dataset="Labels", in_memory=True, num_workers=0, batch_size=16), "num_workers=1", "in memory"),
        (LoaderFacts(dataset="Folder", num_workers=0), "num_workers=1", "cheaper"),
        (LoaderFacts(dataset="Folder", num_workers=1), "num_workers=2", "in memory"),
        (LoaderFacts(dataset="Folder", num_workers=8), "will not help on 4 cores, unless making", "set num_workers"),
        (LoaderFacts(dataset="Folder", num_workers=1, trainer="fastai"), "num_workers=2", "persistent_workers"),
        (LoaderFacts(dataset="Folder", num_workers=1, trainer="transformers"), "set dataloader_num_workers=2", " num_"),
        (None, "num_workers=1", "in memory"),
    ],
)
def test_advice_on_input_fits_the_loader(loader, says, never):
    """No workers for a dataset in memory, no more workers than cores."""
    found = verdict(ALONE, adds("input_wait", 10), loader=loader, hosts={0: "h"}, cores={"h": 4})

    assert says in found.next
    assert never not in found.next


def test_device_times_have_a_lower_floor_for_communication():
    """On a device a millisecond of exposed communication is no scheduling noise."""
    job = Job(own={"forward": 1.0, "backward": 2.0, "optimizer": 0.3}, comm=2.0, leave_ms=0.0)
    window = window_of(job)

    assert diagnose(window, JobFacts(world_size=2))[0].kind is Kind.HEALTHY
    assert diagnose(structs.replace(window, device=True), JobFacts(world_size=2))[0].kind is Kind.COMM_BOUND


def test_rows_with_nothing_in_them_do_no_harm():
    """Steps of no length give no division by zero."""
    rows = np.zeros(60, STEPS.dtype)
    rows["step"], rows["backward_own_ns"] = np.arange(60), -1
    kept = KeptSteps(128)
    kept.scatter(np.zeros(60, np.int64), rows)

    assert diagnose(kept.aligned(), JobFacts())[0].kind is Kind.HEALTHY


def test_profiled_steps_are_left_out():
    """They take longer on the profiled rank, and the others wait: neither jitter nor a slow rank."""
    long = range(100, 112)

    def profile(own, _random):
        own["forward"][1, long] += 80.0

    def found(flag):
        kept = KeptSteps(1024)
        for rank, rows in enumerate(rows_of(Job(), profile)):
            marked = np.isin(rows["step"], long) & (rank == 1)
            rows["bits"] |= np.where(marked, pack_bits(0, flag), 0)
            kept.scatter(np.full(len(rows), rank), rows)

        return [each.kind for each in diagnose(kept.aligned(), JobFacts())]

    usual = [each.kind for each in diagnose(window_of(Job()), JobFacts())]
    assert found(0) != usual
    assert found(int(StepFlag.PROFILED)) == usual


@pytest.mark.parametrize("first", [2, 7000])
def test_live_slow_steps_that_are_over_are_no_finding(first: int) -> None:
    """Neither at the beginning of a run nor later, though the newest steps that are judged have many of them."""
    job = replace(ALONE, steps=first + 600)

    def slow(own: dict[str, np.ndarray], _: np.random.Generator) -> None:
        own["input_wait"][:, first + 200 : first + 450] += 20.0

    rows = rows_of(job, slow)[0]

    def found(until: int) -> set[Kind]:
        whole = KeptSteps(job.steps, 1)
        whole.scatter(np.zeros(until, np.int64), rows[:until])
        window = whole.aligned(last=600)
        history = whole.aligned(last=job.steps) if len(window) < until else window
        known = JobFacts(world_size=1, state="running", latest=(until - 1,))
        return {each.kind for each in diagnose(window, known, history) if each.severity is not Severity.INFO}

    assert found(first + 440)
    assert not found(first + 500)


def test_two_causes_of_one_late_rank_are_both_told() -> None:
    """Neither hides the other one: the rank computes as fast as the others, so its host is none of them."""
    found = verdict(Job(ranks=4, sigma=0.05), adds("input_wait", 3, (0,)), adds("other", 2.5, (0,)))

    assert (found.kind, found.ranks, found.phase) == (Kind.INPUT_STRAGGLER, (0,), "input_wait")
    assert "every part of the step" not in found.summary
    assert found.summary.endswith(" Its code outside the known phases takes 2.51 ms more, too.")


@pytest.mark.parametrize(
    ("job", "faults"),
    [
        (Job(ranks=40, steps=200), (adds("input_wait", 20, chance=0.05),)),
        (Job(ranks=256, steps=150, sigma=0.5, comm=0.3), ()),
        (Job(ranks=64, sigma=0.05), (adds("checkpoint", 8, (7,)),)),
    ],
    ids=["stalls by chance", "uneven lengths", "a rank that saves"],
)
def test_many_ranks_that_wait_for_late_ones_do_not_wait_for_the_network(job: Job, faults: tuple[Fault, ...]) -> None:
    """In each step a few of them are late, which is less than the fifth that waits least."""
    found = diagnose(window_of(job, *faults, seed=1), JobFacts(world_size=job.ranks))

    assert Kind.COMM_BOUND not in [each.kind for each in found]


@pytest.mark.parametrize("ranks", [8, 64, 256])
def test_the_gain_without_communication_is_that_of_a_job_without_it(ranks: int) -> None:
    """However many ranks there are."""
    job = Job(ranks=ranks, steps=120, sigma=0.2, comm=12.0)
    step, without = (window_of(each, seed=1).total.mean() for each in (job, replace(job, comm=0.0)))

    found = verdict(job, seed=1)

    assert found.kind is Kind.COMM_BOUND
    assert found.speedup_if_fixed == pytest.approx(step / without, rel=0.06)


def test_own_backward_that_was_not_measured_is_no_longer_than_the_steps() -> None:
    """A rank is slow in each step that measures it, and its mean is not that of the others."""
    found = verdict(Job(ranks=4, steps=960, callback_every=4), adds("backward", 96, (1,), every=8))

    assert (found.kind, found.ranks, found.phase) == (Kind.COMPUTE_STRAGGLER, (1,), "backward")
    assert found.cost_share < 0.55  # all measured: 0.43


@pytest.mark.parametrize("part", ["h2d", "checkpoint"])
def test_copies_and_saves_that_begin_in_the_run_are_one_finding(part: str) -> None:
    """The one that tells from which step on; a steady cost of all steps would be in none of them."""

    def later(own: dict[str, np.ndarray], _: np.random.Generator) -> None:
        own[part][:, 320:] += 12.0

    found = diagnose(window_of(Job(ranks=4, steps=600), later), JobFacts(world_size=4))

    assert [each.kind for each in found if each.severity is not Severity.INFO] == [Kind.SLOWDOWN]


@pytest.mark.parametrize(
    ("since", "says"), [(0, "The difference grows by 40"), (300, "Since step 300 the difference grows by 40")]
)
def test_a_rank_that_saves_for_longer_and_longer_is_one_finding(since: int, says: str) -> None:
    """Its ranks, and how fast the difference grows, from which step on."""

    def grows(own: dict[str, np.ndarray], _: np.random.Generator) -> None:
        own["checkpoint"][1] = 4.0 * (since > 0)
        own["checkpoint"][1, since:] += np.arange(600 - since) * 0.04

    found = diagnose(window_of(Job(ranks=4, steps=600), grows), JobFacts(world_size=4))

    (saves,) = (each for each in found if each.severity is not Severity.INFO)
    assert (saves.kind, saves.ranks) == (Kind.CHECKPOINT_STALLS, (1,))
    assert says in saves.summary


@pytest.mark.parametrize("steps", [slice(150, None, 2), slice(150, 250, 2)])
def test_work_of_one_rank_in_every_second_step_is_no_communication(steps: slice) -> None:
    """It comes after the ranks have met, so that they wait in the next step, in which no rank works longer."""

    def logs(own: dict[str, np.ndarray], _: np.random.Generator) -> None:
        own["other"][1, steps] += 160.0

    first, *rest = diagnose(window_of(Job(ranks=4, steps=300).scaled(4), logs), JobFacts(world_size=4))

    assert (first.ranks, first.phase) == ((1,), "other")
    assert abs(first.evidence["since_step"] - 150) <= 2
    assert [each for each in rest if each.severity is not Severity.INFO] == []


@pytest.mark.parametrize("part", ["other", "optimizer"])
def test_a_rank_that_was_late_among_noisy_ones_is_told_with_its_end(part: str) -> None:
    """It is one finding, though steps lose half of what it took longer."""

    def early(own: dict[str, np.ndarray], _: np.random.Generator) -> None:
        own[part][8, :334] += 12.0

    found = diagnose(window_of(Job(ranks=32, steps=600, sigma=0.3), early), JobFacts(world_size=32))

    (late,) = (each for each in found if each.severity is not Severity.INFO)
    assert (late.ranks, late.phase) == ((8,), part)
    assert late.evidence["until_step"] == pytest.approx(334, abs=10)


@pytest.mark.parametrize("ranks", [4, 8, 64])
@pytest.mark.parametrize("seed", range(3))
def test_waits_for_data_by_chance_are_those_of_all_ranks(ranks: int, seed: int) -> None:
    """In 200 steps a rank has few of them, and some less than half of what another has."""
    found = diagnose(
        window_of(Job(ranks=ranks, steps=200), adds("input_wait", 20, chance=0.05), seed=seed),
        JobFacts(world_size=ranks),
    )

    (waits,) = (each for each in found if each.severity is not Severity.INFO)
    assert (waits.kind, waits.ranks) == (Kind.INPUT_BOUND, ())
    assert any(words in waits.summary for words in (", unevenly: a rank spends ", ", by the ranks in turns "))


def test_rare_waits_of_one_rank_are_not_those_of_all() -> None:
    """Seven of them in 70 steps are no chance, where the others have none."""
    found = verdict(Job(ranks=4, steps=70), adds("input_wait", 80.0, (1,), every=10))

    assert found.kind is not Kind.INPUT_BOUND


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("part", ["other", "user"])
def test_stalls_by_chance_in_the_scripts_code_are_no_rare_steps(ranks: int, part: str) -> None:
    """On each rank they are in 5 % of the steps, and in most steps some rank has one, for which the others wait."""
    job = Job(ranks=ranks, steps=400, sigma=0.05)
    step, without = (window_of(job, *faults).total.mean() for faults in ((adds(part, 20, chance=0.05),), ()))

    found = verdict(job, adds(part, 20, chance=0.05))

    assert (found.kind, found.ranks, found.phase) == (Kind.RESIDUAL_HEAVY, (), part)
    assert found.speedup_if_fixed == pytest.approx(step / without, rel=0.1)


def test_loading_in_advance_saves_what_ranks_wait_for_each_other() -> None:
    """Each waits 1.4 ms of a step for its data, and steps lose 7 ms: the gain is no bound by what one waits."""
    waits = verdict(Job(ranks=8, steps=200), adds("input_wait", 20, chance=0.05), seed=1)

    assert waits.kind is Kind.INPUT_BOUND
    assert waits.speedup_if_fixed > 1.3
