"""Type checkers see the public names as they are: a misspelled setting is their error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import traceml
import traceml.traces

def train(x: int) -> float:
    return x / 2

traceml.init(local=True, quiet=True, runs_dir="here", backend=["mlflow"])
traceml.init(locla=True)
traceml.init(local="yes")
result = traceml.launch(train, (1,), hostnames=["localhost"])
reveal_type(result)
reveal_type(result.rank(0))
reveal_type(traceml.Launcher().run(train).index("localhost", 0))
reveal_type(traceml.traces.Writer)
reveal_type(traceml.traces.read)
reveal_type(traceml.runs()[0].verdict)
reveal_type(traceml.summary())
"""


SKIPPED = "[mypy-torch.*,numpy.*,rich.*]\nfollow_imports = skip\n"  # large, and part of none of these types


@pytest.mark.process
def test_a_type_checker_sees_the_names(tmp_path: Path) -> None:
    """Wrong settings are errors in their lines and nothing else is; results have the function's type."""
    script = tmp_path / "script.py"
    script.write_text(CODE)
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n" + SKIPPED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path), str(script)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip

    assert done.returncode in (0, 1), done.stderr
    errors = re.findall(r"script.py:(\d+): error: (.*)", done.stdout)
    assert [int(line) for line, _ in errors] == [9, 10], done.stdout
    assert '"locla"' in errors[0][1]
    types = re.findall(r'note: Revealed type is "(.*)"', done.stdout)
    shown = [re.sub(r"\b(builtins|traceml[\w.]*)\.(?=\w)", "", each) for each in types]
    assert shown[:3] == ["LaunchResult[float]", "float", "float"]
    assert "Writer" in shown[3]
    assert shown[3:5] != ["Any", "Any"]
    assert shown[5] in ("str | None", "Union[str, None]")
    assert shown[6] == "dict[str, float]"
