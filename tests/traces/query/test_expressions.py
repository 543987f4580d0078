"""Fields and conditions as users write them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from traceml.errors import UsageError
from traceml.traces.query.conditions import parse_where
from traceml.traces.query.expressions import AllOf, Condition, Negation, parse_by


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cat=POSIX", [("cat", "=", "POSIX", None)]),
        (" cat = POSIX , dur > 100 ", [("cat", "=", "POSIX", None), ("dur", ">", "100", 100)]),
        ("dur>=2.5ms", [("dur", ">=", "2.5ms", 2500)]),
        ("dur<10ns", [("dur", "<", "10ns", Fraction(1, 100))]),
        ("args.size>=4KiB", [("args.size", ">=", "4KiB", 4096)]),
        ("args.size>=1TB,args.size<2k", [("args.size", ">=", "1TB", 10**12), ("args.size", "<", "2k", 2000)]),
        ("args.text=5ms", [("args.text", "=", "5ms", None)]),
        ("name==a,pid == 3", [("name", "=", "a", None), ("pid", "=", "3", 3)]),
        ("name==='x", [("name", "=", "='x", None)]),
        ("name='a,b'", [("name", "=", "a,b", None)]),
        ('name="say \\"hi\\""', [("name", "=", 'say "hi"', None)]),
        ("name=a\\,b", [("name", "=", "a,b", None)]),
        ("name=''", [("name", "=", "", None)]),
        ("name~a{2,3}", None),
        ("pid!=-1", [("pid", "!=", "-1", -1)]),
        (
            "name='5',args.x>'0.5',args.x<'5us'",
            [("name", "=", "5", 5), ("args.x", ">", "0.5", Fraction(1, 2)), ("args.x", "<", "5us", None)],
        ),
        ("cat<>POSIX,name=~^re", [("cat", "!=", "POSIX", None), ("name", "~", "^re", None)]),
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


@pytest.mark.parametrize(
    "text",
    [
        "=",
        "cat",
        "cat=",
        "cat=a,",
        ",",
        "cat=a,,pid=1",
        "dur~5",
        "dur=fast",
        "nme=5",
        "dur>1m",
        "args.size>=4ms",
        "args.size<4Ki",
    ],
)
def test_conditions_that_make_no_sense(text):
    """Each is refused."""
    with pytest.raises(UsageError, match="where: "):
        parse_where(text)


def shown(expression):
    """Return an expression in one form: all parentheses, operators as words."""
    if isinstance(expression, Condition):
        return f"{expression.field}{expression.operator}{expression.value}"

    if isinstance(expression, Negation):
        return f"not {shown(expression.part)}"

    word = " and " if isinstance(expression, AllOf) else " or "
    return f"({word.join(map(shown, expression.parts))})"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("cat=POSIX|cat=STDIO", "(cat=POSIX or cat=STDIO)"),
        ("cat=POSIX || cat=STDIO", "(cat=POSIX or cat=STDIO)"),
        ("name~read|name~write", "(name~read or name~write)"),
        ("cat=POSIX and dur>5", "(cat=POSIX and dur>5)"),
        ("cat=a && pid=1", "(cat=a and pid=1)"),
        ("cat=POSIX OR args.size > 5", "(cat=POSIX or args.size>5)"),
        ("cat=a or cat=b and pid=1", "(cat=a or (cat=b and pid=1))"),
        ("(cat=a or cat=b) and pid=1", "((cat=a or cat=b) and pid=1)"),
        ("not cat=a and pid=1", "(not cat=a and pid=1)"),
        ("!(cat=a, pid=1)", "not (cat=a and pid=1)"),
        ("cat IN (POSIX, 'a, b')", "(cat=POSIX or cat=a, b)"),
        ("pid not in (1,2)", "not (pid=1 or pid=2)"),
        ("(name=f(int) or name=g(a b)) and pid=1", "((name=f(int) or name=g(a b)) and pid=1)"),
        ("(name~^(read|write)$ or cat=x)", "(name~^(read|write)$ or cat=x)"),
        ("name='x' OR NOT NOT cat=y", "(name=x or not not cat=y)"),
        ("name=f)", "name=f)"),
    ],
)
def test_conditions_are_joined(text, meaning):
    """NOT binds closest, then AND, then OR; parentheses of a value belong to it."""
    (found,) = parse_where(text)

    assert shown(found) == meaning


def test_commas_bind_last():
    """A condition that is added by a comma holds for all alternatives before it."""
    assert [shown(part) for part in parse_where("cat=a or cat=b,dur>5")] == ["(cat=a or cat=b)", "dur>5"]


@pytest.mark.parametrize("text", ["cat=POSIX|STDIO", "name!=a|b"])
def test_alternatives_of_a_value(text):
    """Two values are no text to compare with; the error says how several are written."""
    with pytest.raises(UsageError, match=r"write IN \(a, b\) for several"):
        parse_where(text)


@pytest.mark.parametrize(
    "text",
    ["(cat=a", "cat in (", "cat in ()", "cat in (a", "not", "cat='a' or", "cat='a' cat=b", "(cat='a'))", "cat in a"],
)
def test_groups_that_make_no_sense(text):
    """Each is refused, with the place."""
    with pytest.raises(UsageError, match="HERE"):
        parse_where(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("cat=POSIX AND", "cat=POSIX -> HERE ->  AND"),
        ("cat=POSIX or ", "cat=POSIX -> HERE ->  or"),
        ("cat=POSIX AND size>4096", "cat=POSIX -> HERE ->  AND size>4096"),
        ("cat=POSIX && (size > 1)", "cat=POSIX -> HERE ->  && (size > 1)"),
        ("name=a, cat=b OR NAM=c", "name=a, cat=b -> HERE ->  OR NAM=c"),
    ],
)
def test_a_condition_of_no_field_is_no_part_of_a_value(text, place):
    """A misspelt field, or none, after AND or OR would otherwise be compared as text, and match nothing."""
    with pytest.raises(UsageError, match="another condition is expected") as refused:
        parse_where(text)

    assert place in str(refused.value)


@pytest.mark.parametrize("text", ["name='a|b'", "name~a|b", "name=this or that", "name=R&D", "cat~'^(POSIX|STDIO)$'"])
def test_values_that_only_look_joined(text):
    """Quotes protect a value, alternatives belong to a pattern, and words are words."""
    assert len(parse_where(text)) == 1


def test_deep_nesting():
    """Nesting has a limit, below that of Python's stack."""
    with pytest.raises(UsageError, match="at most 50 levels"):
        parse_where("not " * 10_000 + "cat=a")


def test_by():
    """Fields are separated by commas; duplicates count once."""
    assert parse_by(" name, args.size ,name") == ("name", "args.size")


def test_pattern_is_expression_or_glob():
    """An invalid regular expression is a shell pattern for the whole text."""
    (expression,) = parse_where("name~^re")
    (glob,) = parse_where("name~*.npy")

    assert [expression.accepts(name) for name in ("read", "pread", None)] == [True, False, False]
    assert [glob.accepts(name) for name in ("a.npy", "a.npyz")] == [True, False]


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        ("args.x>9", [10, 9.5, "10", "10.5", "1e3", "1e1", "10.0"]),
        ("args.x<='9'", [9, "9", "-0.5"]),
        ("args.x=10", [10, "10", "1e1", "10.0"]),
        ("args.x>=n", ["n/a"]),
    ],
)
def test_numbers_in_quotes_are_numbers(text, passing):
    """In the trace and in the condition; a text and a number have no order."""
    (condition,) = parse_where(text)
    values = [10, 9.5, "10", "10.5", "1e3", 9, "9", "-0.5", "1e1", "10.0", "n/a", None]

    assert [value for value in values if condition.accepts(value)] == [one for one in values if one in passing]
