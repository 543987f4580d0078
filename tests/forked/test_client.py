"""A forked process cannot be told from a new one, except by the time that torch takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import traceml
from tests.forked import client

FACTS = """
import atexit, json, multiprocessing.process, os, sys, threading, warnings
from pathlib import Path
atexit.register(print, "at exit")
print(json.dumps({
    "argv": sys.argv, "words": sys.orig_argv[1:], "path": sys.path, "executable": sys.executable,
    "main": [__name__, globals().get("__file__"), __spec__ is None, sys.modules["__main__"].__dict__ is globals()],
    "environ": dict(os.environ), "folder": [os.getcwd(), multiprocessing.process.ORIGINAL_DIR],
    "fds": sorted(os.listdir("/proc/self/fd")), "flags": str(sys.flags), "options": sys.warnoptions,
    "streams": [repr(each) for each in (sys.stdin, sys.stdout, sys.stderr, sys.__stdout__)],
    "buffering": [sys.stdout.line_buffering, sys.stdout.write_through, sys.stderr.line_buffering],
    "shown": [Path("/proc/self/cmdline").read_text(), sorted(Path("/proc/self/environ").read_text().split("\\0"))],
    "session": os.getsid(0) == os.getpid(), "main thread": threading.main_thread().native_id == os.getpid(),
    "loaded": [name for name in ("torch", "numpy", "pydantic", "traceml", "tests", "program") if name in sys.modules],
    "default": str(warnings.filters[0]), "input": sys.stdin.read(), "signals": str(__import__("signal").getsignal(2)),
}))
"""
ENDS = {
    "an exception": "def inner():\n    1 / 0\ninner()",
    "a syntax error": "x = = 1",
    "a status": "import sys; sys.exit(3)",
    "words": "raise SystemExit('words')",
    "Ctrl-C": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "a signal": "import os; os.abort()",
    "at once": "import os; print('lost'); os._exit(4)",
    "its threads": "import threading, time; threading.Timer(0.05, print, ['last']).start()",
}


@pytest.fixture
def environ() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "NEW": "ü"}


def both(words: list[str], **options: Any) -> list[tuple[int, str, str]]:
    """What a forked process and a new one have left, in this order."""
    done = [run([sys.executable, *words], text=True, **options) for run in (forked, subprocess.run)]
    return [(each.returncode, each.stdout, each.stderr) for each in done]


def forked(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a process that must be forked."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    given, _ = options.pop("input", None), options.pop("capture_output")
    with client.Popen(words, **(pipes | options)) as process:
        assert process.forked
        out, err = process.communicate(given, timeout=240)

    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["-W", "error", "script.py", "a", "-b"], ["-m", "script", "c"], ["-c", FACTS, "d"]])
def test_it_finds_what_a_new_one_finds(
    words: list[str], unbuffered: str, environ: dict[str, str], tmp_path: Path
) -> None:
    """Arguments, paths, streams, options, open files and loaded modules."""
    (tmp_path / "script.py").write_text(FACTS)
    environ |= {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": "relative:/absolute"}
    more = {"start_new_session": bool(unbuffered), "input": "words\n", "capture_output": True}

    done = both(words, cwd=tmp_path, env=environ, **more)

    assert [(status, err) for status, _, err in done] == [(0, "")] * 2
    one, other = (out.splitlines() for _, out, _ in done)
    assert json.loads(one[0]) == json.loads(other[0])
    assert one[1:] == other[1:] == ["at exit"]


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_it_ends_as_a_new_one_does(code: str, environ: dict[str, str], tmp_path: Path) -> None:
    """Status, output and traceback, also of a script that has imported torch."""
    (tmp_path / "script.py").write_text(code)

    one, other = both(["script.py"], cwd=tmp_path, env=environ, capture_output=True)

    assert one == other


def test_open_files_are_written_at_its_end(environ: dict[str, str], tmp_path: Path) -> None:
    """The interpreter's clean-up would do so; a forked process has none."""
    code = "import torch; text = open('text', 'w'); text.write('kept'); data = open('data', 'wb'); data.write(b'kept')"
    forked([sys.executable, "-c", code], env=environ, cwd=tmp_path, text=True, capture_output=True)

    assert [(tmp_path / name).read_text() for name in ("text", "data")] == ["kept", "kept"]


