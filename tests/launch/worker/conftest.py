"""A real agent whose zygote has imported torch, for the tests of workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch.driver import Driver


@pytest.fixture(scope="package")
def driver() -> Iterator[Driver]:
    """An agent that serves all tests of workers, as it serves all launches of a script."""
    with Driver() as made:
        made.prepare(need_torch=True)
        yield made


@pytest.fixture(autouse=True)
def _new_job(driver: Driver) -> Iterator[None]:
    """Each test has a job of its own, and leaves none behind."""
    driver.prepare(need_torch=True)
    driver.said.clear()
    yield
    if driver.of("started") and not driver.of("idle"):
        driver.stop(grace_s=0)
