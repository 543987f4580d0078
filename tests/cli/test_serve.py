"""`traceml serve` on the command line."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forked import client as forked
from tests.ports import free_port
from traceml.cli import main
from traceml.transport import auth
from traceml.transport.client import connect
from traceml.transport.hello import Hello


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `traceml serve` with these options; kill it at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        process = forked.Popen(
            [sys.executable, "-m", "traceml", "serve", "--runs-dir", str(tmp_path / "runs"), *options],
            imports="aggregator",
            forks=True,
            env={key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def port_of(process: subprocess.Popen[str]) -> int:
    """Wait until it serves; return its address."""
    assert process.stdout is not None
    return int(process.stdout.readline().split(",")[0].rpartition(":")[2])


@pytest.mark.process
def test_ranks_of_this_user_find_it_without_being_told_the_token(serve):
    """The first line is its address; the token is in a file of this user."""
    process = serve("--port", "0")
    port = port_of(process)

    connection = connect("127.0.0.1", port, Hello(), timeout_s=60)

    assert connection.request("status")["pid"] == process.pid
    connection.close("done")
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == 0
    assert auth.discover(port, include_dead=True) is None


@pytest.mark.process
def test_token_outlives_a_crash(serve):
    """An aggregator on the port of a crashed one keeps its token, so that its ranks reconnect."""
    first = serve("--port", str(free_port()))  # nobody else takes it before the second one does
    port = port_of(first)
    entry = auth.discover(port)
    assert entry is not None
    first.kill()
    first.wait()

    second = serve("--port", str(port))

    assert port_of(second) == port
    connect("127.0.0.1", port, Hello(), entry.token, timeout_s=60).close()
    second.send_signal(signal.SIGTERM)
    assert second.wait(240) == 0


@pytest.mark.process
def test_port_in_use_by_another_aggregator(serve):
    """The error names the port, its owner and the way out; the exit status is 3."""
    first = serve("--port", "0")
    port = port_of(first)

    second = serve("--port", str(port))

    _, stderr = second.communicate(timeout=240)
    assert second.returncode == 3
    assert f"port {port} on 127.0.0.1 is in use by the aggregator of " in stderr
    assert f"(pid {first.pid})" in stderr
    assert "--port 0" in stderr
    assert "Traceback" not in stderr


def test_port_in_use_by_something_else(capsys, tmp_path):
    """The error names a port of another program, with the way out."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        assert main(["serve", "--port", str(port), "--runs-dir", str(tmp_path)]) == 3

    error = capsys.readouterr().err
    assert f"port {port} on 127.0.0.1 is in use by another program. Choose another address" in error


def test_unwritable_runs_folder(capsys, tmp_path):
    """A runs folder that cannot be written is refused at the start, with the reason."""
    (tmp_path / "file").write_text("")

    assert main(["serve", "--port", "0", "--runs-dir", str(tmp_path / "file" / "runs")]) == 3

    error = capsys.readouterr().err
    assert "cannot write the runs folder" in error
    assert "is a file, not a folder" in error
    assert "--runs-dir" in error


def test_address_that_is_not_here(capsys, tmp_path):
    """An address of another machine is an error with the system's reason."""
    assert main(["serve", "--host", "192.0.2.1", "--port", "0", "--runs-dir", str(tmp_path)]) == 3
    assert "cannot listen on 192.0.2.1:0: Cannot assign requested address" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--prot", "1"], ["--port", "x"], ["--port", "70000"], ["extra"]])
def test_wrong_words_exit_with_2(words, capsys):
    """A usage error is one line and a hint."""
    assert main(["serve", *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_help_hides_what_is_between_our_processes(capsys):
    """The help shows the public options only."""
    assert main(["serve", "--help"]) == 0

    out = capsys.readouterr().out
    assert "--runs-dir" in out
    assert "--fd" not in out
    assert "--ready-fd" not in out


@pytest.mark.process
def test_the_page_is_served_beside_the_aggregator(serve):
    """With --web the address of the page is printed first; it needs its token, and ends with the aggregator."""
    process = serve("--port", "0", "--web", "0")
    assert process.stdout is not None
    line = process.stdout.readline()
    address = line.removeprefix("traceml page at ").strip()
    host, path = address.removeprefix("http://").split("/", 1)

    def status(of: str) -> int:
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", of)
        answer = connection.getresponse().status
        connection.close()
        return answer

    assert "?token=" in address
    assert [status("/"), status(f"/{path}")] == [401, 303]
    assert port_of(process)  # before it serves, a signal ends it without its own end
    process.send_signal(signal.SIGTERM)
    process.wait(240)
    with pytest.raises(ConnectionRefusedError):
        status("/")


@pytest.mark.parametrize("port", ["99999", "-1", "x"])
def test_a_port_that_is_none_is_called_so(port, capsys):
    assert main(["serve", f"--web={port}"]) == 2
    assert "takes a whole number from 0 to 65535" in capsys.readouterr().err


@pytest.mark.process
def test_metrics_are_served_beside_the_aggregator(serve):
    """With --prometheus the address is printed first; the server ends with the aggregator."""
    process = serve("--port", "0", "--prometheus", "0")
    assert process.stdout is not None
    host = process.stdout.readline().removeprefix("traceml metrics at http://").removesuffix("/metrics\n")

    def ask() -> tuple[int, str]:
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    status, text = ask()
    assert (status, "traceml_runs_hidden 0.0" in text) == (200, True)
    assert port_of(process)  # before it serves, a signal ends it without its own end
    process.send_signal(signal.SIGTERM)
    process.wait(240)
    with pytest.raises(ConnectionRefusedError):
        ask()


@pytest.mark.parametrize("address", ["99999", "x", "host:", "-1"])
def test_an_address_of_metrics_that_is_none_is_called_so(address, capsys):
    assert main(["serve", f"--prometheus={address}"]) == 2
    assert "--prometheus takes PORT or HOST:PORT with a port from 0 to 65535" in capsys.readouterr().err


def test_a_script_in_place_of_the_address_is_reported_what_to_write(tmp_path, monkeypatch, capsys):
    """The port may be left out, but not before a script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()

    assert main(["run", "--prometheus", "train.py"]) == 2
    assert "give the port: --prometheus 29767 train.py" in capsys.readouterr().err
