"""One time line for all hosts."""

from __future__ import annotations

from traceml.database.store.reader import StreamIdentity, StreamRecord
from traceml.database.store.run_clocks import RunClocks

S = 10**9


def stream(number, host, **facts):
    return StreamRecord(number, StreamIdentity(number, 0, host, 100 + number, 7, ""), facts)


def test_hosts_are_brought_to_the_aggregators_clock():
    """A host whose wall clock is wrong by an hour has the aggregator's time."""
    right = stream(1, "a", clock=[5 * S, 1000 * S], clock_offset_ns=995 * S, clock_rtt_ns=1000)
    wrong = stream(2, "b", clock=[7 * S, 4600 * S], clock_offset_ns=993 * S, clock_rtt_ns=1000)
    clocks = RunClocks([right, wrong])

    assert clocks.from_monotonic(1, 6 * S) == clocks.from_monotonic(2, 8 * S) == 1001 * S
    assert clocks.from_wall_clock(1, 1001 * S) == clocks.from_wall_clock(2, 4601 * S) == 1001 * S


def test_ranks_of_one_host_share_the_most_exact_measurement():
    """They have one monotonic clock, so differences between their measurements are errors."""
    near = stream(1, "a", clock_offset_ns=1000 * S, clock_rtt_ns=20_000)
    far = stream(2, "a", clock_offset_ns=1000 * S + 400_000, clock_rtt_ns=900_000)
    never = stream(3, "a", clock=[0, 1000 * S + 1_000])
    clocks = RunClocks([near, far, never])

    assert {clocks.from_monotonic(number, 5) for number in (1, 2, 3)} == {1000 * S + 5}


def test_two_machines_of_one_name_keep_their_own():
    """Names of hosts need not differ; when they were booted does."""
    clocks = RunClocks(
        [
            stream(1, "localhost", clock_offset_ns=1000 * S, clock_rtt_ns=1),
            stream(2, "localhost", clock_offset_ns=900 * S, clock_rtt_ns=1),
        ]
    )

    assert clocks.from_monotonic(1, 0) - clocks.from_monotonic(2, 0) == 100 * S


def test_without_any_measurement():
    """The wall clock of the host is used; without it, timestamps count from the machine's start."""
    clocks = RunClocks([stream(1, "a", clock=[5 * S, 1000 * S]), stream(2, "b")])

    assert clocks.from_monotonic(1, 6 * S) == 1001 * S
    assert clocks.from_monotonic(2, 6 * S) == 6 * S
    assert clocks.from_wall_clock(2, 6 * S) == 6 * S
