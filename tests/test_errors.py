"""The tree of errors in the module's text against the classes."""

from __future__ import annotations

import builtins
import pickle
import re

import pytest

from traceml import errors
from traceml.errors import AggregatorUnavailableError, TraceMLError

_LINE = re.compile(r"^(?P<bars>[│ ]*)[├└]── (?P<name>\w+) +(?:\((?P<bases>[\w, ]+)\))?")


def documented() -> dict[str, set[type]]:
    """Each error of the tree: the class above it, and the built-in classes that it names."""
    tree: dict[str, set[type]] = {"TraceMLError": set()}
    parents = ["TraceMLError"]
    for line in (errors.__doc__ or "").splitlines():
        if found := _LINE.match(line):
            depth = len(found["bars"]) // 4 + 1
            named = {getattr(builtins, base) for base in (found["bases"] or "").split(", ") if base}
            tree[found["name"]] = {getattr(errors, parents[depth - 1]), *named}
            parents[depth:] = [found["name"]]

    return tree


def test_the_tree_is_the_classes() -> None:
    """Every error is in the tree, below the class that it derives from, with its built-in classes."""
    classes = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, TraceMLError)}

    assert documented().keys() == classes
    for name, bases in documented().items():
        assert bases <= set(getattr(errors, name).__mro__), name


def test_every_error_is_offered() -> None:
    """`__all__` lists the classes of the tree."""
    assert set(errors.__all__) == documented().keys()


def test_errors_travel_between_processes() -> None:
    """An unpickled error has the text, the arguments, the attributes and the notes of the pickled one."""
    many = [
        errors.SettingsError("mode", "is 3", source="argument", allowed="1, 2"),
        errors.AggregatorUnavailableError("node1", 29765, 2.5, "refused", refused=True),
        errors.AggregatorRefusedError("node1", 29765, "another token"),
        errors.StoreVersionError("run.db", 9, 8),
        errors.TableNotFoundError("no table 'x'"),
        errors.FileMissingError("there is no file x"),
        errors.WorkerFailedError("node1", 3, 1, exit_code=2, log_tail=["last words"]),
        errors.AgentFailedError("node1", "ssh ended", advice="Try it.", words=["denied"]),
        errors.LaunchTimeoutError(3.0, "starting", ["node1"]),
        errors.RemoteTracebackError("Traceback"),
        errors.BackendBusyError("429", retry_after_s=3.0),
    ]
    for error in many:
        error.add_note("a note")
        copy = pickle.loads(pickle.dumps(error))

        assert (type(copy), str(copy), copy.args, vars(copy)) == (type(error), str(error), error.args, vars(error))


def test_a_group_of_failed_tasks_travels_between_processes() -> None:
    """So does the group, with its errors."""
    group = pickle.loads(pickle.dumps(errors.TasksFailedError("2 failed", [ValueError("a"), OSError(2, "b")])))

    assert (str(group), [repr(each) for each in group.exceptions]) == (
        "2 failed",
        ["ValueError('a')", "FileNotFoundError(2, 'b')"],
    )


@pytest.mark.parametrize(("host", "is_told"), [("127.0.0.1", False), ("localhost", False), ("10.0.0.1", True)])
def test_a_slow_network_may_have_more_time(host: str, is_told: bool) -> None:
    """Losing packets, it takes longer than the few seconds that `init` waits; on this host time is not the remedy."""
    text = str(AggregatorUnavailableError(host, 29765, 5.0, "timed out"))

    assert ("TRACEML_CONNECT_TIMEOUT" in text) is is_told
