"""Hosts that cannot be used, each real: what is wrong with them is told at once, with their names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.eventually import eventually
from tests.launch.hosts import Hosts
from tests.launch.jobs import PYTHONPATH
from traceml.errors import AgentFailedError
from traceml.launch.launcher.hosts.agent_connection import AgentConnection
from traceml.launch.launcher.hosts.hosts import HostSpec
from traceml.launch.shared.channel_frames import ChannelClosedError
from traceml.launch.shared.launch_messages import AgentHello, Message

_LAUNCH = """
    import json, sys, traceml
    from tests.launch import jobs
    from traceml.launch.launcher.job import job

    job._HOST_ERROR_GRACE_S = 60  # one of several bad hosts may take long on a busy machine
    found = {}
    for name, options in json.loads(sys.argv[2]).items():
        options = {"hostnames": [name], "workers_per_host": 1, "keep_agents": False, **options}
        try:
            traceml.launch(jobs.nothing, ssh_config_file=sys.argv[1], log_handlers=None, **options)
        except traceml.AgentFailedError as error:
            found[name] = [error.host, error.reason, str(error), getattr(error, "__notes__", [])]
    print(json.dumps(found))
"""


def launch_each(hosts: Hosts, options: dict[str, Any]) -> dict[str, tuple[str, str, str, list[str]]]:
    """Launch on one host after another from node0; return host, reason, text and notes of each failure."""
    script = textwrap.dedent(_LAUNCH)
    env = {"PYTHONPATH": PYTHONPATH}
    told = json.loads(hosts.launcher.python(script, hosts.ssh_config, json.dumps(options), env=env).stdout)
    return {name: tuple(values) for name, values in told.items()}


def _end_of(link: AgentConnection) -> str | None:
    """Return why the channel was closed; None while it is open."""
    try:
        link.channel.receive()
    except ChannelClosedError as error:
        return error.reason

    return None


def _hello(link: AgentConnection) -> AgentHello:
    """Return the agent's first message."""

    def first() -> Message | None:
        link.channel.flush()
        return next(iter(link.channel.receive()), None)

    hello = eventually(first, "the agent's first message")
    assert isinstance(hello, AgentHello)
    return hello


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter whose environment has no torch."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def test_a_python_that_needs_libraries_gets_their_path(hosts: Hosts, tmp_path: Path) -> None:
    """By ssh it starts without the modules of the user's shell; the loader's words were taken for a missing command."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$LD_LIBRARY_PATH" = "/opt/a b" ] && exec ' + sys.executable + ' "$@"\n'
        "echo 'python: error while loading shared libraries: libpython3.so: cannot open' >&2; exit 127\n"
    )
    python.chmod(0o755)
    code = f"""
        import sys, traceml
        from tests.launch import jobs
        options = {{"hostnames": ["node1"], "workers_per_host": 1, "backend": None, "log_handlers": None}}
        options |= {{"python": {str(python)!r}, "ssh_config_file": sys.argv[1], "keep_agents": False}}
        try:
            print(traceml.launch(jobs.rank, **options).rank(0))
        except traceml.AgentFailedError as error:
            print(error.reason)
    """

    def tell(**env: str) -> str:
        return hosts.launcher.python(
            textwrap.dedent(code), hosts.ssh_config, env={"PYTHONPATH": PYTHONPATH, **env}
        ).stdout

    assert tell(LD_LIBRARY_PATH="/opt/a b") == "0\n"
    assert "error while loading shared libraries: libpython3.so" in tell()


def test_each_kind_of_bad_host_is_reported_as_such(hosts: Hosts, bare_python: Path, tmp_path: Path) -> None:
    """Output of ssh, the shell or Python there is recognized, kept, and shown with advice."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'Segfault in the sky' >&2; exit 9\n")
    fake.chmod(0o755)
    prose = tmp_path / "prose"  # a shell interprets it
    prose.write_text("prose is no program\n")
    prose.chmod(0o755)
    options: dict[str, Any] = {
        "unknown": {},
        "refused": {},
        "wrongkey": {},
        "badhostkey": {},
        "node1": {"python": "/no/such/python"},
        "root@node1": {"python": str(prose)},
        "root@node2": {"python": str(tmp_path)},
        "alias1": {"python": str(bare_python)},
        "node2": {"python": str(fake)},
        "alias2": {"hostnames": ["alias2", "refused", "unknown"], "python": str(bare_python)},
    }

    told = launch_each(hosts, options)

    reasons = {name: told[name][1] for name in options}
    assert "its name is unknown" in reasons["unknown"]
    assert "refused" in reasons["refused"]
    assert "permission denied" in reasons["wrongkey"]
    assert "Permission denied (publickey)" in told["wrongkey"][2]
    assert "host key" in reasons["badhostkey"]
    assert reasons["node1"] == "command not found there: /no/such/python"
    assert "python=" in told["node1"][2]
    assert reasons["root@node1"] == f"the command is not executable there: {prose}"
    assert reasons["root@node2"] == f"the command is not executable there: {tmp_path}"
    assert reasons["alias1"] == "torch is not installed there"
    assert str(bare_python) in told["alias1"][2]
    assert "did not start" in reasons["node2"]
    assert "exit code 9" in reasons["node2"]
    assert "Segfault in the sky" in told["node2"][2]
    # several bad hosts are told together, in the order in which they answer
    together = "\n".join([told["alias2"][2], *told["alias2"][3]])
    assert "host refused: the connection was refused" in together
    assert "host unknown: its name is unknown" in together
    for host in hosts.all:
        eventually(lambda host=host: not host.processes(), f"{host.name} to be as before")


