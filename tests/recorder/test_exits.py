"""Ends of processes: the recorded facts, and an end that is not changed."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch._utils import ExceptionWrapper

from tests.aggregator.conftest import Serving
from tests.eventually import eventually
from tests.installed_code import run_installed
from tests.recorder.conftest import Run, exit_rows, stored_steps
from traceml.database.store.reader import StreamRecord
from traceml.diagnosis.facts.ends import RankExit
from traceml.recorder.exits import (
    _MOST_FRAMES,
    _PLACE,
    ExitWatch,
    _frames,
    address_limit_bytes,
    cause_of,
    describe,
    status_of,
)

START = """
import sys, traceml
traceml.init()
for _ in range(5):
    with traceml.trace_step():
        pass
"""


def test_an_exception_is_recorded_and_shown(serving: Serving, run_script: Run) -> None:
    """Type, message, line, step and status are stored; the traceback and the status are the interpreter's."""
    done = run_script(START + "def lose():\n    raise ValueError('no ' + 'x' * 1000)\nlose()\n")

    (row,) = exit_rows(serving)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.count("Traceback") == 1
    assert (row["exception"], row["code"], row["function"]) == ("ValueError", 1, "lose")
    assert row["message"].startswith("no x")
    assert len(row["message"]) == 500
    assert row["file"].endswith("script.py")
    assert row["line"] == 8
    assert row["last_step"] == 4
    assert "lose()" in row["stack"]
    assert stored_steps(serving) == list(range(5))
    assert serving.run_dirs


def test_a_deep_recursion_is_read_in_part() -> None:
    """Its outermost frames may be the only ones of the user, its innermost tell where it failed."""

    def lower(depth: int) -> None:
        if not depth:
            raise ValueError("at the bottom")

        lower(depth - 1)

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        lower(10_000)
    except ValueError as error:
        frames, facts = _frames(error.__traceback__), describe(error)
    finally:
        sys.setrecursionlimit(limit)

    assert len(frames) == _MOST_FRAMES
    assert [frames[at].name for at in (0, 1, -1)] == ["test_a_deep_recursion_is_read_in_part", "lower", "lower"]
    assert frames[-1].lineno == facts["line"] == frames[-2].lineno - 2


TRAINS = """
import os, sys, threading, torch, traceml
traceml.init()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
"""
EVALUATES = f"""{TRAINS}
model.eval()
with torch.no_grad():
    model(torch.ones(2, 4))
"""


@pytest.mark.parametrize(("ending", "phase"), [("", None), ("sys.exit(3)", "evaluation")])
def test_a_script_that_ends_well_does_not_end_in_its_evaluation(
    serving: Serving, run_script: Run, ending: str, phase: str | None
) -> None:
    """Nothing else follows the last evaluation; the step before it is closed by the end of the training."""
    run_script(EVALUATES + ending)

    (row,) = exit_rows(serving)
    assert row.get("open_phase") == phase
    if not ending:
        assert row["last_step"] == 4
        assert stored_steps(serving) == list(range(5))


LOOPS = """
import torch, traceml
traceml.init()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def forward():
    return model(torch.ones(2, 4))
for _ in range(5):
    forward().sum().backward()
    optimizer.step()
"""


@pytest.mark.parametrize(
    ("ending", "step", "phase"),
    [
        ("raise ValueError", 4, None),
        ("torch.save(model.state_dict(), 'missing/model.pt')", 4, "checkpoint"),
        ("forward().sum().backward()\nraise ValueError", 5, None),
        ("model(torch.ones(2, 5))", 5, "forward"),
    ],
    ids=["after the loop", "saves after the loop", "before the optimizer", "in the next forward"],
)
def test_an_error_after_a_loop_without_a_loader_is_in_no_step(
    serving: Serving, run_script: Run, ending: str, step: int, phase: str | None
) -> None:
    """Once the optimizer has stepped, the last step is done; all five are stored."""
    run_script(LOOPS + ending)

    (row,) = exit_rows(serving)
    ended = RankExit.from_facts(0, "failed", row)
    assert (ended.step, ended.in_step, ended.open_phase) == (step, step == 5, phase)
    assert ended.open_step == step
    assert ended.open_s is not None  # that its end writes the row of this step is no progress of a job that hung
    assert stored_steps(serving) == list(range(5))


