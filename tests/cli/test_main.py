"""The dispatcher: commands, help, errors and exit statuses."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import traceml
from traceml import cli
from traceml.errors import AgentFailedError, RunNotFoundError, SettingsError, UsageError


@pytest.fixture
def command(monkeypatch):
    """Add a command `probe` whose function the test gives."""

    def install(action):
        monkeypatch.setitem(cli.COMMANDS, "probe", ("probe", "a probe"))
        monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=action))

    return install


def raising(error):
    def action(argv):
        raise error

    return action


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_overview_lists_every_command(argv, capsys):
    """Without a command, and with --help, the overview lists each command with its help."""
    assert cli.main(argv) == 0

    shown = capsys.readouterr().out
    for name, (_, help_line) in cli.COMMANDS.items():
        assert name in shown
        assert help_line in shown


def test_overview_fits_80_columns(capsys):
    """The overview can be read on a terminal of 80 columns."""
    cli.main([])

    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


def test_version(capsys):
    """--version prints the package's version."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"traceml {traceml.__version__}\n"


def test_a_limit_of_processes_is_named(command, capsys):
    """Where no further process may be started, the message names the limits that do that."""
    command(raising(BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))))

    assert cli.main(["probe"]) == cli.EXIT_ERROR
    assert "pids.max" in capsys.readouterr().err

    command(raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert cli.main(["probe"]) == cli.EXIT_ERROR
    assert "pids.max" not in capsys.readouterr().err


def test_a_working_directory_that_was_removed(monkeypatch, capsys, tmp_path):
    """The system's text names no folder; a missing file has its name."""
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()

    assert cli.main(["sync"]) == cli.EXIT_ERROR
    assert "hint: the working directory was removed" in capsys.readouterr().err

    assert cli.main(["analyze", "x.pfw"]) == cli.EXIT_ERROR
    assert "working directory" not in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_names_that_the_locale_lacks_are_escaped(command, monkeypatch, errors):
    """A name of a trace or a run may have any character."""
    command(lambda _argv: print("loss/\N{GREEK SMALL LETTER ALPHA}") or 0)
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii", errors=errors))

    assert cli.main(["probe"]) == cli.EXIT_OK
    assert printed.getvalue() == b"loss/\\u03b1\n"


@pytest.mark.parametrize("argument", ["gr\udcff\udce9", None])
def test_an_argument_that_is_no_text_is_named(command, capsys, argument):
    """As the shell passes a name of another encoding, which no file of ours can hold; a fault of ours is raised."""
    command(lambda argv: len("gr\udcff".encode()))
    if argument is None:
        with pytest.raises(UnicodeEncodeError):
            cli.main(["report"])
        return

    assert cli.main(["report", argument]) == 2
    assert capsys.readouterr().err.startswith("traceml report: an argument is no text in ")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("reprot", "traceml report"),
        ("train.py", "traceml run train.py"),
        ("watch", "traceml run"),
        ("zzzzzz", None),
        ("nope", None),
        ("--jsn", None),
    ],
)
def test_unknown_command_hints(word, meant, capsys):
    """An unknown command exits with 2, one line, and a suggestion."""
    assert cli.main([word]) == 2

    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2
    assert word in error[0]
    assert (f"did you mean `{meant}`?" in error[0]) == (meant is not None)
    assert error[1].startswith("hint: `traceml")


def test_command_gets_its_words_and_gives_its_status(command):
    """A command gets the arguments after its name, and its status is the exit status."""
    seen = []
    command(lambda argv: seen.append(argv) or 7)

    assert cli.main(["probe", "--x", "a b"]) == 7
    assert seen == [["--x", "a b"]]


def test_help_of_a_command_is_the_commands_own(command):
    """`traceml help COMMAND` is `traceml COMMAND --help`."""
    seen = []
    command(lambda argv: seen.append(argv) or 0)

    assert cli.main(["help", "probe"]) == 0
    assert seen == [["--help"]]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("no such kind"), 2),
        (SettingsError("port", "is no number", source="TRACEML_PORT", allowed="1..65535"), 2),
        (RunNotFoundError("no run 'x' in traceml_runs"), 3),
        (OSError("no such device"), 3),
    ],
)
def test_errors_are_one_line_on_stderr(command, capsys, error, status):
    """A traceml or system error is one line on stderr (and a hint after a usage error)."""
    command(raising(error))

    assert cli.main(["probe"]) == status

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[0] == f"traceml probe: {error}"
    assert [line.split(":")[0] for line in shown.err.splitlines()[1:]] == (["hint"] if status == 2 else [])


def test_a_file_that_may_not_be_used_is_named(command, capsys):
    """Python's number of the error says nothing to a user."""
    command(raising(PermissionError(13, "Permission denied", "/runs")))

    assert cli.main(["probe"]) == 3
    assert capsys.readouterr().err == "traceml probe: cannot use /runs: Permission denied\n"


