"""Findings about memory that grows, and their place among the others."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Job, adds, window_of
from tests.diagnosis.memory.memories import GB, MB, device, growing, growing_workers, host, leaking, processes
from traceml.database.schema import EPOCHS, Resource
from traceml.diagnosis.facts.growing_objects import growing_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.memory_growth import MemoryHistory, MemoryKind
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.topology import Topology
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, grouped=False)


def leaks(*faults, job: Job = ALONE, **facts) -> list[Finding]:
    findings = diagnose(window_of(job, *faults), JobFacts(world_size=job.ranks, **facts))
    return [finding for finding in findings if finding.kind is Kind.MEMORY_LEAK]


def test_growth_is_reported_with_its_rate_and_the_time_left():
    """4 MB per step, 80 MB per second, 1 GB left."""
    (finding,) = leaks(**leaking(used_bytes=15 * GB))

    assert finding.severity == "critical"
    assert finding.evidence["bytes_per_step"] == pytest.approx(4 * MB)
    assert finding.evidence["left_s"] == pytest.approx(1024 / 80)
    assert finding.evidence["left_steps"] == pytest.approx(256)
    assert "grows by 4.00 MiB per step" in finding.headline
    assert finding.headline.endswith("full in 13 s")
    assert "256 steps" in finding.summary


@pytest.mark.parametrize("is_explained", [True, False])
def test_growth_in_few_samples_needs_a_container_that_explains_it(is_explained: bool) -> None:
    """An allocator takes blocks for some seconds after the first steps, and keeps them: in a run, then 474 MiB."""
    rss = [415, 431, 417, 409, 409, 441, 440, 459, 441, 457, 474, 474, 474, 474]
    memory = processes(MemoryHistory(), np.array(rss) * MB, steps_each=9, seconds_each=0.5)
    told = leaks(memory=host(memory, 4 * GB), hosts={0: "h"}, growing=growing_list() if is_explained else {})

    assert bool(told) is is_explained
    longer = processes(MemoryHistory(), np.linspace(410, 600, 40) * MB, steps_each=9, seconds_each=0.5)
    assert leaks(memory=host(longer, 4 * GB), hosts={0: "h"})


@pytest.mark.parametrize(("more_mb", "is_leak"), [(0, False), (400, True)])
def test_memory_that_swings_by_as_much_as_it_has_grown_is_no_leak(more_mb: int, is_leak: bool) -> None:
    """Averaged weights are made anew in each step, tensors of 9 MiB: 20 samples of such a training rise by chance."""
    rss = np.array([
        456, 455, 455, 481, 474, 455, 428, 437, 474, 471, 479, 465, 438, 448, 439, 484, 457, 448, 485, 485, 454, 476,
        484, 466, 484, 493, 475,
    ])  # fmt: skip
    rss = (rss + np.linspace(0, more_mb, len(rss))) * MB
    memory = processes(MemoryHistory(), rss, steps_each=8, seconds_each=0.5)

    assert bool(leaks(memory=host(memory, 4 * GB), hosts={0: "h"})) is is_leak


@pytest.mark.parametrize("profiles", [True, False])
def test_a_profiler_that_is_left_on_keeps_what_it_records(profiles):
    """No variable of the script refers to it."""
    (finding,) = leaks(**leaking(), profiles=profiles)

    assert finding.next.startswith("Turn off torch's profiler") is profiles
    assert "kept from step to step" in finding.next


@pytest.mark.parametrize(("resource", "whose"), [(Resource.MEMORY, "container's"), (Resource.OPEN_FILES, "host's")])
def test_a_limit_of_the_container_is_told_as_such(resource, whose):
    """Its memory is what is compared with then."""
    (finding,) = leaks(**leaking(used_bytes=15 * GB), limits=(ResourceUse(0, resource, 15 * GB, 16 * GB),))

    assert f"At this rate the {whose} 16.0 GiB are full" in finding.summary


@pytest.mark.parametrize(
    ("sizes", "is_leak"),
    [
        ((1, 2, 3, 4), False),
        ((1, 1, 1, 1), True),
        ((1, 2, 2, 2), True),
        ((4, 3, 2, 1), True),
        ((0, 0, 0, 0), True),
        ((1, 1.03, 1.06, 1.1), True),
        ((1, 1.1, 1.2, 1.3), True),
    ],
)
def test_memory_that_follows_the_size_of_batches_is_no_leak(sizes, is_leak):
    """As with longer and longer sequences; where these stay the same, or grow by far less, nothing explains growth."""
    window = window_of(ALONE)
    elements = np.repeat(np.float32(sizes), -(-len(window) // 4))[None, : len(window)]
    findings = diagnose(replace(window, elements=elements), JobFacts(**leaking(15 * GB)))

    assert any(each.kind is Kind.MEMORY_LEAK for each in findings) is is_leak


def test_a_leak_that_lasts_for_long_is_no_more_than_a_warning():
    """Without a host's figures nothing is said about the time left."""
    (far,) = leaks(**leaking())
    (unknown,) = leaks(memory=processes(MemoryHistory(), growing()))

    assert far.severity == unknown.severity == "warning"
    assert "full in" not in far.headline
    assert "full in" in far.summary
    assert "full" not in unknown.summary
    assert "left_s" not in unknown.evidence


