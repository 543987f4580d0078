"""`traceml launch`: its words. What it does on hosts is in tests/launch."""

from __future__ import annotations

import signal
from importlib import import_module

import pytest

from traceml import cli
from traceml.cli.launch import _joined, main


@pytest.mark.parametrize(
    ("words", "understood"),
    [
        (
            "--hostnames a b --workers-per-host 2 3 train.py --lr 1",
            "--hostnames=a,b --workers-per-host=2,3 train.py --lr 1",
        ),
        ("--hostnames a,b train.py a b", "--hostnames=a,b train.py a b"),
        ("--hostnames a b train.py", "--hostnames=a,b train.py"),
        ("--workers-per-host auto --hostnames slurm train", "--workers-per-host=auto --hostnames=slurm train"),
        ("--workers-per-host 2 train", "--workers-per-host=2 train"),
        ("--hostnames a b -m train --hostnames c", "--hostnames=a,b -m train --hostnames c"),
        ("--timeout 3 --hostnames a --report r train", "--hostnames=a --timeout 3 --report r train"),
        ("--hostnames a --timeout 3 --hostnames b --hostnames=c,d t.py", "--hostnames=a,b,c,d --timeout 3 t.py"),
        ("train.py --hostnames a b", "train.py --hostnames a b"),
    ],
)
def test_lists_end_where_the_script_begins(words: str, understood: str) -> None:
    """Values of a list may stand apart; the script and its own options are left alone."""
    assert _joined(words.split()) == understood.split()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "no script given. Try: traceml launch --hostnames node1 node2 train.py"),
        ([""], "no script given. Try: traceml launch --hostnames node1 node2 train.py"),
        (["--hostnames", "a", "b", "trani.py"], "can't open file 'trani.py'"),
        (["--hostnames"], "--hostnames needs a value"),
        (["--hostnames", "a", "--workers-per-host", "0", "x.py"], "'0' is not a number of workers"),
        (["--workers-per-host", "2", "3", "x.py"], "workers_per_host has 2 numbers for 1 host ("),
        (["--hostnames", "a", "a", "x.py"], "hostnames has a more than once"),
        (["--timeout", "-1", "x.py"], "--timeout takes a number above 0, not '-1'"),
        (["--hostnames", "slurm", "x.py"], "Slurm"),
        (["--nodes", "2", "x.py"], "--nodes"),
        (["--live", "terminal", "x.py"], "standard output is not one"),
        (["--hostnames", "./hosts", "x.py"], "hostfile hosts cannot be read: No such file or directory"),
        (["--hostnames", "bad.txt", "x.py"], "hostfile bad.txt, line 2: 'slot=2' is not understood"),
        (["--hostnames", "a:b", "x.py"], "'b' is not a port"),
    ],
)
def test_mistakes_are_reported_in_one_line(words, complaint, capsys, monkeypatch, tmp_path) -> None:
    """Called wrongly, it says what is wrong before any host is asked, and exits with 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "x.py").write_text("")
    (tmp_path / "bad.txt").write_text("node1\nnode2 slot=2\n")

    status = cli.main(["launch", *words])

    shown = capsys.readouterr().err
    assert complaint in shown
    assert status == (3 if "slurm" in words else 2)
    assert len(shown.splitlines()) <= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_job_before_the_launcher(number, capsys, monkeypatch, tmp_path) -> None:
    """Ctrl-\\ too: it killed the launcher, whose live screen then stayed in the terminal."""
    ended = []

    def run_script(*_args: object, **_options: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            ended.append(error.number)
            raise

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    monkeypatch.setattr(import_module("traceml.launch.launcher.assembly"), "run_script", run_script)
    before = signal.getsignal(number)

    assert main(["--hostnames", "localhost", "train.py"]) == 128 + number
    assert ended == [number]
    assert f"traceml launch: ended by {number.name}" in capsys.readouterr().err
    assert signal.getsignal(number) is before
