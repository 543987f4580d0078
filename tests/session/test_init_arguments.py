"""The typed arguments of `traceml.init()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from traceml.session.init_arguments import InitArguments
from traceml.settings import declarations


def test_every_setting_is_an_argument_of_its_type() -> None:
    """Arguments and settings are the same, in the same order; lists, maps and paths are taken in any form."""
    typed = get_type_hints(InitArguments)

    assert list(typed) == list(declarations())
    assert typed == {name: _taken(declared.kind) for name, declared in declarations().items()}


def _taken(kind: Any) -> Any:
    forms: dict[Any, Any] = {tuple: Sequence[str], dict: Mapping[(str, *get_args(kind)[1:])], Path: str | PathLike[str]}
    if kind == Path | None:
        return forms[Path] | None

    return forms.get(get_origin(kind) or kind, kind)