@pytest.mark.parametrize(
    ("ending", "status", "expected"),
    [
        ("", 0, 0),
        ("sys.exit(0)", 0, 0),
        ("sys.exit(3)", 3, 3),
        ("exit(3)", 3, 3),
        ("quit()", 0, 0),
        ("raise SystemExit(3)", 3, 3),
        ("raise SystemExit(0)", 0, 0),
        ("raise SystemExit", 0, 0),
        ("class Own(SystemExit): pass\nraise Own(3)", 3, 3),
        ("try:\n    raise SystemExit(3)\nexcept SystemExit as kept:\n    assert kept.code == 3", 0, 0),
        ("try:\n    exit(3)\nexcept SystemExit:\n    pass", 0, 0),
        ("try:\n    sys.exit(3)\nexcept SystemExit:\n    pass", 0, 0),
        ("try:\n    sys.exit(3)\nexcept SystemExit as kept:\n    error = kept", 0, 0),
        ("import threading\nt = threading.Thread(target=lambda: sys.exit(9))\nt.start()\nt.join()", 0, 0),
    ],
)
def test_a_status_is_recorded_when_it_ends_the_process(
    serving: Serving, run_script: Run, ending: str, status: int, expected: int
) -> None:
    """A SystemExit counts if it ended the program, not if it was caught or raised in a thread."""
    done = run_script(START + ending)

    assert done.returncode == status
    assert [row["code"] for row in exit_rows(serving)] == [expected]
    if not status:
        assert [RankExit.from_facts(0, "finished", row).steps for row in exit_rows(serving)] == [5]
    assert all("exception" not in row for row in exit_rows(serving))
    is_told = ending.startswith(("sys.exit", "exit", "quit"))
    if is_told or "raise" not in ending:  # Python 3.11 does not tell the line of that
        assert [row.get("line") for row in exit_rows(serving)] == [7 if is_told else None]


@pytest.mark.parametrize("entry", [True, False])
def test_the_text_of_an_exit_is_recorded(serving: Serving, run_script: Run, entry: bool) -> None:
    """It is the reason that the script gives: with its line, and without secrets; the interpreter prints it too."""
    key = "sk-" + "proj-aB3dE5fG7hI9jK1lM3nO5"
    done = run_script(START + f"def leave():\n    sys.exit('no data for {key}')\nleave()\n", entry=entry)

    (row,) = exit_rows(serving)
    assert done.returncode == 1
    assert done.stderr.endswith(f"no data for {key}\n")
    assert (row["exception"], row["code"], row["function"], row["line"]) == ("SystemExit", 1, "leave", 8)
    assert row["message"].startswith("no data for ")
    assert key not in row["message"]


def test_the_text_behind_an_exception_is_added(serving: Serving, run_script: Run) -> None:
    """The exception stays the cause, with its line."""
    ending = "try:\n    open('/missing/a.yaml')\nexcept OSError:\n    sys.exit('run set-up first')\n"
    run_script(START + ending)

    (row,) = exit_rows(serving)
    assert (row["exception"], row["code"], row["line"]) == ("FileNotFoundError", 1, 8)
    assert row["message"].endswith("'/missing/a.yaml' (sys.exit: run set-up first)")


@pytest.mark.parametrize("before", [KeyboardInterrupt(), OSError(28, "No space left on device"), None])
def test_the_complaint_of_torchs_writer_is_what_broke_the_file(before: BaseException | None) -> None:
    """Ctrl-C in the middle of `torch.save` is no full disk; a RuntimeError of others is its own cause."""
    complaint = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 800 vs 0")
    complaint.__context__ = before
    other = RuntimeError("bad")
    other.__context__ = before

    assert cause_of(complaint) is (before or complaint)
    assert cause_of(other) is other
    assert describe(complaint)["exception"] == type(before or complaint).__name__


