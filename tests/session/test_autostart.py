"""`TRACEML=1`: tracing by torch's entry point, without a line of code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.forked import client as forked
from tests.recorder.conftest import environ

ROOT = Path(__file__).parents[2]
LOOP = """
import sys
import time
import torch
from torch.utils.data import DataLoader, TensorDataset

def train(context=None):
    torch.set_num_threads(1)
    model = torch.nn.Linear(8, 1)
    if torch.distributed.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(torch.ones(60, 8)), 2, num_workers=1 if context else 0,
                        multiprocessing_context=context)
    for x, in loader:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    # A busy machine starts an aggregator in more than the 5 s that the end of so short a training waits for it.
    until = time.monotonic() + 120
    current = sys.modules.get("traceml.recorder.current_recorder")
    recorder = current and current.current_recorder()
    while recorder and recorder.enabled and recorder.run_dir is None and time.monotonic() < until:
        time.sleep(0.01)

    # And writes the report of it in more than the 10 s for which its verdict is waited for.
    if (notices := sys.modules.get("traceml.recorder.run_notices")) is not None:
        notices._REPORT_WAIT_S = 120.0

def work(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    train()
    torch.distributed.destroy_process_group()
"""
SCRIPT = LOOP + "train()\nprint('trained')"
LINE = re.compile(r"^traceml: tracing this run; results in traceml_runs/\S+; live: `traceml top`$", re.MULTILINE)
CARD = re.compile(r"^─ traceml ─ \w+ ", re.MULTILINE)

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """Run Python with `TRACEML=1`, and with the entry points of `pyproject.toml`, installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "site" / f"traceml_torch-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["torch.backends"]
    lines = [f"{name} = {point}" for name, point in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[torch.backends]", *lines, ""]))
    path = f"{metadata.parent}:{ROOT / 'src'}"

    def run(code: str, *words: str, by: tuple[str, ...] = (), **values: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "train.py"
        script.write_text(textwrap.dedent(code))
        own = {"TRACEML": "1", "TRACEML_QUIET": "", "PYTHONPATH": path, "COLUMNS": "80"}
        return forked.run(
            [sys.executable, *by, str(script), *words], forks=True,
            cwd=tmp_path, env=environ(tmp_path, **own | values), capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip

    return run


def runs(tmp_path: Path) -> list[Path]:
    """The folders of the runs."""
    return [each for each in (tmp_path / "traceml_runs").glob("2*") if each.is_dir()]


def report(tmp_path: Path) -> dict[str, Any]:
    """The report of the only run."""
    [run_dir] = runs(tmp_path)
    path = run_dir / "report.json"  # its aggregator may need longer than the script waits for it
    eventually(path.exists, "the report")
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def steps(tmp_path: Path) -> list[tuple[int, int]]:
    """Rank and number of steps of each rank of the only run."""
    return [(rank["rank"], rank["steps"]) for rank in report(tmp_path)["ranks"]]


def test_what_came_before_the_training_is_startup(python: Python, tmp_path: Path) -> None:
    """The run began with the script, however late its aggregator was started."""
    python(f"import time\ntime.sleep(1)\n{LOOP}\ntime.sleep(1)\ntrain()")

    section = report(tmp_path)["time"]
    parts = {part["part"]: part["seconds"] for part in section["parts"]}
    assert parts["startup"] >= 2
    assert sum(parts.values()) == pytest.approx(section["wall_s"], rel=0.01)


def test_a_script_is_traced(python: Python, tmp_path: Path) -> None:
    """One line says where the run goes, the card follows at the end; the script's own output is untouched."""
    ended = python(SCRIPT)

    assert (ended.returncode, ended.stdout) == (0, "trained\n"), ended.stderr
    assert LINE.match(ended.stderr)
    assert len(CARD.findall(ended.stderr)) == 1
    assert steps(tmp_path) == [(0, 30)]


@pytest.mark.parametrize(
    ("local_rank", "on_host", "is_named"), [("0", "1", True), ("1", "2", False), ("0", "2", False)]
)
def test_another_host_names_the_run_of_its_ranks(python: Python, local_rank: str, on_host: str, is_named: bool) -> None:
    """It has an aggregator, and with that a run, of its own; the ranks beside rank 0 are in that one's."""
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": on_host}
    ended = python(SCRIPT, **ranks, MASTER_ADDR="10.0.0.1", MASTER_PORT="1")

    assert ended.returncode == 0, ended.stderr
    line = "traceml: tracing the ranks of this host in this run; results in traceml_runs/"
    assert ended.stderr.startswith(line) == is_named
    assert ("traceml: tracing" in ended.stderr) == is_named
    assert not CARD.search(ended.stderr)


@pytest.mark.parametrize(("encoding", "first"), [("utf-8", "─"), ("latin-1", "-")])
def test_the_card_has_the_encoding_of_standard_error(python: Python, encoding: str, first: str) -> None:
    """Not that of the locale, which a script sets with others, as for the decimal point."""
    ended = python(f"import locale\nlocale.setlocale(locale.LC_ALL, 'C')\n{SCRIPT}", PYTHONIOENCODING=encoding)

    assert ended.returncode == 0, ended.stderr
    assert f"\n{first} traceml {first} " in ended.stderr
    assert "\\x" not in ended.stderr


def test_the_card_goes_to_what_replaces_standard_error(python: Python, tmp_path: Path) -> None:
    """A script's class that writes to a file too has no method but those which `print` calls."""
    tee = """
        import sys

        class Tee:
            def write(self, text):
                open("copy.txt", "a").write(text)

            def flush(self):
                pass

        sys.stderr = Tee()
    """
    ended = python(f"{textwrap.dedent(tee)}\n{SCRIPT}")

    assert (ended.returncode, ended.stderr) == (0, "")
    copied = (tmp_path / "copy.txt").read_text()
    assert LINE.match(copied)
    assert len(CARD.findall(copied)) == 1, copied


def test_each_run_of_a_process_has_its_card(python: Python, tmp_path: Path) -> None:
    """At the end, in their order: the script's own output stays together."""
    fold = f"traceml.init(local=True, run_name=name)\n{LOOP}\ntrain()\ntraceml.shutdown()\nprint(name)"
    indented = "\n".join(f"    {line}" for line in fold.splitlines())
    ended = python(f"import traceml\nfor name in ('first', 'second'):\n{indented}", TRACEML="")

    assert (ended.returncode, ended.stdout) == (0, "first\nsecond\n"), ended.stderr
    assert len(CARD.findall(ended.stderr)) == 2
    commands = re.findall(r"Command traceml report \S+-(\w+)-\w{4}$", ended.stderr, re.MULTILINE)
    assert commands == ["first", "second"]


def test_a_run_whose_folder_was_removed_is_told_of(python: Python, tmp_path: Path) -> None:
    """In place of the card, as the script's user looks for one."""
    announced = "from traceml.recorder import run_notices\nwhile not run_notices._here: time.sleep(0.01)\n"
    ended = python(f"{SCRIPT}\n{announced}import shutil\nshutil.rmtree('traceml_runs')")

    assert (ended.returncode, ended.stdout) == (0, "trained\n"), ended.stderr
    assert "traceml: no report of this run: its folder" in ended.stderr
    assert "was moved or removed while it ran" in ended.stderr


def test_quiet_prints_nothing(python: Python, tmp_path: Path) -> None:
    """The run is stored all the same."""
    ended = python(SCRIPT, TRACEML_QUIET="1")

    assert (ended.stdout, ended.stderr) == ("trained\n", "")
    assert len(runs(tmp_path)) == 1


def test_a_process_that_does_not_train_leaves_nothing(python: Python, tmp_path: Path) -> None:
    """Importing torch, and computing with it, makes no run, starts no aggregator and prints nothing."""
    ended = python("import torch\nprint(torch.ones(2).sum().item())")

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "2.0\n", "")
    assert not (tmp_path / "traceml_runs").exists()


@pytest.mark.parametrize("switch", [{"TRACEML": ""}, {"TRACEML": "0"}, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}])
def test_switched_off_nothing_is_imported(python: Python, switch: dict[str, str]) -> None:
    """Without the variable, `import torch` imports one module of ours, which has no imports of its own."""
    code = "import sys, torch\nprint(sorted(name for name in sys.modules if name.startswith('traceml')))"

    imported = {"['traceml_torch']", "[]"} if switch.get("TRACEML") != "0" else None
    ended = python(code, **switch)

    assert ended.returncode == 0, ended.stderr
    if imported is not None:
        assert ended.stdout.strip() in imported
    else:
        assert "recorder" not in ended.stdout


def test_ranks_of_torchrun_and_not_torchrun(python: Python, tmp_path: Path) -> None:
    """Both ranks are one run; torchrun itself and spawned loader workers are no ranks; a restart is an attempt."""
    code = LOOP + (
        "import os\n"
        "if __name__ == '__main__':\n"
        "    is_first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "    train('spawn' if is_first else None)\n"
        "    if is_first: sys.exit(3)\n"
    )  # no process group: with torch 2.13 alone, gloo reads the addresses of before the restart, 6 times of 10
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    ended = python(code, by=torchrun)

    assert ended.returncode == 0, ended.stderr
    read = report(tmp_path)
    assert read["run"]["attempt"] == 1
    assert sorted(rank["rank"] for rank in read["ranks"]) == [0, 1]


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_ranks_that_the_script_starts(python: Python, tmp_path: Path, method: str) -> None:
    """Children that train are the ranks; the script's own process, which does not, leaves no run."""
    start = f"torch.multiprocessing.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method={method!r})"
    ended = python(f"{LOOP}\nif __name__ == '__main__':\n    {start}", str(tmp_path / "store"))

    assert ended.returncode == 0, ended.stderr
    assert steps(tmp_path) == [(0, 30), (1, 30)]
    assert len(LINE.findall(ended.stderr)) == len(CARD.findall(ended.stderr)) == 1


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_ranks_that_a_script_with_init_starts(python: Python, tmp_path: Path, method: str) -> None:
    """They are the ranks of its run: it has no second one, without a step, whose card would be the last."""
    start = f"torch.multiprocessing.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method={method!r})"
    begun = f"{LOOP}\nif __name__ == '__main__':\n    import traceml\n    traceml.init(local=True)\n    {start}"
    ended = python(begun, str(tmp_path / "store"), TRACEML="")

    assert ended.returncode == 0, ended.stderr
    assert steps(tmp_path) == [(0, 30), (1, 30)]
    assert len(LINE.findall(ended.stderr)) == len(CARD.findall(ended.stderr)) == 1


def test_a_worker_of_a_pool_that_is_ended_at_once(python: Python, tmp_path: Path) -> None:
    """It gives its result when the aggregator that it starts can read its steps: the pool ends it then."""
    code = """
        import torch

        def work(size):
            optimizer = torch.optim.SGD([parameter := torch.nn.Parameter(torch.ones(size))], lr=0.01)
            for _ in range(30):
                parameter.sum().backward()
                optimizer.step()

        if __name__ == "__main__":
            with torch.multiprocessing.get_context("fork").Pool(1) as pool:
                pool.apply(work, (8,))
    """
    ended = python(code)

    assert ended.returncode == 0, ended.stderr
    [(rank, count)] = steps(tmp_path)
    assert (rank, count >= 29) == (0, True)  # the last step is not over when the task is


def test_init_adds_its_settings(python: Python, tmp_path: Path) -> None:
    """An explicit `init` before the training names the run; there is one run, and one card."""
    ended = python(SCRIPT.replace("train()\n", "import traceml; traceml.init(run_name='baseline'); train()\n"))

    assert ended.returncode == 0, ended.stderr
    assert report(tmp_path)["run"]["name"] == "baseline"
    assert steps(tmp_path) == [(0, 30)]
    assert len(CARD.findall(ended.stderr)) == 1


def test_a_training_after_shutdown_runs_untraced(python: Python, tmp_path: Path) -> None:
    """The hook of `init` around what waits for the first optimizer is undone, and leaves that in place."""
    again = "import traceml; traceml.init(); train(); traceml.shutdown(); train()\n"
    ended = python(SCRIPT.replace("train()\n", again))

    assert (ended.returncode, ended.stdout) == (0, "trained\n"), ended.stderr
    assert steps(tmp_path) == [(0, 30)]


def test_a_late_init_is_reported(python: Python, tmp_path: Path) -> None:
    """After the first optimizer the run has its name; `init` says which settings it ignores."""
    ended = python(f"{LOOP}\ntrain()\nimport traceml\ntraceml.init(run_name='late', local=True)")

    assert "init(run_name) was called too late" in ended.stderr
    assert "or end this run by traceml.shutdown() first." in ended.stderr
    assert "TRACEML_RUN_NAME" in ended.stderr
    assert report(tmp_path)["run"]["name"] == "train"


def test_under_traceml_run_it_is_one_run(python: Python, tmp_path: Path) -> None:
    """`traceml run` traces already, and its children are no second run."""
    code = f"{SCRIPT}\nimport subprocess\nsubprocess.run([sys.executable, '-c', 'import torch'], check=True)"
    ended = python(code, by=("-m", "traceml", "run", "--live", "none"))

    assert ended.returncode == 0, ended.stderr
    assert steps(tmp_path) == [(0, 30)]
    assert len(CARD.findall(ended.stderr)) == 1


def test_a_script_that_starts_its_training(python: Python, tmp_path: Path) -> None:
    """Under `traceml run` it is traced also where the script becomes another program, which starts it by a shell."""
    (tmp_path / "child.py").write_text(SCRIPT)
    code = """
        import os, subprocess, sys
        if len(sys.argv) < 2:
            os.execv(sys.executable, [sys.executable, __file__, "again"])
        subprocess.run(["sh", "-c", f"{sys.executable} child.py; true"], check=True)
    """
    ended = python(code, by=("-m", "traceml", "run", "--live", "none"), TRACEML="")

    assert (ended.returncode, ended.stdout) == (0, "trained\n"), ended.stderr
    assert steps(tmp_path) == [(0, 30)]
    assert report(tmp_path)["run"]["state"] == "finished"


def test_a_wrong_setting_does_not_stop_the_script(python: Python, tmp_path: Path) -> None:
    """The script runs untraced, and a warning names the setting."""
    ended = python(SCRIPT, TRACEML_PORT="many")

    assert (ended.returncode, ended.stdout) == (0, "trained\n")
    assert "this process is not traced: " in ended.stderr
    assert "TRACEML_PORT" in ended.stderr
    assert runs(tmp_path) == []


def test_a_file_of_our_name_does_not_stop_torch(python: Python, tmp_path: Path) -> None:
    """Where Python finds another `traceml`, torch is imported, and a line says what to do."""
    (tmp_path / "traceml.py").write_text("raise ValueError('not yours')")
    ended = python(SCRIPT)

    assert (ended.returncode, ended.stdout) == (0, "trained\n")
    assert f"another `traceml` in {tmp_path / 'traceml.py'} (not yours)" in ended.stderr
    assert "pip uninstall traceml traceml-ai" in ended.stderr


STOP = """
import os, signal, subprocess
from traceml.recorder import run_notices
words = ["pgrep", "-f", f"serve --fd .*--runs-dir {os.getcwd()}/"]
aggregator = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
os.kill(aggregator, signal.SIGSTOP)
"""


def test_an_aggregator_that_is_slow_at_the_end(python: Python, tmp_path: Path) -> None:
    """The process waits for its report a little longer than it tries to send the rest."""
    ended = python(f"{SCRIPT}{STOP}\nsubprocess.Popen(['sh', '-c', f'sleep 6; kill -CONT {{aggregator}}'])")

    assert (ended.returncode, ended.stdout) == (0, "trained\n"), ended.stderr
    assert len(CARD.findall(ended.stderr)) == 1, ended.stderr
    assert steps(tmp_path) == [(0, 30)]


def test_an_aggregator_that_is_too_slow_at_the_end(python: Python, tmp_path: Path) -> None:
    """One line says how the verdict is shown later, in place of one of half a run."""
    ended = python(f"{SCRIPT}{STOP}\nrun_notices._REPORT_WAIT_S = 0.5\nprint(aggregator)")
    trained, aggregator = ended.stdout.splitlines()
    os.kill(int(aggregator), signal.SIGCONT)

    assert (ended.returncode, trained) == (0, "trained"), ended.stderr
    command = r"`traceml report traceml_runs/\S+`"
    assert re.search(rf"^traceml: the run is not stored completely yet; {command} shows", ended.stderr, re.MULTILINE)
    assert not CARD.search(ended.stderr)
    assert steps(tmp_path) == [(0, 30)]


def test_a_script_that_fails(python: Python, tmp_path: Path) -> None:
    """Its traceback, its status and the card."""
    ended = python(f"{LOOP}\ntrain()\nraise ValueError('a bug')")

    assert ended.returncode == 1
    assert re.search(r"^ValueError: a bug$(.|\n)+^─ traceml ─ RANK_LOST", ended.stderr, re.MULTILINE), ended.stderr
    assert report(tmp_path)["run"]["state"] == "failed"
