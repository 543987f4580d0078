"""Help of every command: readable on a narrow terminal, with examples that work, and completion in the shell."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from tests.diagnosis.fabricated import Job
from tests.forked import client as forked
from tests.runs.fabricated_store import run_facts, store_run
from tests.whatif.generated_job import GeneratedJob
from traceml import cli
from traceml.cli.completion import whole_parser
from traceml.cli.options.examples import EXAMPLES, examples_text
from traceml.cli.options.parsing import parse
from traceml.cli.runs import EDITS
from traceml.errors import UsageError

# These start jobs, hosts or servers, or need a terminal: their own tests run them; here their arguments are parsed.
PARSED = {"demo", "launch", "mcp", "serve", "top"}
WIDE = 100  # columns; texts below the examples have their lines as they are written
NEEDS_JOB = {"stacks", "profile"}
LINES = [(name, words) for name, examples in EXAMPLES.items() for _, words in examples]


@pytest.mark.parametrize("columns", [60, WIDE])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_the_terminal(command, columns, capsys, monkeypatch):
    """No line is wider, or ends before it is full; the examples are in it as they are typed."""
    monkeypatch.setenv("COLUMNS", str(columns))

    assert cli.main([command, "--help"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > columns] == []
    assert [both for both in pairwise(lines) if columns == WIDE and _is_broken_early(*both)] == []
    assert set(examples_text(command).splitlines()) <= set(lines)
    if columns == WIDE:
        assert set(getattr(import_module(cli.COMMANDS[command][0]), "_EPILOG", "").splitlines()) <= set(lines)


def _is_broken_early(line: str, below: str) -> bool:
    """Return whether a text of an option goes on below, though its next word had room: up to 90, as margins differ."""
    if not re.search(r"[a-z,;]$", line) or not re.match(r" {8,}[a-z(]", below):
        return False

    indented = len(below) - len(below.lstrip())
    return line[:indented].strip() == "" and len(line) + 1 + len(below.split(maxsplit=1)[0]) <= WIDE - 10


@pytest.mark.parametrize("command", ["demo", "profile"])
def test_help_has_the_defaults_in_force(command, capsys, monkeypatch):
    """argparse adds none: each number and each choice that an option has when it is not given stands in its text."""
    monkeypatch.setenv("COLUMNS", "200")
    options = getattr(import_module(cli.COMMANDS[command][0]), f"{command.title()}Options")
    defaults = [each.default for each in fields(options)]

    assert cli.main([command, "--help"]) == 0

    told = re.findall(r"\(default: (\w+)\)", capsys.readouterr().out)
    in_force = [f"{each:g}" if isinstance(each, float) else str(each) for each in defaults if each not in (None, False)]
    assert told == in_force


@pytest.mark.parametrize("words", [["runs", name] for name in EDITS], ids=" ".join)
def test_help_on_a_word_of_runs_fits_60_columns(words, capsys, monkeypatch):
    """Labels and removal have a help of their own, with examples."""
    monkeypatch.setenv("COLUMNS", "60")

    assert cli.main([*words, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert set(examples_text(" ".join(words)).splitlines()) <= set(lines)


def test_the_overview_fits_60_columns(capsys, monkeypatch):
    """Each command with its help; the call at the end needs no aggregator."""
    monkeypatch.setenv("COLUMNS", "60")

    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[-1].endswith(" traceml.init(local=True)")


def test_every_command_has_examples():
    """Each is of that command, and no two are the same."""
    assert EXAMPLES.keys() == cli.COMMANDS.keys() | {f"runs {name}" for name in EDITS}
    assert all(f"traceml {name}" in words for name, words in LINES)
    assert len(set(LINES)) == len(LINES)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change into a folder with what the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, started in (("20260101-000000-train-a1b2", 1.7e9), ("20260102-000000-train-c3d4", 1.7e9 + 100)):
        facts = run_facts(id=name, started=started, ended=started + 10)
        store_run(tmp_path / "traceml_runs" / name, Job(steps=120), facts=facts)

    events = [{"ph": "X", "name": "read", "cat": "POSIX", "pid": 1, "tid": 1, "ts": n, "dur": 1} for n in range(9)]
    (tmp_path / "trace.pfw.gz").write_text("\n".join(map(json.dumps, events)))
    (tmp_path / "train.py").write_text("print('trained')\n")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "train.py").write_text("print('trained')\n")
    return tmp_path


def _words(line: str) -> list[str]:
    """Return the arguments of an example after `traceml COMMAND`."""
    inner = line.removeprefix('eval "$(').removesuffix(')"').partition(" > ")[0]
    words = shlex.split(inner)
    return words[words.index("traceml") + 2 :]


@pytest.mark.parametrize(("command", "line"), [each for each in LINES if each[0] in PARSED], ids=lambda value: value)
def test_examples_of_commands_that_start_jobs_are_understood(folder, command, line):
    """Each option exists and takes that value."""
    module = import_module(cli.COMMANDS[command][0])
    if hasattr(module, "make_parser"):
        assert module.make_parser().parse_args(_words(line))
        with pytest.raises(UsageError):
            module.make_parser().parse_args(["--no-such-option", "x"])
    else:
        options = getattr(module, f"{command.title()}Options")
        assert parse(options, _words(line), prog=f"traceml {command}")


OTHERS = [each for each in LINES if each[0] not in PARSED | {"run", "whatif"} and "hostnames" not in each[1]]


@pytest.mark.process
@pytest.mark.parametrize(("command", "line"), OTHERS, ids=lambda value: value)
def test_examples_work(folder, command, line, capsys):
    """Each runs on two small runs; one that needs a running job, or its samples, says that there is none."""
    status = cli.main([command.split()[0], *_words(line)])

    shown = capsys.readouterr()
    if command in NEEDS_JOB:
        assert status == 3, shown.err
        assert "run" in shown.err
    else:
        assert status in (0, 3 if command == "doctor" else 0), shown.err
        assert shown.out or Path("report.html").exists()


@pytest.mark.process
@pytest.mark.parametrize("line", [words for name, words in LINES if name == "whatif"])
def test_examples_on_a_generated_job_work(folder, line, capsys):
    """The trace of a generated hybrid-parallel job."""
    trace, meta = GeneratedJob().run().write(folder)
    trace.rename("ops.parquet")
    meta.rename("j.yaml")

    assert cli.main(["whatif", *_words(line)]) == 0
    assert capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize("line", [EXAMPLES["run"][0][1], EXAMPLES["run"][2][1]])
def test_examples_of_run_train(folder, line):
    """A script and a module, each in a process as from a shell."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRACEML_")}
    done = forked.run(
        [sys.executable, "-m", "traceml", "run", *_words(line)], imports="aggregator", forks=True,
        cwd=folder, env={**environ, "TRACEML_PORT": "0"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr


def test_completion_knows_every_command_and_public_option():
    """Options between our own processes are not offered."""
    commands = next(action for action in whole_parser()._actions if action.dest == "command").choices

    assert list(commands) == list(cli.COMMANDS)
    options = {name: set(parser._option_string_actions) for name, parser in commands.items()}
    assert {"--json", "--html", "--fail-on", "--runs-dir"} <= options["report"]
    assert {"--prometheus", "--web", "--host"} <= options["serve"]
    assert {"-o", "--output"} <= options["export"]


def test_completion_offers_folders_for_every_runs_dir():
    """Of commands with a parser of their own too, where the word in the help is written by hand."""
    commands = next(action for action in whole_parser()._actions if action.dest == "command").choices
    found = {name: parser._option_string_actions.get("--runs-dir") for name, parser in commands.items()}

    assert "serve" in found
    assert [name for name, action in found.items() if action is not None and not hasattr(action, "complete")] == []


COMPLETED = [
    ("traceml rep", {"report"}),
    ("traceml report --h", {"--help", "--html"}),
    ("traceml demo --fault in", {"input"}),
    ("traceml completion z", {"zsh"}),
    ("traceml runs t", {"tag"}),
    ("traceml serve --fo", set()),
    ("traceml run tra", {"trace.pfw.gz", "traceml_runs/", "train.py"}),
    ("traceml run --nproc-per-node 2 trai", {"train.py"}),
    ("traceml analyze trace.", {"trace.pfw.gz"}),
    ("traceml report traceml_r", {"traceml_runs/"}),
    ("traceml runs tag traceml_r", {"traceml_runs/"}),
]
ONE_OFFERED = [(typed, *offered) for typed, offered in COMPLETED if len(offered) == 1][::3]  # command, file, folder
# An interactive zsh in a terminal of its own: Tab, then a key that writes the line down.
ZSH = """
zmodload zsh/zpty
zpty inner zsh -f -i
zpty -w inner 'autoload -U compinit; compinit -u -D; eval "$(cat completion.zsh)"; '\\
'write() { print -r -- "$BUFFER" > line; print do""ne }; zle -N write; bindkey "^B" write; '\\
'echo rea""dy'
zpty -r inner seen '*ready*'
zpty -wn inner "$1"$'\\t\\x02'
zpty -r inner seen '*done*'
zpty -d inner
"""


@pytest.mark.process
@pytest.mark.parametrize(("typed", "offered"), COMPLETED)
def test_bash_completes(folder, typed, offered, capsys):
    """As bash asks the script after a press of Tab; also where a command was parsed before."""
    cli.main(["analyze", "nothing-of-this-name"])
    capsys.readouterr()
    cli.main(["completion", "bash"])
    (folder / "completion.bash").write_text(capsys.readouterr().out)
    program = (
        f"source completion.bash; COMP_WORDS=({typed}); COMP_CWORD={len(typed.split()) - 1}; "
        "$(complete -p traceml | sed 's/.*-F \\([^ ]*\\).*/\\1/') traceml; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True, check=False)

    assert {word.strip() for word in done.stdout.split()} == {word.rstrip("/") for word in offered}, done.stderr


@pytest.mark.process
@pytest.mark.needs("shells")
def test_fish_completes(folder, capsys):
    """With the line that the README names."""
    cli.main(["completion", "fish"])
    (folder / "completion.fish").write_text(capsys.readouterr().out)
    asked = "; ".join(f'echo "> {typed}"; complete -C "{typed}"' for typed, _ in COMPLETED)
    done = subprocess.run(
        ["fish", "-c", f'eval "$(cat completion.fish)"; {asked}'],
        env={**os.environ, "HOME": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    answers = [answer.splitlines() for answer in done.stdout.split("> ")[1:]]
    assert [(typed, {line.split("\t")[0] for line in lines}) for typed, *lines in answers] == COMPLETED, done.stderr


@pytest.mark.process
@pytest.mark.needs("shells")
@pytest.mark.parametrize(("typed", "offered"), ONE_OFFERED)
def test_zsh_completes(folder, typed, offered, capsys):
    """With the line that the README names."""
    cli.main(["completion", "zsh"])
    (folder / "completion.zsh").write_text(capsys.readouterr().out)
    environ = {**os.environ, "ZDOTDIR": str(folder)}
    subprocess.run(
        ["zsh", "-fc", ZSH, "zsh", typed],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=True,
    )

    *before, _ = typed.split(" ")
    assert (folder / "line").read_text().rstrip("\n ").startswith(" ".join([*before, offered]))


@pytest.mark.process
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_sound(folder, shell, capsys):
    """Each shell that is installed parses its script."""
    assert cli.main(["completion", shell]) == 0

    script = Path(folder / f"completion.{shell}")
    script.write_text(capsys.readouterr().out)
    assert "report" in script.read_text()
    if shutil.which(shell):
        assert subprocess.run([shell, "-n", str(script)], check=False).returncode == 0