def test_only_a_leak_that_ends_the_run_comes_before_slow_steps():
    """Within the hour it is the verdict; else slow data is."""
    window = window_of(ALONE, adds("input_wait", 20))
    kinds = [
        diagnose(window, JobFacts(loader=LoaderFacts(num_workers=0), **leaking(used)))[0].kind
        for used in (15 * GB, 4 * GB)
    ]

    assert kinds == ["MEMORY_LEAK", "INPUT_BOUND"]


@pytest.mark.parametrize(
    ("state", "ran_s", "kind"),
    [
        ("finished", 10.0, Kind.INPUT_BOUND),
        ("finished", 20.0, Kind.MEMORY_LEAK),
        ("running", 10.0, Kind.MEMORY_LEAK),
        ("failed", 10.0, Kind.MEMORY_LEAK),
    ],
)
def test_a_run_that_finished_had_room_for_its_leak(state, ran_s, kind):
    """Memory would be full 13 s later: what the run lost by slow data is more, unless it was close to its end."""
    window, time = window_of(ALONE, adds("input_wait", 20)), RunTime.of(ran_s, {"steps": ran_s})
    facts = JobFacts(loader=LoaderFacts(num_workers=0), state=state, time=time, **leaking(15 * GB))

    assert diagnose(window, facts)[0].kind is kind


def test_the_ranks_of_a_host_fill_it_together():
    """Four ranks leave a quarter of the time; a rank that does not grow is not named."""
    history = host(MemoryHistory(), 15 * GB)
    for rank in range(4):
        processes(history, growing(), rank=rank)

    (all_ranks,) = leaks(job=Job(ranks=4), memory=history, hosts=dict.fromkeys(range(4), "h"))
    one = processes(processes(host(MemoryHistory(), 15 * GB), growing(), rank=1), [900 * MB] * 60)
    (second,) = leaks(job=Job(ranks=2), memory=one, hosts=dict.fromkeys(range(2), "h"))

    assert all_ranks.ranks == ()
    assert all_ranks.evidence["left_s"] == pytest.approx(1024 / 320)
    assert second.ranks == (1,)
    assert "of rank 1" in second.headline


