"""Patterns of secrets and personal data in texts. Every repetition is bounded, so no text is slow to search."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

from traceml.privacy.name_rules import words_of

__all__ = [
    "ASSIGNED",
    "CARD",
    "CODE",
    "EMAIL",
    "FILES",
    "FLAG",
    "HEADER",
    "HOME",
    "PHONE",
    "SECRET_WORDS",
    "SHARED_NAMES",
    "TOKENS",
    "URL_QUERY",
    "URL_USER",
    "compiled",
    "is_card",
    "shell_pattern",
]


@cache
def compiled(expression: str) -> re.Pattern[str]:
    """Compile a pattern on first use: a training process that masks few parameters needs almost none."""
    return re.compile(expression)


_PRIVATE_KEY = (
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?s:(?!-----(?:BEGIN|END)).){0,20000}"
    r"(?:-----END [A-Z0-9 ]{0,40}-----)?"
)
# (a text that must occur, the expression): long texts cost only the search for the first. An expression that starts
# with a letter matches at the start of a word only.
TOKENS: Final = (
    *((prefix, rf"{prefix}[A-Z2-7]{{16}}\b") for prefix in ("AKIA", "ASIA", "ABIA", "ACCA")),
    *((prefix, rf"{prefix}[A-Za-z0-9]{{30,255}}") for prefix in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")),
    ("github_pat_", r"github_pat_\w{22,255}"),
    *((f"{prefix}-", rf"{prefix}-[\w.-]{{20,255}}") for prefix in ("glpat", "gldt", "glrt", "glptt", "glcbt")),
    ("xox", r"xox[abeoprs]-[\w-]{10,255}"),
    ("xapp-", r"xapp-[\w-]{10,255}"),
    ("hooks.slack.com/", r"hooks\.slack\.com/services/[\w/]{20,255}"),
    ("/api/webhooks/", r"(?<=/api/webhooks/)\d{15,22}/[\w-]{40,100}"),
    ("hf_", r"hf_[A-Za-z0-9]{30,64}\b"),
    ("api_org_", r"api_org_[A-Za-z0-9]{30,64}\b"),
    ("sk-", r"sk-(?:(?:proj|ant|or|lf|admin|svcacct|live|test)-[\w-]{16,255}|[A-Za-z0-9]{32,255})"),
    ("k_live_", r"[prs]k_live_[A-Za-z0-9]{16,255}"),
    ("k_test_", r"[prs]k_test_[A-Za-z0-9]{16,255}"),
    ("whsec_", r"whsec_[A-Za-z0-9+/=]{16,255}"),
    ("AIza", r"AIza[\w-]{35}"),
    ("ya29.", r"ya29\.[\w-]{20,2048}"),
    ("GOCSPX-", r"GOCSPX-[\w-]{20,64}"),
    ("wandb_v", r"wandb_v\d_[\w-]{20,255}"),
    ("npm_", r"npm_[A-Za-z0-9]{36}\b"),
    ("pypi-", r"pypi-Ag[\w-]{50,1024}"),
    ("dop_v1_", r"do[opr]_v1_[a-f0-9]{64}\b"),
    ("dckr_pat_", r"dckr_pat_[\w-]{20,64}"),
    ("glsa_", r"glsa_\w{32,64}"),
    ("SG.", r"SG\.[\w-]{16,64}\.[\w-]{16,64}"),
    ("dapi", r"dapi[a-f0-9]{32}\b"),
    ("hvs.", r"hv[sb]\.[\w-]{24,255}"),
    ("nvapi-", r"nvapi-[\w-]{32,128}"),
    ("r8_", r"r8_[A-Za-z0-9]{32,64}\b"),
    ("gsk_", r"gsk_[A-Za-z0-9]{32,128}\b"),
    ("xai-", r"xai-[A-Za-z0-9]{32,128}\b"),
    ("AGE-SECRET-KEY-", r"AGE-SECRET-KEY-1[A-Z0-9]{40,80}"),
    ("ATATT3", r"ATATT3[\w=-]{40,300}"),
    ("shp", r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}\b"),
    (":AA", r"\d{8,10}:AA[\w-]{30,40}"),
    ("eyJ", r"\beyJ[\w-]{8,4096}\.eyJ[\w-]{8,8192}(?:\.[\w-]{0,4096})?"),
    ("PRIVATE KEY", _PRIVATE_KEY),
    ("AccountKey=", r"(?<=AccountKey=)[A-Za-z0-9+/=]{20,255}"),
    ("SharedAccessSignature=", r"(?<=SharedAccessSignature=)[^\s;\"']{10,1024}"),
)  # fmt: skip
URL_USER: Final = r"(?<=://)[^\s/?#\"'<>@]{1,256}(?:@[^\s/?#\"'<>@]{1,256}){0,3}(?=@[\w\[])"
URL_QUERY: Final = (
    r"(?i)([?&](?:sig|signature|key|auth|code|(?:[a-z]{1,16}_)?token|x-amz-(?:signature|credential))=)"
    r"([^&\s#\"']{6,4096})"
)
HEADER: Final = (
    r"(?i)(\bauthorization\\?[\"']?\s{0,3}[:=]\s{0,3}\\?[\"']?(?:[a-z]{1,16}\s{1,3})?|\bbearer\s{1,3}(?=[\w.~+/-]{0,255}\d))"
    r"([\w.~+/-]{6,4096}={0,2})"
)
# Lines with one of these words are searched for assignments in code, configuration and JSON.
SECRET_WORDS: Final = (
    "passw",
    "passphrase",
    "passcode",
    "secret",
    "token",
    "key",
    "credential",
    "cookie",
    "jwt",
    "pwd",
    "_pass",
    "auth",
)
_VALUE = (
    r"""(?P<value>\\?"(?:[^"\\\n]|\\[^"\n]){0,4096}\\?"|\\?'(?:[^'\\\n]|\\[^'\n]){0,4096}\\?'|[^\s"',;&|)}]{1,4096})"""
)
ASSIGNED: Final = (
    r"""(?P<head>(?<![\w.-])-{0,2}(?P<name>[A-Za-z_][\w.-]{0,80})"""
    r"""(?:\\?["']\]?)?(?:\s{0,2}:\s{0,2}[\w.\[\]|]{1,40}(?=\s{0,2}=))?\s{0,2}(?:=>|=(?!=)|:(?!:))\s{0,3})""" + _VALUE
)
FLAG: Final = r"(?P<head>(?<![\w-])--?(?P<name>[A-Za-z][\w.-]{0,80})[ \t]{1,3})(?!-)" + _VALUE
CODE: Final = r".*[(\[{]|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+$|f?r?[\"']?$"
EMAIL: Final = r"(?<![\w.+%-])([\w.+%-]{1,64})@((?:[A-Za-z0-9-]{1,63}\.){1,6})([A-Za-z]{2,24})(?![\w-]|\.\w)"
FILES = words_of("pth ckpt json yaml yml txt log png jpg csv npz npy bin onnx safetensors html toml cfg ini git")
PHONE: Final = (
    r"(?<![\w.+/-])(?:\+[1-9]\d{0,2}[ -]?(?:\(\d{1,4}\)[ -]?)?\d{1,4}(?:[ -]?\d{2,4}){2,4}"
    r"|\(\d{3}\)[ ]?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w-]|\.\d)"
)
CARD: Final = (
    r"(?<![\w.+-])[3-6]\d{3}(?:[ -]?\d{4}){3}(?![\w-]|\.\d)|(?<![\w.+-])3[47]\d{2}[ -]?\d{6}[ -]?\d{5}(?![\w-]|\.\d)"
)
HOME: Final = (
    r"((?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2}|/var/home/|/export/home/))([^/\\\s\"':;,\[\]<>*?]{1,64})"
)
SHARED_NAMES = frozenset(
    {"root", "user", "ubuntu", "admin", "runner", "shared", "public", "jovyan", "app", "data", "Public", "Shared"}
)


def shell_pattern(pattern: str, *, words: bool = False) -> re.Pattern[str]:
    """Return a shell pattern as a regular expression.

    Args:
        pattern: with `*` and `?`; case does not matter.
        words: match words in a text; else whole names.
    """
    any_of = r"[^\s\"',;=()<>]" if words else "."
    body = "".join({"*": f"{any_of}*", "?": any_of}.get(each, re.escape(each)) for each in pattern)
    return re.compile(rf"(?i)(?<![^\s\"',;=()<>]){body}(?![^\s\"',;=()<>])" if words else f"(?is){body}")


def is_card(text: str) -> bool:
    """Whether digits have the checksum of a payment card (Luhn).

    Args:
        text: a text whose digits have the prefix and length of a card number.
    """
    digits = [int(each) for each in text if each.isdigit()]
    doubled = (sum(divmod(2 * each, 10)) for each in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1