def test_the_line_of_what_a_library_handles_is_the_one_that_called_it(tmp_path: Path) -> None:
    """Of a full disk torch's writer raises two errors: the traceback of the first begins in torch."""
    names = run_installed(
        tmp_path,
        "def write():\n"
        "    try:\n"
        "        open('/missing/model.pt')\n"
        "    finally:\n"
        "        raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 800 vs 0')\n",
    )
    with pytest.raises(RuntimeError) as raised:
        names["write"]()

    facts = describe(raised.value)
    assert facts["exception"] == "FileNotFoundError"
    assert facts["file"].endswith("test_exits.py")
    assert facts["function"] == "test_the_line_of_what_a_library_handles_is_the_one_that_called_it"


@pytest.mark.parametrize(("code", "cause"), [(0, False), (None, False), (2, True), ("2 of 3", True)])
def test_the_cause_of_an_exit_is_what_was_handled(code: object, cause: bool) -> None:
    """Only where it tells a failure; a text that repeats the exception is not added."""
    leaving = SystemExit(code)
    leaving.__context__ = error = ValueError("only 2 of 3")

    assert cause_of(leaving) is (error if cause else None)
    assert describe(leaving).get("message") == ("only 2 of 3" if cause else None)
    assert describe(leaving).get("caught") is (True if cause else None)
    assert "caught" not in describe(error)
    assert cause_of(error) is error


def test_an_exception_without_text_is_raised_again_by_its_name() -> None:
    """No colon announces a text that is not there."""

    def load() -> None:
        try:
            raise ValueError("bad record 70")
        except ValueError as error:
            raise LookupError from error

    with pytest.raises(LookupError) as raised:
        load()

    facts = describe(raised.value)

    assert (facts["exception"], facts["raised_as"]) == ("ValueError", "LookupError")


def test_what_a_library_below_no_line_of_the_script_handles_was_not_caught() -> None:
    """`torch.multiprocessing.spawn` leaves by `sys.exit(1)`; the process that has called it prints the traceback."""
    leaving = SystemExit(1)
    leaving.__context__ = ValueError("bad label")
    setattr(leaving, _PLACE, {})

    facts = describe(leaving)

    assert facts["exception"] == "ValueError"
    assert "caught" not in facts


def test_an_exception_that_is_raised_again_counts_as_the_first(serving: Serving, run_script: Run) -> None:
    """`raise ... from error` hides the line that failed."""
    key = "sk-" + "a1B2" * 12
    train = "def train():\n    raise ValueError('bad record 70')\n"
    run_script(
        START + train + f"try:\n    train()\nexcept Exception as e:\n    raise RuntimeError('failed {key}') from e\n"
    )

    (row,) = exit_rows(serving)
    assert (row["exception"], row["message"]) == ("ValueError", "bad record 70")
    assert (row["line"], row["function"]) == (8, "train")
    assert row["raised_as"].startswith("RuntimeError: failed ")
    assert key not in row["raised_as"]
    assert "in <module>" in row["stack"]


@pytest.mark.parametrize(
    "pool", ["concurrent.futures.ProcessPoolExecutor(1)", "multiprocessing.get_context('fork').Pool(1)"]
)
def test_the_line_in_a_process_of_a_pool_is_told(serving: Serving, run_script: Run, pool: str) -> None:
    """Where its results are taken, nothing is wrong."""
    tokenize = "import concurrent.futures, multiprocessing\ndef tokenize(number):\n    raise ValueError('bad text')\n"
    run_script(START + tokenize + f"with {pool} as pool:\n    list(pool.map(tokenize, [1]))\n")

    row = exit_rows(serving)[-1]
    assert (row["exception"], row["message"]) == ("ValueError", "bad text (in a process of a pool)")
    assert (row["line"], row["function"]) == (9, "tokenize")


def test_the_exception_behind_a_status_is_recorded(serving: Serving, run_script: Run) -> None:
    """`except Exception: sys.exit(4)` hides the reason from the screen, not from us."""
    done = run_script(START + "try:\n    1 / 0\nexcept Exception:\n    sys.exit(4)\n")

    (row,) = exit_rows(serving)
    assert done.returncode == 4
    assert (row["code"], row["exception"]) == (4, "ZeroDivisionError")