def test_a_cache_that_may_fill_in_the_first_epoch_is_no_verdict():
    """It is a remark, which says so; after the epoch it is a warning, and where memory ends before it, critical."""
    epochs = np.zeros(2, EPOCHS.dtype)
    loader, short = (LoaderFacts(length=length, batch_size=32, num_workers=0) for length in (100_000, 30_000))
    first = {"loader": loader, "latest": (1000,), "epochs": epochs[:1]}
    (remark,) = leaks(**leaking(), **first)
    (later,) = leaks(**leaking(), **(first | {"epochs": epochs}))
    (many,) = leaks(**leaking(), **(first | {"latest": (9000,)}))
    (ending,) = leaks(**leaking(15 * GB), **first)
    (fitting,) = leaks(**leaking(15 * GB), **(first | {"loader": short}))
    long = {**first, "loader": LoaderFacts(length=60_000, batch_size=32, num_workers=0)}
    one, accumulating = (leaks(**leaking(15 * GB), **long, read_micro_batches=lambda n=n: n)[0] for n in (1.0, 2.0))

    (resumed,) = leaks(**leaking(), **(first | {"latest": (9000,), "first_step": 8000}))

    assert remark.severity == resumed.severity == "info"  # another process has read it before
    assert "a cache that fills looks the same" in remark.summary
    assert later.severity == many.severity == "warning"
    assert "cache that fills" not in later.summary
    assert ending.severity == "critical"
    assert fitting.severity == "info"  # all data is read before memory ends
    assert (one.severity, accumulating.severity) == ("critical", "info")  # with two batches a step it is read in time
    assert diagnose(window_of(ALONE), JobFacts(**leaking(), **first))[0].kind is not Kind.MEMORY_LEAK


def test_ranks_that_divide_a_model_read_the_same_samples():
    """With 8 of them a pass takes 8 times the steps of as many replicas: a cache may still be filling."""
    loader = LoaderFacts(length=100_000, batch_size=32, num_workers=0)
    first = {"loader": loader, "latest": (1000,), "job": Job(ranks=8)}
    meshes = {dimension: Topology(mesh={rank: {dimension: rank} for rank in range(8)}) for dimension in ("tp", "dp")}
    found = {dimension: leaks(**leaking(), **first, topology=mesh)[0] for dimension, mesh in meshes.items()}

    assert {dimension: str(each.severity) for dimension, each in found.items()} == {"tp": "info", "dp": "warning"}


def test_device_memory_fills_the_device():
    """Its room is that of the device."""
    (finding,) = leaks(memory=device(MemoryHistory(), growing(10 * GB), total_bytes=20 * GB))

    assert finding.evidence["memory"] == "device"
    assert finding.evidence["left_s"] == pytest.approx((10 * 1024 - 59 * 80) / 80)
    assert finding.headline.startswith("Device memory grows by 4.00 MiB per step")


def test_pinned_memory_is_reported_as_such():
    """It may count as resident memory too, which is then not told."""
    history = processes(MemoryHistory(), growing())
    (finding,) = leaks(memory=device(history, [GB] * 60, pinned=growing(100 * MB)))

    assert finding.evidence["memory"] == "pinned"
    assert finding.headline.startswith("Pinned memory grows by 4.00 MiB")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_little_pinned_memory_hides_no_leak(rank):
    """Of the same rank or another one: it is not what grows there."""
    history = processes(MemoryHistory(), growing())
    device(history, [GB] * 60, pinned=growing(100 * MB, MB), rank=rank)

    found = leaks(memory=history, job=Job(ranks=2))
    assert {each.evidence["memory"]: each.ranks for each in found} == {"resident": (0,), "pinned": (rank,)}


def test_pinned_memory_that_may_be_resident_does_not_count_twice():
    """Both grow; the host is full as soon as with resident memory alone."""
    facts = leaking(15 * GB)
    device(facts["memory"], [GB] * 60, pinned=growing(100 * MB, 30 * MB))

    assert leaks(**facts)[0].evidence["left_s"] == pytest.approx(1024 / 80)


@pytest.mark.parametrize("rss", [np.full(60, 900 * MB), 900 * MB + np.minimum(np.arange(60), 25) * 80 * MB])
def test_memory_that_has_stopped_growing_is_no_finding(rss):
    """Level memory, and a cache that is full."""
    assert leaks(memory=host(processes(MemoryHistory(), rss), 15 * GB), hosts={0: "h"}) == []


