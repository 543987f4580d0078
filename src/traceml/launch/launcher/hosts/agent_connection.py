"""Connection to the agent of one host: started by ssh, srun or as a local process; explains why it failed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Sequence

from traceml.errors import AgentFailedError
from traceml.formatting import cut_text, left_text
from traceml.helper_programs import end_process, without_debugger
from traceml.inspection.kernel_state import process_info
from traceml.launch.launcher.hosts import bootstrap
from traceml.launch.launcher.hosts.hostfile import split_port
from traceml.launch.launcher.hosts.hosts import HostSpec
from traceml.launch.launcher.hosts.slurm import step_command, task_options
from traceml.launch.shared.channel import Channel
from traceml.launch.shared.launch_messages import AgentHello
from traceml.launch.shared.process_cleanup import end_job
from traceml.process_ends import end_of_status

__all__ = ["AgentConnection"]

_SSH_OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=3")
_CONNECT_TIMEOUT_S = 20  # for ssh, unless the user's configuration sets one
# The command line overrides the configuration, so ask `ssh -G` first whether the configuration sets a timeout. What it
# sets for a user's own logins would keep the agent from running, or from reading; older versions of ssh know no such
# options, and show none.
_SSH_SCRIPT = """
host=$1 command=$2 limit=$3; shift 3
found=$(ssh "$@" -G "$host" 2>/dev/null)
has() { printf '%s\\n' "$found" | grep -q "^$1"; }
if has "connecttimeout none"; then set -- "$@" -o ConnectTimeout="$limit"; fi
if has "remotecommand "; then set -- "$@" -o RemoteCommand=none; fi
if has "stdinnull yes"; then set -- "$@" -o StdinNull=no; fi
exec ssh "$@" -- "$host" "$command"
"""

# Python itself may need this variable; the first line of its standard input has the value.
_WITH_LIBRARIES = 'IFS= read -r LD_LIBRARY_PATH; export LD_LIBRARY_PATH; exec "$@"'
_NO_LIBRARY = re.compile(r"^.*error while loading shared libraries: .*$", re.MULTILINE)

_KEPT_LINES = 20
_LONGEST_LINE = 1000
_READ_BYTES = 65536
_SSH_FAILED = 255  # exit status of ssh itself
_SIGNALED = 128  # from here on a status may be that of a signal: 128 + n from srun, 255 from ssh
_TOO_OLD = 78  # exit status of the bootstrap program
_SILENT_S = 6.0  # longer than any pause of a connection that works: both sides send something every few seconds
_LOST = "A host whose agent is silent that long counts as lost, and the job ends: the other ranks would wait for it."
_END_WAIT_S = 1.0  # a program that has closed its output exits soon; its status is known only then

_REMOVAL = re.compile(r"^\s*(ssh-keygen -f .* -R .*?)\s*$", re.MULTILINE)  # of the file and the name that have the key

_log = logging.getLogger("traceml.launch")

# Patterns in the output of ssh and srun, with the meaning and the advice. The first match wins.
_MEANINGS: Sequence[tuple[str, str, str]] = (
    (
        r"Could not resolve hostname|Name or service not known|Invalid node name|nodename nor servname",
        "its name is unknown",
        "Check the spelling, and that it is in DNS, /etc/hosts or the ssh configuration.",
    ),
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key verification failed|No .*host key is known for",
        "its host key was not accepted",
        "Connect once by hand (`{ssh}`) and check the key; `ssh-keygen -R {known_host}` removes an old one.",
    ),
    (
        r"Permission denied \(|Too many authentication failures",
        "permission denied: it accepts none of your ssh keys",
        "`{ssh} true` must work without a prompt: check user and key in the ssh configuration, or ssh's agent.",
    ),
    (
        r"Connection refused",
        "the connection was refused: nothing listens there",
        "Check that sshd runs on it, and the port in the ssh configuration.",
    ),
    (
        r"timed out during banner exchange",
        "something listens there but sends nothing: its sshd hangs, or another program has the port",
        "`{verbose}` shows the last step; check the load of the host and the log of its sshd.",
    ),
    (
        r"timed out|Timeout, server|No route to host|Network is unreachable|Host is down",
        "it cannot be reached: the connection timed out or there is no route to it",
        "Check that it is up, and that no firewall blocks the connection.",
    ),
    (
        r"Bad configuration option|Can't open user config file|terminating, \d+ bad configuration",
        "the ssh configuration cannot be read",
        "Check the file given as ssh_config_file.",
    ),
    (
        r"Unable to contact slurm controller|Invalid job id|Unable to confirm allocation|Job has expired",
        "Slurm's allocation is gone, or its controller does not answer",
        "Check `squeue` and `scontrol ping`.",
    ),
    (
        r"kex_exchange_identification|Connection (closed|reset) by|Broken pipe",
        "it closed the connection",
        "Check the log of its sshd.",
    ),
)


class AgentConnection:
    """The agent of one host, and the channel to it.

    The agent is started at once and not waited for: `hello` is None until it has answered.

    Attributes:
        channel: to the agent. It skips what precedes the agent's greeting.
        errors_fd: stderr of ssh, srun and the agent; to be waited on, and read by `read_errors`.
        hello: the agent's description of itself and its host.

    Args:
        library_path: LD_LIBRARY_PATH for a Python that ssh starts; empty: as it is there.

    Raises:
        AgentFailedError: the program that connects cannot be started.
    """

    def __init__(
        self,
        spec: HostSpec,
        python: str,
        ssh_config_file: str | os.PathLike[str] | None,
        *,
        library_path: str = "",
    ) -> None:
        self.spec = spec
        self.hello: AgentHello | None = None
        self._python, self._ssh_config_file = python, ssh_config_file
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._partial_line = b""
        inner_in, outer_in = os.pipe()
        outer_out, inner_out = os.pipe()
        self.errors_fd, inner_err = os.pipe()
        os.set_blocking(self.errors_fd, False)
        bundled = spec.transport != "local" or python != sys.executable  # another Python may lack our package
        library_path = library_path if spec.transport == "ssh" else ""
        self._head = f"{library_path}\n".encode() if library_path else b""
        self._command = command = _command(spec, python, ssh_config_file, has_head=bool(self._head))
        hidden = task_options(os.environ) if spec.transport == "srun" else {}
        self._environ = {name: value for name, value in os.environ.items() if name not in hidden}
        self._cleanup: subprocess.Popen[bytes] | None = None
        try:
            with without_debugger():
                # in a session of its own: only we handle Ctrl-C of the terminal, and ssh cannot prompt there
                self._process = subprocess.Popen(
                    command,
                    stdin=inner_in,
                    stdout=inner_out,
                    stderr=inner_err,
                    env=self._environ,
                    start_new_session=True,
                )
        except OSError as error:
            for fd in (outer_in, outer_out, self.errors_fd):
                os.close(fd)

            advice = "It is needed to reach the host." if command[0] != python else "Check the launcher's `python`."
            raise AgentFailedError(
                spec.name, f"{command[0]} cannot be run here: {error.strerror}", advice=advice
            ) from error
        finally:
            for fd in (inner_in, inner_out, inner_err):
                os.close(fd)

        _connections.add(self)
        self.channel = Channel(outer_out, outer_in, side="launcher", name=spec.name, greeting=True)
        _log.debug("%s: agent started by %s, pid %d", spec.name, spec.transport, self._process.pid)
        # made when it is written: comparing files takes time, and connections begin on all hosts meanwhile
        program = bootstrap.remote_program if bundled else bootstrap.local_program
        self.channel.open_with(lambda: self._head + program())

    def __repr__(self) -> str:
        pid = self._process.pid
        return f"AgentConnection({self.spec.name!r}, {self.spec.transport}, pid={pid}, channel={self.channel})"

    @property
    def alive(self) -> bool:
        """Whether the program that carries the channel still runs."""
        return not self.channel.closed and self._process.poll() is None

    def send_package(self) -> None:
        """Send our package to a host that has asked for it; until its hello nothing else may be sent."""
        package = bootstrap.sent_package()
        _log.debug("%s: has other files: the package is sent, %d bytes", self.spec.name, len(package))
        self.channel.send_raw(package)

    @property
    def by_hand(self) -> str:
        """A command that shows why the agent's start takes long: how far a connection gets, or its processes."""
        reach = _reach(self.spec, self._ssh_config_file)
        if reach and not self.channel.greeted:
            return self._shown_by(self._python, "-V")

        return shlex.join([*reach, "ps", "ax", "-o", "pid,stat,wchan:20,args"]) + " | grep traceml-"

    def _shown_by(self, *command: str) -> str:
        """Return the line of a shell that runs a command on the host, and tells how far the connection gets."""
        carrier, *reach = _reach(self.spec, self._ssh_config_file)
        return shlex.join([carrier, "-v", *reach, *command])  # srun knows -v too

    def read_errors(self) -> bytes | None:
        """Read stderr and keep its last lines; return the bytes, empty if there is nothing now, None at its end."""
        try:
            data = os.read(self.errors_fd, _READ_BYTES)
        except BlockingIOError:
            return b""

        *lines, last = (self._partial_line + data).split(b"\n")
        self._partial_line = last[:_READ_BYTES]  # a start-up file may write a line without an end
        self._lines += [line.decode(errors="replace").rstrip() for line in lines if line.strip()]
        return data or None

    def failure(self, reason: str, during: str = "while the job ran") -> AgentFailedError:
        """Close the connection; return the error that explains why it broke.

        Args:
            during: what its host did, for a connection that had worked.
        """
        silence_s, was_stopped = self.channel.silence_s, self._is_stopped()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_WAIT_S)

        while self.read_errors():
            pass

        status = self._process.poll()
        noise = [line.decode(errors="replace") for line in self.channel.noise.splitlines() if line.strip()]
        rest = [self._partial_line.decode(errors="replace")] if self._partial_line.strip() else []
        output = [cut_text(line, _LONGEST_LINE) for line in (*noise[-_KEPT_LINES:], *self._lines, *rest)]
        self.close()
        if self.hello is not None:
            self._clean_up(self.hello.mark, self.hello.pid)

        what, advice = self._explain(status, "\n".join(output), reason, silence_s, during)
        if was_stopped:
            advice = f"Its process was stopped by a signal (SIGSTOP, Ctrl-Z). {_LOST}"

        _log.debug("%s: agent lost: %s (%s, status %s)", self.spec.name, what, reason, status)
        return AgentFailedError(self.spec.name, what, advice=advice, words=output)

    def _is_stopped(self) -> bool:
        """Return whether the agent is a process of this machine that a signal has stopped."""
        if self.hello is None or self.spec.transport != "local":
            return False

        info = process_info(self.hello.pid)
        return info is not None and info.state == "T"

    def close(self, *, wait_s: float = _END_WAIT_S) -> None:
        """End the agent, which ends its workers when the channel closes.

        Args:
            wait_s: how long the program that carries the channel may take before it is killed, in seconds.
        """
        self.close_now()
        end_process(self._process, wait_s)

    def await_cleanup(self, limit_s: float) -> None:
        """After `failure`, wait until nothing of the job is left on the host, or the host does not answer in time."""
        if self._cleanup is not None:
            end_process(self._cleanup, max(0.0, limit_s))

    def close_now(self) -> None:
        """Close the channel without waiting for the agent's end."""
        if not self.channel.closed:
            self.channel.close()
            os.close(self.errors_fd)

    def release_in_child(self) -> None:
        """Close it in a forked child: it belongs to the parent, which alone can wait for its processes.

        A child that held the channel open would keep the agent from noticing the parent's end.
        """
        self.close_now()
        self._process.returncode = 0

    def _clean_up(self, mark: str, agent: int) -> None:
        """End what a lost agent has left. Agent, zygote and reaper do that for each other, unless all were killed."""
        if self.spec.transport == "local":
            end_job(mark, agent)
            return

        with contextlib.suppress(OSError):  # also if the program ends at once, and its standard input is closed
            null = subprocess.DEVNULL
            self._cleanup = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=null,
                stderr=null,
                env=self._environ,
                start_new_session=True,
            )
            assert self._cleanup.stdin is not None
            with self._cleanup.stdin as stdin:
                stdin.write(self._head + bootstrap.cleanup_program(mark, agent))

    def _explain(self, status: int | None, output: str, reason: str, silence_s: float, during: str) -> tuple[str, str]:
        """Return what happened, and advice."""
        carrier = {"local": "the agent"}.get(self.spec.transport, self.spec.transport)
        ended = f"{carrier} {'still runs' if status is None else end_of_status(status)}"
        if self.hello is not None:
            what = f"its agent was lost {during} ({reason}; {ended})"
            return what, _explain_loss(carrier, status, output, silence_s)

        advice = "The launcher starts the Python at its own path; give that host's path with `python=`."
        program = re.escape(self._python)
        if status == 126 or re.search(rf"execve\(\).*Permission denied|{program}: (line )?\d+: ", output):
            return f"the command is not executable there: {self._python}", advice  # or a shell interprets it

        if missing := _NO_LIBRARY.search(output):
            remedy = "Set LD_LIBRARY_PATH here, which is sent, or in a start-up file of the shell there."
            return missing[0].strip(), remedy

        if status == 127 or re.search(r"execve\(\).*No such file", output):
            return f"command not found there: {self._python}", advice

        if status == _TOO_OLD:
            return "its Python is too old", "Give the path of a newer one with `python=`."

        for pattern, meaning, advice in _MEANINGS:
            if carrier != "the agent" and re.search(pattern, output):
                return meaning, self._with_commands(advice, output)

        if status == _SSH_FAILED and carrier == "ssh" and self.channel.greeted:
            return "the connection broke after Python had started there", f"Try `{self.by_hand}`."

        if carrier == "the agent":
            hand = ""
        elif carrier == "ssh" and not self.channel.greeted and status not in (None, _SSH_FAILED):
            hand = self._login_advice()
        else:
            hand = f"Try `{self._shown_by('true')}`."

        return f"its agent did not start ({reason}; {ended})", hand

    def _login_advice(self) -> str:
        """Return the advice for a connection that worked, whose shell or Python then ended by itself."""
        return (
            f"`{self._shown_by('true')}` must end with status 0 (see `echo $?`): otherwise a start-up file of its "
            f"shell (~/.bashrc) ends the login. If it does, try `{self._shown_by(self._python, '-V')}`."
        )

    def _with_commands(self, advice: str, output: str) -> str:
        """Fill in the commands that reach this host; where ssh itself names one that removes the old key, that one."""
        host, port = split_port(self.spec.name)
        if removal := _REMOVAL.search(output):
            advice = advice.replace("ssh-keygen -R {known_host}", "{removal}")
        return advice.format(
            ssh=shlex.join(_reach(self.spec, self._ssh_config_file)),
            verbose=self._shown_by(),
            known_host=host if port is None else shlex.quote(f"[{host}]:{port}"),
            removal=removal and removal[1],
        )


