"""`traceml schema`: JSON Schemas of what commands print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from traceml.cli.assistants.json_documents import DOCUMENTS, document_schema
from traceml.cli.options.parsing import Metavar, Positional, parse
from traceml.errors import UsageError
from traceml.fail_open import writing
from traceml.formatting import plural

__all__ = ["main"]


@dataclass(frozen=True)
class SchemaOptions:
    """Print the JSON Schema of a document that commands print with --json.

    Without a name, the documents are listed.
    """

    name: Annotated[str | None, Positional("[NAME]")] = None
    """report, lines, compare, compares, analysis, whatif, fleet, runs, stacks or profile."""
    output: Annotated[str | None, Metavar("DIR", "-o")] = None
    """Write it, or without a name all of them, to this folder instead."""
    json: bool = False
    """Print the list of documents as JSON and nothing else; a schema is always JSON."""


def main(argv: list[str]) -> int:
    """Print a schema, or the list of them."""
    options = parse(SchemaOptions, argv, prog="traceml schema")
    if options.name is not None and options.name not in DOCUMENTS:
        raise UsageError(f"no document {options.name!r}. Documents: {', '.join(DOCUMENTS)}")

    if options.output is not None:
        written = _write(Path(options.output), [*DOCUMENTS] if options.name is None else [options.name])
        print(json.dumps(written, indent=2) if options.json else f"{options.output}: {plural(len(written), 'schema')}")
    elif options.name is not None:
        print(_text(options.name), end="")
    elif options.json:
        print(json.dumps({name: printed_by for name, (_, printed_by) in DOCUMENTS.items()}, indent=2))
    else:
        print("\n".join(f"{name:<10}{printed_by}" for name, (_, printed_by) in DOCUMENTS.items()))

    return 0


def _text(name: str) -> str:
    return json.dumps(document_schema(name), indent=2) + "\n"


def _write(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Write schemas to a folder; return their paths by name."""
    paths = {name: folder / f"{name}-1.json" for name in names}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            path.write_text(_text(name))

    return {name: str(path) for name, path in paths.items()}
