from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path

import pytest

from traceml.transport import auth


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The runtime folder of a user, empty."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(auth, "_candidates", lambda: [tmp_path / "traceml"])
    return tmp_path / "traceml"


def test_mac_is_as_documented():
    """The proof is HMAC-SHA256 over nonce, role, run and rank, with nothing between them."""
    expected = hmac.new("tökén".encode(), b"n" * 32 + b"rank" + "jöb".encode() + b"12", hashlib.sha256).digest()

    assert auth.mac("tökén", b"n" * 32, "rank", "jöb", 12) == expected
    assert auth.same_mac(expected, expected)
    assert not auth.same_mac(expected, expected[:-1])


def test_nonces_of_clients_are_tagged_and_all_are_fresh():
    """A client can tell its own kind of nonce from a server's; no nonce comes twice."""
    assert auth.client_nonce().startswith(auth.CLIENT_NONCE_TAG)
    assert not auth.server_nonce().startswith(auth.CLIENT_NONCE_TAG)
    assert len({auth.client_nonce() for _ in range(100)} | {auth.server_nonce() for _ in range(100)}) == 200


def test_publish_discover_withdraw(folder):
    """Other processes of the user find a published address until it is withdrawn."""
    path = auth.publish("127.0.0.1", 4711, "secret", runs_dir="/runs")

    entry = auth.discover(4711)

    assert entry is not None
    assert (entry.host, entry.port, entry.token, entry.runs_dir, entry.pid) == (
        "127.0.0.1", 4711, "secret", "/runs", os.getpid(),
    )  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "secret" not in repr(auth.discover(4712))
    auth.withdraw(4711)
    assert auth.discover(4711) is None


def test_entry_of_a_dead_aggregator_is_told_apart(folder):
    """A pid that is used again does not make a dead aggregator alive."""
    path = auth.publish("127.0.0.1", 4711, "secret")
    path.write_text(json.dumps({**json.loads(path.read_text()), "start_ticks": 1}))

    assert auth.discover(4711) is None
    left = auth.discover(4711, include_dead=True)
    assert left is not None
    assert left.token == "secret"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_open_folder_is_not_trusted(folder, mode, caplog):
    """A folder that others may enter is neither written nor believed."""
    auth.publish("127.0.0.1", 4711, "secret")
    folder.chmod(mode)

    assert auth.discover(4711) is None
    assert "mode 0700" in caplog.text
    with pytest.raises(PermissionError, match="must be a folder of this user"):
        auth.publish("127.0.0.1", 4711, "secret")


@pytest.mark.needs("root")
def test_folder_of_another_user_is_not_trusted(folder):
    """A folder that belongs to someone else is refused even with the right mode."""
    auth.publish("127.0.0.1", 4711, "secret")
    os.chown(folder, 12345, -1)

    assert auth.discover(4711) is None


def test_links_and_damaged_files_are_not_followed(folder, tmp_path, caplog):
    """A symbolic link, or a file that is no entry, is ignored and said."""
    path = auth.publish("127.0.0.1", 4711, "secret")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    (folder / "aggregator-4712.json").write_text('{"port": 4712}')

    assert auth.discover(4711) is None
    assert auth.discover(4712) is None
    assert caplog.text.count("ignoring") == 2


def test_publish_does_not_write_through_a_link(folder, tmp_path):
    """A link planted under the draft's name is not written through."""
    auth.runtime_folder()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / f"aggregator-4711.json.{os.getpid()}").symlink_to(victim)

    with pytest.raises(OSError, match="symbolic links"):
        auth.publish("127.0.0.1", 4711, "secret")

    assert victim.read_text() == "mine"


def test_example_in_the_documentation_is_right():
    """The example on the wire page holds, for other implementations."""
    page = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()

    assert auth.mac("secret", b"\x01" * 32, "rank", "job", 3).hex() in page


def test_files_of_aggregators_that_were_killed_long_ago_are_swept(folder):
    """They go after a day; files of live aggregators, and recent ones, stay."""
    killed = {"start_ticks": 1}
    for port, changes, age_s in ((1, killed, 90_000), (2, killed, 60), (3, {}, 90_000)):
        path = auth.publish("127.0.0.1", port, "secret")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age_s))

    auth.publish("127.0.0.1", 4, "secret")

    assert sorted(path.name for path in folder.iterdir()) == [f"aggregator-{port}.json" for port in (2, 3, 4)]