def test_workers_that_copy_shared_objects_are_reported_with_the_attribute():
    """40 MB a minute each; the loader is in its first epoch, but a cache would be new memory."""
    (finding,) = leaks(**growing_workers())

    assert finding.headline == "8 loader workers grow by 320 MiB per minute together"
    assert "Listing.files is a list of 1,500,000 objects (str)" in finding.summary
    assert "Listing.files" in finding.next
    assert finding.severity == "warning"
    assert finding.evidence["attribute"] == "Listing.files"


@pytest.mark.parametrize(("left_bytes", "is_told"), [(14 * GB, False), (100 * MB, True)])
def test_copies_end_with_what_there_is_to_copy(left_bytes, is_told):
    """A host that has room for all of it will not be full."""
    facts = growing_workers()
    host(facts["memory"], 16 * GB - left_bytes)
    (finding,) = leaks(**facts, hosts={0: "h"})

    assert ("are full in" in finding.summary) is is_told
    assert ("left_s" in finding.evidence) is is_told


def test_copies_of_a_further_loader_are_reported_with_its_data_set():
    """The validation loader's, which is described after that of the training."""
    (finding,) = leaks(**growing_workers(number=1))

    assert finding.evidence["attribute"] == "Listing.files"


@pytest.mark.parametrize("facts", [{"copies": False}, {"start_method": "spawn"}])
def test_workers_that_grow_otherwise_are_reported_without_a_cause(facts):
    """New memory is no copy, and spawned workers share nothing."""
    (finding,) = leaks(**growing_workers(**facts))

    assert "Listing" not in finding.summary + finding.next
    assert "reference count" not in finding.summary
    assert "attribute" not in finding.evidence


def test_copies_of_unknown_objects_name_no_attribute():
    """The dataset's attributes have few objects, or it hides them."""
    (finding,) = leaks(**growing_workers(objects=False))

    assert "copies of memory shared since the fork" in finding.summary
    assert "attribute" not in finding.evidence


LIST = {
    "path": "losses", "file": "/home/me/train.py", "function": "main", "line": 41, "kind": "list", "count": 4000,
    "per_step": 1.0, "item_bytes": 200, "holds_graph": True, "of_dataset": False, "item": "Tensor",
}  # fmt: skip


def growing_list(**facts) -> dict[int, tuple]:
    return {0: growing_of({"grown": [LIST | facts]})}


def test_a_container_that_grows_is_a_leak_whatever_the_batches_do():
    """It is seen to hold what it is given."""
    window = window_of(ALONE)
    elements = np.linspace(1, 9, len(window), dtype=np.float32)[None]
    facts = JobFacts(**leaking(15 * GB), growing=growing_list())

    assert any(each.kind is Kind.MEMORY_LEAK for each in diagnose(replace(window, elements=elements), facts))


@pytest.mark.parametrize(("rate", "words"), [(4096.2, "gained 4,096 elements"), (0.25, "gained 0.25 elements")])
def test_the_rate_of_a_growing_list_is_a_number_for_people(rate, words):
    """Not 4.1e+03."""
    (finding,) = leaks(**leaking(), growing=growing_list(per_step=rate))

    assert words in finding.summary


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "; it had 4,000 at step 1,200."),
        ({"kind": "figures", "path": "pyplot"}, "; there were 4,000 at step 1,200."),
        ({"kind": "graph", "path": "total"}, "an autograd graph, 4,000 operations deep at step 1,200, which grows"),
    ],
)
def test_a_count_says_when_it_was_made(facts, words):
    """A container is counted now and then, and not at the end of the run."""
    (finding,) = leaks(**leaking(), growing={0: growing_of({"step": 1200, "grown": [LIST | facts]})})

    assert words in finding.summary


