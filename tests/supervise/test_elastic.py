"""torchrun's failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import get_method_name

from tests.forked import client as forked
from tests.ports import free_port
from traceml.supervise.elastic import _method_name, first_failure, terminate_remaining_workers


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([(1, 100), (4, 100)], 4),  # os._exit cut the other rank's connection
        ([(1, 100), (-9, 101)], -9),
        ([(1, 100), (-15, 100)], 1),  # torchrun ended the other one
        ([(-15, 100), (1, 100)], -15),
        ([(1, 101), (1, 100)], 1),
        ([(3, 100), (-11, 100)], 3),
    ],
)
def test_an_exception_may_be_the_consequence_of_another_end(failures, first):
    """torchrun knows the second of each only."""
    known = [SimpleNamespace(exitcode=code, timestamp=second) for code, second in failures]

    assert first_failure(known).exitcode == first


@pytest.mark.process
def test_a_stopped_worker_does_not_outlive_an_interrupted_torchrun() -> None:
    """SIGTERM stays pending in it, and another signal ends torchrun's wait for it."""
    worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
    worker.send_signal(signal.SIGSTOP)
    os.waitpid(worker.pid, os.WUNTRACED)  # of two pending signals it would take SIGTERM first
    worker.terminate()
    agent = SimpleNamespace(_pcontext=SimpleNamespace(subprocess_handlers={0: SimpleNamespace(proc=worker)}))
    terminate_remaining_workers(agent)

    assert worker.returncode == -signal.SIGKILL


def test_methods_are_named_as_torchrun_names_them() -> None:
    """Also where there are fewer frames than asked for."""

    def named(depth: int) -> list[str]:
        return [name(depth) for name in (_method_name, get_method_name)]

    assert named(1) == ["<listcomp>" if sys.version_info < (3, 12) else "named"] * 2
    assert named(3)[0] == named(3)[1]
    assert named(10_000) == ["no_method_name"] * 2


@pytest.mark.process
def test_the_rendezvous_reads_no_sources(tmp_path: Path) -> None:
    """Its names of methods would cost more than all else that torchrun does."""
    (tmp_path / "script.py").write_text("print('trained')")
    code = (
        "import sys\n"
        "from torch.distributed.elastic.rendezvous import dynamic_rendezvous\n"
        "from traceml.supervise.elastic import main\n"
        "dynamic_rendezvous.inspect = None\n"
        "sys.exit(main(['--nproc-per-node=1', 'script.py']))\n"
    )
    done = forked.run_code(code, cwd=tmp_path, text=True)

    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr


# torchrun looks at it ten times a second, and sleeps in between: it is ready when torchrun has looked.
WAITS = """
import os, re, time

def sleeps():
    with open(f"/proc/{os.getppid()}/status") as status:
        return int(re.search(r"^voluntary_ctxt_switches:\\s+(\\d+)", status.read(), re.MULTILINE)[1])

before = sleeps()
while sleeps() < before + 20:
    time.sleep(0.05)
print("ready", flush=True)
time.sleep(600)
"""


def start_torchrun(
    script: Path, ranks: int, failures_fd: int, stdin: int | None = None, *, nodes: Sequence[str] = ("--standalone",)
) -> subprocess.Popen[str]:
    return forked.Popen(
        [sys.executable, "-m", "traceml.supervise.elastic", *nodes, "--nproc-per-node", str(ranks), script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRACEML_FAILURES_FD": str(failures_fd)}, pass_fds=(failures_fd,),
        stdin=stdin, stdout=subprocess.PIPE, text=True, forks=True,
    )  # fmt: skip


@pytest.mark.process
def test_ranks_that_torchrun_ends_on_a_signal_are_stopped(tmp_path: Path) -> None:
    """As after Ctrl-C, of which a rank in a long call into C takes no notice: nobody else has killed them."""
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    ours, theirs = os.pipe()
    with start_torchrun(script, 1, theirs) as torchrun:
        os.close(theirs)
        try:
            assert torchrun.stdout is not None
            assert torchrun.stdout.readline() == "ready\n"
            torchrun.terminate()
            with open(ours) as lines:
                (end,) = map(json.loads, lines)
        finally:
            torchrun.kill()

    assert (end["exitcode"], end.get("stopped")) == (-signal.SIGTERM, True)


@pytest.mark.process
def test_ranks_that_torchrun_ends_as_another_node_joins_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts them again with those of the other node; they have not failed, and nobody has killed them."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, sys\nif os.environ['WORLD_SIZE'] == '1':\n    print('ready', flush=True)\n    sys.stdin.readline()"
    )
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # torch 2.13: in a shared one the other finds nobody
    nodes = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    nodes += ["--rdzv-conf", "last_call_timeout=1"]
    held, release = os.pipe()
    ours, theirs = os.pipe()
    with start_torchrun(script, 1, theirs, held, nodes=nodes) as first, open(os.devnull, "w") as unread:
        os.close(theirs)
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        with start_torchrun(script, 1, unread.fileno(), held, nodes=nodes) as other, open(ours) as lines:
            ends = [(end["exitcode"], end.get("stopped", False)) for end in map(json.loads, lines)]

    os.close(release)
    os.close(held)
    assert (first.returncode, other.returncode) == (0, 0)
    assert ends == [(-signal.SIGTERM, True), (0, False)]


# Rank 1 fails when torchrun has seen, and collected, the end of rank 0.
LEAVES_FIRST = """
import os, pathlib, time
mark = pathlib.Path(__file__).with_name("pid")
if os.environ["RANK"] == "0":
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").rename(mark)
    os._exit(0)
while not mark.exists() or os.path.exists(f"/proc/{mark.read_text()}"):
    time.sleep(0.01)
os._exit(3)
"""


@pytest.mark.process
def test_the_end_of_a_rank_that_torchrun_thinks_well_of_is_reported(tmp_path: Path) -> None:
    """Its exit code 0 tells that no signal has ended it, where another rank fails because it is gone."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES_FIRST)
    ours, theirs = os.pipe()
    with start_torchrun(script, 2, theirs) as torchrun:
        os.close(theirs)
        torchrun.communicate()

    with open(ours) as lines:
        ends = {end["rank"]: end["exitcode"] for end in map(json.loads, lines)}

    assert ends == {0: 0, 1: 3}


@pytest.mark.process
def test_ranks_that_end_well_are_reported_when_they_end(tmp_path: Path) -> None:
    """One that leaves by os._exit(0) says no bye: it would count as lost, while the others still run and at the end."""
    script = tmp_path / "leaves.py"
    script.write_text("import os, sys; os.environ['RANK'] == '0' and os._exit(0); sys.stdin.readline()")
    ours, theirs = os.pipe()
    held, release = os.pipe()
    with start_torchrun(script, 2, theirs, stdin=held) as torchrun:
        os.close(theirs)
        with open(ours) as lines:
            first = json.loads(lines.readline())
            os.close(release)
            rest = [*map(json.loads, lines)]

    os.close(held)
    assert (first["rank"], first["exitcode"]) == (0, 0)
    assert [(end["rank"], end["exitcode"]) for end in rest] == [(1, 0)]
    assert torchrun.returncode == 0


@pytest.mark.process
@pytest.mark.parametrize("option", ["--tee=9", "--local-ranks-filter=a", "--rdzv-backend=none"])
def test_a_value_that_torchrun_refuses_is_a_usage_error(option: str, tmp_path: Path) -> None:
    """It was a traceback of torch with the status of a script that has failed."""
    command = [sys.executable, "-m", "traceml.supervise.elastic", option, str(tmp_path / "script.py")]
    done = forked.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "torchrun: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
