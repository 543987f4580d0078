"""Workers, agents and networks that fail on real hosts: told with host and rank, and nothing is left on any host."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.eventually import eventually
from tests.launch.hosts import Hosts
from tests.processes import command_of

# The user's script: it launches what it is told, on node1 and node2 with two workers each, and says what came of it.
# Agents stay from launch to launch. Every worker leaves a daemon behind, which wants to survive.
SCRIPT = """
import json, os, signal, subprocess, sys, time
import traceml
from traceml.launch.launcher.job import job

job._CLEANUP_S = 60  # a busy host may need longer than a user waits

def spawn():
    subprocess.run(["sh", "-c", "setsid sleep 86411 >/dev/null 2>&1 &"])

def rank():
    spawn()
    return int(os.environ["RANK"])

def wait(folder, who):
    if folder:
        open(os.path.join(folder, f"rank-{who}"), "w").close()

    while True:
        time.sleep(1)

def fine():
    return rank()

def raises(folder=None):
    who = rank()
    if who == 2:
        raise LookupError("on purpose")

    wait(folder, who)

def killed():
    who = rank()
    if who == 3:
        print("the last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    wait(None, who)

def crashes():
    who = rank()
    if who == 3:
        import ctypes
        ctypes.string_at(0)

    wait(None, who)

def exits():
    who = rank()
    if who == 3:
        os._exit(3)

    wait(None, who)

def agent_killed(*, zygote_too=False):
    who = rank()
    if who == 2:
        zygote = os.getppid()
        agent = int(open(f"/proc/{zygote}/stat").read().rpartition(")")[2].split()[1])
        os.kill(zygote, signal.SIGSTOP if zygote_too else signal.SIGCONT)
        os.kill(agent, signal.SIGKILL)
        os.kill(zygote, signal.SIGKILL if zygote_too else signal.SIGCONT)

    wait(None, who)

def both_killed():
    agent_killed(zygote_too=True)

def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])

def all_signaled(*numbers):
    who = rank()
    if who == 2:
        zygote = os.getppid()
        agent = parent(zygote)
        for number in numbers:
            for pid in (parent(agent), agent, zygote):
                os.kill(pid, number)

    wait(None, who)

def never_returns(folder):
    import threading, traceback
    import torch.distributed as dist
    who = rank()
    main = threading.get_ident()

    def tell():
        while who != 2 and "in barrier" not in "".join(traceback.format_stack(sys._current_frames()[main])):
            time.sleep(0.01)

        open(os.path.join(folder, f"rank-{who}"), "w").close()

    threading.Thread(target=tell).start()
    if who == 2:
        while True:
            time.sleep(1)

    dist.barrier()

def elsewhere():
    sys.path.insert(0, "/dev/shm")
    import only_here
    return only_here.function

for line in sys.stdin:
    asked = json.loads(line)
    options = {"hostnames": ["node1", "node2"], "workers_per_host": 2, "log_handlers": None, **asked["options"]}
    func = elsewhere() if asked["func"] == "elsewhere" else globals()[asked["func"]]
    try:
        told = {"results": traceml.launch(func, asked["args"], ssh_config_file=sys.argv[1], **options).results}
    except BaseException as error:
        told = {
            "type": type(error).__name__, "text": str(error), "notes": getattr(error, "__notes__", []),
            **{name: getattr(error, name, None) for name in ("host", "rank", "local_rank", "exit_code", "signal")},
            "cause": str(error.__cause__),
        }
    print(json.dumps(told), flush=True)
"""


class Script:
    """The script, running on node0."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.process = hosts.launcher.start(
            sys.executable, "-u", hosts.launcher.script(SCRIPT), hosts.ssh_config, stdin=-1, stderr=None
        )

    def begin(self, func: str, *args: Any, **options: Any) -> None:
        """Have it launch something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"func": func, "args": args, "options": options}) + "\n")
        self.process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Return what came of it."""
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told

    def launch(self, func: str, *args: Any, **options: Any) -> dict[str, Any]:
        self.begin(func, *args, **options)
        return self.end()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def script(hosts: Hosts) -> Iterator[Script]:
    with closing(Script(hosts)) as running:
        assert running.launch("fine")["results"] == {"node1": [0, 1], "node2": [2, 3]}
        yield running

    eventually(lambda: not any(hosts[name].processes() for name in hosts.names), "agents to end with the launcher")


def for_debugging(hosts: Hosts, name: str) -> list[str]:
    """Return what is left on a host beside an idle agent, its reaper and its zygote."""
    commands = map(command_of, hosts[name].processes())
    found = [" ".join(command[:3]) for command in commands if command]
    pythons = [line for line in found if "python" in line]
    return [line for line in found if "python" not in line] + pythons[3:]


