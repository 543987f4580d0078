"""Prose: docstrings begin with a noun or a verb, spelling is American, and words are those of the field."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.source_tree import SOURCE, nodes_of, source_files

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

_QUESTION = re.compile(r"(What|How|Who|Whose|Where|When|Which|Why)\b")
_BRITISH = re.compile(
    r"colour|behaviour|honour|favour|neighbour|\bcentre|\bgrey\b|\bdefence|\blicence|\bprogramme\b|\bwhilst|\bamongst"
    r"|travell(ed|ing)|labell(ed|ing)|modell(ed|ing)|signall(ed|ing)"
    r"|\banalys(e|ed|ing|er)\b|\b(capitalis|categoris|customis|emphasis|finalis|generalis|initialis|maximis|minimis|modularis|normalis|optimis"
    r"|organis|parallelis|prioritis|quantis|randomis|realis|recognis|reorganis|serialis|specialis|stabilis|standardis"
    r"|summaris|synchronis|tokenis|utilis|vectoris|visualis)(e|ed|es|er|ers|ing|ation|ations)\b"
)
_WORD = re.compile(r"\w+")
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
    "stand-ins": "representatives",
    "stand_ins": "representatives",
    "time-out": "timeout",
    "time-outs": "timeouts",
    "for ever": "forever, or a bound",
    "whatever becomes of": "(say what happens)",
    "takes down": "records",
    "take down": "record",
    "stands still": "makes no progress, or was stopped",
    "stand still": "make no progress, or were stopped",
    "stood still": "made no progress, or was stopped",
    "holds the others up": "slows the others down",
    "hold others up": "slow others down",
}
_PRIVATE_WORD = re.compile("|".join(rf"\b{word}\b" for word in _PRIVATE))


def _docstrings() -> Iterator[tuple[str, str]]:
    for path in source_files():
        for node in nodes_of(path, ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                line = getattr(node, "lineno", 1)
                yield f"{path.relative_to(ROOT)}:{line}", text


@cache
def _texts() -> dict[str, str]:
    """Return the texts in lower case by their path."""
    paths = [*source_files(), *sorted(SOURCE.rglob("*.c")), *PAGES]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").lower() for path in paths}


def _words() -> dict[str, str]:
    """Return each word that occurs, with the path of a text: a word occurs a hundred times on average."""
    return {word: path for path, text in _texts().items() for word in set(_WORD.findall(text))}


def _places(pattern: re.Pattern[str]) -> Iterator[str]:
    """Yield where a text has a pattern: path, line and what was found."""
    for path, text in _texts().items():
        for found in pattern.finditer(text):
            yield f"{path}:{text.count(chr(10), 0, found.start()) + 1}: {found[0]}"


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    """A docstring says what a thing is or does; it does not begin as a question."""
    assert [f"{place}: {text[:60]}" for place, text in _docstrings() if _QUESTION.match(text)] == []


def test_spelling_is_american() -> None:
    """One spelling in code and docs, that of torch."""
    assert [f"{path}: {word}" for word, path in _words().items() if _BRITISH.search(word)] == []


def test_words_are_those_of_the_field() -> None:
    """No word needs a translation that the field has a term for."""
    assert list(_places(_PRIVATE_WORD)) == []
