"""Processes beside the training step back, also as sessions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os
from pathlib import Path
from traceml.priority import lower_priority
lower_priority()
group = Path("/proc/self/autogroup")
# empty where the process is in no group, as in the system's root group
words = group.read_text().split() if group.exists() else []
print(os.nice(0), words[-1] if words else 19)
"""


@pytest.mark.process
def test_a_session_of_its_own_steps_back_as_a_whole() -> None:
    """The kernel weighs sessions against each other, so the session's own priority counts."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], start_new_session=True, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["19", "19"]


@pytest.mark.process
def test_a_session_of_others_is_left_alone() -> None:
    """A process in its parent's session makes only itself nice."""
    group = Path("/proc/self/autogroup")
    before = group.read_text() if group.exists() else ""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)

    assert done.stdout.split()[0] == "19"
    assert before == (group.read_text() if group.exists() else "")