def runs(process: psutil.Process) -> bool:
    """Return whether a process has not ended; the host's first process may still have to reap it."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def assert_clean(hosts: Hosts) -> None:
    """When a launch has returned or raised, all processes have ended already."""
    assert {name: for_debugging(hosts, name) for name in hosts.names} == {name: [] for name in hosts.names}


def test_an_exception_on_one_host_ends_all(hosts: Hosts, script: Script) -> None:
    """It keeps its type, says where it was raised, and comes although the other ranks would run for ever."""
    told = script.launch("raises")

    assert (told["type"], told["text"]) == ("LookupError", "on purpose")
    assert any("rank 2" in note and "node2" in note for note in told["notes"])
    assert "in raises" in told["cause"]
    assert_clean(hosts)


@pytest.mark.parametrize(
    ("func", "number", "code", "words"),
    [
        ("killed", signal.SIGKILL, None, "the last words"),
        ("crashes", signal.SIGSEGV, None, "Fatal Python error: Segmentation fault"),
        ("exits", None, 3, "ended with exit code 3"),
    ],
)
def test_a_worker_that_dies_is_named(
    hosts: Hosts, script: Script, func: str, number: int | None, code: int | None, words: str
) -> None:
    """Signal or exit code, host, rank and last words, also those of faulthandler."""
    told = script.launch(func)

    assert told["type"] == "WorkerFailedError"
    assert (told["host"], told["rank"], told["local_rank"]) == ("node2", 3, 1)
    assert (told["signal"], told["exit_code"]) == (number, code)
    assert words in told["text"]
    assert_clean(hosts)


@pytest.mark.parametrize("func", ["agent_killed", "both_killed"])
def test_an_agent_that_is_killed_takes_its_workers_along(hosts: Hosts, script: Script, func: str) -> None:
    """The host is named; its workers and their daemons are gone, and those of the other host too.

    Also when the fork server is killed with it: a third process is above them.
    """
    told = script.launch(func)

    assert (told["type"], told["host"]) == ("AgentFailedError", "node2")
    assert "The connection worked to the end: the agent was killed" in told["text"]
    eventually(lambda: hosts["node2"].processes() == [], "node2 to be clean: nobody is there to wait for it")
    assert for_debugging(hosts, "node1") == []
    assert script.launch("fine")["results"] == {"node1": [0, 1], "node2": [2, 3]}


@pytest.mark.parametrize("numbers", [(signal.SIGSTOP, signal.SIGKILL), (signal.SIGSTOP,)])
def test_a_host_is_clean_without_all_that_guard_it(hosts: Hosts, script: Script, numbers: tuple[int, ...]) -> None:
    """Agent, its reaper and the zygote are killed or stopped at once: the launcher connects again and cleans up."""
    told = script.launch("all_signaled", *map(int, numbers))

    assert (told["type"], told["host"]) == ("AgentFailedError", "node2")
    assert for_debugging(hosts, "node1") == []
    assert not any(map(runs, hosts["node2"].processes()))


def test_ctrl_c_tells_who_was_absent(hosts: Hosts, script: Script, tmp_path: Path) -> None:
    """Before a launch that hangs is ended, stacks are collected, and the rank that the others wait for is named."""
    script.begin("never_returns", str(tmp_path))
    eventually(lambda: len(list(tmp_path.iterdir())) == 4, "all ranks to run")
    os.killpg(script.process.pid, signal.SIGINT)
    told = script.end()

    assert told["type"] == "KeyboardInterrupt"
    notes = "\n".join(told["notes"])
    assert (
        "Ranks 0, 1, 3 were waiting in a collective that these ranks had not entered: rank 2 (local rank 0 on node2)"
        in notes
    )
    # Where the one is, and where the others wait: that can be several lines within the collective's own code.
    assert 2 <= notes.count("in never_returns") <= 4
    assert_clean(hosts)


def test_a_host_that_is_cut_off_is_named_in_time(hosts: Hosts, script: Script, tmp_path: Path) -> None:
    """A silent network is noticed on both sides: by the launcher, and there the workers end while it is silent."""
    script.begin("raises", str(tmp_path), workers_per_host=1)  # two ranks: nobody raises
    eventually(lambda: len(list(tmp_path.iterdir())) == 2, "all ranks to run")
    with hosts.cut("node2"):
        told = script.end()
        assert (told["type"], told["host"]) == ("AgentFailedError", "node2")
        # TCP would retry for a quarter of an hour; its own limit of silence is what the launcher has waited for.
        assert re.search(r"Nothing was received from it for \d+ s", told["text"])
        assert "the host or the network is down" in told["text"]
        assert for_debugging(hosts, "node1") == []
        eventually(lambda: hosts["node2"].processes() == [], "the agent to notice that nobody talks to it")


@pytest.mark.parametrize(
    ("obstacle", "cause"),
    [
        ("route add unreachable 10.77.0.11", "No route to host"),
        ("neigh replace 10.77.0.11 lladdr 02:00:00:00:00:01 dev eth0 nud permanent", "Connection timed out"),
    ],
)
def test_a_host_that_cannot_reach_the_first_one_is_named(
    hosts: Hosts, script: Script, obstacle: str, cause: str
) -> None:
    """Address and cause are told long before the timeout of 600 s, and the command that tests the network."""
    hosts["node2"].run("ip", *obstacle.split())
    try:
        told = script.launch("fine")
    finally:
        kind, _, rest = obstacle.partition(" ")
        hosts["node2"].run("ip", kind, "del", *rest.split()[1:])

    assert (told["type"], told["host"]) == ("AgentFailedError", "node2")
    assert "it cannot connect to node1 at 10.77.0.11:" in told["text"]
    assert f"where the ranks meet: {cause}." in told["text"]
    assert "`traceml doctor --hostnames node1 node2`" in told["text"]
    assert_clean(hosts)
    assert script.launch("fine")["results"] == {"node1": [0, 1], "node2": [2, 3]}


def test_a_function_that_the_host_does_not_have_is_named(hosts: Hosts, script: Script) -> None:
    """A module that only the launcher's host has cannot be imported there; the error says which."""
    code = "def function():\n    return 1\n"
    hosts.launcher.run("sh", "-c", f"printf '{code}' > /dev/shm/only_here.py")
    told = script.launch("elsewhere")

    assert "only_here" in told["text"]
    assert any("rank" in note for note in told["notes"])
    assert_clean(hosts)