def test_a_host_without_torch_runs_what_needs_none(hosts: Hosts, bare_python: Path) -> None:
    """On a host with nothing but Python, a function runs when no process group is asked for; also on this one."""
    options = {"python": str(bare_python), "backend": None}
    assert launch_each(hosts, {"node1": options, "localhost": options}) == {}


def test_a_python_of_another_version_gets_no_function(hosts: Hosts, bare_python: Path, tmp_path: Path) -> None:
    """Its bytecode would crash there. What travels is unpacked by what packed it, not by what is installed there."""
    other = tmp_path / "python"
    code = "import sys; sys.version = '3.99.1 (other)'; exec(sys.argv[1])"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$2"\n')
    other.chmod(0o755)
    library = next((bare_python.parents[1] / "lib").glob("python*/site-packages"))
    (library / "cloudpickle.py").write_text("raise ImportError('very old')\n")

    told = launch_each(hosts, {"node1": {"python": str(other)}, "node2": {"python": str(bare_python), "backend": None}})

    assert told.keys() == {"node1"}
    assert told["node1"][1].startswith("its Python is 3.99.1, ours 3.")


def test_an_interpreter_that_is_not_here_is_reported() -> None:
    """On this host too, the interpreter's name is in the error."""
    with pytest.raises(AgentFailedError, match=r"host localhost: /no/such/python cannot be run here"):
        AgentConnection(HostSpec("localhost", "local", 1), "/no/such/python", None)


def test_noise_before_the_agent_is_skipped_and_kept(tmp_path: Path) -> None:
    """Output of a start-up file does not disturb the channel, and is not lost when the agent fails."""
    loud = tmp_path / "python"
    loud.write_text("#!/bin/sh\necho 'Welcome to the machine'\nexit 4\n")
    loud.chmod(0o755)
    link = AgentConnection(HostSpec("localhost", "local", 1), str(loud), None)
    error = link.failure(eventually(lambda: _end_of(link), "the channel to close"))

    assert "exit code 4" in error.reason
    assert error.words == ["Welcome to the machine"]
    assert not link.alive


def test_a_connection_that_broke_during_the_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command to try shows how far a connection gets; once Python runs there, its processes."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        "#!/bin/sh\ncase \"$*\" in *-G*) exit 0;; esac\nprintf '\\n\\000traceml-agent/1\\000\\n'; exit 255\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    link = AgentConnection(HostSpec("node1:2222", "ssh", 1), "/opt/python", tmp_path / "config")
    assert link.by_hand == f"ssh -v -F {tmp_path}/config -p 2222 node1 /opt/python -V"

    error = link.failure(eventually(lambda: _end_of(link), "the channel to close"))

    assert error.reason == "the connection broke after Python had started there"
    assert f"ssh -F {tmp_path}/config -p 2222 node1 ps ax -o pid,stat" in str(error)


