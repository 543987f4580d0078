"""What commands that start a script share."""

from __future__ import annotations

import pytest

from traceml.cli.options.shared_options import default_name


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