def test_a_keyboard_interrupt_is_recorded(serving: Serving, run_script: Run) -> None:
    """It is recorded as such, and the process dies of the signal as always."""
    done = run_script(START + "raise KeyboardInterrupt\n")

    (row,) = exit_rows(serving)
    assert done.returncode in (-2, 130)
    assert (row["exception"], row["code"]) == ("KeyboardInterrupt", 130)


def test_hooks_of_others_are_called(serving: Serving, run_script: Run) -> None:
    """One from before init is called by ours; one that came later may hide ours, and all is recorded still."""
    early = "import sys\nsys.excepthook = lambda kind, error, trace: print('early', kind.__name__)\n"
    late = "sys.excepthook = lambda kind, error, trace: print('late', kind.__name__)\n"
    assert run_script(early + START + "1 / 0\n").stdout == "early ZeroDivisionError\n"
    assert exit_rows(serving)[0]["exception"] == "ZeroDivisionError"

    assert run_script(START + late + "1 / 0\n").stdout == "late ZeroDivisionError\n"
    assert exit_rows(serving)[0]["exception"] == "ZeroDivisionError"


def test_an_error_at_the_prompt_ends_nothing(serving: Serving, run_script: Run) -> None:
    """The interpreter calls the hook for it, and asks for the next line."""
    typed = "import traceml\ntraceml.init()\n1 / 0\ntraceml.shutdown()\n"
    run_script(f"""
        import subprocess, sys
        subprocess.run([sys.executable, "-i"], input={typed!r}, text=True, check=True)
    """)

    assert not exit_rows(serving)


def test_shutdown_puts_the_hooks_back(run_script: Run) -> None:
    """Nothing of ours stays in sys."""
    done = run_script(
        """
        import sys, traceml
        def hooks():
            return sys.excepthook, sys.exit, SystemExit.code
        before = hooks()
        code = SystemExit.__dict__["code"]
        traceml.init()
        assert hooks()[:2] != before[:2]
        assert hooks()[2] is before[2]
        assert SystemExit.__dict__["code"] is not code
        traceml.shutdown()
        assert hooks() == before
        assert SystemExit.__dict__["code"] is code
        """
    )

    assert done.returncode == 0, done.stderr


def test_a_thread_that_runs_on_does_not_hang_the_end(serving: Serving, run_script: Run) -> None:
    """A sleeping daemon thread of the script and a pending step are no hindrance."""
    done = run_script(
        START + "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )

    assert done.returncode == 0
    assert stored_steps(serving) == list(range(5))


def test_describe_names_the_users_own_line() -> None:
    """An error deep in a library is recorded with the line of the script that led there."""
    try:
        import json

        json.loads("{")
    except ValueError as error:
        facts = describe(error)

    assert facts["exception"] == "json.decoder.JSONDecodeError"
    assert facts["file"] == __file__
    assert "decoder.py" in facts["stack"]


def test_a_module_that_does_not_exist_has_no_place() -> None:
    """As for `-m nosuch.module`: the line of Python's own that looked for it says nothing."""
    path = "<frozen importlib.util>"
    try:
        exec(compile("raise ModuleNotFoundError(\"No module named 'nosuch'\", name='nosuch')", path, "exec"))
    except ModuleNotFoundError as error:
        facts = describe(error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None))

    assert facts["message"] == "No module named 'nosuch'"
    assert "file" not in facts


def raised_again(error: Exception, where: str) -> dict[str, object]:
    """Return what is described of an error that torch has carried here from another process."""
    try:
        raise error
    except Exception:
        carried = ExceptionWrapper(where=where)

    try:
        carried.reraise()
    except Exception as again:
        return describe(again)