def test_torch_appears_when_it_is_imported(environ: dict[str, str], tmp_path: Path) -> None:
    """Import hooks see it; it works; what it imports lazily is there as late as ever."""
    code = """
import sys
seen = []
class Hook:
    def find_spec(self, name, path=None, target=None):
        seen.append(name)
sys.meta_path.insert(0, Hook())
assert "torch" not in sys.modules
import torch
assert "torch" in seen and "torch.nn" in seen and "numpy" in seen, seen
assert torch.__spec__.origin == torch.__file__
assert "torch._dynamo" not in sys.modules and "_dynamo" not in vars(torch) and "adam" not in vars(torch.optim)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
assert "torch._dynamo" in sys.modules and torch._dynamo is sys.modules["torch._dynamo"]
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
print(torch.rand(2).tolist(), torch.get_num_threads())
import random, numpy
print(random.random(), numpy.random.rand(), file=sys.stderr)
"""
    runs = [forked([sys.executable, "-c", code], env=environ, text=True, capture_output=True) for _ in range(2)]

    assert [each.returncode for each in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout  # torch's own seed is a constant
    one, other = (each.stderr.split() for each in runs)
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_it_leads_its_session_at_once(environ: dict[str, str]) -> None:
    """Whoever signals its group as soon as it is started reaches no other process."""
    for _ in range(20):
        process = client.Popen(
            [sys.executable, "-c", "input()"], env=environ, start_new_session=True, stdin=subprocess.PIPE, text=True
        )
        with process:
            group = os.getpgid(process.pid)
            process.communicate("\n")

        assert (group, process.returncode) == (process.pid, 0)


def test_it_is_signaled_and_waited_for(environ: dict[str, str]) -> None:
    """As long as it runs it has no status; a signal ends it, and time may run out."""
    with client.Popen(
        [sys.executable, "-c", "print('ready', flush=True)\nwhile True: pass"], env=environ, stdout=subprocess.PIPE
    ) as process:
        assert process.forked
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)

        process.terminate()
        assert process.wait(240) == -signal.SIGTERM
        assert process.poll() == -signal.SIGTERM


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (["-X", "utf8", "-c", "print(1)"], {}),
        (["-c", "print(1)"], {"PYTHONHASHSEED": "0"}),
        (["-c", "print(1)"], {"OMP_NUM_THREADS": "2"}),
    ],
)
def test_a_new_interpreter_is_started_where_it_is_asked_for(
    words: list[str], more: dict[str, str], environ: dict[str, str]
) -> None:
    """Options and variables that are read at the start only."""
    with client.Popen([sys.executable, *words], env=environ | more, stdout=subprocess.PIPE, text=True) as process:
        assert not process.forked
        assert process.communicate() == ("1\n", None)


