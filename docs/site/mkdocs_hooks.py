"""MkDocs hooks: pages made from other files of the repository, and links that lead out of `docs/`.

`make docs` builds the site into `build/site`; a link that leads nowhere fails it.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REPOSITORY = "https://github.com/traceml/traceml"
RAW = "https://raw.githubusercontent.com/traceml/traceml/main/"
CARDS = ROOT / "tests" / "renderers" / "snapshots" / "kinds_80.txt"
HELP_COLUMNS = "88"
CATALOG_LEAD = """\
Each kind of finding with an example: its headline, the cause with the figures it is based on, and the remedy. The rules
made the examples; times and names differ in your run. [Rules](verdicts.md#kinds) states the condition of each kind, and
where another severity is given."""

# Pages of the site that are files elsewhere in the repository.
COPIED = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}

_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_CARD = re.compile(r"^─ traceml ─ (\w+) ─", re.MULTILINE)
_LABEL = re.compile(r"^ (Next|Gain|Basis|Also|Time|Not known) +", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    for name, make in _made_pages().items():
        files.append(File.generated(config, name, content=make()))

    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside the site lead to the repository."""
    name = page.file.src_uri
    source = ROOT / COPIED[name] if name in COPIED else DOCS / name
    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _with_links(part, name, source) for part in parts)


def _made_pages() -> dict[str, Callable[[], str]]:
    copies = {name: (ROOT / source).read_text for name, source in COPIED.items()}
    return {
        **copies,
        "commands.md": commands_page,
        "catalog.md": catalog_page,
        "api/errors.md": errors_page,
        "decisions/index.md": decisions_page,
    }


def _with_links(text: str, name: str, source: Path) -> str:
    text = text.replace(f"]({RAW}", f"]({os.path.relpath(ROOT, source.parent)}/")
    return _LINK.sub(lambda found: f"]({site_link(found[1], name, source)})", text)


def site_link(link: str, name: str, source: Path) -> str:
    """Return a link of a page as the site needs it.

    Args:
        link: as written, relative to its file.
        name: the page, relative to the site.
        source: the file that the page comes from.
    """
    path, mark, anchor = link.partition("#")
    if "://" in link or not path:
        return link

    target = Path(os.path.normpath(source.parent / path))
    if not target.exists() or not target.is_relative_to(ROOT):
        return link  # a page that is made here, or one that MkDocs reports

    pages = {ROOT / file: page for page, file in COPIED.items()} | {DOCS / "decisions": "decisions/index.md"}
    if target in pages or (target.is_file() and target.is_relative_to(DOCS)):
        on_site = pages.get(target) or target.relative_to(DOCS).as_posix()
        return posixpath.relpath(on_site, posixpath.dirname(name) or ".") + mark + anchor

    kind = "tree" if target.is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{target.relative_to(ROOT).as_posix()}{mark}{anchor}"


def commands_page() -> str:
    """Return the reference of commands: the help of each, from its parser."""
    from traceml.cli import COMMANDS
    from traceml.cli.runs import EDITS

    lines = ["# Commands", "", "The help of each command, as `traceml COMMAND --help` prints it."]
    for words in [*([name] for name in COMMANDS), *(["runs", name] for name in EDITS)]:
        lines += ["", f"## traceml {' '.join(words)}", "", "```text", help_text(words), "```"]

    return "\n".join(lines) + "\n"


def help_text(words: list[str]) -> str:
    """Return the help of a command without colors."""
    from traceml.cli import main

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = HELP_COLUMNS
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        os.environ.update({} if before is None else {"COLUMNS": before})

    return _ANSI.sub("", output.getvalue()).strip()


def catalog_page() -> str:
    """Return the catalog of verdicts: for each kind its severity, and examples that the rules made."""
    from traceml.diagnosis.kinds import CRITICAL_SHARE, WARNING_SHARE, Kind
    from traceml.formatting import percent_text

    examples = examples_by_kind()
    lines = [
        "# Catalog of verdicts",
        "",
        CATALOG_LEAD,
    ]
    least = [percent_text(share) for share in (WARNING_SHARE, CRITICAL_SHARE)]
    by_cost = f"`warning` from {least[0]} of step time, `critical` from {least[1]}"
    for kind in Kind:
        severity = f"`{kind.rule.severity}`" if kind.rule.severity else by_cost
        lines += ["", f"## {kind}", "", f"Severity: {severity}."]
        for headline, cause, remedies in examples[kind.value]:
            lines += ["", f'!!! example "{headline}"', "", f"    {cause}"]
            lines += [line for label, text in remedies for line in ("", f"    **{label}:** {text}")]

    return "\n".join(lines) + "\n"


def examples_by_kind() -> dict[str, list[tuple[str, str, list[tuple[str, str]]]]]:
    """Return headline, cause and labeled lines of the cards that a test holds, by kind."""
    found = defaultdict(list)
    parts = _CARD.split(CARDS.read_text(encoding="utf-8"))
    for kind, body in zip(parts[1::2], parts[2::2], strict=True):
        text = body.partition("\n")[2]
        told, *labeled = _LABEL.split(text)
        headline, _, cause = told.strip().partition("\n")
        labels = [(label, _unwrapped(each)) for label, each in zip(labeled[::2], labeled[1::2], strict=True)]
        found[kind].append((_escaped(_unwrapped(headline)), _escaped(_unwrapped(cause)), labels))

    return found


def _unwrapped(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return text.replace("_", r"\_").replace('"', "'")


def errors_page() -> str:
    """Return the reference of errors: their tree, and each one's docstring."""
    from traceml import errors

    tree = (errors.__doc__ or "").partition("\n\n")[2].strip()
    lines = ["# Errors", "", "Every error of traceml is a `TraceMLError`.", "", "```text", tree, "```", ""]
    return "\n".join([*lines, *(f"::: traceml.errors.{name}\n" for name in errors.__all__)])


def decisions_page() -> str:
    """Return the list of decisions, by number."""
    lines = ["# Decisions", "", "Choices between alternatives: the question, the measurements, the choice.", ""]
    for path in sorted((DOCS / "decisions").glob("*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")

    return "\n".join(lines) + "\n"
