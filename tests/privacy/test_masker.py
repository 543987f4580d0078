"""Masked and unmasked values, and the time for long texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traceml.errors import SettingsError
from traceml.privacy import Masker, is_secret_name
from traceml.privacy.name_rules import name_kind

# Written in two parts, so that nobody's scanner takes this file for a leak.
SECRETS = {
    "AWS key id": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub token": "ghp_" + "a1B2" * 9,
    "GitHub fine-grained": "github_pat_" + "11ABCDEFG0" * 4,
    "GitLab token": "glpat-" + "x9Y8z7W6v5U4t3S2r1Q0",
    "Slack token": "xoxb-" + "123456789012-abcdefABCDEF",
    "Hugging Face token": "hf_" + "AbCdEfGhIj" * 3 + "Klmn",
    "OpenAI key": "sk-" + "proj-aB3dE5fG7hI9jK1lM3nO5",
    "Anthropic key": "sk-" + "ant-api03-aB3dE5fG7hI9jK1lM3nO5",
    "Stripe key": "sk_" + "live_4eC39HqLyjWDarjtT1zdp7dc",
    "Google key": "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "npm token": "npm_" + "aB3d" * 9,
    "JWT": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
    "private key": "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIEpAIBAAKC\nAQEA0Z3V\n-----END RSA PRIVATE " + "KEY-----",
    "Databricks token": "dapi" + "0123456789abcdef" * 2,
}


@pytest.fixture
def masker() -> Masker:
    return Masker(user_name="akeller")


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
def test_tokens_are_found_anywhere(masker: Masker, secret: str) -> None:
    """A well-known form of key is masked alone, in a sentence, in code, in a list and in a nested mapping."""
    for text in (secret, f"use {secret}, please", f"KEY='{secret}'\nlr = 0.1", f'+{{"x": "{secret}"}}'):
        masked = masker.mask_text(text)
        assert secret.splitlines()[-1] not in masked
        assert "[masked:secret]" in masked

    nested = masker.mask_value("data", {"inner": ["a", {"deep": f"x {secret} y"}]})
    assert secret not in repr(nested)
    assert masker.counts["secret"] >= 5


SECRET_NAMES = """
    password db_password DB_PASSWORD PGPASSWORD MYSQL_PWD userPassword smtp.passwd api_key apiKey OPENAI_API_KEY api-key
    AWS_SECRET_ACCESS_KEY secret client_secret HF_TOKEN hub_token auth_token accessToken passphrase credentials
    private_key access_key_id authorization session_cookie wandb_api_key openai_api_key_2 connection_string DB_PASS
    smtpPass redis_pass
"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_values_with_secret_names(masker: Masker, name: str) -> None:
    """A value under a secret's name is masked in any form, unless it is a placeholder."""
    assert is_secret_name(name)
    assert masker.mask_value(name, "hunter") == "[masked:secret]"
    assert masker.mask_value(name, 123456) == "[masked:secret]"
    for reference in (None, True, "", "none", "${SECRET}", "<HUB_TOKEN>", "****"):
        assert masker.mask_value(name, reference) == reference


@pytest.mark.parametrize(
    "secret", ["$up3rS3cret", "$ecretPass", "$2b$12$KIXQJk1", "<abc123", "<a1>b2", "{{{x", "%(x)s1", "{{x}}1"]
)
def test_a_secret_that_begins_like_a_placeholder_is_masked(masker: Masker, secret: str) -> None:
    """Also in a URL and in code: only what is a reference as a whole stays."""
    assert masker.mask_value("db_password", secret) == "[masked:secret]"
    assert masker.mask_text(f'password = "{secret}"') == 'password = "[masked:secret]"'


@pytest.mark.parametrize(
    "reference",
    [
        "$TOKEN", "${TOKEN:-none}", "${TOKEN:?must be set}", "${{ secrets.TOKEN }}", "$(cat /run/token)", "$env:TOKEN",
        "$1", "$db_pass", "<your token>", "{{ token }}", "%(password)s", "${USER}:${PASS}", "$HOME/.netrc",
    ],
)  # fmt: skip
def test_references_to_secrets_stay(masker: Masker, reference: str) -> None:
    """As a value, and in code with quotes and without."""
    assert masker.mask_value("db_password", reference) == reference
    for line in (f'password = "{reference}"', f"PASSWORD={reference}", f"--password {reference}"):
        assert masker.mask_text(line) == line


