"""Operators of traces: own time, device time, and lines."""

from __future__ import annotations

from typing import Any

from traceml.runs.export.top_operators import OUTSIDE, CallSamples, OperatorTable

PLACES = [("/x/train.py", 7, "step"), ("/x/train.py", 9, "load")]


def span(name: str, ts: float, dur: float, category: str = "cpu_op", tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": 5, "tid": tid, "ts": ts, "dur": dur, "args": args}


def table(*events: dict[str, Any], calls: CallSamples | None = None) -> OperatorTable:
    made = OperatorTable()
    made.add([span("ProfilerStep#3", 0, 100, "user_annotation"), *events], 1_000_000, calls or CallSamples())
    return made


def test_own_time_excludes_inner_operators() -> None:
    """Also where one is deeper, and where another follows; threads are apart."""
    found = table(
        span("linear", 10, 40), span("addmm", 15, 30), span("copy", 20, 5), span("relu", 60, 10),
        span("linear", 12, 20, tid=2),
    ).by_name  # fmt: skip

    assert {name: each.self_ns for name, each in found.items()} == {
        "linear": 10_000 + 20_000, "addmm": 25_000, "copy": 5_000, "relu": 10_000, OUTSIDE: 50_000,
    }  # fmt: skip
    assert found["linear"].calls == 2


def test_kernels_belong_to_the_operator_that_launched_them() -> None:
    """By the number that both have; then operators are in the order of device time."""
    made = table(
        span("relu", 0, 50, **{"External id": 1}),
        span("addmm", 50, 10, **{"External id": 2}),
        span("gemm", 200, 80, "kernel", tid=7, **{"External id": 2}),
        span("memcpy", 300, 3, "gpu_memcpy", tid=7, **{"External id": 9}),
    )

    assert [(name, each.device_ns) for name, each in made.ordered()][:3] == [
        ("addmm", 80_000), ("unknown", 3_000), ("relu", 0)
    ]  # fmt: skip


def test_samples_outside_the_profiled_steps_do_not_count() -> None:
    """The profiler is started and stopped in the user's line that ends a step: that is no time of the steps."""
    samples = [(1_000_000 + us * 1000, place) for us, place in ((-30, 0), (-10, 0), (20, 1), (100, 0), (150, 0))]
    calls = CallSamples.from_row({"places": [list(each) for each in PLACES], "samples": samples})

    assert table(span("relu", 60, 10), calls=calls).by_name[OUTSIDE].places == {PLACES[1]: 1}


def test_a_sample_counts_for_the_innermost_operator() -> None:
    """One outside of all counts for the time outside; operators of other threads get none."""
    samples = [(1_000_000 + us * 1000, place) for us, place in ((5, 1), (16, 0), (41, 0), (90, 1))]
    calls = CallSamples.from_row({"places": [list(each) for each in PLACES], "samples": samples})
    found = table(
        span("linear", 10, 40), span("addmm", 15, 20), span("backward", 1, 98, tid=2), calls=calls
    ).by_name  # fmt: skip

    assert found["addmm"].place == PLACES[0]
    assert found["linear"].place == PLACES[0]
    assert found[OUTSIDE].places == {PLACES[1]: 2}
    assert found["backward"].place is None
