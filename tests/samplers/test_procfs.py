"""Files under /proc that stay open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from traceml.samplers.procfs import ProcFile


def test_a_file_that_the_script_has_closed_is_opened_again(tmp_path: Path) -> None:
    """Also where the script has opened one of its own with that number, which is left alone."""
    file = ProcFile("/proc/self/comm")
    name = Path("/proc/self/comm").read_bytes()
    number = file._own.number
    os.close(number)
    assert file.read() == name

    mine = os.open(tmp_path / "mine", os.O_CREAT | os.O_RDWR)
    os.write(mine, b"mine")
    taken = file._own.number
    os.dup2(mine, taken)
    assert file.read() == name
    assert os.pread(taken, 9, 0) == b"mine"

    file.close()
    with pytest.raises(OSError, match="it is closed"):
        file.read()

    for each in {mine, taken}:
        os.close(each)
