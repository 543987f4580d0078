"""Fields and conditions as users write them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from traceml.errors import UsageError
from traceml.traces.query.expressions import parse_by, parse_where


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cat=POSIX", [("cat", "=", "POSIX", None)]),
        (" cat = POSIX , dur > 100 ", [("cat", "=", "POSIX", None), ("dur", ">", "100", 100)]),
        ("dur>=2.5ms", [("dur", ">=", "2.5ms", 2500)]),
        ("dur<10ns", [("dur", "<", "10ns", Fraction(1, 100))]),
        ("args.size>=4KiB", [("args.size", ">=", "4KiB", 4096)]),
        ("name==a,pid == 3", [("name", "=", "a", None), ("pid", "=", "3", 3)]),
        ("name==='x", [("name", "=", "='x", None)]),
        ("name='a,b'", [("name", "=", "a,b", None)]),
        ('name="say \\"hi\\""', [("name", "=", 'say "hi"', None)]),
        ("name=a\\,b", [("name", "=", "a,b", None)]),
        ("name=''", [("name", "=", "", None)]),
        ("name~a{2,3}", None),
        ("pid!=-1", [("pid", "!=", "-1", -1)]),
        ("name='5'", [("name", "=", "5", None)]),
        ("", []),
    ],
)
def test_conditions(text, parts):
    """Commas separate conditions, quotes protect commas, numbers may have units."""
    if parts is None:
        with pytest.raises(UsageError, match="HERE"):
            parse_where(text)
    else:
        found = [(each.field, each.operator, each.value, each.number) for each in parse_where(text)]
        assert found == parts


@pytest.mark.parametrize("text", ["=", "cat", "cat=", "cat=a,", ",", "cat=a,,pid=1", "dur~5", "dur=fast", "nme=5"])
def test_conditions_that_make_no_sense(text):
    """Each is refused."""
    with pytest.raises(UsageError, match="where: "):
        parse_where(text)


@pytest.mark.parametrize(
    "text",
    [
        "cat=POSIX|cat=STDIO",
        "cat=POSIX || cat=STDIO",
        "cat=POSIX|STDIO",
        "name!=a|b",
        "name~read|name~write",
        "cat=POSIX and dur>5",
        "cat=POSIX OR args.size > 5",
        "cat=a && pid=1",
    ],
)
def test_conditions_joined_by_other_words(text):
    """Each matched nothing; the error says how several values and conditions are written."""
    with pytest.raises(UsageError, match=r"several as in cat~'\^\(POSIX\|STDIO\)\$'"):
        parse_where(text)


@pytest.mark.parametrize("text", ["name='a|b'", "name~a|b", "name=this or that", "name=R&D", "cat~'^(POSIX|STDIO)$'"])
def test_values_that_only_look_joined(text):
    """Quotes protect a value, alternatives belong to a pattern, and words are words."""
    assert len(parse_where(text)) == 1


def test_by():
    """Fields are separated by commas; duplicates count once."""
    assert parse_by(" name, args.size ,name") == ("name", "args.size")


def test_pattern_is_expression_or_glob():
    """An invalid regular expression is a shell pattern for the whole text."""
    (expression,) = parse_where("name~^re")
    (glob,) = parse_where("name~*.npy")

    assert [expression.accepts(name) for name in ("read", "pread", None)] == [True, False, False]
    assert [glob.accepts(name) for name in ("a.npy", "a.npyz")] == [True, False]
