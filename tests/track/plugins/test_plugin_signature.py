"""Seals of the code that runs name."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from traceml.track.plugins.plugin_signature import is_signed, sign

ROW: dict[str, Any] = {"backends": ["mine:Backend"], "registered": {"x": "mine:X"}, "sys_path": ["/home/me/code"]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_row_bears_the_seal_of_its_user() -> None:
    """Whatever else is in it, and as msgpack gives it back."""
    signed = {**ROW, "name": "any", "signature": sign(ROW)}

    assert is_signed(signed)
    assert not is_signed(ROW)
    assert not is_signed({**ROW, "signature": ""})


@pytest.mark.parametrize(
    "change", [{"backends": ["other:Backend"]}, {"registered": {"x": "other:X"}}, {"sys_path": ["/tmp/other"]}]
)
def test_changed_code_is_not_sealed(change: dict[str, Any]) -> None:
    """Each of the facts that decide what is imported."""
    assert not is_signed({**ROW, "signature": sign(ROW), **change})


def test_another_user_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one who has none yet."""
    signed = {**ROW, "signature": sign(ROW)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))

    assert not is_signed(signed)
    assert sign(ROW) != signed["signature"]
    assert not is_signed(signed)


def test_the_key_is_this_users_alone(cache: Path) -> None:
    """Nothing else is left in its folder."""
    sign(ROW)

    (path,) = (cache / "traceml" / "keys").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_processes_that_begin_together_have_one_key() -> None:
    """All ranks of a user's first run."""
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: sign(ROW), range(64)))) == 1


def test_without_a_place_for_a_key_nothing_is_signed(cache: Path) -> None:
    """A file is where the folder would be; announcing goes on."""
    cache.write_text("")

    assert sign(ROW) == ""
    assert not is_signed({**ROW, "signature": ""})


def test_a_key_that_is_a_link_is_not_used(cache: Path, tmp_path: Path) -> None:
    """Somebody else may have chosen what it leads to."""
    (tmp_path / "planted").write_bytes(bytes(32))
    (cache / "traceml" / "keys").mkdir(parents=True, mode=0o700)
    (cache / "traceml" / "keys" / "runs").symlink_to(tmp_path / "planted")

    assert sign(ROW) == ""
