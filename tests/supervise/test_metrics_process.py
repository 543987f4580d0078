"""The metrics beside a job: address, token, restart and end."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import sys
import time

import pytest

from tests.display.monitoring.running import running_run, series_of
from tests.forked import client as forked
from tests.ports import free_port
from traceml.errors import TraceMLError
from traceml.supervise import metrics_process
from traceml.supervise.listen_address import ListenAddress
from traceml.supervise.metrics_process import MetricsProcess, metrics_beside

FREE = ListenAddress(port=0)


@pytest.fixture(autouse=True)
def _own_tokens(tmp_path, monkeypatch):
    """No token of this user's servers, and none left behind."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setattr("traceml.transport.auth._candidates", lambda: [runtime])
    return runtime


def get(port, **headers):
    """Return status and text of a request; the server may still be starting."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/metrics", headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_metrics_are_served_replaced_when_killed_and_gone_at_the_end(tmp_path):
    """The socket stays, so a scrape during the restart is answered by the next process."""
    with running_run(tmp_path / "runs" / "r1"), MetricsProcess(tmp_path / "runs", FREE) as process:
        status, text = get(process.port)
        assert (status, series_of(text)['traceml_steps_total{run="r1"}']) == (200, 200)
        first = process.process.pid
        os.kill(first, signal.SIGKILL)
        while process.process.pid == first:
            process.restart_if_dead()
            time.sleep(0.02)

        assert get(process.port)[0] == 200

    with pytest.raises(ConnectionRefusedError):
        get(process.port)


def test_other_hosts_need_the_token_in_the_file(tmp_path):
    """On an address that others reach; the file is readable by this user only and removed at the end."""
    with MetricsProcess(tmp_path / "runs", ListenAddress("0.0.0.0", 0)) as process:
        file = process.token_file
        assert file.stat().st_mode & 0o777 == 0o600
        assert process.announcement == f"http://0.0.0.0:{process.port}/metrics, with the bearer token in {file}"
        assert process.token not in process.announcement
        assert get(process.port)[0] == 401
        assert get(process.port, Authorization=f"Bearer {file.read_text()}")[0] == 200

    assert not file.exists()


def test_the_token_is_derived_from_the_shared_secret_and_not_it(tmp_path):
    """Ranks prove the secret without sending it; a request of Prometheus sends its token in the clear."""
    everywhere = ListenAddress("0.0.0.0", 0)
    tokens = []
    for secret in ("shared", "shared", "other"):
        process = MetricsProcess(tmp_path, everywhere, secret)
        tokens.append(process.token)
        process.close()

    assert tokens[0] == tokens[1] != tokens[2]
    assert "shared" not in tokens[0]


def test_a_port_in_use_is_reported(tmp_path):
    """With its owner where that is known, and the way out."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            TraceMLError, match=f"port {port} on 127.0.0.1 is in use by another program.*--prometheus HOST:PORT"
        ):
            MetricsProcess(tmp_path, ListenAddress(port=port))

    with (
        MetricsProcess(tmp_path / "a", FREE) as first,
        pytest.raises(TraceMLError, match=rf"in use by the metrics of {tmp_path}/a \(pid \d+\)"),
    ):
        MetricsProcess(tmp_path / "b", ListenAddress(port=first.port))


def test_a_second_job_of_the_folder_uses_the_first_ones_server(tmp_path):
    """Two `traceml run --prometheus` in one folder: one server shows both runs."""
    said: list[str] = []
    with metrics_beside(tmp_path, FREE, None, said.append):
        port = int(said[0].removesuffix("/metrics").rpartition(":")[2])
        with metrics_beside(tmp_path, ListenAddress(port=port), None, said.append) as keep:
            keep()

        assert get(port)[0] == 200

    assert said[1] == f"traceml metrics at http://127.0.0.1:{port}/metrics, by process {os.getpid()}"


def test_without_its_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_process, "find_spec", lambda name: None)

    with pytest.raises(TraceMLError, match=r"pip install 'traceml-torch\[prometheus\]'"):
        MetricsProcess(tmp_path, FREE)


def test_without_an_address_nothing_is_served(tmp_path):
    """It is off unless asked for."""
    said: list[str] = []
    with metrics_beside(tmp_path, None, None, said.append) as keep:
        keep()

    assert said == []


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9000", ListenAddress("127.0.0.1", 9000)),
        ("0.0.0.0:9000", ListenAddress("0.0.0.0", 9000)),
        ("[::1]:9000", ListenAddress("::1", 9000)),
        ("::1:9000", ListenAddress("::1", 9000)),
        ("trainer:0", ListenAddress("trainer", 0)),
    ],
)
def test_addresses(text, address):
    assert ListenAddress.parse(text) == address


@pytest.mark.parametrize("text", ["", "x", "70000", "host:", ":9000", "-1", "a b:9000"])
def test_texts_that_are_no_address(text):
    with pytest.raises(ValueError, match="takes PORT or HOST:PORT"):
        ListenAddress.parse(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("localhost.evil.example", False)],
)  # fmt: skip
def test_only_loopback_needs_no_token(host, expected):
    assert ListenAddress(host).is_loopback is expected


def test_a_script_under_traceml_run_can_be_scraped(tmp_path):
    """While it runs, with its state; the server ends with the job."""
    port = free_port()

    (tmp_path / "train.py").write_text(
        "import urllib.request\n"
        f"print(urllib.request.urlopen('http://127.0.0.1:{port}/metrics', timeout=60).read().decode())\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRACEML_")}
    command = [sys.executable, "-m", "traceml", "run", "--live", "none", "--prometheus", str(port), "train.py"]
    options = {"cwd": tmp_path, "env": environ, "capture_output": True, "text": True, "timeout": 240}
    done = forked.run(command, imports="aggregator", forks=True, **options)

    assert done.returncode == 0, done.stderr
    assert "traceml_runs_hidden" in series_of(done.stdout)
    assert f"traceml metrics at http://127.0.0.1:{port}/metrics\n" in done.stderr
    with pytest.raises(ConnectionRefusedError):
        get(port)
