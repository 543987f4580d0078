"""Functions and classes of the launching script, used in a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.forked import client as forked

SCRIPT = """
    import io, multiprocessing, pickle, sys
    from dataclasses import dataclass
    import traceml

    @dataclass
    class Point:
        x: int

    def double(point):
        return Point(2 * point.x)

    def work():
        import torch
        import torch.distributed as dist

        file = io.BytesIO()
        torch.save(Point(1), file)
        file.seek(0)
        gathered = [None, None]
        dist.all_gather_object(gathered, Point(dist.get_rank()))
        pools = []
        for method in ("fork", "spawn"):
            with multiprocessing.get_context(method).Pool(1) as pool:
                pools += pool.map_async(double, [Point(1)]).get(60)

        return torch.load(file, weights_only=False), gathered, pools

    if __name__ == "__main__":
        result = traceml.launch(work, hostnames=["localhost"], workers_per_host=2).rank(1)
        assert result == (Point(1), [Point(0), Point(1)], [Point(2), Point(2)]), result
        print("as it should be")
"""


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return forked.run(
        [sys.executable, *words], forks=True, cwd=folder, env=environ, capture_output=True, text=True, timeout=240
    )


def test_classes_of_the_script_can_be_pickled_and_processes_started(tmp_path: Path) -> None:
    """torch.save, all_gather_object and multiprocessing look names up in `__main__`; also under `python -m`."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))

    for words in (["script.py"], ["-m", "script"]):
        done = run(*words, folder=tmp_path)
        assert done.stdout == "as it should be\n", done.stdout + done.stderr


def test_a_spawned_process_does_not_launch_again(tmp_path: Path) -> None:
    """A script without `if __name__ == "__main__"` is told what is missing."""
    (tmp_path / "script.py").write_text(
        "import multiprocessing, traceml\n"
        "def work():\n"
        "    child = multiprocessing.get_context('spawn').Process(target=print)\n"
        "    child.start()\n"
        "    child.join()\n"
        "    return child.exitcode\n"
        "print(traceml.launch(work, hostnames=['localhost'], workers_per_host=1, backend=None).rank(0))\n"
    )

    done = run("script.py", folder=tmp_path)

    assert done.stdout.splitlines()[-1] == "1"
    assert "UsageError: launch was called while a process that multiprocessing has spawned" in done.stdout