def test_an_error_of_a_loaders_worker_is_the_datasets_own() -> None:
    """Its message and line, not those of the loop that asked for the batch."""
    facts = raised_again(ValueError("sample 1777\nis damaged"), "in DataLoader worker process 0")

    assert facts["exception"] == "ValueError"
    assert facts["message"] == "sample 1777\nis damaged (in DataLoader worker process 0)"
    assert facts["file"] == __file__
    assert facts["function"] == "raised_again"
    assert facts["line"] == raised_again.__code__.co_firstlineno + 3


def test_an_error_of_a_worker_without_text_has_its_place() -> None:
    """`raise KeyError` alone."""
    facts = raised_again(KeyError(), "in pin memory thread for device 0")

    assert (facts["exception"], facts["message"]) == ("KeyError", "(in pin memory thread for device 0)")
    assert facts["function"] == "raised_again"


def test_a_text_that_looks_so_stays() -> None:
    """Only torch's own form is read."""
    assert describe(ValueError("Caught cold in winter."))["message"] == "Caught cold in winter."


def test_a_message_that_fails_is_said() -> None:
    """A user's __str__ may raise; the row still comes."""

    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe(Odd())["message"] == "<its text failed: RuntimeError>"
    assert describe(None) == {}
    assert describe(SystemExit(3)) == {}


def test_the_members_of_a_group_are_told() -> None:
    """Its own text only counts them; one that says more stays as it is."""

    class OfTasks(ExceptionGroup[Exception]):
        def __str__(self) -> str:
            return "2 of 7 tasks failed"

    members = [ValueError("bad shard 3"), ExceptionGroup("readers", [KeyError("label"), TimeoutError()])]
    told = "ValueError: bad shard 3; ExceptionGroup: readers (2 sub-exceptions): KeyError: 'label'; TimeoutError"

    assert describe(ExceptionGroup("epoch", members))["message"] == f"epoch (2 sub-exceptions): {told}"
    assert describe(OfTasks("epoch", members))["message"] == "2 of 7 tasks failed"


def test_status_is_the_interpreters() -> None:
    """As documented for sys.exit: None is 0, a text is 1, a number is taken modulo 256."""
    assert [status_of(SystemExit(code)) for code in (None, 0, 3, 256, -1, "text")] == [0, 0, 3, 0, 255, 1]
    assert status_of(KeyboardInterrupt()) == 130
    assert status_of(ValueError()) == 1


def test_a_watched_exit_is_read_and_written_as_before() -> None:
    """Its status is a plain attribute, also of the class and of what was raised before."""
    before, seen = SystemExit(4), []
    watch = ExitWatch(lambda error, status: seen.append((error, status)), lambda **_: None, lambda *_: None)
    watch.install()
    try:
        leaving = SystemExit("text")
        assert (before.code, leaving.code, SystemExit().code) == (4, "text", None)
        leaving.code = 7
        assert (leaving.code, leaving.args) == (7, ("text",))
        del leaving.code
        assert leaving.code is None
        rebuild, arguments = SystemExit(3).__reduce__()[:2]  # by pickle itself, as tblib's form forgets the status
        assert rebuild(*arguments).code == 3
    finally:
        watch.uninstall()

    assert (before.code, leaving.code, seen) == (4, None, [])


@pytest.mark.process
def test_an_interrupt_stays_one() -> None:
    """An exit handler that evaluates text makes the interpreter forget it; a later handler of ours reminds it."""
    code = """
import atexit
from traceml.recorder.exits import end_by_interrupt
atexit.register(end_by_interrupt)
atexit.register(lambda: eval("1"))
raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)

    assert done.returncode == -signal.SIGINT


def test_a_handler_that_evaluates_text_keeps_the_status(serving: Serving, run_script: Run) -> None:
    """The signal ends a traced script too, whatever runs at its end."""
    done = run_script("import atexit\n" + START + "atexit.register(lambda: eval('1'))\nraise KeyboardInterrupt\n")

    (row,) = exit_rows(serving)
    assert (done.returncode, row["exception"]) == (-signal.SIGINT, "KeyboardInterrupt")


AT_END = """
import atexit, os, signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
begun, ends, sent = threading.Event(), threading.Event(), threading.Event()
threading._register_atexit(ends.set)  # called last, before threads are waited for, and what `atexit` has is called
def wait():
    begun.set()
    sent.wait()
