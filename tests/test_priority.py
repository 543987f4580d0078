"""Processes beside the training step back, also as sessions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from traceml.settings import Config

CODE = """
import os
from pathlib import Path
from traceml.helper_programs import lower_priority
lower_priority()
group = Path("/proc/self/autogroup")
# empty if the process is in no group, as in the system's root group
words = group.read_text().split() if group.exists() else []
print(os.nice(0), words[-1] if words else 19)
"""

TURNS = """
import os, sys, time
from traceml.helper_programs import lower_priority
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.setpriority(os.PRIO_PROCESS, 0, 0)  # the tests may be nice themselves
delivery = os.fork()
if delivery == 0:
    lower_priority(int(sys.argv[1]))
    while True:
        pass
end_s = time.process_time() + 1
while time.process_time() < end_s:  # this is the training
    pass
os.kill(delivery, 9)
used = os.wait4(delivery, 0)[2]
print(used.ru_utime + used.ru_stime)
"""


@pytest.mark.process
@pytest.mark.skipif(os.nice(0) > 0 and os.geteuid() != 0, reason="only root takes back that the tests are nice")
def test_delivery_gets_a_part_of_a_core_that_is_busy() -> None:
    """It loads a tracker's library within half a minute of a training that uses every core, which takes seconds."""
    command = [sys.executable, "-c", TURNS, str(Config().delivery_nice)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.05 < float(done.stdout) < 0.25


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
