"""What commands that start a script share."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from traceml.cli.options.shared_options import default_name, script_words
from traceml.errors import UsageError


@pytest.mark.parametrize(
    ("target", "is_module", "name"),
    [
        ("jobs/train.py", False, "train"),
        ("package.train", True, "train"),
        ("package.jobs.train", True, "train"),
        ("train", True, "train"),
        ("package.__main__", True, "package"),
        ("__main__", True, "__main__"),
    ],
)
def test_a_run_is_named_after_its_script_or_module(target: str, is_module: bool, name: str) -> None:
    """A module after its last part: the rest of its name is no suffix."""
    assert default_name(target, is_module=is_module) == name


@pytest.mark.parametrize("words", [["--", "-x.py", "-v"], ["--", "./-x.py", "-v"], ["./-x.py", "-v"]])
def test_a_script_whose_name_begins_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]):
    """As for Python itself, what follows `--` is a file; its path makes it none of Python's options either."""
    monkeypatch.chdir(tmp_path)
    Path("-x.py").touch()

    assert script_words(Namespace(script=words, module=False), example="") == ["./-x.py", "-v"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-x.py"], "unknown option -x.py"),
        (["--", "-y.py"], "can't open file"),
        (["-"], "-: a script on standard input cannot be run"),
    ],
)
def test_a_dash_without_such_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], why: str
) -> None:
    """It is an option, or a file that does not exist."""
    monkeypatch.chdir(tmp_path)
    Path("-x.py").touch()

    with pytest.raises(UsageError, match=why):
        script_words(Namespace(script=words, module=False), example="")
