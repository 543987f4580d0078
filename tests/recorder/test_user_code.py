"""What is the user's code."""

from __future__ import annotations

import collections
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import cast

import pytest

from traceml.cli import demonstration
from traceml.recorder.user_code import UserCode
from traceml.session import entry

DEMO = str(Path(demonstration.__file__).with_name("_demo_train.py"))  # importing it would import scikit-learn


def frame_of(path: str, **values: object) -> FrameType:
    """Return a frame of code in a file of that name; of the script, if that is the module's name."""
    module = ModuleType("module")
    vars(module).update({"sys": sys, **values})
    if module.__name__ == "__main__":
        sys.modules["__main__"] = module

    exec(compile("frame = sys._getframe()", path, "exec"), vars(module))
    return cast("FrameType", module.frame)


@pytest.fixture(autouse=True)
def own_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore what runs as the script."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.mark.parametrize(
    ("path", "values", "is_of_user"),
    [
        ("/home/me/train.py", {}, True),
        ("/tmp/ipykernel_77/1234.py", {}, True),
        ("<ipython-input-3-abc>", {}, True),
        ("<command-1234567890>", {}, True),
        ("<cell 3>", {}, True),
        ("/home/me/.venv/lib/python3.11/site-packages/timm/models.py", {}, False),
        ("/usr/lib/python3/dist-packages/numpy/core.py", {}, False),
        (collections.__file__, {}, False),
        ("<frozen importlib._bootstrap>", {}, False),
        (sys.modules["traceml.recorder"].__file__, {}, False),
        ("/opt/pytorch/torch/nn/linear.py", {}, False),
        # a script wherever it lies, as `python /usr/lib/python3/dist-packages/x/train.py`
        ("/usr/lib/python3/dist-packages/x/train.py", {"__name__": "__main__", "__spec__": None}, True),
        # the demonstration, and what `traceml run` runs the script with
        (DEMO, {"__name__": "__main__", "__spec__": None}, True),
        (entry.__file__, {"__name__": "__main__", "__spec__": None}, False),
    ],
)
def test_what_the_user_wrote(path: str, values: dict[str, object], *, is_of_user: bool) -> None:
    """Everything but the standard library, installed packages, torch and traceml."""

    class Torch:
        __file__ = "/opt/pytorch/torch/__init__.py"

    assert UserCode({"torch": Torch}).contains(frame_of(path, **values)) is is_of_user


def test_a_file_as_a_script_and_as_a_module() -> None:
    """A file of an installed package is the user's only where it runs as the script, in whatever order it is asked."""
    path = "/usr/lib/python3/dist-packages/x/train.py"
    script, module = frame_of(path, __name__="__main__", __spec__=None), frame_of(path)
    user = UserCode()

    assert [user.contains(frame) for frame in (module, script, module, script)] == [False, True, False, True]


def test_what_starts_the_script_is_not_the_users() -> None:
    """A worker of a launch is started by text that Python has from its command line."""
    starts = frame_of("<string>", __name__="__main__", __spec__=None)
    user = UserCode()

    assert user.contains(starts)  # python -c
    script = frame_of("/home/me/train.py", __name__="__main__", __spec__=None)
    assert [user.contains(frame) for frame in (starts, script)] == [False, True]
