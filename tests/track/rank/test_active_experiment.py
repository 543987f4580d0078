"""Which experiment what is logged belongs to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from traceml.track.rank.active_experiment import ExperimentLoggers
from traceml.track.rank.logger import Logger


class Emptied(deque[Callable[[Logger], object]]):
    """Queue whose last action another thread takes right after it was seen."""

    def __len__(self) -> int:
        return 1

    def popleft(self) -> Any:
        raise IndexError("pop from an empty deque")


def test_actions_that_another_thread_takes_are_left_to_it() -> None:
    """The training thread and the recorder's both settle them; neither may fail."""
    loggers = ExperimentLoggers()
    loggers._undecided = Emptied()

    loggers.settle()


def test_actions_run_in_order_once_it_is_decided() -> None:
    """With the logger of the experiment that represents the run."""
    loggers, seen = ExperimentLoggers(), []
    loggers.when_decided(lambda logger: seen.append(("a", logger)))
    loggers.when_decided(lambda logger: seen.append(("b", logger)))
    assert not seen

    logger = Logger(7)
    loggers.activate(logger)
    loggers.settle()

    assert seen == [("a", logger), ("b", logger)]
