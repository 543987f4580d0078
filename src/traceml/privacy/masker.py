"""Masking of secrets and personal data, by the name of a value and by its form.

A match is replaced by `[masked:<kind>]`; the kinds are `secret` (keys, tokens, passwords, credentials in URLs),
`email`, `phone`, `card` (payment cards with a valid checksum), `user` (user names in paths) and `custom` (the
`mask` setting). Masking is deterministic and idempotent. Ordinary hyperparameters are not masked (`max_tokens`,
`pad_token`, `key_dim`, seeds, git hashes), so it finds what looks like a secret, not every secret: names that must not
leave the machine belong in the `exclude` setting.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from traceml.errors import SettingsError
from traceml.privacy.name_rules import MASKED, is_placeholder, looks_random, name_kind
from traceml.privacy.patterns import (
    ASSIGNED,
    CARD,
    CODE,
    EMAIL,
    FILES,
    FLAG,
    HEADER,
    HOME,
    PHONE,
    SECRET_WORDS,
    SHARED_NAMES,
    TOKENS,
    URL_QUERY,
    URL_USER,
    compiled,
    is_card,
    shell_pattern,
)

__all__ = ["KINDS", "Masker"]

KINDS: Final = ("secret", "email", "phone", "card", "user", "custom")


class Masker:
    """Masks values, mappings and texts, and counts masked values by kind.

    Args:
        patterns: the `mask` setting. A shell pattern (`customer_*`) masks values under names that match it, and words
            that match it in texts; `re:EXPRESSION` does so by a regular expression; `!NAME` exempts names (a shell
            pattern) from being judged by their name; `!email`, `!phone`, `!card` and `!user` turn a kind off.
        user_name: user whose folders are also recognized outside `/home`; by default this process's user.
        source: origin of the patterns, for errors.

    Attributes:
        counts: number of masked values of each kind in the results, including those that were masked before.

    Raises:
        SettingsError: a pattern is invalid.
    """

    def __init__(self, patterns: Iterable[str] = (), *, user_name: str | None = None, source: str = "argument") -> None:
        self._source = source
        self.counts: Counter[str] = Counter()
        self._off: set[str] = set()
        self._exempt: list[re.Pattern[str]] = []
        self._names: list[Callable[[str], object]] = []
        self._texts: list[re.Pattern[str]] = []
        for pattern in patterns:
            self._add(pattern)

        name = _own_name() if user_name is None else user_name
        worth = len(name) >= 3 and name not in SHARED_NAMES
        self._own = re.compile(rf"(?<=[/\\]){re.escape(name)}(?=[/\\\s\"':]|$)") if worth else None

    def mask_mapping(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy with secret and personal values masked, also in nested mappings.

        Args:
            values: parameters, options, tags, an environment.
        """
        return {name: self.mask_value(name, value) for name, value in values.items()}

    def mask_logged_text(self, name: str, text: str) -> str:
        """Return a text that was logged under a name, masked; one of a dialogue's `user` is no login name."""
        is_said = name.lower() == "user" and not any(matches(name) for matches in self._names)
        return self.mask_text(text) if is_said else str(self.mask_value(name, text))

    def mask_value(self, name: str, value: Any) -> Any:
        """Return the value, masked if necessary.

        Texts are searched, also inside lists and mappings; numbers are masked by their name alone; other objects are
        returned unchanged, so convert them to texts first.

        Args:
            name: its name, which may mark it as secret.
        """
        name = str(name)
        if any(matches(name) for matches in self._names):
            return self._hidden("custom", value)

        kind = "" if any(each.fullmatch(name) for each in self._exempt) else name_kind(name)
        if isinstance(value, Mapping):
            inner = {each: self.mask_value(str(each), item) for each, item in value.items()}
            return {each: self._hidden("secret", item) for each, item in inner.items()} if kind == "strong" else inner
        if isinstance(value, list | tuple | set | frozenset):
            is_plain = kind not in _OF_NUMBERS and {*map(type, value)} <= {float, int}  # a matrix has a million of them
            return list(value) if is_plain else self._sequence(name, value)
        if kind == "strong" and _is_worth_masking(value):
            return self._hidden("secret", value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            return self._hidden(kind, value) if kind in _OF_NUMBERS and type(value) is int else value
        if kind in {"likely", "weak"} and looks_random(value, kind) and not is_placeholder(value):
            return self._hidden("secret", value)
        if kind in KINDS and kind not in self._off and not is_placeholder(value) and _fits(kind, value):
            return self._hidden(kind, value)

        return self.mask_text(value)

    def mask_text(self, text: str) -> str:
        """Return the text with secrets and personal data masked.

        Args:
            text: of any length: a log, a git diff, a command line, a configuration file.
        """
        if len(text) < 6:
            return self._custom(text) if self._texts else text
        if MASKED in text:
            for kind in KINDS:
                self.counts[kind] += text.count(f"{MASKED}{kind}]")

        text = self._tokens(text)
        if "://" in text:
            text = compiled(URL_USER).sub(self._url_user, text)
            text = compiled(URL_QUERY).sub(self._second, text)

        lower = text.lower()
        if "bearer" in lower or "authorization" in lower:
            text = compiled(HEADER).sub(self._second, text)
        if any(word in lower for word in SECRET_WORDS):
            text = self._assignments(text)
        if "email" not in self._off and "@" in text:
            text = compiled(EMAIL).sub(self._email, text)
        if "user" not in self._off and ("/" in text or "\\" in text):
            text = compiled(HOME).sub(self._home, text)
            text = self._own.sub(lambda _: self._mask("user"), text) if self._own is not None else text
        if "card" not in self._off:
            text = compiled(CARD).sub(self._card, text)
        if "phone" not in self._off and ("+" in text or "-" in text):
            text = compiled(PHONE).sub(self._phone_in(text), text)

        return self._custom(text) if self._texts else text

    # --- kinds -----------------------------------------------------------------------------------------------

    def _add(self, pattern: str) -> None:
        exempts, rest = pattern.startswith("!"), pattern.removeprefix("!").strip()
        if exempts and rest in KINDS and rest not in {"secret", "custom"}:
            self._off.add(rest)
            return

        try:
            if not rest or (exempts and rest in KINDS):
                raise ValueError(f"{pattern!r} cannot be turned off")
            if exempts:
                self._exempt.append(shell_pattern(rest))
            elif rest.startswith("re:"):
                expression = re.compile(rest.removeprefix("re:"))
                if expression.match(""):
                    raise ValueError("it matches the empty text")

                self._names.append(expression.search)
                self._texts.append(expression)
            else:
                self._names.append(shell_pattern(rest).fullmatch)
                self._texts.append(shell_pattern(rest, words=True))
        except (re.error, ValueError) as error:
            raise SettingsError(
                "mask", f"{pattern!r} is not a pattern: {error}", source=self._source, allowed=_ALLOWED
            ) from error

    def _mask(self, kind: str) -> str:
        self.counts[kind] += 1
        return f"{MASKED}{kind}]"

    def _hidden(self, kind: str, value: Any) -> Any:
        """Mask a value of any type, keeping the structure of a mapping or a list."""
        if isinstance(value, Mapping):
            return {name: self._hidden(kind, item) for name, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._hidden(kind, item) for item in value]

        return self._mask(kind) if _is_worth_masking(value) else value

    def _sequence(self, name: str, values: Iterable[Any]) -> list[Any]:
        """Mask the members; one after an option such as `--api-key` by the name of the option."""
        masked, option = [], name
        for value in values:
            own, is_given, rest = _argument(value)
            if is_given:
                masked.append(f"{own}={self.mask_value(own.strip('-+~'), rest)}")
            else:
                masked.append(self.mask_value(option, value))

            option = own.lstrip("-") if own.startswith("-") and not is_given else name

        return masked

    def _tokens(self, text: str) -> str:
        for needle, expression in TOKENS:
            if needle in text:
                text = compiled(expression).sub(self._token, text)

        return text

    def _token(self, match: re.Match[str]) -> str:
        before = match.string[match.start() - 1] if match.start() else ""
        inside_a_word = match[0][0].isalnum() and (before.isalnum() or before == "_")
        return match[0] if inside_a_word else self._mask("secret")

    def _assignments(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        for i, line in enumerate(lines):
            lower = line.lower()
            if any(word in lower for word in SECRET_WORDS):
                seen = compiled(ASSIGNED).sub(self._assigned, line)
                lines[i] = compiled(FLAG).sub(self._assigned, seen) if "-" in seen else seen

        return "".join(lines)

    def _assigned(self, match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        kind = name_kind(name)
        if kind not in {"strong", "likely", "weak"} or any(each.fullmatch(name) for each in self._exempt):
            return match[0]

        bare = value.strip("\\\"'")
        quoted = bare != value
        if is_placeholder(bare) or (not quoted and (compiled(CODE).match(value) or name_kind(bare) == "strong")):
            return match[0]
        if kind != "strong" and not looks_random(bare, kind):
            return match[0]
        if match["head"].endswith(": ") and bare.isalpha() and match.string[match.end() :][:2].strip(" ").isalpha():
            return match[0]  # a sentence: "Secret: the model ..."

        before, _, after = value.partition(bare)
        return match["head"] + before + self._mask("secret") + after

    def _second(self, match: re.Match[str]) -> str:
        return match[0] if is_placeholder(match[2]) else match[1] + self._mask("secret")

    def _url_user(self, match: re.Match[str]) -> str:
        return match[0] if match[0] == "git" or is_placeholder(match[0]) else self._mask("secret")

    def _email(self, match: re.Match[str]) -> str:
        is_file = match[3].lower() in FILES or match[2][0].isdigit()
        return match[0] if is_file or match[1] == "git" else self._mask("email")

    def _home(self, match: re.Match[str]) -> str:
        return (
            match[0] if match[2] in SHARED_NAMES or match[2].startswith(MASKED[:5]) else match[1] + self._mask("user")
        )

    def _card(self, match: re.Match[str]) -> str:
        return self._mask("card") if is_card(match[0]) else match[0]

    def _phone_in(self, text: str) -> Any:
        is_diff = text.startswith("diff --git") or "\n@@ " in text

        def phone(match: re.Match[str]) -> str:
            at = match.start()
            if not 9 <= sum(map(str.isdigit, match[0])) <= 15:
                return match[0]
            if is_diff and match[0].startswith("+") and (at == 0 or text[at - 1] == "\n"):
                return match[0]  # a number on an added line

            return self._mask("phone")

        return phone

    def _custom(self, text: str) -> str:
        for expression in self._texts:
            text = expression.sub(lambda match: self._mask("custom") if match[0] else "", text)

        return text


_OF_NUMBERS = {"strong", "phone", "card"}
_ALLOWED = "shell patterns, re:EXPRESSION, !NAME, !email, !phone, !card, !user"


def _argument(value: Any) -> tuple[str, bool, str]:
    """Return an argument's name, whether it includes a value (`--lr=1`, `db.user=x`), and that value."""
    if not isinstance(value, str):
        return "", False, ""

    name, equals, rest = value.partition("=")
    is_name = name.strip("-+~").replace(".", "").replace("-", "").replace("_", "").replace("/", "").isalnum()
    return (name, bool(equals), rest) if is_name else ("", False, "")


def _is_worth_masking(value: Any) -> bool:
    """Whether a value under a secret's name can be a secret: a text or an integer."""
    return type(value) is int or (
        isinstance(value, str | bytes | os.PathLike) and not is_placeholder(str(value).strip())
    )


def _fits(kind: str, value: str) -> bool:
    digits = sum(map(str.isdigit, value))
    return digits >= (6 if kind == "phone" else 3) if kind in {"phone", "card"} else kind == "user" or "@" in value


@cache
def _own_name() -> str:
    try:
        return Path.home().name
    except RuntimeError:
        return ""
