"""init(local=True): one aggregator for the job, started by the first rank, ended after the last."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import pytest

import traceml
from tests.aggregator.conftest import Serving
from tests.eventually import eventually
from tests.ports import free_port
from tests.recorder.conftest import environ
from traceml import settings
from traceml.database.store.reader import StoreReader
from traceml.errors import AggregatorUnavailableError
from traceml.recorder import local_aggregator
from traceml.run_folder import STORE_NAME
from traceml.transport import auth
from traceml.transport.folder_aggregator import AggregatorAddress
from traceml.transport.framing import WIRE_VERSION, encode

SCRIPT = """
import sys, traceml
traceml.init(local=True)
for _ in range(int(sys.argv[1])):
    with traceml.trace_step():
        pass
print("encodings.idna" in sys.modules)
"""


def port_is_free(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return True

    return False


@pytest.mark.process
def test_ranks_share_one_aggregator_that_ends_with_them(tmp_path: Path) -> None:
    """Four ranks at once start one; their steps are in one run; it ends by itself and leaves a report.

    No rank loads the codec of international names with its tables.
    """
    port = free_port()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(10 + rank)],
            env=environ(
                tmp_path,
                TRACEML_PORT=str(port),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="4",
                TORCHELASTIC_RUN_ID="a-job",
                MASTER_PORT="1",
            ),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        assert (rank.returncode, out) == (0, "False\n"), err

    eventually(lambda: port_is_free(port))
    runs = [path for path in (tmp_path / "traceml_runs").iterdir() if path.name[0] != "." and not path.is_symlink()]
    assert len(runs) == 1
    with StoreReader(runs[0] / STORE_NAME) as store:
        assert store.stored("steps") == 10 + 11 + 12 + 13
        assert {stream.identity.rank for stream in store.streams()} == {0, 1, 2, 3}
    assert (runs[0] / "report.json").exists()


@pytest.mark.process
def test_it_is_nobodys_child(tmp_path: Path) -> None:
    """A scheduler that kills a process with its children, as Ray does, leaves the aggregator to store the rows."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, psutil, traceml\n"
        "traceml.init(local=True)\n"
        "for _ in range(5):\n"
        "    with traceml.trace_step():\n"
        "        pass\n"
        "for child in psutil.Process().children(recursive=True):\n"
        "    child.kill()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    own = environ(tmp_path, TRACEML_PORT=str(free_port()))
    assert subprocess.run([sys.executable, str(script)], env=own, cwd=tmp_path, check=False).returncode == -9

    (run_dir,) = (tmp_path / "traceml_runs").glob("2*")
    eventually((run_dir / "report.json").exists)
    with StoreReader(run_dir / STORE_NAME) as store:
        assert store.stored("steps") == 5


@pytest.mark.process
def test_a_script_that_changes_its_folder_is_stored_where_it_began(tmp_path: Path) -> None:
    """Its recorder starts the aggregator meanwhile; the other folder may not be writable."""
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "train.py"
    script.write_text("import os, traceml\ntraceml.log_metric('loss', 1)\nos.chdir('elsewhere')\n")

    subprocess.run([sys.executable, str(script)], env=environ(tmp_path), cwd=tmp_path, check=True)

    # A busy machine starts an aggregator in more than the seconds that the end of so short a script waits for it.
    eventually(lambda: list((tmp_path / "traceml_runs").glob("*/store.db")), "the run")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.process
