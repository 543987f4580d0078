"""A process that dies again and again is started less and less often."""

from __future__ import annotations

from traceml.supervise.restarting_process import RestartPolicy


def test_pauses_grow_up_to_a_bound():
    """The first start is at once; from then on each waits twice as long, half a minute at the most."""
    now = [100.0]
    again = RestartPolicy(lambda: now[0])
    waited = []
    for _ in range(9):
        since = now[0]
        while not again.due():
            now[0] += 0.25

        waited.append(now[0] - since)
        again.started()

    assert waited == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]


def test_one_that_lived_long_begins_anew():
    """A process that died after a minute of work is restarted at once."""
    now = [100.0]
    again = RestartPolicy(lambda: now[0])
    for _ in range(6):
        now[0] += 60
        assert again.due()
        again.started()

    now[0] += 61
    assert again.due()
    now[0] += 0.5
    assert again.due()
