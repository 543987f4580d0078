from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path
from threading import get_native_id

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


def test_a_joined_run_is_found_until_its_command_ends(folder):
    """Its file is this user's only; an aggregator of this host is not among the joined runs, nor the reverse."""
    auth.publish("127.0.0.1", 4711, "other")
    path = auth.publish_joined("10.0.0.1", 4711, "secret", run_dir=Path("/runs/run-1"), node="node1", tls=True)

    (joined,) = auth.joined_runs()

    assert (joined.host, joined.port, joined.token, joined.tls) == ("10.0.0.1", 4711, "secret", True)
    assert (joined.node, joined.runs_dir, joined.run_id) == ("node1", "/runs", "run-1")
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text(json.dumps({**json.loads(path.read_text()), "start_ticks": 1}))
    assert auth.joined_runs() == []
    assert auth.published_by(os.getpid()).token == "other"


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
    assert f"its mode is {mode:04o}, not 0700" in caplog.text
    with pytest.raises(PermissionError, match="Correct one of these folders, or set XDG_RUNTIME_DIR"):
        auth.publish("127.0.0.1", 4711, "secret")


@pytest.mark.needs("root")
def test_folder_of_another_user_is_not_trusted(folder):
    """A folder that belongs to someone else is refused even with the right mode."""
    auth.publish("127.0.0.1", 4711, "secret")
    os.chown(folder, 12345, -1)

    assert auth.discover(4711) is None


@pytest.mark.needs("root")
def test_a_place_that_another_user_has_taken_is_replaced_by_the_next(tmp_path, monkeypatch, caplog):
    """An aggregator still publishes its token, ranks still find it, and one line says what is wrong."""
    taken, spare = tmp_path / "taken", tmp_path / "home" / "spare"
    monkeypatch.setattr(auth, "_candidates", lambda: [taken, spare])
    taken.mkdir(mode=0o700)
    (taken / "aggregator-4711.json").write_text("planted")
    os.chown(taken, 12345, -1)

    path = auth.publish("127.0.0.1", 4711, "secret")

    assert path.parent == spare
    assert spare.stat().st_mode & 0o777 == 0o700
    entry = auth.discover(4711)
    assert entry is not None
    assert entry.token == "secret"
    auth.withdraw(4711)
    assert [record.getMessage() for record in caplog.records] == [
        f"{taken} cannot keep an aggregator's token: it belongs to another user (uid 12345). The next folder is used"
    ]


def test_without_a_temporary_folder_memory_is_used(monkeypatch):
    """A container with a read-only root has only /dev/shm, which no other host has: before the home folder."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    uid = os.getuid()
    places = [str(folder) for folder in auth._candidates()]

    assert places[-3:-1] == [f"/tmp/traceml-{uid}", f"/dev/shm/traceml-{uid}"]


def test_the_last_place_is_in_the_home_folder_of_this_host(tmp_path, monkeypatch):
    """Names under /tmp can be taken by anyone; a home may be shared by hosts, so each has a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    assert auth._candidates()[-1] == tmp_path / "cache" / "traceml" / os.uname().nodename


@pytest.mark.needs("root")
def test_a_runtime_folder_of_another_user_is_no_candidate(tmp_path, monkeypatch):
    """`sudo -E` keeps the variable: root must not make a folder there that the user cannot use afterwards."""
    os.chown(tmp_path, 12345, -1)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    assert tmp_path / "traceml" not in auth._candidates()


def test_links_and_damaged_files_are_not_followed(folder, tmp_path, caplog):
    """A symbolic link, or a file that is no entry, is ignored and said."""
    path = auth.publish("127.0.0.1", 4711, "secret")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    (folder / "aggregator-4712.json").write_text('{"port": 4712}')

    assert auth.discover(4711) is None
    assert auth.discover(4712) is None
    assert caplog.text.count("ignoring") == 2


def test_a_file_of_a_newer_version_is_read(folder, caplog):
    """It may have more fields; two versions on one host find each other's aggregators."""
    path = auth.publish("127.0.0.1", 4711, "secret")
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": 1}))

    found = auth.discover(4711)

    assert found is not None
    assert found.token == "secret"
    assert not caplog.records


def test_publish_does_not_write_through_a_link(folder, tmp_path):
    """A link planted under the draft's name is not written through."""
    auth.runtime_folder()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / f".aggregator-4711.json-{os.getpid()}-{get_native_id()}").symlink_to(victim)

    path = auth.publish("127.0.0.1", 4711, "secret")

    assert path.stat().st_mode & 0o777 == 0o600
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