@pytest.mark.parametrize(
    ("said", "tries"),
    [
        ("Host key verification failed.", ["ssh {} node1", "ssh-keygen -R '[node1]:2222'"]),
        # an alias, or another file of known hosts: only ssh knows under which name and where the old key is
        (
            'remove with:\n  ssh-keygen -f "/etc/my hosts" -R "[10.0.0.1]:2222"\nHost key verification failed.',
            ["ssh {} node1", 'ssh-keygen -f "/etc/my hosts" -R "[10.0.0.1]:2222"'],
        ),
        ("root@node1: Permission denied (publickey).", ["ssh {} node1 true"]),
        ("Connection timed out during banner exchange", ["ssh -v {} node1"]),
        ("what is this", ["ssh -v {} node1 true"]),
    ],
)
def test_the_commands_to_try_reach_the_host(
    said: str, tries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have its port and the configuration that the launcher uses."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\ncase \"$*\" in *-G*) exit 0;; esac\necho '{said}' >&2; exit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    link = AgentConnection(HostSpec("node1:2222", "ssh", 1), "/opt/python", tmp_path / "config")
    error = link.failure(eventually(lambda: _end_of(link), "the channel to close"))

    for command in tries:
        assert f"`{command.format(f'-F {tmp_path}/config -p 2222')}`" in str(error)


@pytest.mark.parametrize(("status", "is_login"), [(3, True), (255, False)])
def test_a_shell_that_ends_before_python_is_told_apart(
    status: int, is_login: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start-up file that ends by `exit 3` looks like a broken Python; 255 is ssh's own. Long lines are cut."""
    ssh = tmp_path / "ssh"
    said = "head -c 50000 /dev/zero | tr '\\0' x"
    ssh.write_text(f'#!/bin/sh\ncase "$*" in *-G*) exit 0;; esac\n{said}; {said} >&2; exit {status}\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    link = AgentConnection(HostSpec("node1", "ssh", 1), "/opt/python", None)
    error = link.failure(eventually(lambda: _end_of(link), "the channel to close"))

    assert "its agent did not start" in error.reason
    assert "`ssh -v node1 true`" in error.advice
    assert ("~/.bashrc" in error.advice and "`ssh -v node1 /opt/python -V`" in error.advice) is is_login
    assert [len(line) for line in error.words] == [1000, 1000]


@pytest.mark.parametrize(
    ("remote", "told"),
    [
        ('eval "$word"', "The host is not the cause: ssh was killed here, by a user or for lack of memory."),
        (
            '(eval "$word"); echo why >&2; exit 1',
            "The agent ended itself with this status. Its last lines say why.",
        ),
        (
            '(eval "$word"); echo "OSError: [Errno 24] Too many open files" >&2; exit 1',
            "Its limit of open files is too low for so many workers: raise it (`ulimit -n`), or start fewer there.",
        ),
    ],
)
def test_a_lost_connection_is_explained_by_what_has_ended(
    remote: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that nobody has killed was said to be killed."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\ncase "$*" in *-G*) exit 0;; esac\nfor word; do :; done\n{remote}\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    link = AgentConnection(HostSpec("node1", "ssh", 1), sys.executable, None)
    link.hello = _hello(link)
    agent = psutil.Process(link.hello.pid)
    psutil.Process(agent.ppid()).kill()  # its parent, which is our ssh, or what ssh waits for

    error = link.failure(eventually(lambda: _end_of(link), "the channel to close"))

    link.await_cleanup(60)
    assert error.advice == told
    eventually(lambda: not agent.is_running(), "the agent to end")


@pytest.mark.parametrize(
    ("setting", "option"), [("remotecommand tmux", "RemoteCommand=none"), ("stdinnull yes", "StdinNull=no")]
)
def test_a_configuration_for_logins_does_not_keep_the_agent_out(
    setting: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that an older ssh does not know are given only where its configuration shows them."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\ncase "$*" in *-G*) cat "$SETTING"; exit 0;; esac\necho "$*" >&2; exit 255\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SETTING", str(tmp_path / "setting"))
    options = {}
    for shown in (setting, "user me"):
        (tmp_path / "setting").write_text(f"{shown}\n")
        link = AgentConnection(HostSpec("node1", "ssh", 1), "/opt/python", None)
        options[shown] = link.failure(eventually(lambda link=link: _end_of(link), "the channel to close")).words[0]

    assert f"-o {option} -- node1" in options[setting]
    assert "=none" not in options["user me"]
    assert "StdinNull" not in options["user me"]


def test_something_that_accepts_and_says_nothing_is_reported(hosts: Hosts) -> None:
    """A hanging sshd is told apart from a host that is down."""
    code = "import socket, time; s = socket.create_server(('', 2323)); print('up', flush=True); time.sleep(600)"
    mute = hosts["node2"].start(sys.executable, "-c", code)
    try:
        assert mute.stdout is not None
        mute.stdout.readline()
        told = launch_each(hosts, {"node2:2323": {}})
    finally:
        mute.kill()
        mute.communicate()

    assert told["node2:2323"][1].startswith("something listens there but sends nothing")


def test_an_agent_that_was_stopped_is_reported() -> None:
    """It still exists and is silent; nothing of it is left."""
    link = AgentConnection(HostSpec("localhost", "local", 1), sys.executable, None)
    link.hello = _hello(link)
    agent = psutil.Process(link.hello.pid)
    agent.suspend()
    eventually(lambda: agent.status() == psutil.STATUS_STOPPED, "the agent to stop")

    error = link.failure("nothing was received from the other side for 15 s")

    assert "stopped by a signal (SIGSTOP" in str(error)
    assert "counts as lost" in str(error)
    eventually(lambda: not agent.is_running(), "the agent to end")
