"""`traceml doctor`."""

from __future__ import annotations

import json
import re
import socket
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import traceml
from tests.ports import free_port
from traceml import cli
from traceml.cli.checks import local_checks
from traceml.errors import AggregatorForeignError
from traceml.settings import declarations, load
from traceml.transport import auth, client
from traceml.transport.folder_aggregator import AggregatorAddress, FolderLock


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Leave out torch, which takes a second, and the working directory's own settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_checks, "_torch", lambda: local_checks.Check("torch", "ok", "2.0"))
    port = free_port()
    monkeypatch.setenv("TRACEML_PORT", str(port))
    return port


def test_everything_is_there(quick, capsys):
    """A good installation passes; each setting is printed with its value and source."""
    assert cli.main(["doctor"]) == 0

    shown = capsys.readouterr().out
    for name in ("python", "packages", "torch", "runs_dir", "flight files", "tokens", "aggregator", "gpu", "terminal"):
        assert f" {name} " in shown
    for name in declarations():
        assert f"\n{name} " in shown
    assert f"{quick}" in shown
    assert "TRACEML_PORT" in shown
    assert "Everything that traceml needs is available." in shown


def test_another_product_beside_the_package_is_seen(quick, capsys, monkeypatch, tmp_path):
    """Its metadata is in the folder that contains the package, not in the package."""
    assert cli.main(["doctor"]) == 0
    assert f" in {Path(traceml.__file__).parent}\n" in capsys.readouterr().out

    monkeypatch.setattr(local_checks, "PACKAGE", tmp_path / "traceml")
    (tmp_path / "traceml_ai-0.5.0.dist-info").mkdir()

    assert cli.main(["doctor"]) == 3
    assert (
        f"broken traceml       0.1.0 in {tmp_path / 'traceml'}, mixed with traceml-ai 0.5.0" in capsys.readouterr().out
    )


