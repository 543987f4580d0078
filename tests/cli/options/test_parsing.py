"""Parsing of arguments: errors of one line."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Annotated, Literal

import pytest

from traceml.cli import launch, run, serve
from traceml.cli.options.number_range import NumberRange
from traceml.cli.options.parsing import CommandParser, Metavar, Positional, parse, wrapped
from traceml.errors import UsageError


@dataclass(frozen=True)
class Options:
    """Do a thing."""

    count: Annotated[int, NumberRange()] = 1
    """How often."""
    json: bool = False
    """As JSON."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    most: Annotated[float | None, NumberRange(float)] = None
    """At most."""
    form: Literal["x", "y"] | None = None
    """In which form."""
    hosts: Annotated[tuple[str, ...], Metavar("HOST")] = ()
    """On which hosts."""
    output: Annotated[str, Metavar("FILE", "-o")] = ""
    """Into 100 % of a file."""
    where: Annotated[tuple[str, ...], Metavar("CONDITION", one_each=True)] = ()
    """Under which conditions."""


def test_words_become_options():
    """Arguments fill the dataclass."""
    words = ["--count=3", "--json", "-o", "x=y", "--hosts", "a", "b"]

    assert parse(Options, words, prog="traceml thing") == Options(count=3, json=True, output="x=y", hosts=("a", "b"))


def test_values_of_a_repeated_option_are_added():
    """None of them is forgotten, and a condition does not take the words after it."""
    words = ["--hosts", "a", "b", "--where", "x y", "--hosts", "c", "--where=z"]

    options = parse(Options, words, prog="traceml thing")

    assert options == Options(hosts=("a", "b", "c"), where=("x y", "z"))
    with pytest.raises(UsageError, match="unrecognized arguments: y"):
        parse(Options, ["--where", "x", "y"], prog="traceml thing")


def test_help_without_the_source_lists_the_options(capsys):
    """An installation may have compiled files only: the texts are missing then, not the help."""
    options = make_dataclass("NoSourceOptions", [("steps", Annotated[int, NumberRange()], 5)])

    with pytest.raises(SystemExit, match="0"):
        parse(options, ["--help"], prog="traceml thing")

    assert "--steps INT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--jsn"], "did you mean --json?"),
        (["extra"], "unrecognized arguments: extra"),
        (["--count", "x"], "--count"),
        (["--count"], "--count needs a value"),
        (["--kind", "c"], "--kind: invalid choice: 'c'"),
        (["-o"], "--output needs a value"),
        (["--json=1"], "--json"),
        (["--cou", "3"], "unrecognized options: --cou; did you mean --count?"),
        (["--most", "x"], "--most takes a number of at least 1, not 'x'"),
        (["--form", "z"], "--form: invalid choice: 'z'"),
        (["--hosts"], "--hosts needs a value"),
        (["--hosts", "--json"], "--hosts needs a value"),
    ],
)
def test_errors_are_one_line(words, says, capsys):
    """Each kind of mistake is a UsageError of one line which names it; nothing is printed."""
    with pytest.raises(UsageError) as caught:
        parse(Options, words, prog="traceml thing")

    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "None" not in str(caught.value)
    assert not set("│╭─╰") & set(str(caught.value))
    assert capsys.readouterr().err == ""


@dataclass(frozen=True)
class Needy:
    """Need two things."""

    first: Annotated[str, Positional("FIRST")]
    """The first."""
    second: Annotated[str, Positional("SECOND")]
    """The second."""


@pytest.mark.parametrize(("words", "names"), [([], "FIRST and SECOND are"), (["x"], "SECOND is")])
def test_what_is_missing_is_named(words, names):
    """Missing options are named, without their help."""
    with pytest.raises(UsageError, match=f"^{names} missing$"):
        parse(Needy, words, prog="traceml thing")


@dataclass(frozen=True)
class Optional:
    """Need a word."""

    word: Annotated[str, Positional("WORD")]
    """The word."""
    keep_all: bool = False
    """Not an unknown option."""


@pytest.mark.parametrize(
    "words", [["a", "--keep-all"], ["--keep-all", "a"], ["--keep-all", "--", "a"], ["--keep_all", "a"]]
)
def test_options_stand_before_and_after_words(words):
    """The order of options and words means nothing."""
    assert parse(Optional, words, prog="traceml thing") == Optional("a", keep_all=True)


def test_words_go_on_after_an_option():
    """Also those of one argument."""
    options = make_dataclass(
        "WordsOptions", [("all", Annotated[tuple[str, ...], Positional("A")], ()), ("b", bool, False)]
    )

    assert parse(options, ["x", "--b", "y", ""], prog="traceml thing").all == ("x", "y", "")
    assert parse(options, [], prog="traceml thing") == options()


def test_an_unknown_option_is_named_before_a_word_that_is_missing():
    """The option that is not known is the mistake; underscores in names are hyphens."""
    with pytest.raises(UsageError, match=r"^unrecognized options: --other$"):
        parse(Optional, ["--keep-all", "--other=1"], prog="traceml thing")

    with pytest.raises(UsageError, match=r"^WORD is missing$"):
        parse(Optional, ["--keep_all"], prog="traceml thing")


@pytest.mark.parametrize("flag", ["--port", "--hosts"])
def test_an_option_without_its_value_is_named(flag):
    """The commands with a parser of their own say it in the same words."""
    parser = CommandParser(prog="traceml thing")
    parser.add_argument("--port", metavar="PORT")
    parser.add_argument("--hosts", metavar="HOST", nargs="+")

    with pytest.raises(UsageError, match=f"^{flag} needs a value$"):
        parser.parse_args([flag])


def test_help_prints_and_leaves(capsys):
    """--help prints to stdout and leaves with 0."""
    with pytest.raises(SystemExit) as left:
        parse(Options, ["--help"], prog="traceml thing")

    assert not left.value.code
    assert "How often." in capsys.readouterr().out


def test_sentences_are_wrapped_and_examples_kept():
    """A line that is indented is an example: it goes on indented."""
    text = "Some words that are too many for it.\n\n  traceml run train.py    one rank"

    assert wrapped(text, 20).splitlines() == [
        "Some words that are",
        "too many for it.",
        "",
        "  traceml run",
        "      train.py",
        "      one rank",
    ]


@pytest.mark.parametrize(
    ("command", "word", "meant"), [(run, "--nproc", "--nproc-per-node"), (launch, "--host", "--hostnames")]
)
def test_a_shortened_option_is_completed_before_one_that_is_alike(command, word, meant):
    """`--nproc` is nearer to `--project`, and `--host` to `--qos`."""
    with pytest.raises(UsageError, match=f"unrecognized options: {word}; did you mean {meant}\\?"):
        command.make_parser().parse_args([word, "2"])


@pytest.mark.parametrize("command", [run, launch, serve])
def test_parsers_with_words_of_a_script_name_an_option_that_is_alike(command):
    """They are no dataclass."""
    with pytest.raises(UsageError, match="unrecognized options: --runs_di; did you mean --runs"):
        command.make_parser().parse_args(["--runs_di", "x"])