def test_few_elements_are_counted_and_make_no_rate():
    """One that comes in each epoch tells nothing of a step."""
    rare = growing_of({"steps": 180, "grown": [LIST | {"per_step": 3 / 180}]})
    (finding,) = leaks(**leaking(), growing={0: rare})

    assert "gained 3 elements in 180 steps, each of which holds the graph" in finding.summary


def test_a_leak_that_slows_the_steps_down_is_reported():
    """Memory that grows less and less with time grows evenly with the steps; where they are even, a cache fills."""
    slower = 2000 * (1 - np.exp(-np.arange(60) / 8))
    times = np.arange(60) * 10**9

    for steps, found in ((slower, ["MEMORY_LEAK"]), (np.arange(60) * 20, [])):
        history = MemoryHistory()
        history.curve(0, MemoryKind.RESIDENT).add(steps, times, 900 * MB + slower * MB)
        assert [finding.kind for finding in leaks(memory=history)] == found


def in_waves() -> np.ndarray:
    """Memory of what grows by copies that take long: between two of them it is there once."""
    at = np.arange(60)
    return growing() + np.where(at % 7 == 0, 0, 40 * MB * at)


TABLE = {"path": "table", "kind": "DataFrame", "item_bytes": 4 * MB, "holds_graph": False, "is_copied": True}


def growing_table(step: int = 1000, count: int = 1000) -> dict[int, tuple]:
    return {0: growing_of({"step": step, "steps": 20, "grown": [LIST | TABLE | {"count": count}]})}


def test_growth_by_copies_that_come_and_go_is_reported_with_its_container():
    """Memory itself goes up and down: one pair of samples in ten does not rise."""
    (finding,) = leaks(memory=processes(MemoryHistory(), in_waves()), growing=growing_table(), latest=(1180,))

    assert finding.evidence["container"] == "table"
    assert "the DataFrame table (added to in train.py:41 main) gained 1 row per step" in finding.summary
    assert finding.next.startswith("Keep less in table")


@pytest.mark.parametrize(
    "known",
    [{}, growing_table(step=500), growing_table(count=400), growing_list()],
    ids=["no container", "one that grew at first", "one that was cleared", "one that is not copied"],
)
def test_memory_in_waves_alone_is_no_leak(known):
    """Nor is it one with a container that may have stopped to grow."""
    assert not leaks(memory=processes(MemoryHistory(), in_waves()), growing=known, latest=(1180,))


def test_a_list_of_graphs_is_reported_with_its_line():
    """It is no cache that fills, also in the first epoch."""
    first = {"loader": LoaderFacts(length=10**9, batch_size=32), "latest": (1000,)}
    (finding,) = leaks(**leaking(), growing=growing_list(), **first)

    assert "the list losses (added to in train.py:41 main) gained 1 element per step" in finding.summary
    assert "each of which holds the graph of its step" in finding.summary
    assert finding.next.startswith("Add loss.item() or loss.detach() to losses")
    assert finding.severity == "warning"
    assert (finding.evidence["file"], finding.evidence["line"]) == ("/home/me/train.py", 41)


def test_all_containers_that_explain_the_growth_are_named():
    """Whoever mends only the first one still has a leak."""
    outputs = LIST | {"path": "outputs", "line": 42}
    table = LIST | TABLE | {"path": "rows", "kind": "list", "line": 43, "is_copied": False}
    (finding,) = leaks(**leaking(), growing={0: growing_of({"grown": [LIST, outputs, table]})})

    assert "The list outputs (added to in train.py:42 main) gained 1 element per step, too." in finding.summary
    assert "The list rows (added to in train.py:43 main) gained 1 element per step, too." in finding.summary
    assert finding.next.startswith("Add loss.item() or loss.detach() to losses and outputs: ")
    assert "Clear rows now and then" in finding.next
    assert finding.evidence["other_containers"] == ["outputs", "rows"]


