"""Runtimes for tests, and a check that each test ends its threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.eventually import eventually
from traceml import Runtime


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("traceml-")]


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    """After each test no thread of any Runtime is left."""
    yield
    eventually(lambda: not threads_of_ours())


@pytest.fixture
def rt() -> Iterator[Runtime]:
    """A Runtime with two workers."""
    with Runtime(threads=2, io_threads=2) as runtime:
        yield runtime


@pytest.fixture
def single() -> Iterator[Runtime]:
    """A Runtime with one worker."""
    with Runtime(threads=1, io_threads=1) as runtime:
        yield runtime