def _explain_loss(carrier: str, status: int | None, output: str, silence_s: float) -> str:
    """Return why a connection that worked may have broken."""
    if "Too many open files" in output:
        return "Its limit of open files is too low for so many workers: raise it (`ulimit -n`), or start fewer there."

    if carrier == "the agent":
        return ""

    if silence_s >= _SILENT_S or re.search(r"Timeout, server|timed out|Broken pipe|No route|unreachable", output):
        down = "the host or the network is down, or its agent was stopped (SIGSTOP, a suspended machine)"
        return f"Nothing was received from it for {left_text(silence_s)}: {down}. {_LOST}"

    if re.search(r"closed by remote host|[Cc]onnection (closed|reset)", output):
        return "Its sshd closed the connection: the host shuts down, or the session was ended."

    if status is not None and status < 0:
        return f"The host is not the cause: {carrier} was killed here, by a user or for lack of memory."

    if status is not None and status < _SIGNALED:
        return "The agent ended itself with this status." + (" Its last lines say why." if output else "")

    return "The connection worked to the end: the agent was killed, by a user or for lack of memory."


_connections: weakref.WeakSet[AgentConnection] = weakref.WeakSet()  # all of them, in the pool or in a launch


def _release_all() -> None:
    for connection in list(_connections):
        connection.release_in_child()


