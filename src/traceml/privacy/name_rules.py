"""Classification of a value by its name: a secret, personal data, or neither."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import Final

__all__ = ["MASKED", "is_placeholder", "is_secret_name", "looks_random", "name_kind", "words_of"]

MASKED: Final = "[masked:"


def words_of(text: str) -> frozenset[str]:
    """Return the words of a text, as a list of names is written."""
    return frozenset(text.split())


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Words that always mark a secret, also inside an unseparated word such as PGPASSWORD.
_STRONG = re.compile(
    r"passw(?:or)?d|passphrase|passcode|apikey|apisecret|(?:auth|access|api|refresh|bearer)token"
    r"|(?:secret|access|private|auth)key|credential|connectionstring"
)
_STRONG_WORDS = frozenset(
    {"secret", "secrets", "pwd", "authorization", "cookie", "cookies", "bearer", "htpasswd", "jwt"}
)
_OF_KEYS = words_of(
    "api access secret private auth encryption signing master account storage service ssh gpg deploy license "
    "subscription shared admin root hmac aes"
)
_OF_TOKENS = words_of(
    "auth access api bearer refresh hub hf huggingface github gitlab slack bot session csrf xsrf security oauth id "
    "wandb mlflow clearml aim openai anthropic npm pypi vault personal registry deploy push user login "
    "service secret jwt telegram discord notion jira azure aws gcp google traceml ci job"
)
# Last words that describe a secret, so that the value is not one (`password_length`, `secret_name`).
_DESCRIBES = words_of(
    "length len size dim dims name type count num file files path dir env min max policy expiry ttl timeout required "
    "enabled version dropout rate ratio prob per index idx manager store backend provider variable header mode limit "
    "budget loss weight weights embedding embeddings vocab"
)
_OF_PASSES = words_of(
    "db database sql mysql postgres pg mongo redis rabbitmq smtp imap mail ldap ftp ssh proxy user admin root login"
)
_WEAK_WORDS = frozenset({"auth", "pass", "key", "pw"})
_PERSONAL = {
    "email": words_of("email emails mail e.mail email.address mail.address"),
    "phone": words_of("phone telephone fax msisdn phone.number telephone.number mobile.number cell.number"),
    "card": words_of("creditcard cardnumber cvv cvc credit.card card.number"),
}
_USERS = words_of("user username logname login user.name")
_NO_SECRETS = frozenset(
    {"", "none", "null", "true", "false", "yes", "no", "auto", "basic", "bearer", "str", "int", "bool"}
)
# Their ends may be missing: where code has no quotes, a value ends at a space or a bracket.
_REFERENCES = (
    r"\$\{[^{}]*\}?",
    r"\$?\{\{[^{}]*(?:\}\})?",
    r"\$\(.*",
    r"\$(?:env:)?[A-Z_][A-Z0-9_]*",
    r"\$[a-z_]*(?:pass|password|pwd|secret|token|key)",
    r"\$[\d@*#?$!-]?",
    r"<[^<>]*>|<[A-Za-z_-]*",
    r"%\(\w+(?:\)s)?",
)
_REFERENCE = f"(?:{'|'.join(_REFERENCES)})"
_PLACEHOLDER = re.compile(rf"(?s:{_REFERENCE}(?:[:@/.-]{_REFERENCE})*(?:/[\w./-]*)?)")


@lru_cache(maxsize=4096)
def name_kind(name: str) -> str:
    """Return how surely a name marks a secret, a kind of personal data, or an empty text.

    `strong` is a secret for any value; for `likely` and `weak` the value has to look like a secret too.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words:
        return ""

    if words[-1] not in _DESCRIBES:
        pairs = set(pairwise(words))
        if (
            not _STRONG_WORDS.isdisjoint(words)
            or any(_STRONG.search(word) for word in words)
            or any(second in {"key", "keys"} and first in _OF_KEYS for first, second in pairs)
            or (words[-1] == "pass" and len(words) > 1 and words[-2] in _OF_PASSES)
            or not pairs.isdisjoint({("pass", "word"), ("pass", "phrase"), ("connection", "string")})
            or (words[-1] == "token" and len(words) > 1 and words[-2] in _OF_TOKENS)
        ):
            return "strong"

        if words[-1] in _WEAK_WORDS:
            return "weak"
        if words[-1] == "token":
            return "likely"

    for kind, names in _PERSONAL.items():
        if words[-1] in names or ".".join(words[-2:]) in names:
            return kind

    return "user" if ".".join(words) in _USERS else ""


def is_secret_name(name: str) -> bool:
    """Whether a name marks a secret for any value: `api_key`, `DB_PASSWORD`."""
    return name_kind(name) == "strong"


def is_placeholder(text: str) -> bool:
    """Whether a text is a placeholder for a secret: `${TOKEN}`, `<token>`, `****`.

    A secret may begin like one: `$2b$12$...` is a hash.
    """
    return (
        text.lower() in _NO_SECRETS
        or text.startswith(MASKED)
        or _PLACEHOLDER.fullmatch(text) is not None
        or not text.strip("*xX. \t")
    )


def looks_random(text: str, kind: str) -> bool:
    """Whether a text without spaces looks like a key: digits among letters, and enough of them.

    Args:
        kind: `likely` or `weak`, the kind of its name.
    """
    if len(text) < 8 or any(each.isspace() for each in text) or text.startswith(("/", "./", "<", "[")) or "_" in text:
        return False

    digits = sum(each.isdigit() for each in text)
    letters = sum(each.isalpha() for each in text)
    is_mixed = text.lower() != text != text.upper()
    return digits >= 1 and letters >= 1 and (kind == "likely" or is_mixed or digits >= len(text) // 6)