# What training scripts really log.
HARMLESS = {
    "lr": 3e-4,
    "max_tokens": 4096,
    "num_tokens": "1000000",
    "tokenizer": "gpt2-medium",
    "tokenizer_name": "bert-base-uncased2",
    "num_pass": "3",
    "forward_pass": "checkpointed",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "mask_token": "[MASK]",
    "bos_token": "<|begin_of_text_2|>",
    "token_dropout": 0.1,
    "token": "mean_pool_2x2",
    "key_dim": 64,
    "num_key_value_heads": 8,
    "key": "validation_f1_score_v2",
    "sort_key": "val_loss",
    "password_length": 12,
    "secret_name": "prod/db2",
    "author": "transformers",
    "seed": 4111111111111111,
    "initial_seed": 9223372036854775807,
    "commit": "d8347ed0c1b2a3948576abcdefabcdefabcdef12",
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "run_id": "20261120-110912-train-9f3a",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
    "date": "2026-11-20 11:09:12",
    "eps": "1e-08",
    "loss": "0.41111111111111111",
    "values": [1.5, 2.5, "3.25"],
    "betas": (0.9, 0.999),
    "path": "/data/imagenet/train",
    "home": "/home/ubuntu/data",
    "url": "https://example.com/model?version=2&key=a1",
    "git": "git@github.com:org/repo.git",
    "remote": "ssh://git@example.com:22/org/repo.git",
    "scorer": "precision@10",
    "checkpoint": "best@step.ckpt",
    "version": "torch==2.13.0+cpu",
    "argv": ["train.py", "--lr", "0.1", "--max-tokens", "512", "--key-dim=64"],
    "model": "sk-learn-baseline-experiment-number-1",
    "name": "hf_trainer_with_a_long_name",
    "ip": "192.168.100.200",
    "shape": "(8, 16, 1024, 1024)",
    "monkey": "banana123",
    "passes": 3,
    "second_pass": True,
    "compass": "north12345",
}


def test_ordinary_parameters_stay(masker: Masker) -> None:
    """Hyper-parameters, hashes, dates, versions and special tokens are not touched."""
    masked = masker.mask_mapping(HARMLESS)

    assert {
        name: (value, HARMLESS[name]) for name, value in masked.items() if value != HARMLESS[name] and name != "betas"
    } == {}
    assert not masker.counts


def test_code_stays(masker: Masker) -> None:
    """A diff of ordinary code loses nothing."""
    diff = """diff --git a/train.py b/train.py
@@ -1,4 +1,9 @@
+1234567890123
-    token: str = None
+    def __init__(self, api_key: str | None = None, password=None):
+        self.api_key = api_key
+        self.token = args.token
+        token = get_token(key=2)
+        key = jax.random.PRNGKey(0)
+        password = os.environ["PASSWORD"]
+        os.environ["PASSWORD"] = read(args.password_file)
+        if config["password"] == "x": weights[secret] = 1
+        if token == eos_token: break
+        tokens = tokenizer(text, max_length=512)["input_ids"]
+        @property
"""
    assert masker.mask_text(diff) == diff