def test_threads_are_those_of_the_environment_where_nothing_computes(environ: dict[str, str]) -> None:
    """Libraries of trackers and of the aggregator start none: such a process is forked whatever the variable is."""
    for threads in ({"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "1"}):
        code = "import os; print(os.environ['OMP_NUM_THREADS'], len(os.listdir('/proc/self/task')))"
        with client.Popen(
            [sys.executable, "-c", code], env=environ | threads, stdout=subprocess.PIPE, text=True, imports="aggregator"
        ) as process:
            assert process.forked
            assert process.communicate() == (f"{threads['OMP_NUM_THREADS']} 1\n", None)


STARTS = """
import os, subprocess, sys
import traceml
words = [os.path.join(os.path.dirname(traceml.__file__), "session", "entry.py"), "script.py"]
def die_with_us(death_signal):
    return lambda: death_signal
child = subprocess.Popen([sys.executable, "-u", *words], stdout=subprocess.PIPE, preexec_fn=die_with_us(15), text=True)
other = subprocess.run([sys.executable, "-c", "import os; print(os.getppid())"], capture_output=True, text=True)
print(child.pid, os.getpid(), int(other.stdout) == os.getpid(), child.stdout.readline(), end="", flush=True)
sys.stdin.read() and print(child.wait())
"""
WAITS = """
import os, signal, sys
print("it has words to say", file=sys.stderr)
print(os.getpid(), os.getppid(), open("/proc/self/cmdline").read().replace("\\0", " "), flush=True)
signal.pause()
"""


@pytest.fixture
def starter(environ: dict[str, str], tmp_path: Path) -> Iterator[client.Popen]:
    """A program that starts one that imports torch; both are forked."""
    (tmp_path / "script.py").write_text(WAITS)
    environ = {name: value for name, value in environ.items() if not name.startswith("TRACEML_")}
    with client.Popen(
        [sys.executable, "-c", STARTS], cwd=tmp_path, env=environ | {"TRACEML_ENABLED": "0"}, text=True, forks=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        yield process


def test_its_own_children_are_forked_too(starter: client.Popen) -> None:
    """They are its children, are shown as what they are, and end by a signal as others do."""
    assert starter.stdout is not None
    child, parent, other_is_child, *reported = starter.stdout.readline().split()

    assert reported[:2] == [child, parent]
    assert reported[3:] == ["-u", str(Path(traceml.__file__).parent / "session" / "entry.py"), "script.py"]
    assert other_is_child == "True"
    assert parent == str(starter.pid)
    assert "libtorch" in Path(f"/proc/{child}/maps").read_text()
    os.kill(int(child), signal.SIGUSR1)
    out, err = starter.communicate("wait for it", timeout=240)
    assert (starter.returncode, out) == (0, f"{-signal.SIGUSR1}\n")
    assert err == "it has words to say\n"


def test_the_kernel_ends_its_children(starter: client.Popen) -> None:
    """When it is killed, they get the signal that they asked for; nothing else is left of it."""
    assert starter.stdout is not None
    child = int(starter.stdout.readline().split()[0])
    others = psutil.Process(starter.pid).children()
    starter.kill()

    starter.wait(240)
    assert starter.stdout.read() == ""  # all that held it are gone
    psutil.wait_procs(others, timeout=240)
    assert len(others) == 2
    assert not [each for each in others if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert child in [each.pid for each in others]


def test_clients_share_the_process_that_forks(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As workers of one run of the tests are; it stays as long as one of them."""

    def parent() -> str:
        code = "import os; print(os.getppid())"
        return client.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True).stdout

    first = parent()
    with monkeypatch.context() as patch:
        another = client.ForkServer("torch")
        patch.setattr(client, "_server", lambda kind: another)
        assert parent() == first
        another._close()

    assert parent() == first


SPAWNS = """
import multiprocessing, os, sys, tempfile
from pathlib import Path
from traceml.recorder.detached_process import DetachedProcess

def work(name):
    is_forked = "libtorch" in Path("/proc/self/maps").read_text() and "torch" not in sys.modules
    Path(name).write_text(f"{is_forked} {Path('/proc/self/cmdline').read_text().split(chr(0))[2]}")

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        child = multiprocessing.get_context(method).Process(target=work, args=(method,))
        child.start()
        child.join()

    code = "import os, script; script.work('detached'); print(os.getpid(), os.getppid())"
    with open("output", "wb") as output:
        detached = DetachedProcess([sys.executable, "-c", code], output=output, environ=os.environ, fds=())

    while not detached.has_ended():
        pass

    print(detached.pid, Path("output").read_text(), os.getpid())
"""


def test_what_multiprocessing_and_detached_processes_start_is_forked_too(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """A process in place of another one also: what `os.execv` starts."""
    (tmp_path / "script.py").write_text(SPAWNS)
    words = [sys.executable, "script.py"]
    done = client.run(words, forks=True, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=240)

    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "spawn").read_text().startswith("True from multiprocessing.spawn ")
    assert (tmp_path / "forkserver").read_text().startswith("True from multiprocessing.forkserver ")
    assert (tmp_path / "detached").read_text().startswith("True import os, script;")
    started, itself, parent, starter = done.stdout.split()
    assert started == itself
    assert parent != starter
