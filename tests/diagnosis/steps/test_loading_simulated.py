"""Advice on loading that is followed, in a simulation of workers that share cores: the promised gain comes true."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.diagnosis.fabricated import MS
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.rules.loading_advice import LoadingAdvice, for_input
from traceml.diagnosis.steps.loading import Pipeline

TICK_MS = 1.0
STEPS, WARM_UP = 100, 30
PREFETCHED = 2
"""Batches that a worker of a DataLoader has made in advance at most."""


@dataclass
class _Worker:
    """A worker, and what is left of the batch that it makes."""

    cpu_ms: float = 0.0
    wait_ms: float = 0.0
    ready: int = 0

    @property
    def is_free(self) -> bool:
        return self.cpu_ms <= 0 and self.wait_ms <= 0


@dataclass
class Loading:
    """A training whose batches are made by its own process or by workers, on cores that they share.

    Attributes:
        fetch_ms: time that one process takes for a batch, of which `fetch_cpu` is computing.
        rest_ms: computing of the training for a step.
    """

    fetch_ms: float
    rest_ms: float
    fetch_cpu: float = 1.0
    cores: int = 2
    workers: int = 0
    _makers: list[_Worker] = field(default_factory=list)

    def pipeline(self) -> Pipeline:
        """Return what the rule knows of it."""
        return Pipeline(
            fetch_ns=self.fetch_ms * MS, fetch_cpu=self.fetch_cpu, rest_ns=self.rest_ms * MS, cores=self.cores,
            workers=self.workers,
        )  # fmt: skip

    def step_ms(self) -> float:
        """Return the mean step, played through in ticks."""
        if not self.workers:
            return self.fetch_ms + self.rest_ms

        self._makers = [_Worker() for _ in range(self.workers)]
        tick = begun = step = 0
        left_ms = 0.0
        while step < STEPS + WARM_UP:
            if left_ms <= 0 and self._makers[step % self.workers].ready:  # batches are taken in turns
                self._makers[step % self.workers].ready -= 1
                left_ms = self.rest_ms
                step += 1
                begun = tick if step == WARM_UP else begun

            left_ms -= self._run_workers(is_training=left_ms > 0)
            tick += 1

        return (tick - begun) * TICK_MS / STEPS

    def _run_workers(self, *, is_training: bool) -> float:
        """Let a tick pass; return the time for which the training had a core."""
        for each in self._makers:
            if each.is_free and each.ready < PREFETCHED:
                each.cpu_ms, each.wait_ms = self.fetch_ms * self.fetch_cpu, self.fetch_ms * (1 - self.fetch_cpu)

        runnable = sum(each.cpu_ms > 0 for each in self._makers) + is_training
        got_ms = TICK_MS * min(1.0, self.cores / max(runnable, 1))
        for each in self._makers:
            if each.is_free:
                continue

            if each.cpu_ms > 0:
                each.cpu_ms -= got_ms
            else:
                each.wait_ms -= TICK_MS

            each.ready += each.is_free

        return got_ms if is_training else 0.0

    def changed(self, *, workers: int | None = None, fetch_share: float = 1.0) -> Loading:
        """Return it with other workers, or with cheaper batches."""
        count = self.workers if workers is None else workers
        return Loading(self.fetch_ms * fetch_share, self.rest_ms, self.fetch_cpu, self.cores, count)


def advised(loading: Loading, **loader: object) -> LoadingAdvice:
    facts = LoaderFacts(**{"dataset": "Folder", "num_workers": loading.workers, "batch_size": 8, **loader})  # type: ignore[arg-type]
    return for_input(JobFacts(loader=facts), loading.pipeline())


@pytest.mark.parametrize(
    "loading",
    [
        Loading(298, 95),  # decodes
        Loading(20, 30),
        Loading(60, 20, cores=8),
        Loading(64, 8, fetch_cpu=0.05),  # waits for a server
        Loading(40, 10, fetch_cpu=0.5, cores=4),
        Loading(90, 10, fetch_cpu=0.1, workers=2),
        Loading(90, 20, cores=8, workers=2),
    ],
)
def test_the_advised_workers_give_the_promised_gain(loading: Loading) -> None:
    """Three tenths more or less."""
    advice = advised(loading)

    assert advice.workers is not None
    assert f"num_workers={advice.workers}" in advice.text
    assert loading.step_ms() / loading.changed(workers=advice.workers).step_ms() == pytest.approx(advice.gain, rel=0.3)


@pytest.mark.parametrize("loading", [Loading(20, 10, cores=1), Loading(80, 15, workers=2), Loading(80, 10, workers=16)])
def test_workers_that_would_gain_nothing_are_not_advised(loading: Loading) -> None:
    """The cores are used already; half the work for a sample gives what is promised instead."""
    advice = advised(loading)

    assert "num_workers=" not in advice.text
    assert max(loading.step_ms() / loading.changed(workers=count).step_ms() for count in (3, 4, 8)) < 1.3
    assert loading.step_ms() / loading.changed(fetch_share=0.5).step_ms() == pytest.approx(advice.gain, rel=0.3)


def test_a_batch_in_another_process_gives_the_promised_gain() -> None:
    """Without a loader, one worker fetches the next batch meanwhile."""
    loading = Loading(30, 40)
    advice = advised(loading, num_workers=None)

    assert "num_workers=1" in advice.text
    assert loading.step_ms() / loading.changed(workers=1).step_ms() == pytest.approx(advice.gain, rel=0.3)


def test_whole_batches_give_the_promised_gain() -> None:
    """A tenth of the time; not for samples that are made, which is said to be the work of workers."""
    loading = Loading(8, 12)
    advice = advised(loading, in_memory=True, batch_size=256)

    assert "data[indices]" in advice.text
    assert loading.step_ms() / loading.changed(fetch_share=0.1).step_ms() == pytest.approx(advice.gain, rel=0.3)
    assert "data[indices]" not in advised(loading, in_memory=True, batch_size=8).text
