"""Freed memory stays in the process while a task runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from traceml.traces.query.cluster import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        np.ones(1_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with keep_freed_memory():
    inside = faults()
print(outside, inside, faults())
"""


@pytest.mark.process
def test_memory_is_used_again_inside_only():
    """With an environment that returns memory at once, arrays cost page faults outside the context only."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    outside, inside, afterwards = map(int, done.stdout.split())

    assert inside < outside / 10
    assert afterwards > outside / 2
