"""The calls of a script that is not traced: they do nothing, start nothing, import nothing."""

from __future__ import annotations

import multiprocessing.process
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import traceml

pytestmark = pytest.mark.usefixtures("quiet_process")


def test_disabled_calls_do_nothing() -> None:
    """Context managers are one shared object, data comes back as it is, functions and processes run as they are."""
    threads, start = set(threading.enumerate()), multiprocessing.process.BaseProcess.start
    recorder = traceml.init(enabled=False, port=1)
    data = [1, 2]

    with traceml.trace_step() as step, traceml.phase("x") as phase:
        assert step is phase

    assert traceml.trace_data(data) is data
    assert traceml.trace(len)([1]) == 1
    assert multiprocessing.process.BaseProcess.start is start
    assert not recorder.enabled
    assert not traceml.is_enabled()
    assert set(threading.enumerate()) <= threads  # one of an earlier test may have ended
    traceml.shutdown()


def test_exceptions_pass_through_what_does_nothing() -> None:
    """A no-op swallows nothing."""
    with pytest.raises(ZeroDivisionError), traceml.phase("x"):
        raise ZeroDivisionError


def test_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRACEML_ENABLED=0 needs no change of the script."""
    monkeypatch.setenv("TRACEML_ENABLED", "0")

    assert not traceml.init(port=1).enabled


def test_bad_settings_are_the_callers() -> None:
    """init raises for wrong settings before anything is started."""
    with pytest.raises(traceml.SettingsError, match="Did you mean 'port'"):
        traceml.init(prot=1)
    with pytest.raises(traceml.SettingsError, match="true or false"):
        traceml.init(tls="perhaps")


def test_decorated_functions_keep_their_name() -> None:
    """Also generators and coroutines stay what they are."""

    @traceml.trace("named")
    def plain() -> int:
        """Its text."""
        return 1

    assert (plain.__name__, plain.__doc__, plain()) == ("plain", "Its text.", 1)


@pytest.mark.process
def test_importing_is_light() -> None:
    """`import traceml` and disabled calls bring neither torch nor numpy nor pydantic nor sqlite."""
    code = (
        "import sys, traceml; traceml.init(enabled=False)\n"
        "with traceml.trace_step(), traceml.phase('x'): pass\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'sqlite3', 'asyncio', 'rich', 'zstandard'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.process
def test_names_that_are_first_used_when_the_interpreter_ends_do_nothing() -> None:
    """In the `__del__` of an object of the script: nothing can be imported any more, and a traceback told that."""
    code = (
        "import traceml\nclass Kept:\n"
        "    def __del__(self): traceml.log_text('name', 'text'); print('ended')\nkept = Kept()"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert (done.stdout, done.stderr) == ("ended\n", "")


def test_the_public_recorder_is_the_class() -> None:
    """traceml.Recorder is what init returns."""
    assert isinstance(traceml.init(enabled=False), traceml.Recorder)


def test_a_mistake_of_ours_does_not_end_the_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error is logged, and the script runs untraced."""

    def broken(*_args: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("traceml.recorder.recorder.identify", broken)
    recorder = traceml.init(port=1)

    assert not recorder.enabled
    assert "tracing could not be started" in caplog.text
    with traceml.trace_step():
        pass


def test_a_callable_without_a_name_can_be_traced() -> None:
    """As `functools.partial` and objects with `__call__` have none."""

    class Doubling:
        def __call__(self, value: int) -> int:
            return 2 * value

    assert traceml.trace(partial(max, 3))(2) == 3
    assert traceml.trace(Doubling())(2) == 4


def test_static_and_class_methods_are_traced_in_either_order() -> None:
    """They are called as without the decorator, from the class and from an instance."""

    class Model:
        @traceml.trace
        @staticmethod
        def half(value: int) -> int:
            return value // 2

        @traceml.trace("building")
        @classmethod
        def name(cls) -> str:
            return cls.__name__

    assert Model.half(4) == Model().half(4) == 2
    assert Model.name() == Model().name() == "Model"


@pytest.mark.parametrize("decorate", [traceml.trace, traceml.trace("named"), traceml.trace(None)])
def test_only_what_can_be_called_is_traced(decorate: Callable[[Any], Any]) -> None:
    with pytest.raises(traceml.ArgumentTypeError, match=r"trace\(5\): give a function or the name of a phase"):
        decorate(5)


def test_a_step_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(
        traceml.UsageError, match=r"set_step\(1208925819614629174706176\): the largest number of a step is"
    ):
        traceml.set_step(2**80)


@pytest.mark.parametrize("step", [-1, 1.0, True, "3"])
def test_number_of_a_step_that_is_none(step: object) -> None:
    """A mistake is the caller's, traced or not."""
    with pytest.raises(traceml.UsageError, match="whole number from 0"):
        traceml.set_step(step)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [np.int64(7), torch.tensor(7), np.array(7)])
def test_a_step_of_a_checkpoint_may_be_a_tensor(step: Any) -> None:
    """Any whole number is one; nothing is recorded here."""
    traceml.set_step(step)


@pytest.mark.parametrize("step", [True, 1.5, "7", None, -1, torch.tensor(1.5), torch.tensor([1, 2])])
def test_a_step_that_is_no_whole_number_is_refused(step: Any) -> None:
    with pytest.raises(traceml.UsageError, match="a whole number from 0"):
        traceml.set_step(step)