def test_a_container_that_is_little_of_the_growth_is_not_named_beside_another():
    """A list of numbers grows in each step, too."""
    numbers = LIST | {"path": "history", "holds_graph": False, "item_bytes": 28}
    (finding,) = leaks(**leaking(), growing={0: growing_of({"grown": [LIST, numbers]})})

    assert "history" not in finding.summary + finding.next
    assert "other_containers" not in finding.evidence


@pytest.mark.parametrize(("share", "named"), [(0.2, ["b", "c"]), (0.15, [])])
def test_containers_that_explain_growth_only_together_are_named(share: float, named: list[str]) -> None:
    """The outputs of each layer are in a list of their own; half of the growth has to be in them."""
    each_bytes = int(share * leaks(**leaking())[0].evidence["bytes_per_step"])
    kept = [LIST | {"path": path, "holds_graph": False, "item_bytes": each_bytes} for path in "abc"]
    (finding,) = leaks(**leaking(), growing={0: growing_of({"grown": kept})})

    assert finding.evidence.get("other_containers", []) == named
    assert ("No container" in finding.summary) is not bool(named)


def test_many_containers_in_one_are_told_as_lists() -> None:
    """The recorder has joined them."""
    (finding,) = leaks(**leaking(), growing=growing_list(path="outputs[...]", per_step=24.0))

    assert "the lists outputs[...] (added to in train.py:41 main) gained 24 elements per step" in finding.summary
    assert "; they had 4,000" in finding.summary


@pytest.mark.parametrize(("per_step", "told"), [(0.95, "1 element"), (0.8, "0.8 elements"), (2.04, "2 elements")])
def test_an_element_more_or_less_is_no_other_rate(per_step, told):
    """Of 20 steps, at the begin and the end of which the list was read."""
    listed = growing_of({"steps": 20, "grown": [LIST | {"per_step": per_step}]})
    (finding,) = leaks(**leaking(), growing={0: listed})

    assert f"(added to in train.py:41 main) gained {told} per step" in finding.summary


def test_a_sum_of_losses_is_reported_as_a_graph():
    """Its size in bytes is not known, its operations are."""
    (finding,) = leaks(**leaking(), growing=growing_list(path="total", kind="graph", line=None))

    assert "The tensor total (in main, train.py) has an autograd graph, 4,000 operations deep" in finding.summary
    assert "line" not in finding.evidence


def test_a_hidden_state_is_told_to_be_detached():
    """That of an RNN, which a script passes on with its graph, is no sum of losses."""
    (finding,) = leaks(**leaking(), growing=growing_list(path="model.hidden", kind="graph", line=None))

    assert "If model.hidden sums losses, add loss.item()" in finding.next
    assert "If it is a state that goes from step to step, as of an RNN, detach it there (model.hidden.detach())." in (
        finding.next
    )


@pytest.mark.parametrize("facts", [{"holds_graph": False}, {"holds_graph": False, "per_step": 0.0}])
def test_a_list_that_is_too_small_to_explain_the_growth_is_not_blamed(facts):
    """A number of 28 bytes per step is not 4 MB per step."""
    (finding,) = leaks(**leaking(), growing=growing_list(**facts))

    assert "losses (" not in finding.summary
    assert "No container that the script's variables refer to was seen to grow that much." in finding.summary
    assert "native code" in finding.next
    assert "gc.disable" in finding.next
    assert "container" not in finding.evidence


@pytest.mark.parametrize("growing", [{}, growing_list()])
def test_native_code_is_suspected_only_where_the_containers_do_not_grow(growing):
    """Not before they were read, nor where one explains it."""
    (finding,) = leaks(**leaking(), growing=growing)

    assert "was seen to grow" not in finding.summary
    assert "native code" not in finding.next


