"""Pages of the documentation as blocks of code, and the commands in them."""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import traceml
from traceml import traces

__all__ = ["PAGES", "ROOT", "Block", "blocks", "commands_of", "docstring_examples", "run_examples", "spans"]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

_BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_SPAN = re.compile(r"`([^`\n]+)`")
_ENDS_COMMAND = {"|", "||", "&&", ";", "&", ">", ">>", "<"}


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
        page: path relative to the repository.
        line: number of its first line in the page.
        language: the word after the fence; "" where there is none.
        file: the file that it is the content of; "" where it is no file.
        text: the code.
    """

    page: str
    line: int
    language: str
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def shell_lines(self) -> list[str]:
        """Return its commands: all lines of `sh`, those after a prompt of `console`, and else those of traceml."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "sh":
            return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]

        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return prompted or [line for line in lines if not self.language and line.startswith(("traceml ", "TRACEML_"))]


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages, or those in some languages."""
    return [block for page in PAGES for block in _blocks_of(page) if not languages or block.language in languages]


def _blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        title = _TITLE.search(found[2])
        line = text.count("\n", 0, found.start()) + 2
        yield Block(str(page.relative_to(ROOT)), line, found[1], title[1] if title else "", found[3])


def docstring_examples() -> list[Block]:
    """Return the examples in the docstrings of public names, the shutdown of this process last."""
    parser = doctest.DocTestParser()
    names = sorted(_DOCUMENTED, key=lambda name: name == "traceml.shutdown")
    texts = {name: "".join(each.source for each in parser.get_examples(_docstring(name))) for name in names}
    return [Block(name, 1, "python", "", text) for name, text in texts.items() if text]


_DOCUMENTED = {f"{owner.__name__}.{name}": (owner, name) for owner in (traceml, traces) for name in owner.__all__}


def _docstring(name: str) -> str:
    owner, own_name = _DOCUMENTED[name]
    return getattr(owner, own_name).__doc__ or ""


class _ShownOutput(doctest.OutputChecker):
    """Compares the outputs that a docstring shows; one that it does not show may be anything."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def run_examples(name: str, names: dict[str, Any]) -> None:
    """Run the examples in the docstring of a public name, and compare the outputs that it shows.

    Args:
        name: such as `traceml.init`.
        names: the variables, also for the examples that follow.
    """
    examples = doctest.DocTestParser().get_doctest(_docstring(name), names, name, None, None)
    examples.globs = names  # the parser has made a copy
    failures: list[str] = []
    ran = doctest.DocTestRunner(_ShownOutput()).run(examples, out=failures.append, clear_globs=False)
    if ran.failed:
        raise AssertionError("".join(failures))


def spans(page: Path) -> list[str]:
    """Return the code within the sentences of a page."""
    return _SPAN.findall(_BLOCK.sub("", page.read_text(encoding="utf-8")))


def commands_of(line: str) -> list[list[str]]:
    """Return the arguments of each call of traceml in a line of the shell."""
    inner = re.sub(r"\$\(|\)$|^eval ", " ", line)
    lexer = shlex.shlex(inner, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = list(lexer)
    starts = [index for index, word in enumerate(words) if word == "traceml" and not _is_value(words[:index])]
    return [[*_until_end(words[start + 1 :])] for start in starts]


def _is_value(before: list[str]) -> bool:
    """Whether the word after these is a value: the name of a package, of a secret or of torchrun's log files."""
    return (
        before[:1] == ["pip"] or before[-1:] == ["--logs-specs"] or (before[:1] == ["kubectl"] and "--" not in before)
    )


def _until_end(words: list[str]) -> Iterator[str]:
    for word in words:
        if word in _ENDS_COMMAND:
            return

        yield word
