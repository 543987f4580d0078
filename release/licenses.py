"""Licenses of installed dependencies, as SPDX expressions, and whether they are allowed (`licenses.toml`)."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["LicensedPackage", "dependencies", "is_allowed", "license_of", "licensed"]

DISTRIBUTION = "traceml-torch"
_RULES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("licenses.toml").read_text())
_CLASSIFIER = "License :: OSI Approved :: "
_WORD = r"[\w.+-]+(?: WITH [\w.-]+)?"
_EXPRESSION = re.compile(rf"\(*{_WORD}\)*(?: (?:AND|OR) \(*{_WORD}\)*)*")


@dataclass(frozen=True)
class LicensedPackage:
    """An installed package and its license.

    Attributes:
        name: normalized name of the distribution.
        version: as installed.
        license: SPDX expression; "" where its metadata tells none that is known.
        said: the words of its metadata.
    """

    name: str
    version: str
    license: str
    said: str

    @property
    def is_allowed(self) -> bool:
        """Whether the license is known, and every part of it allowed."""
        return bool(_EXPRESSION.fullmatch(self.license)) and is_allowed(self.license)


def dependencies(extras: set[str] | None = None) -> tuple[dict[str, metadata.Distribution], set[str]]:
    """Return the installed distributions that ours needs, directly or not, by name, and those that are not installed.

    Args:
        extras: of ours, to follow; None: all.

    Raises:
        importlib.metadata.PackageNotFoundError: our distribution is not installed.
    """
    own = metadata.distribution(DISTRIBUTION)
    every = set(own.metadata.get_all("Provides-Extra") or ())
    waiting = list(_needs(own, every if extras is None else extras))
    found: dict[str, metadata.Distribution] = {}
    missing: set[str] = set()
    followed: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        need = waiting.pop()
        step = name, _ = canonicalize_name(need.name), frozenset(need.extras)
        if name == DISTRIBUTION or step in followed:
            continue

        followed.add(step)
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.add(name)
        else:
            waiting += _needs(found[name], set(need.extras))

    return found, missing


def _needs(distribution: metadata.Distribution, extras: set[str]) -> Iterator[Requirement]:
    for line in distribution.requires or ():
        need = Requirement(line)
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield need


def licensed(distribution: metadata.Distribution) -> LicensedPackage:
    """Return a package with the license that its metadata tells, or that `licenses.toml` has for it."""
    fields = distribution.metadata.json
    name = canonicalize_name(str(fields["name"]))
    expression, text = (_line(fields.get(field)) for field in ("license_expression", "license"))
    classifiers = [each for each in _list(fields.get("classifier")) if each.startswith("License ::")]
    said = "; ".join(each for each in (expression, text, *classifiers) if each) or "nothing"
    known = _RULES["read"].get(name) or license_of(expression, text, classifiers)
    return LicensedPackage(name, distribution.version, known, said)


def _line(text: str | list[str] | None) -> str:
    lines = str(text or "").strip().splitlines()
    return lines[0].strip() if lines else ""


def _list(value: str | list[str] | None) -> list[str]:
    return value if isinstance(value, list) else []


def license_of(expression: str, text: str, classifiers: list[str]) -> str:
    """Return the license that metadata tells, as an SPDX expression; "" if it tells none that is known.

    Args:
        expression: the field `License-Expression`.
        text: the first line of the older field `License`.
        classifiers: those of licenses. All of them must apply, as they do not say which.
    """
    spellings: dict[str, str] = _RULES["spellings"]
    if expression:
        return expression

    if text in spellings:
        return spellings[text]

    if text.upper() not in ("", "UNKNOWN") and _EXPRESSION.fullmatch(text):
        return text

    names = [spellings.get(each.removeprefix(_CLASSIFIER), "") for each in classifiers]
    return " AND ".join(names) if all(names) else ""


def is_allowed(expression: str) -> bool:
    """Return whether an SPDX expression has an alternative of which each part is allowed.

    Raises:
        ValueError: it is no SPDX expression.
    """
    if not _EXPRESSION.fullmatch(expression):
        raise ValueError(f"{expression!r} is no SPDX expression")

    allowed = set(_RULES["allowed"])
    words = re.sub(rf"\b(?!AND\b|OR\b){_WORD}", lambda found: str(found[0] in allowed), expression)
    return _value(ast.parse(words.replace("AND", "and").replace("OR", "or"), mode="eval").body)


def _value(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        values = [_value(each) for each in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)

    return isinstance(node, ast.Constant) and bool(node.value)