@pytest.mark.parametrize(
    ("text", "kept", "gone"),
    [
        ("postgres://bob:s3cr:et@db.example.org:5432/runs", "@db.example.org:5432/runs", "s3cr"),
        ("https://x-access-token:abcdef@git.example.org/a/b.git", "@git.example.org/a/b.git", "abcdef"),
        ("https://onlytoken@git.example.org/a.git", "@git.example.org/a.git", "onlytoken"),
        ("redis://:p@ss@host/0", "@host/0", "p@ss"),
        ("https://s3.example.org/o?X-Amz-Signature=abc123def&x=1", "&x=1", "abc123def"),
        ("http://127.0.0.1:7860/?write_token=abc123def&x=1", "&x=1", "abc123def"),
        ("curl -H 'Authorization: Bearer abcdefghijkl' http://x", "http://x", "abcdefghijkl"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ", "dXNlcjpwYXNz"),
        ("python train.py --api-key hunter2 --lr 0.1", "--lr 0.1", "hunter2"),
        ("python train.py --password=hunter2 --lr 0.1", "--lr 0.1", "hunter2"),
        ('+os.environ["DB_PASSWORD"] = "correcthorse"', '+os.environ["DB_PASSWORD"] = ', "correcthorse"),
        ("+export WANDB_API_KEY=0123456789abcdef\n+LR=1", "+LR=1", "0123456789abcdef"),
        ('{"lr": 1, "api_key": "correct horse", "n": 2}', '"n": 2', "correct horse"),
        ('"{\\"password\\": \\"correcthorse\\", \\"n\\": 2}"', '\\"n\\": 2', "correcthorse"),
        ("db_password: correcthorse\nlr: 1", "lr: 1", "correcthorse"),
        ('password: str = "correcthorse"', "password: str = ", "correcthorse"),
        ("DB_PASSWORD = 'it''s'", "DB_PASSWORD = ", "it"),
        ("mail alice.b+x@mail.example.co.uk now", "mail ", "alice"),
        ("call +49 170 1234567 or (555) 123-4567 or 555-123-4567.", "call ", "123"),
        ("+4917012345678", "", "170"),
        ("card 4111 1111 1111 1111, 5500-0000-0000-0004, 378282246310005", "card ", "1111"),
        ("/home/jdoe/data/x.pt C:\\Users\\jdoe\\x /Users/jdoe", "/data/x.pt", "jdoe"),
        ("/scratch/akeller/run1", "/run1", "akeller"),
    ],
)  # fmt: skip
def test_texts(masker: Masker, text: str, kept: str, gone: str) -> None:
    """The secret part goes, the rest stays; masking the result changes nothing."""
    masked = masker.mask_text(text)

    assert kept in masked
    assert gone not in masked
    assert masker.mask_text(masked) == masked
    assert sum(masker.counts.values()) == 2 * masked.count("[masked:")


def test_personal_names(masker: Masker) -> None:
    """A number or a name is personal where its key says so."""
    values = {
        "phone": 491701234567,
        "contact_email": "a@b.example",
        "USER": "jdoe",
        "card_number": "4000",
        "user_count": 3,
    }

    assert masker.mask_mapping(values) == {
        "phone": "[masked:phone]",
        "contact_email": "[masked:email]",
        "USER": "[masked:user]",
        "card_number": "[masked:card]",
        "user_count": 3,
    }
    assert masker.counts == {"phone": 1, "email": 1, "user": 1, "card": 1}


def test_what_the_user_of_a_dialogue_says_stays(masker: Masker) -> None:
    """`log_text("user", prompt)` arrived as one mask, and the assistant's answers whole."""
    assert masker.mask_logged_text("user", "Write to me@example.com") == "Write to [masked:email]"
    assert masker.mask_logged_text("username", "ada") == "[masked:user]"
    assert Masker(["user"]).mask_logged_text("user", "hello there") == "[masked:custom]"


def test_numbers_of_a_list_are_judged_by_its_name_once(masker: Masker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of 1,000 by 1,000 took four seconds."""
    judged: list[str] = []
    monkeypatch.setattr("traceml.privacy.masker.name_kind", lambda name: judged.append(name) or name_kind(name))

    assert masker.mask_value("confusion", [[0.5, 2] * 50] * 10) == [[0.5, 2] * 50] * 10
    assert len(judged) == 11
    assert masker.mask_value("card_number", [1234, 0.5]) == ["[masked:card]", 0.5]


def test_containers(masker: Masker) -> None:
    """Whatever lies in a mapping called a secret is masked, and options tell about the argument that follows."""
    assert masker.mask_value("credentials", {"a": "x1", "b": ["y", 2.5]}) == {
        "a": "[masked:secret]",
        "b": ["[masked:secret]", 2.5],
    }
    assert masker.mask_value("argv", ["t.py", "--db-password", "hunter", "--lr", "1"])[2:] == [
        "[masked:secret]",
        "--lr",
        "1",
    ]
    assert masker.mask_value("api_keys", ["a", "b"]) == ["[masked:secret]"] * 2
    assert masker.mask_value("data", Path("/home/jdoe/x")) == "/home/[masked:user]/x"


def test_custom_patterns() -> None:
    """The setting adds patterns on names and in texts, exempts names, and turns kinds off."""
    masker = Masker(["customer_*", "re:ACME-\\d+", "!*_secret_sauce", "!email"], user_name="")

    assert masker.mask_value("customer_name", "Meier") == "[masked:custom]"
    assert masker.mask_value("note", "for customer_77, see ACME-1234.") == "for [masked:custom], see [masked:custom]."
    assert masker.mask_value("our_secret_sauce", "mix") == "mix"
    assert masker.mask_value("contact", "a@example.org") == "a@example.org"
    assert masker.mask_value("password", "a@example.org") == "[masked:secret]"


def test_an_expression_may_begin_with_flags() -> None:
    """As any of Python's; case does not matter then, in names and in texts."""
    masker = Masker(["re:(?i)acme"])

    assert masker.mask_value("customer_of_Acme", "Meier") == "[masked:custom]"
    assert masker.mask_text("sold to ACME") == "sold to [masked:custom]"


@pytest.mark.parametrize("pattern", ["re:(", "re:.*", "!", "!secret"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    """A pattern that cannot work is an error that names it; nothing goes out unmasked by mistake."""
    with pytest.raises(SettingsError, match="mask"):
        Masker([pattern])


@given(st.text(), st.text())
def test_masking_is_total_and_idempotent(name: str, text: str) -> None:
    """Any text can be masked, twice with the same result."""
    masker = Masker(user_name="akeller")
    once = masker.mask_value(name, text)

    assert masker.mask_value(name, once) == once
    assert masker.mask_text(masker.mask_text(text)) == masker.mask_text(text)


UNITS = (
    "a",
    "key=",
    "token:",
    "a@",
    "a.",
    "-",
    "1",
    "1 ",
    "+1",
    '"',
    "\\",
    "://",
    "eyJ",
    "/home/",
    "key ",
    "x:y@",
    " ",
)


@pytest.mark.parametrize("unit", [*UNITS, "-----BEGIN PRIVATE " + "KEY-----"])
def test_no_text_is_slow(masker: Masker, unit: str) -> None:
    """Texts made to be slow to search are searched in linear time."""
    masker.mask_text(unit * (400_000 // len(unit)))  # quadratic, this would take longer than a test may
