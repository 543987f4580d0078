"""The entry point of traced scripts against `python`: the same output, errors, status and signals."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.aggregator.conftest import TOKEN, Serving
from tests.eventually import eventually
from tests.ports import free_port
from tests.recorder.conftest import ENTRY, Run, environ, exit_rows, stored_steps

PROBE = '''
"""Its docstring."""
import inspect, multiprocessing, os, pickle, signal, sys

number: int = 3

class Thing:
    pass

def double(x):
    return 2 * x

if __name__ == "__main__":
    names = sorted(name for name in globals() if name.startswith("__"))
    print(sys.argv, sys.path[0], __file__, __doc__, __package__, __spec__ and __spec__.name, names)
    print(inspect.get_annotations(sys.modules["__main__"]))
    print(type(pickle.loads(pickle.dumps(Thing()))) is Thing, sys.modules["__main__"].double is double)
    print(inspect.getsource(double), inspect.getfile(Thing), sys.flags.safe_path)
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "raise":
        try:
            raise ValueError("first")
        except ValueError as error:
            raise RuntimeError("second") from error
    if what == "exit":
        sys.exit(7)
    if what == "words":
        sys.exit("some words")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "at once":
        os._exit(9)
    if what == "hook":
        sys.excepthook = lambda kind, error, trace: print("a hook of its own", kind.__name__)
        1 / 0
    if what == "broken hook":
        sys.excepthook = lambda kind, error, trace: 1 / 0
        raise ValueError
    if what == "spawn":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(double, (21,)))
    if what == "leave":
        import atexit, threading, time
        atexit.register(print, "at exit")
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread done"))).start()
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts, a package, a folder and an archive that can be run."""
    made = tmp_path_factory.mktemp("programs")
    (made / "probe.py").write_text(PROBE)
    (made / "syntax.py").write_text("def broken(:\n")
    (made / "package").mkdir()
    (made / "package" / "__init__.py").write_text("")
    (made / "package" / "module.py").write_text(PROBE)
    (made / "package" / "__main__.py").write_text(PROBE)
    (made / "bare").mkdir()
    (made / "bare" / "__init__.py").write_text("")
    (made / "nothing").mkdir()
    (made / "link.py").symlink_to("package/module.py")
    with zipfile.ZipFile(made / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", "import sys; print(sys.argv, sys.path[0], __file__)")

    return made


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    """Run without an aggregator anywhere."""
    port = str(free_port())

    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environ(folder, TRACEML_PORT=port),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    # `python -m` shows the frames of runpy; ours are not shown at all.
    frames = re.compile(r'  File "<frozen runpy>".*\n')
    return done.returncode, done.stdout, frames.sub("", done.stderr)


@pytest.mark.parametrize(
    "words",
    [
        "probe.py --flag word",
        "./probe.py",
        "link.py",
        "probe.py raise",
        "probe.py exit",
        "probe.py words",
        "probe.py interrupt",
        "probe.py term",
        "probe.py at once",
        "probe.py hook",
        "probe.py broken hook",
        "probe.py spawn",
        "probe.py leave",
        "missing.py",
        "syntax.py",
        "package",
        "nothing",
        "archive.zip word",
        "-m package.module --flag",
        "-m package.module raise",
        "-m package.module spawn",
        "-m package",
        "-m bare",
        "-m missing",
        "-m package.missing",
        "-m sys",
    ],
)
def test_a_script_lives_as_under_python(folder: Path, words: str) -> None:
    """Arguments, module, path, output, tracebacks, status and signal are the same."""
    program, _, rest = words.removeprefix("-m ").partition(" ")
    arguments = [rest] if rest in ("at once", "broken hook") else rest.split()
    command = [*(["-m"] if words.startswith("-m ") else []), program, *arguments]

    plain, traced = run(folder, *command), run(folder, ENTRY, *command)

    assert traced == plain


def test_modules_of_the_user_are_not_taken_for_the_standard_library(tmp_path: Path) -> None:
    """The working directory has modules of such names: our start imports none of them."""
    for name in ("types", "contextlib", "runpy", "signal", "queue"):
        (tmp_path / f"{name}.py").write_text(f"print('the {name} of the user')\n")
    (tmp_path / "script.py").write_text("import sys\nprint(sys.argv, sys.path[0])\n")

    plain, traced = run(tmp_path, "script.py"), run(tmp_path, ENTRY, "script.py")

    assert traced == plain
    assert traced[0] == 0


def test_the_script_is_traced(serving: Serving, run_script: Run) -> None:
    """A script that knows nothing of traceml gets its steps stored; init inside returns the recorder that runs."""
    done = run_script(
        """
        import torch, traceml
        recorder = traceml.init(port=1)
        assert recorder.enabled and traceml.is_enabled()
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        """,
        entry=True,
    )

    assert done.returncode == 0, done.stderr
    eventually(lambda: stored_steps(serving) == list(range(20)))


def test_its_exception_is_recorded_with_its_phase(serving: Serving, run_script: Run) -> None:
    """An error inside the model's call names forward, the line that made the call, and the step."""
    done = run_script(
        """
        import torch
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            loss = model(torch.ones(2, 4 if step < 4 else 3)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        """,
        entry=True,
    )

    (row,) = eventually(lambda: exit_rows(serving))
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
    assert "traceml/recorder" not in done.stderr
    assert (row["exception"], row["code"], row["open_phase"], row["line"]) == ("RuntimeError", 1, "forward", 6)


@pytest.mark.parametrize(
    ("call", "phase"),
    [
        ("torch.save(lambda: 0, 'a.pt')", "checkpoint"),
        ("model.eval(); model(torch.ones(2, 4)); torch.save({}, 'missing/a.pt')", "checkpoint"),
        ("torch.load('missing.pt')", None),
    ],
)
def test_an_exception_of_a_save_is_recorded_with_its_phase(
    serving: Serving, run_script: Run, call: str, phase: str | None
) -> None:
    """What cannot be pickled, and a folder that is missing, also after an evaluation; a failed load is no save."""
    run_script(
        f"""
        import torch
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        {call}
        """,
        entry=True,
    )

    (row,) = eventually(lambda: exit_rows(serving))
    assert (row["code"], row["line"], row.get("open_phase")) == (1, 9, phase)


def test_bad_settings_do_not_keep_it_from_running(run_script: Run) -> None:
    """The script runs untraced, and the user reads why."""
    done = run_script("print('ran')", entry=True, TRACEML_PROT="1")

    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "Did you mean" in done.stderr


def test_disabled_it_does_nothing(serving: Serving, run_script: Run) -> None:
    """TRACEML_ENABLED=0: no thread, no connection, no run."""
    done = run_script(
        "import threading, traceml\nassert threading.active_count() == 1\nassert not traceml.is_enabled()",
        entry=True,
        TRACEML_ENABLED="0",
    )

    assert done.returncode == 0, done.stderr
    assert serving.run_dirs == []


def test_disabled_it_is_torchrun(run_script: Run, tmp_path: Path) -> None:
    """torchrun's options start as many ranks as with tracing."""
    script = tmp_path / "ranks.py"
    # One write: both ranks write into one pipe, and torchrun has Python pass on each part of a `print`.
    line = "' '.join([os.environ['RANK'], os.environ['WORLD_SIZE'], f'{sys.argv[1:]}\\n'])"
    script.write_text(f"import os, sys\nsys.stdout.write({line})")
    words = [sys.executable, "-m", "traceml", "run", "--nproc-per-node", "2", str(script), "--log", "x"]
    done = subprocess.run(
        words, cwd=tmp_path, env=environ(tmp_path, TRACEML_ENABLED="0"), capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 2 ['--log', 'x']", "1 2 ['--log', 'x']"]
    assert not (tmp_path / "traceml_runs").exists()


def test_ctrl_c_is_the_scripts(serving: Serving, tmp_path: Path) -> None:
    """A signal while it runs: its finally block runs, the process dies of the signal, the rows are stored."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time, traceml\n"
        f"log = open({str(tmp_path / 'log')!r}, 'w')\n"
        "log.write('unflushed')\n"
        "for _ in range(3):\n"
        "    with traceml.trace_step():\n"
        "        pass\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    while True:  # a signal just before a long sleep would be handled after it\n"
        "        time.sleep(0.05)\n"
        "finally:\n"
        "    print('cleaned up', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, ENTRY, str(script)],
        env=environ(
            tmp_path, TRACEML_PORT=str(serving.port), TRACEML_TOKEN=TOKEN, TRACEML_RUNS_DIR=str(serving.folder)
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)

    assert process.returncode == -signal.SIGINT
    assert out == "cleaned up\n"
    assert err.endswith("KeyboardInterrupt\n")
    assert (tmp_path / "log").read_text() == "unflushed"
    eventually(lambda: stored_steps(serving) == [0, 1, 2])
    assert eventually(lambda: exit_rows(serving))[0]["exception"] == "KeyboardInterrupt"
