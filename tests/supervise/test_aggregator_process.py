"""The handle of a run's aggregator, next to one that answers late or not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from traceml.errors import AggregatorUnavailableError
from traceml.supervise.aggregator_process import AggregatorProcess

COMPUTES, WAITS = "while True: sum(range(10**5))", "input()"


class LateAggregator(AggregatorProcess):
    """An aggregator that does not answer twice."""

    def __init__(self, runs_dir: Path, program: str) -> None:
        super().__init__("a-run", runs_dir)
        self._program = program
        self.tries = 0

    def spawn_process(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", self._program], stdin=subprocess.PIPE)

    def _connect(self, timeout_s: float, **_: object) -> object:
        self.tries += 1
        before_s = self._cpu_s()
        while self._program is COMPUTES and self._cpu_s() == before_s:  # a tick of the kernel
            pass

        if self.tries <= 2:
            raise AggregatorUnavailableError("127.0.0.1", self.port, timeout_s, "it does not answer")

        return "connection"


@pytest.fixture
def late(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LateAggregator]:
    with LateAggregator(tmp_path, request.param) as aggregator:
        aggregator.start()
        if aggregator._program is WAITS:
            _until_it_waits(aggregator)

        yield aggregator
        aggregator.process.kill()
        aggregator.process.stdin.close()


def _until_it_waits(aggregator: LateAggregator) -> None:
    path = Path(f"/proc/{aggregator.process.pid}/wchan")
    while "pipe" not in path.read_text():
        pass


@pytest.mark.parametrize("late", [COMPUTES], indirect=True)
def test_an_aggregator_that_starts_is_waited_for(late: LateAggregator) -> None:
    """On a busy host its imports take longer than an answer: it was killed half started, and the report was missing."""
    assert late._connect_at_end() == "connection"
    assert late.tries == 3


@pytest.mark.parametrize("late", [WAITS], indirect=True)
def test_an_aggregator_that_hangs_is_given_up(late: LateAggregator) -> None:
    """It uses no core meanwhile; another one takes its place."""
    with pytest.raises(AggregatorUnavailableError):
        late._connect_at_end()

    assert late.tries == 1