def interrupt():
    begun.wait()
    ends.wait()
    os.kill(os.getpid(), signal.SIGINT)
    sent.set()
threading.Thread(target=interrupt, daemon=True).start()
"""


@pytest.mark.parametrize("entry", [True, False])
@pytest.mark.parametrize("ends", ["", "sys.exit(0)\n"])
@pytest.mark.parametrize("waits", ["threading.Thread(target=wait).start()\n", "atexit.register(wait)\n"])
def test_an_interrupt_of_the_end_is_recorded(
    serving: Serving, run_script: Run, waits: str, ends: str, entry: bool
) -> None:
    """Python ignores it, and ends with the status that the script had."""
    done = run_script(AT_END + START + waits + ends, entry=entry)

    row = exit_rows(serving)[-1]
    assert done.returncode == 0
    # From Python 3.13 on its header may be missing.
    assert ("Exception ignored" if sys.version_info < (3, 13) else "KeyboardInterrupt") in done.stderr
    assert (row["exception"], row["code"]) == ("KeyboardInterrupt", 0)


def test_an_interrupt_of_the_end_replaces_no_error(serving: Serving, run_script: Run) -> None:
    """Nor is one recorded that Python ignores before the end."""
    ignored = "class Odd:\n    def __del__(self):\n        raise KeyboardInterrupt\nOdd()\n"
    waits = "threading.Thread(target=wait).start()\n"
    run_script(AT_END + START + ignored + waits + "raise ValueError\n")

    assert [row["exception"] for row in exit_rows(serving)] == ["ValueError"]


@pytest.mark.parametrize("limit", [1 << 44, resource.RLIM_INFINITY])
def test_the_limit_of_the_address_space_is_that_of_this_process(limit):
    """None without one."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        assert address_limit_bytes() == (None if limit == resource.RLIM_INFINITY else limit)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("leaves", "steps"),
    [
        ("os._exit(7)", 5),
        ("model(torch.ones(2, 4))\nos._exit(7)", 5),
        ("model(torch.ones(2, 4)).sum().backward()\nos._exit(7)", 5),
        ("thread = threading.Thread(target=os._exit, args=(7,))\nthread.start()\nthread.join()", 4),
    ],
    ids=["after a step", "in a forward", "after a backward", "in another thread"],
)
def test_a_step_that_is_done_counts_before_an_end_at_once(
    serving: Serving, run_script: Run, leaves: str, steps: int
) -> None:
    """Its end is told as after that step; nothing else would close it. The training thread may be in a hook."""
    run_script(f"{TRAINS}{leaves}\n")

    eventually(lambda: exit_rows(serving))
    assert stored_steps(serving) == list(range(steps))


def streams(serving: Serving) -> list[StreamRecord]:
    with serving.store() as store:
        return list(store.streams())


@pytest.mark.parametrize(
    ("leaves", "known"),
    [
        ("leave(7)", {"code": 7, "function": "leave"}),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    leave(7)", {"code": 7, "exception": "ZeroDivisionError"}),
        ("os._exit(0)", None),
        ("if os.fork():\n    os.wait()\nelse:\n    leave(7)", {"code": 0}),
    ],
    ids=["with a status", "for an exception", "well", "in a child"],
)
def test_the_place_of_an_end_at_once_is_known(
    serving: Serving, run_script: Run, leaves: str, known: dict[str, Any] | None
) -> None:
    """No exit handlers run after `os._exit`: what is known of it is in the flight file before."""
    done = run_script(f"import os\n{START}def leave(status):\n    os._exit(status)\n{leaves}\n")

    assert done.returncode == (known["code"] if known else 0)
    eventually(
        lambda: exit_rows(serving) if known else [each.state for each in streams(serving)] not in ([], ["running"])
    )
    rows = exit_rows(serving)
    assert [{name: row.get(name) for name in known or {}} for row in rows] == ([known] if known else [])
    assert all(row.get("open_phase") != "exit" for row in rows)