def test_a_script_in_a_debugger_has_its_run(tmp_path: Path) -> None:
    """debugpy, of VS Code, debugs the Python programs that a script starts, too; a fork in these never returned."""
    script = tmp_path / "train.py"
    script.write_text("import traceml\ntraceml.init(local=True)\nwith traceml.trace_step():\n    pass\n")
    words = [sys.executable, "-m", "debugpy", "--listen", f"127.0.0.1:{free_port()}", str(script)]  # ipykernel has it
    with (tmp_path / "output").open("wb") as output:
        own = environ(tmp_path, TRACEML_CONNECT_TIMEOUT="60")
        job = subprocess.Popen(words, env=own, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
        try:
            assert job.wait(120) == 0, (tmp_path / "output").read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # with the debugger's own processes

    eventually(lambda: list((tmp_path / "traceml_runs").glob("2*/report.json")), "the report")
    assert "pydevd" not in (tmp_path / "output").read_text()


def test_files_do_not_override_the_settings_of_the_job(
    quiet_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting of the job that is turned off is off in its aggregator, too; what must stay on the machine stays."""
    started: list[Mapping[str, str]] = []

    def fail(*_: object, environ: Mapping[str, str], **__: object) -> NoReturn:
        started.append(environ)
        raise OSError("no process starts in this test")

    monkeypatch.setattr(local_aggregator, "DetachedProcess", fail)
    (tmp_path / "traceml.toml").write_text(
        'keep_runs = 1\non_finding = ["true"]\ntls = true\notlp_endpoint = "http://collector:4318"\n'
    )
    own = {"keep_runs": None, "on_finding": [], "tls": False, "otlp_endpoint": None}
    own |= {"local_only": True, "mask": ["re:secret-[a-z]{3,5}", "*.key"]}
    with pytest.raises(AggregatorUnavailableError, match="no process starts"):
        traceml.init(local=True, runs_dir=tmp_path / "runs", **own)

    config = settings.load(started[0], tmp_path)
    assert {name: getattr(config, name) for name in own} == own | {
        "on_finding": (), "mask": ("re:secret-[a-z]{3,5}", "*.key"),
    }  # fmt: skip


def test_a_foreign_host_is_no_place_for_it(quiet_process: None) -> None:
    """An address that is not this host's cannot be served from here; the error says so."""
    with pytest.raises(AggregatorUnavailableError, match="none can be started"):
        traceml.init(local=True, host="192.0.2.1", port=free_port(), connect_timeout=0.2)


def test_a_host_of_unknown_name_is_told_as_no_aggregator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error of the name service is none that `on_missing="warn"` and the recorder's thread know."""

    def unknown(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(AggregatorUnavailableError, match=r"a-host:29765 .*Name or service not known"):
        traceml.init(local=True, host="a-host", runs_dir=tmp_path)


@pytest.mark.process
def test_another_users_aggregator_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host of many users the usual port may be another's: this user's aggregator takes another one."""
    (tmp_path / "other").mkdir()
    with monkeypatch.context() as patch:
        for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
            patch.setenv(name, str(tmp_path / "other"))

        other = Serving(tmp_path / "other" / "runs", tmp_path / "log")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    try:
        own = environ(tmp_path, TRACEML_PORT=str(other.port))
        done = subprocess.run(
            [sys.executable, str(script), "5"], env=own, cwd=tmp_path, capture_output=True, text=True, check=False
        )
    finally:
        other.close()

    assert (done.returncode, done.stderr) == (0, "")
    (run_dir,) = (tmp_path / "traceml_runs").glob("2*")
    with StoreReader(run_dir / STORE_NAME) as store:
        assert store.stored("steps") == 5


@pytest.mark.process
def test_a_stopping_aggregator_is_not_another_users(quiet_process: None, tmp_path: Path) -> None:
    """Its token is gone before its connections are; the next one takes its port, where the job's other ranks look."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = int(listener.getsockname()[1])

    def end() -> None:
        connection, _ = listener.accept()
        listener.close()
        with connection:
            connection.sendall(encode({"t": "challenge", "v": WIRE_VERSION, "nonce": b"n" * 32}))
            connection.recv(1)

    ending = threading.Thread(target=end)
    ending.start()
    traceml.init(local=True, port=port, runs_dir=tmp_path / "runs")
    ending.join()

    assert auth.discover(port) is not None


@pytest.mark.process
def test_an_aggregator_that_cannot_start_is_explained(quiet_process: None, tmp_path: Path) -> None:
    """The error names its log, and does not advise what was tried."""
    (tmp_path / "file").write_text("")
    with pytest.raises(AggregatorUnavailableError, match=r"the one started here has ended: .*local-") as failure:
        traceml.init(local=True, port=free_port(), runs_dir=tmp_path / "file" / "runs")

    assert "local=True" not in str(failure.value)


@pytest.mark.process
def test_an_aggregator_that_cannot_store_is_explained_after_the_usual_time(
    quiet_process: None, tiny_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk it answers at once: the wait for one that starts slowly is not for that."""
    disk = tiny_disk(1 << 16)
    with contextlib.suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass

    monkeypatch.setattr(local_aggregator, "START_S", math.inf)
    with pytest.raises(AggregatorUnavailableError, match=r"cannot accept this process: .*disk is full"):
        traceml.init(local=True, port=free_port(), runs_dir=disk / "runs", connect_timeout=0.2)


@pytest.mark.process
def test_an_aggregator_that_cannot_write_its_token_is_explained(
    quiet_process: None, tiny_disk: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers, and its token cannot be found: it is still the job's own, and no other user's."""
    disk = tiny_disk(1 << 16)
    disk.chmod(0o700)
    (disk / "traceml").mkdir(mode=0o700)
    with contextlib.suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(disk))
    with pytest.raises(AggregatorUnavailableError, match=r"the file of its token: the disk of .* is full"):
        traceml.init(local=True, runs_dir=tmp_path / "runs", connect_timeout=0.2)


@pytest.mark.parametrize("is_port_given", [True, False])
def test_one_that_another_rank_started_and_cannot_store_is_given_up_likewise(
    quiet_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_port_given: bool
) -> None:
    """All ranks of a job give up after the same time, not only the one that started it."""

    def refuse(host: str, port: int, *_: object, **__: object) -> NoReturn:
        raise AggregatorUnavailableError(host, port, 0.1, "the disk is full", refused=True)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(local_aggregator, "START_S", math.inf)
        monkeypatch.setattr(local_aggregator, "connect", refuse)
        monkeypatch.setattr(local_aggregator, "address_of", lambda *_: AggregatorAddress("127.0.0.1", port))
        given = {"port": port} if is_port_given else {}
        with pytest.raises(AggregatorUnavailableError, match="the disk is full"):
            traceml.init(local=True, runs_dir=tmp_path / "runs", connect_timeout=0.2, **given)
