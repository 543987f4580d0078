"""Prose: docstrings begin with a noun or a verb, spelling is American, and words are those of the field."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "traceml"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

_QUESTION = re.compile(r"(What|How|Who|Whose|Where|When|Which|Why)\b")
_BRITISH = re.compile(
    r"colour|behaviour|honour|favour|neighbour|\bcentre|\bgrey\b|\bdefence|\blicence|\bprogramme\b|\bwhilst|\bamongst"
    r"|travell(ed|ing)|labell(ed|ing)|modell(ed|ing)|signall(ed|ing)"
    r"|\banalys(e|ed|ing|er)\b|\b(capitalis|categoris|customis|emphasis|finalis|generalis|initialis|maximis|minimis|modularis|normalis|optimis"
    r"|organis|parallelis|prioritis|quantis|randomis|realis|recognis|reorganis|serialis|specialis|stabilis|standardis"
    r"|summaris|synchronis|tokenis|utilis|vectoris|visualis)(e|ed|es|er|ers|ing|ation|ations)\b",
    re.IGNORECASE,
)
# Private words of earlier versions, each with the term that replaced it.
_PRIVATE = {
    "crew": "worker group",
    "culprit": "the argument's name",
    "parcel": "serialized call",
    "forlorn": "never connected",
    "bury": "finalize",
    "buried": "finalized",
    "tunnel mouth": "tunnel listener",
    "stand-in": "compensating thread",
    "stand_in": "substitute",
    "time-out": "timeout",
    "time-outs": "timeouts",
    "for ever": "forever, or a bound",
    "whatever becomes of": "(say what happens)",
    "holds the others up": "slows the others down",
    "hold others up": "slow others down",
}
_PRIVATE_WORD = re.compile("|".join(rf"\b{word}\b" for word in _PRIVATE), re.IGNORECASE)


def _docstrings() -> Iterator[tuple[str, str]]:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    line = getattr(node, "lineno", 1)
                    yield f"{path.relative_to(ROOT)}:{line}", text


def _lines() -> Iterator[tuple[str, str]]:
    for path in [*sorted(SOURCE.rglob("*.py")), *sorted(SOURCE.rglob("*.c")), *PAGES]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f"{path.relative_to(ROOT)}:{number}", line


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    """A docstring says what a thing is or does; it does not begin as a question."""
    assert [f"{place}: {text[:60]}" for place, text in _docstrings() if _QUESTION.match(text)] == []


def test_spelling_is_american() -> None:
    """One spelling in code and docs, that of torch."""
    assert [f"{place}: {found[0]}" for place, line in _lines() if (found := _BRITISH.search(line))] == []


def test_words_are_those_of_the_field() -> None:
    """No word needs a translation that the field has a term for."""
    assert [f"{place}: {found[0]}" for place, line in _lines() if (found := _PRIVATE_WORD.search(line))] == []