def test_settings_alone(quick, capsys, monkeypatch):
    """--settings prints each value and source, and checks nothing; a bad one is a usage error."""
    assert cli.main(["doctor", "--settings"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()] == ["setting", *declarations()]
    assert f"{quick}" in shown

    monkeypatch.setenv("TRACEML_PROT", "1")
    assert cli.main(["doctor", "--settings"]) == 2
    assert "Did you mean TRACEML_PORT?" in capsys.readouterr().err


def test_problems_come_first(quick, capsys, monkeypatch):
    """What is broken stands above notes, notes above what is well, and that above the settings."""
    monkeypatch.setenv("TRACEML_PROT", "1")
    monkeypatch.setattr(local_checks, "_torch", lambda: local_checks.Check("torch", "note", "none"))

    assert cli.main(["doctor"]) == 3
    shown = capsys.readouterr().out
    states = [line.split()[0] for line in shown.splitlines() if line.startswith(("broken ", "note ", "ok "))]
    assert states == sorted(states, key=["broken", "note", "ok"].index)
    assert shown.startswith("broken ")


def test_settings_follow_the_checks(quick, capsys):
    """The table of settings stands below the checks; the answer is last."""
    cli.main(["doctor"])
    blocks = capsys.readouterr().out.strip().split("\n\n")

    assert [block.split()[0] for block in blocks] == ["ok", "setting", "Everything"]


def test_json_is_json_and_nothing_else(quick, capsys):
    """--json prints one document with every check and setting."""
    assert cli.main(["doctor", "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "traceml.doctor/1"
    assert told["broken"] is False
    assert told["settings"]["port"] == {"value": str(quick), "source": "TRACEML_PORT"}
    assert {check["state"] for check in told["checks"]} <= {"ok", "note", "broken"}


def test_token_is_never_shown(quick, capsys, monkeypatch):
    """A token is reported as set, without its value."""
    monkeypatch.setenv("TRACEML_TOKEN", "geheim123")

    cli.main(["doctor"])
    cli.main(["doctor", "--settings"])
    cli.main(["doctor", "--json"])

    shown = capsys.readouterr().out
    assert "geheim123" not in shown
    assert "(set, not shown)" in shown


def test_passwords_in_other_settings_are_masked(quick, capsys, monkeypatch):
    """In an address, and in the options of a tracker: reports of problems contain this list."""
    monkeypatch.setenv("TRACEML_OTLP_ENDPOINT", "http://me:geheim123@host:4318")
    monkeypatch.setenv("TRACEML_BACKEND_OPTIONS", '{"jsonl": {"path": "/logs", "api_key": "geheim123"}}')
    monkeypatch.setenv("TRACEML_EXCLUDE", "grad/*,debug")

    for options in ([], ["--settings"], ["--json"]):
        cli.main(["doctor", *options])
        shown = capsys.readouterr().out
        assert "geheim123" not in shown
        for part in ("@host:4318", "'path': '/logs'", "grad/*, debug"):
            assert part in shown


def test_bad_setting_is_broken(quick, capsys, monkeypatch):
    """A bad setting is named with its source, the other checks still run, and the status is 3."""
    monkeypatch.setenv("TRACEML_PROT", "1")

    assert cli.main(["doctor"]) == 3

    shown = capsys.readouterr().out
    assert "TRACEML_PROT" in shown
    assert "Broken: settings" in shown


def test_names_of_plugins(quick, capsys, monkeypatch):
    """A name that no plugin has is a note with the one that was meant, as the script may register it."""
    monkeypatch.setenv("TRACEML_BACKEND", "mlfow,jsonl")
    monkeypatch.setenv("TRACEML_COLLECTORS", "my_package:Watts")

    assert cli.main(["doctor"]) == 0

    notes = [line for line in capsys.readouterr().out.splitlines() if " plugins " in line]
    assert len(notes) == 1
    assert "Did you mean 'mlflow'?" in notes[0]


def test_options_of_trackers(quick, capsys, monkeypatch, tmp_path):
    """Tables of no tracker, and options that a tracker lacks, are notes, also where no tracker is used."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traceml.toml").write_text(
        '[backends.mlfow]\n[backends.wandb]\nmod = "offline"\n[backends.aim]\nrepo = "x"\n[backends."my:Own"]\na = 1\n'
    )

    assert cli.main(["doctor"]) == 0

    lines = capsys.readouterr().out.splitlines()
    found = [(line, lines[at + 1].strip()) for at, line in enumerate(lines) if " plugins " in line]
    (unknown, hint), (option, place) = found
    assert "no tracker 'mlfow'. Did you mean 'mlflow'?" in unknown
    assert hint == "correct, unless your script registers 'mlfow'"
    assert "backend 'wandb' has no option 'mod'" in option
    assert place == f"correct [backends.wandb] in {tmp_path}/traceml.toml"


def test_runs_dir_that_is_a_file(quick, capsys, monkeypatch, tmp_path):
    """A runs folder that cannot be created is broken, with the way out."""
    (tmp_path / "taken").touch()
    monkeypatch.setenv("TRACEML_RUNS_DIR", str(tmp_path / "taken" / "runs"))

    assert cli.main(["doctor"]) == 3
    assert "TRACEML_RUNS_DIR" in capsys.readouterr().out


def test_runs_dir_that_is_not_there_yet(tmp_path):
    """A folder that will be created is fine, and the check leaves nothing behind."""
    check = local_checks._runs_dir(tmp_path / "a" / "b")

    assert check.state == "ok"
    assert "will be created" in check.text
    assert list(tmp_path.iterdir()) == []


def test_runs_dir_on_a_network_filesystem(tmp_path, monkeypatch):
    """A folder on NFS works, and the check says what it costs."""
    monkeypatch.setattr(local_checks, "network_filesystem", lambda path: "nfs4" if path == tmp_path else None)
    check = local_checks._runs_dir(tmp_path)

    assert check.state == "note"
    assert "on a network filesystem (nfs4)" in check.text
    assert "local disk" in check.hint


def test_no_folder_for_tokens_is_broken(quick, capsys, monkeypatch, tmp_path):
    """As in a container where nothing but the runs folder can be written: `init(local=True)` fails there."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(auth, "_candidates", lambda: [tmp_path / "file"])

    assert cli.main(["doctor"]) == 3
    assert f"broken tokens        {tmp_path / 'file'} cannot keep an aggregator's token: " in capsys.readouterr().out


@pytest.fixture
def stranger(monkeypatch) -> Iterator[tuple[str, int]]:
    """The address of a server that never says a word; so it is waited for a short time only."""
    monkeypatch.setattr(local_checks, "_ANSWER_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()


def test_port_taken_by_a_stranger(stranger):
    """A foreign server on the port is broken, as `serve` could not start there."""
    check = local_checks._aggregator(load(port=stranger[1]))

    assert check.state == "broken"
    assert "TRACEML_PORT" in check.hint


def test_aggregator_of_another_folder_is_a_note(tmp_path, monkeypatch, stranger):
    """Jobs of this folder start their own beside it; one that serves this folder is found on any port."""
    (tmp_path / "runtime").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    auth.publish("127.0.0.1", 29765, "secret", runs_dir=str(tmp_path / "other"))
    config = load({}, tmp_path, runs_dir=tmp_path / "runs")

    check = local_checks._aggregator(config)

    assert check.state == "note"
    assert f"serves another runs folder, {tmp_path / 'other'}" in check.text
    assert "--port 0" in check.hint
    with FolderLock.acquire(tmp_path / "runs") as lock:
        lock.publish(AggregatorAddress(*stranger))
        assert str(stranger[1]) in local_checks._aggregator(config).text


@pytest.mark.parametrize(("given", "state"), [({}, "note"), ({"port": 29765}, "broken")])
def test_another_users_aggregator_is_a_note_unless_its_address_was_set(tmp_path, monkeypatch, given, state):
    """Jobs of this user start their own beside it, on a machine of many."""

    def refuse(host, port, *_, **__):
        raise AggregatorForeignError(host, port, "no token is known for it")

    monkeypatch.setattr(local_checks, "_is_free", lambda *_: False)
    monkeypatch.setattr(auth, "discover", lambda *_: None)  # an aggregator of another test may have the port
    monkeypatch.setattr(client, "connect", refuse)
    check = local_checks._aggregator(load({}, tmp_path, runs_dir=tmp_path / "runs", **given))

    assert (check.state, "no token is known" in check.text) == (state, True)
    assert ("--port 0" in check.hint) is (state == "note")


@pytest.mark.parametrize(
    ("script", "state", "says"),
    [
        ("print('2.5.0', 2, True)", "ok", "2.5.0, 2 CUDA devices"),
        ("print('2.5.0', 1, False)", "note", "without torch.distributed"),
        ("raise ImportError('libcudart is missing')", "broken", "libcudart is missing"),
        ("import os; os.abort()", "broken", "`import torch` was killed by signal 6 (SIGABRT)"),
    ],
)
def test_torch(script, state, says):
    """The error of a torch that cannot be imported, or crashes, is its last line of output."""
    check = local_checks._torch((sys.executable, "-c", script))

    assert check.state == state
    assert says in check.text


def test_missing_package_is_broken(monkeypatch):
    """A missing required package is named."""
    monkeypatch.setattr(local_checks, "_version", lambda name: None if name == "zstandard" else "1.0")

    (check,) = local_checks._packages()

    assert (check.state, check.text) == ("broken", "not installed: zstandard")
    assert check.hint == "pip install zstandard"


def test_every_dependency_is_looked_for():
    """Those of pyproject.toml that each machine needs."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[><=]", need)[0] for need in project["dependencies"] if "platform_machine" not in need}

    assert sorted(local_checks._REQUIRED) == sorted(needed)


def test_a_free_threaded_python_is_a_note(monkeypatch):
    """With what it costs; a usual Python has no note."""
    assert (local_checks._python().state, local_checks._python().hint) == ("ok", "")

    monkeypatch.setattr(sys, "abiflags", "t")
    check = local_checks._python()
    assert check.state == "note"
    assert "not tested with it" in check.hint


def test_no_shared_memory_is_a_note(tmp_path):
    """Without /dev/shm tracing works from the run's folder: a note, not a fault."""
    assert local_checks._flight_folder(Path("/nonexistent")).state == "note"
    assert local_checks._flight_folder(tmp_path).state == "ok"


@pytest.mark.process
def test_backends_are_looked_at_one_by_one(quick, capsys, monkeypatch, tmp_path):
    """Each tracker has versions, credentials without values, and reachability; a failing configured one is broken."""
    port = free_port()

    key_file = tmp_path / "key"
    key_file.write_text("geheim123")
    key_file.chmod(0o644)
    options = {"mlflow": {"tracking_uri": f"http://127.0.0.1:{port}"}, "wandb": {"api_key_file": str(key_file)}}
    monkeypatch.setenv("TRACEML_BACKEND", "mlflow,jsonl,no-such-tracker,wandb")
    monkeypatch.setenv("TRACEML_BACKEND_OPTIONS", json.dumps(options))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "geheim123")

    assert cli.main(["doctor", "--backends", "--json"]) == 3

    shown = capsys.readouterr().out
    found = {check["name"]: check for check in json.loads(shown)["checks"]}
    assert found["mlflow"]["state"] == "broken"
    assert "mlflow 3" in found["mlflow"]["text"]
    assert "key MLFLOW_TRACKING_TOKEN set" in found["mlflow"]["text"]
    assert f"{port} does not respond" in found["mlflow"]["text"]
    assert (found["jsonl"]["state"], "can be written" in found["jsonl"]["text"]) == ("ok", True)
    assert "no-such-tracker" in found["no-such-tracker"]["text"]
    assert "chmod 600" in found["wandb"]["text"]
    assert found["tensorboard"]["state"] == "ok"
    assert "geheim123" not in shown
