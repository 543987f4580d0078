"""The page beside a job: its socket, its token, its end."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import time

import pytest

from tests.ports import free_port
from traceml.errors import TraceMLError
from traceml.supervise import page_process
from traceml.supervise.page_process import PageProcess, page_beside


@pytest.fixture(autouse=True)
def _own_tokens(tmp_path, monkeypatch):
    """No token of a page that this user runs, and none left behind."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr("traceml.transport.auth._candidates", lambda: [runtime])


def status_of(keeper, path="/", **headers):
    """Ask for an address, and wait for the server as long as it needs to start."""
    connection = http.client.HTTPConnection("127.0.0.1", keeper.port, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_page_is_served_replaced_when_killed_and_gone_at_the_end(tmp_path):
    """The socket stays, so who asks while there is no server waits for the next one; the token stays with the port."""
    with PageProcess(tmp_path / "runs", free_port(), nice=0) as keeper:  # taken again below
        port, token, first = keeper.port, keeper.token, keeper.pid
        assert status_of(keeper) == 401
        assert keeper.address("a b") == f"http://127.0.0.1:{port}/run/a%20b?token={token}"
        os.kill(first, signal.SIGKILL)
        while keeper.pid == first:
            keeper.restart_if_dead()
            time.sleep(0.02)

        assert status_of(keeper, f"/?token={token}") == 303

    with pytest.raises(ConnectionRefusedError):
        status_of(keeper)

    with PageProcess(tmp_path / "runs", port, nice=0) as again:
        assert again.token == token


def test_a_port_in_use_is_reported(tmp_path):
    """By whom, where that is known; a job takes another port instead."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TraceMLError, match=f"port {port} on 127.0.0.1 is in use by another program.*--web PORT"):
            PageProcess(tmp_path, port)

        other = PageProcess(tmp_path, port, any_port=True)
        assert other.port != port
        other.close()

    said = r"in use by the page of .* \(pid \d+\).*\?token="
    with PageProcess(tmp_path, 0) as first, pytest.raises(TraceMLError, match=said):
        PageProcess(tmp_path, first.port)


def test_without_its_libraries_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(page_process, "find_spec", lambda name: None)

    with pytest.raises(TraceMLError, match=r"pip install 'traceml-torch\[web\]'"):
        PageProcess(tmp_path, 0)


def test_a_page_of_the_same_runs_is_used(tmp_path, monkeypatch, capsys):
    """A job whose runs somebody already watches starts no second page."""
    with PageProcess(tmp_path, 0) as keeper:
        monkeypatch.setattr(page_process, "DEFAULT_PORT", keeper.port)
        with page_beside(tmp_path / "run-1") as keep:
            keep()

    assert capsys.readouterr().err == f"traceml: the page is at {keeper.address('run-1')}\n"