os.register_at_fork(after_in_child=_release_all)


def _command(
    spec: HostSpec, python: str, ssh_config_file: str | os.PathLike[str] | None, *, has_head: bool
) -> list[str]:
    """Return the command that starts a host's agent.

    Args:
        has_head: whether a line with the LD_LIBRARY_PATH precedes the program.
    """
    agent = bootstrap.agent_command(python)
    if spec.transport == "local":
        return agent

    if spec.transport == "srun":
        return [*step_command(spec.name, spec.het_group), *agent]

    _, *options, host = _reach(spec, ssh_config_file)
    command = "exec " + shlex.join(["/bin/sh", "-c", _WITH_LIBRARIES, "sh", *agent] if has_head else agent)
    return ["/bin/sh", "-c", _SSH_SCRIPT, "sh", host, command, str(_CONNECT_TIMEOUT_S), *options, *_SSH_OPTIONS]


def _reach(spec: HostSpec, ssh_config_file: str | os.PathLike[str] | None) -> list[str]:
    """Return what a user types before a command for this host; empty for our own."""
    if spec.transport == "local":
        return []

    if spec.transport == "srun":
        return ["srun", "--overlap", "-w", spec.name]

    host, port = split_port(spec.name)
    options = [] if ssh_config_file is None else ["-F", os.fspath(ssh_config_file)]
    return ["ssh", *options, *([] if port is None else ["-p", str(port)]), host]