def test_notes_of_an_error_follow_it(command, capsys):
    """What an error has as notes, such as a host's state or the stack of a rank, is told after it."""
    error = AgentFailedError("node1", "it closed the connection")
    error.add_note("host node2: it is down")
    command(raising(error))

    assert cli.main(["probe"]) == 3
    assert capsys.readouterr().err == "traceml probe: host node1: it closed the connection.\nhost node2: it is down\n"


def test_interrupt_is_130(command, capsys):
    """Ctrl-C ends a command quietly with 130."""
    command(raising(KeyboardInterrupt()))

    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (5, 5), ("told", 3)])
def test_system_exit_becomes_a_status(command, code, status):
    """The code of a command's SystemExit is the exit status."""
    command(raising(SystemExit(code)))

    assert cli.main(["probe"]) == status


WRITER = """
import sys, types
from traceml import cli
def write_much(argv):
    for number in range(100000):
        print("line", number)
    return 0
sys.modules["probe"] = types.SimpleNamespace(main=write_much)
cli.COMMANDS["probe"] = ("probe", "a probe")
sys.exit(cli.main(["probe"]))
"""

PROBE = """
import socket, sys, types
from traceml import cli
def open_something(argv):
    with socket.socket() as sock:
        print("stderr is", sys.stderr.fileno(), "and the socket higher:", sock.fileno() > 2)
    return 0
sys.modules["probe"] = types.SimpleNamespace(main=open_something)
cli.COMMANDS["probe"] = ("probe", "a probe")
sys.exit(cli.main(["probe"]))
"""


@pytest.mark.process
def test_closed_standard_streams_are_no_place_for_sockets(tmp_path):
    """Started with stdin and stderr closed, a command's sockets do not get their numbers."""
    (tmp_path / "probe.py").write_text(PROBE)

    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {tmp_path}/probe.py <&- 2>&-"],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip

    assert (done.stdout, done.returncode) == ("stderr is 2 and the socket higher: True\n", 0)


@pytest.mark.process
def test_reader_that_goes_away_is_quiet(tmp_path):
    """When the reader of the pipe is gone the command ends with no output on stderr."""
    (tmp_path / "writer.py").write_text(WRITER)
    script = f'{sys.executable} {tmp_path}/writer.py | head -n 1; exit "${{PIPESTATUS[0]}}"'

    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=240)

    assert (done.stdout, done.stderr, done.returncode) == ("line 0\n", "", 141)


def test_reader_that_goes_away_ends_a_table_alike(command, monkeypatch):
    """Rich exits with 1 in its handler of the broken pipe; the status is that of every other output."""
    from rich.console import Console

    reader, writer = os.pipe()
    os.close(reader)

    def draw(argv):
        Console().print("a line")
        return 0

    command(draw)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["probe"]) == 141


@pytest.mark.process
@pytest.mark.parametrize(
    ("first", "heavy"),
    [
        ("import traceml.cli as c; c.main(['--version'])", ["rich", "tyro", "numpy", "torch", "pydantic", "asyncio"]),
        (
            "import traceml.cli.run",
            ["rich", "numpy", "torch", "asyncio", "platform", "secrets", "_hashlib", "tempfile"],
        ),
    ],
)
def test_commands_import_nothing_heavy(first, heavy):
    """Finding a command costs no import of a large library; the start of a script by `traceml run` neither."""
    probe = f"{first}; import sys; print([m for m in {heavy} if m in sys.modules])"

    done = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=True, timeout=240)

    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    """Each command has help for itself and each option, within 100 columns."""
    assert cli.main([name, "--help"]) == 0

    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: traceml {name}")
    assert max(len(line) for line in shown.splitlines()) <= 100


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_refuses_an_unknown_option(name, capsys):
    """An unknown option exits with 2, one line and a hint."""
    assert cli.main([name, "--no-such-option"]) == 2

    said, hint = capsys.readouterr().err.splitlines()
    assert said.startswith(f"traceml {name}: ")
    assert hint == f"hint: `traceml {name} --help`"


@pytest.mark.parametrize("command", [None, "run", "launch", "serve"])
def test_help_keeps_to_a_narrow_terminal(command, monkeypatch, capsys):
    """Sentences are wrapped at its width."""
    monkeypatch.setenv("COLUMNS", "60")

    cli.main([*([command] if command else []), "--help"])

    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 60


def test_columns_of_0_are_unknown_ones(monkeypatch, capsys):
    """A width that is not known is that of a pipe: rich alone would print nothing."""
    monkeypatch.setenv("COLUMNS", "0")

    assert cli.main(["doctor", "--settings"]) == 0

    assert max(len(line) for line in capsys.readouterr().out.splitlines()) > 40


@pytest.mark.process
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_standard_output(unbuffered: str) -> None:
    """The error names what cannot be written, and the status is that of other failures."""
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "traceml", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environ,
        )  # fmt: skip

    assert done.returncode == 3
    assert done.stderr == "traceml: cannot write standard output: no space left on device\n"