def test_a_cache_of_the_data_set_may_end_in_the_first_epoch():
    """It explains the growth, and is a remark until the data was read once."""
    first = {"loader": LoaderFacts(length=10**9, batch_size=32), "latest": (1000,)}
    cache = growing_list(path="dataset.cache", kind="dict", holds_graph=False, item_bytes=4 * MB, of_dataset=True)
    (finding,) = leaks(**leaking(), growing=cache, **first)

    assert finding.severity == "info"
    assert "the dict dataset.cache" in finding.summary
    assert "a cache that fills looks the same" in finding.summary


REPLAY = {"path": "replay", "kind": "deque", "holds_graph": False, "item_bytes": 4 * MB}


def test_a_container_with_a_bound_for_which_there_is_room_is_no_leak():
    """It fills until it is full: a replay buffer, a cached function. Without room it is a leak with that advice."""
    bounded = {**leaking(), "latest": (1000,)}

    assert not leaks(**bounded, growing=growing_list(**REPLAY, max_size=5000))
    (finding,) = leaks(**bounded, growing=growing_list(**REPLAY, max_size=10**9))
    assert "it had 4,000 of at most 1,000,000,000" in finding.summary
    assert "Give replay a maxlen that fits into memory" in finding.next


def test_a_container_with_a_bound_that_is_little_of_the_growth_hides_no_leak():
    (finding,) = leaks(**leaking(), growing=growing_list(**{**REPLAY, "item_bytes": 1 * MB}, max_size=5000))

    assert finding.kind == "MEMORY_LEAK"


@pytest.mark.parametrize(("history_gb", "is_told"), [(6, False), (1, True), (None, True)])
def test_an_optimizer_that_fills_its_history_is_no_leak(history_gb, is_told):
    """L-BFGS after Adam: its first 100 updates, of 1.5 MB each, were told to fill the host in 8 minutes."""
    builder = JobFactsBuilder(1)
    builder.info(0, {"kind": "optimizer", "history_bytes": history_gb and history_gb * GB})
    builder.info(0, {"kind": "optimizer", "history_bytes": None})

    assert bool(leaks(**leaking(), history_bytes=builder.build().history_bytes)) is is_told


def test_a_list_that_grows_beside_the_history_of_an_optimizer_is_a_leak():
    """What the script keeps does not end with the history."""
    assert leaks(**leaking(), history_bytes=6 * GB, growing=growing_list())


@pytest.mark.parametrize(("kind", "bounded"), [("list", "deque with maxlen"), ("dict", "lru_cache with maxsize")])
def test_a_container_is_told_to_be_bounded_as_its_kind_can_be(kind, bounded):
    """A deque is no dict."""
    (finding,) = leaks(**leaking(), growing=growing_list(kind=kind, holds_graph=False, item_bytes=4 * MB))

    assert bounded in finding.next


def test_a_table_that_grows_by_copies_is_reported_with_its_rows():
    """It is as large as the growth; a batch, which is another array in each step, is not."""
    copied = {"path": "table", "kind": "DataFrame", "holds_graph": False, "is_copied": True}
    (finding,) = leaks(
        **leaking(), growing=growing_list(**copied, item_bytes=16, per_step=300_000.0, count=170_000_000)
    )
    (other,) = leaks(**leaking(), growing=growing_list(**copied, item_bytes=16, per_step=300_000.0, count=900_000))

    assert "Meanwhile the DataFrame table (added to in" in finding.summary
    assert "gained 300,000 rows per step; it had 170,000,000." in finding.summary
    assert "each addition copies all of it" in finding.next
    assert "table" not in other.summary


def test_damaged_rows_are_left_out():
    """Of another version, or of another shape."""
    assert growing_of({"grown": [{"path": "x"}, 3, LIST]}) == growing_of({"grown": [LIST]})
    assert growing_of({}) == ()


def test_a_damaged_description_of_a_container_is_left_out():
    """Its number was a text, and the comparison with it ended the report of the run."""
    wrong = [LIST | {"count": "many"}, LIST | {"per_step": None}, 5]
    assert growing_of({"grown": [*wrong, LIST]}) == growing_of({"grown": [LIST]})
