"""An agent: it prepares, it passes on, and it ends everything whatever happens to whom."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.eventually import eventually
from tests.launch.driver import Driver, alive
from traceml.database.flight.flight_archive import unpack_flight
from traceml.database.flight.postmortem import read_flight
from traceml.database.schema import STEPS
from traceml.launch.launcher.hosts import bootstrap
from traceml.launch.shared.launch_messages import CollectStacks, Message, Release, StreamOpened
from traceml.launch.shared.package_import import PACKAGE, import_code

# An agent that is not its launcher's child, as those of other hosts.
_REMOTE = (
    import_code().replace("{", "{{").replace("}", "}}")
    + """
from traceml.launch.agent import agent_main
from traceml.launch.shared.channel_frames import GREETING
import os
os.write(1, GREETING)
agent_main._SILENCE_S = {silence_s}
{changes}
agent_main.main()
"""
)
_EIGHT_GPUS = "from traceml.launch.agent import machine; machine._nvidia_gpus = lambda: 8"


def _spawn_kin() -> None:
    """Leave children of every kind, say who they are, and never return."""
    import subprocess
    import time

    pids = [os.getpid(), subprocess.Popen(["sleep", "1000"]).pid]
    pids.append(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid)
    pids.append(subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 1000 & wait; sleep 1000"]).pid)
    if (child := os.fork()) == 0:  # a daemon that ran no other program, and has no parent left
        os.setsid()
        if os.fork():
            os._exit(0)

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("daemon", os.getpid(), flush=True)
        time.sleep(1000)
        os._exit(0)

    os.waitpid(child, 0)
    subprocess.run(["sh", "-c", "setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo daemon $!"], check=True)
    print("daemon", *pids, flush=True)
    time.sleep(1000)


def _die_with_rows(rows: int) -> None:
    """Append rows that cannot be compressed to a flight file, as a rank does, and be killed."""
    import socket

    from traceml.database.flight.flight import FlightFile
    from traceml.database.schema import STEPS

    identity = {"job": "a-run", "host": socket.gethostname(), "rank": 0, "world_size": 1, "recorder": "r"}
    ring = FlightFile.create(None, identity).ring(STEPS.name)
    for _ in range(rows):
        ring.append(*STEPS.struct.unpack(os.urandom(STEPS.row_bytes)))

    os.kill(os.getpid(), signal.SIGKILL)


def _kin(driver: Driver) -> list[int]:
    """Return the processes that `_spawn_kin` has told of, once it has told all."""

    def told() -> list[int]:
        text = driver.text(0)
        return [int(word) for line in text.splitlines() for word in line.split()[1:]] if text.count("\n") == 3 else []

    return driver.until(told)  # type: ignore[no-any-return]


def _descriptors(driver: Driver) -> dict[str, str]:
    """Return what the agent has open, by number."""
    found = {}
    for fd in Path(f"/proc/{driver.wait('hello')['pid']}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            found[fd.name] = str(fd.readlink())

    return found


def _zygote(driver: Driver) -> int:
    """Return the process that the workers come from."""
    return int(Path(f"/proc/{driver.pid(0)}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def driver() -> Iterator[Driver]:
    """An agent of this test alone."""
    with Driver() as made:
        yield made


def test_an_agent_tells_of_itself_at_once(driver: Driver) -> None:
    """Without being asked, and without torch, it tells what the launcher plans with."""
    told = driver.wait("hello")

    assert psutil.Process(told["pid"]).ppid() == driver.process.pid
    assert told["cores"] == len(os.sched_getaffinity(0))
    assert "127.0.0.1" in told["addresses"]
    assert told["netns"] == str(Path("/proc/self/ns/net").readlink())
    assert told["executable"] == sys.executable
    assert "libtorch" not in Path(f"/proc/{told['pid']}/maps").read_text()


def test_an_agent_imports_no_more_than_it_needs() -> None:
    """It introduces its host before it imports what workers need, and then imports no stored tables."""
    code = (
        "import sys, logging; print(*sys.modules);"  # on Python 3.14 it imports inspect
        "import traceml.launch.agent.agent_main; print(*sys.modules);"
        "import traceml.launch.agent.agent; print(*sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    logs, before, after = (set(line.split()) for line in shown.splitlines())

    assert "traceml.launch.agent.machine" in before
    assert "traceml.launch.agent.worker_group" not in before
    assert not {"inspect", "zipfile", "traceml.database", "traceml.privacy"} & (after - logs)
    assert not {"platform", "shutil", "traceml.formatting"} & (before | after)


def test_an_agent_from_a_bundle_needs_nothing_installed(tmp_path: Path) -> None:
    """The package comes through the channel, also for the zygote and its workers; nothing is written to a disk."""
    # -S: no site-packages, so neither traceml nor msgpack nor cloudpickle are there
    command = [sys.executable, "-S", *bootstrap.agent_command(sys.executable)[1:]]
    program = bootstrap.remote_program()
    with Driver(command, program=program, env={"PATH": os.environ["PATH"]}, cwd=tmp_path) as driver:
        driver.prepare(env={"PYTHONNOUSERSITE": "1"}, sys_path=[], cwd=str(tmp_path))

        def where() -> str:
            import traceml

            return traceml.__file__

        found = driver.run(where)
        driver.prepare(env={"PYTHONNOUSERSITE": "1"}, sys_path=[], cwd=str(tmp_path))
        run = {"run_id": "a-run", "runs_dir": str(tmp_path), "flights": True}
        traced = driver.run(where, trace=run, env={"TRACEML_ENABLED": "0"})

    assert found[0].startswith("/proc/")
    assert traced == found
    assert list(tmp_path.iterdir()) == []


def test_an_agent_with_the_same_files_is_sent_none(tmp_path: Path) -> None:
    """It imports this very package from where it is, and so do zygote and workers."""
    program = bootstrap.remote_program()
    with Driver(bootstrap.agent_command(sys.executable), program=program, cwd=tmp_path) as driver:
        driver.prepare(sys_path=[], cwd=str(tmp_path))

        def where() -> str:
            import traceml

            return traceml.__file__

        assert driver.run(where) == [f"{PACKAGE}/__init__.py"]
        assert driver.of("package") == []


def test_the_cleanup_of_a_lost_agent_needs_nothing_installed(tmp_path: Path) -> None:
    """It ends what carries the job's mark, by a Python that has no traceml."""
    left = subprocess.Popen(["sleep", "600"], env={"TRACEML_LAUNCH_MARK": "of-a-lost-agent"})
    command = [sys.executable, "-S", *bootstrap.agent_command(sys.executable)[1:]]
    program = bootstrap.cleanup_program("of-a-lost-agent", 1 << 22)

    done = subprocess.run(command, input=program, capture_output=True, cwd=tmp_path, timeout=240, check=False)

    try:
        assert (done.returncode, done.stderr) == (0, b"")
        assert left.wait(240) == -signal.SIGTERM or left.returncode == -signal.SIGKILL
    finally:
        left.kill()


def test_an_old_python_says_so(tmp_path: Path) -> None:
    """The code that an agent boots from is understood by Pythons that are too old for it."""
    program = bootstrap.remote_program().replace(b"sys.version_info < (3, 11)", b"sys.version_info > (3, 11)")
    done = subprocess.run(bootstrap.agent_command(sys.executable), input=program, capture_output=True, check=False)

    assert done.returncode == 78
    assert b"is too old: 3.11 or newer is needed" in done.stderr
    assert done.stdout == b""


def test_processes_have_short_names() -> None:
    """What process lists show of agent, reaper, zygote and workers is one line with a name, not their programs."""
    with Driver() as driver:
        driver.prepare()
        kin = driver.run(lambda: [os.getpid(), os.getppid(), psutil.Process(os.getppid()).ppid()])[0]
        pids = [driver.process.pid, kin[2], kin[1]]
        lines = [" ".join(psutil.Process(pid).cmdline()) for pid in pids]

    assert [line.rpartition(" ")[2] for line in lines] == ["traceml-agent", "traceml-agent", "traceml-workers"]
    assert all(len(line) < 200 and "\n" not in line for line in lines)


def test_warnings_as_errors_find_nothing_of_ours() -> None:
    """Agent and zygote write nothing where Python shows every warning, as in its development mode."""
    with Driver() as driver:
        driver.prepare(env={**os.environ, "PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"})
        found = driver.run(lambda: sys.flags.dev_mode)
        words = driver.words() + "".join(driver.text(-1, fd) for fd in ("out", "err"))

    assert found == [True]
    assert words == ""


def test_a_script_may_be_called_as_a_module_is(tmp_path: Path) -> None:
    """Modules in the working directory do not get in the way of the agent's."""
    for name in ("selectors", "traceml", "signal", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")

    with Driver(cwd=tmp_path) as driver:
        driver.prepare(cwd=str(tmp_path), sys_path=[])
        found = driver.run(os.getcwd)

    assert found == [str(tmp_path)]


# --- preparing -------------------------------------------------------------------------------------------------------


def test_the_gpus_that_are_counted_are_those_of_the_jobs_workers(tmp_path: Path) -> None:
    """By the variables of this job, not those of the agent, which may serve others, nor of an earlier job's zygote."""
    (tmp_path / "env.sh").write_text("export CUDA_VISIBLE_DEVICES=0,1,2\n")
    (tmp_path / "all.sh").write_text("unset CUDA_VISIBLE_DEVICES\n")
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    code = _REMOTE.format(silence_s=60, changes=_EIGHT_GPUS)
    with Driver([sys.executable, "-c", code], env={**environ, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}) as driver:

        def gpus(**fields: Any) -> int:
            return int(driver.prepare(cwd=str(tmp_path), **fields)["gpus"])

        assert gpus(env=environ) == 5  # the agent's
        assert gpus(env={**environ, "CUDA_VISIBLE_DEVICES": "6,7"}) == 2
        assert gpus(env={**environ, "CUDA_VISIBLE_DEVICES": "3"}) == 1
        assert gpus(env={**environ, "CUDA_VISIBLE_DEVICES": ""}) == 0
        assert gpus(env={**environ, "CUDA_VISIBLE_DEVICES": "3"}, env_file="env.sh") == 3
        assert gpus(env={**environ, "CUDA_VISIBLE_DEVICES": "3"}, env_file="all.sh") == 8


@pytest.mark.parametrize(("built_for", "expected"), [("cuda = '12.4'", 8), ("cuda = None", 0), ("hip = '6.2'", 2)])
def test_only_gpus_that_torch_can_use_are_counted(tmp_path: Path, built_for: str, expected: int) -> None:
    """With a build for the CPU, nccl was chosen for the GPU of the host; with AMD's GPUs, a worker per core."""
    for name in ("__init__", "distributed/__init__", "nn/__init__", "nn/parallel", "utils/__init__", "utils/data"):
        path = tmp_path / "torch" / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"class version:\n    {built_for}\n" if name == "__init__" else "")

    for node, simds in enumerate((0, 416, 416, 416)):
        path = tmp_path / "nodes" / str(node) / "properties"
        path.parent.mkdir(parents=True)
        path.write_text(f"cpu_cores_count 0\nsimd_count {simds}\nmem_banks_count 1\n")

    changes = f"{_EIGHT_GPUS}; machine._KFD = machine.Path({str(tmp_path / 'nodes')!r})"
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    with Driver([sys.executable, "-c", _REMOTE.format(silence_s=60, changes=changes)], env=environ) as driver:
        env = {**environ, "ROCR_VISIBLE_DEVICES": "0,GPU-55", "HIP_VISIBLE_DEVICES": "1,0"}
        told = driver.prepare(env=env, sys_path=[str(tmp_path)], need_torch=True)

    assert told["gpus"] == expected


def test_env_file_is_sourced_by_bash(driver: Driver, tmp_path: Path) -> None:
    """Workers get its exports, its output is forwarded, and a change takes effect at the next launch."""
    (tmp_path / "env.sh").write_text(
        "echo sourcing\nHIDDEN=1\nexport SHOWN=\"$(printf 'a\\nb')\" PATH=/x:$PATH\nfalse\n"
    )

    def read() -> tuple[str | None, ...]:
        return os.environ.get("SHOWN"), os.environ.get("HIDDEN"), os.environ["PATH"][:3]

    told = driver.prepare(env_file="env.sh", cwd=str(tmp_path))
    found = driver.run(read)

    assert told["error"] is None
    assert found == [("a\nb", None, "/x:")]
    assert "sourcing" in told["env_file_log"]
    assert "sourcing" in driver.words()

    (tmp_path / "part.sh").write_text("export SHOWN=changed\n")
    (tmp_path / "env.sh").write_text("source ./part.sh\n")
    driver.prepare(env_file="env.sh", cwd=str(tmp_path))

    assert driver.run(read)[0][0] == "changed"


@pytest.mark.parametrize(
    ("fields", "files", "kind", "text"),
    [
        ({"env_file": "missing.sh"}, {}, "env_file", "missing.sh cannot be read"),
        ({"env_file": "bad.sh"}, {"bad.sh": "echo why not; exit 5"}, "env_file", "why not"),
        (
            {"env_file": "torn.sh"},
            {"torn.sh": "export A=1\nexport B='torn"},
            "env_file",
            "torn.sh: line 2: unexpected EOF",
        ),
        ({"cwd": "/nowhere/at/all"}, {}, "cwd", "/nowhere/at/all: No such file"),
        ({"need_torch": True}, {"torch.py": "raise ModuleNotFoundError(name='torch')"}, "no_torch", "python"),
        ({"need_torch": True}, {"torch.py": "raise OSError('libcuda.so: odd')"}, "import", "libcuda.so: odd"),
        ({"need_torch": True}, {"torch.py": "import os; os.abort()"}, "died", "signal 6"),
    ],
)
def test_what_is_wrong_with_a_host_is_reported(
    driver: Driver, tmp_path: Path, fields: dict[str, Any], files: dict[str, str], kind: str, text: str
) -> None:
    """Each thing that keeps workers from being made has a name and its own words; the agent can be asked again."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    told = driver.prepare(**{"cwd": str(tmp_path), "sys_path": [str(tmp_path)], **fields})

    assert told["error"]["kind"] == kind
    assert text in told["error"]["text"]
    assert driver.prepare()["error"] is None


def test_other_variables_need_no_other_zygote(driver: Driver, tmp_path: Path) -> None:
    """Variables, working directory and search path are those of each launch, though the zygote stays the same."""

    def look() -> tuple[Any, ...]:
        return os.environ.get("A"), os.environ.get("B"), str(Path.cwd()), str(tmp_path) in sys.path, os.getppid()

    base = dict(os.environ)
    driver.prepare(env={**base, "A": "1"})
    first = driver.run(look)[0]
    driver.prepare(env={**base, "B": "2"}, cwd=str(tmp_path), sys_path=[str(tmp_path)])
    second = driver.run(look)[0]
    driver.prepare(env={**base, "LD_LIBRARY_PATH": "/odd"})
    third = driver.run(look)[0]

    assert first[:4] == ("1", None, str(Path.cwd()), False)
    assert second[:4] == (None, "2", str(tmp_path), True)
    assert first[4] == second[4] != third[4]


def test_a_deleted_variable_does_not_come_back(tmp_path: Path) -> None:
    """An agent of this host is kept from an earlier launch, when the launcher still had it."""
    code = _REMOTE.format(silence_s=60, changes=_EIGHT_GPUS)
    environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    with Driver([sys.executable, "-c", code], env={**environ, "CUDA_VISIBLE_DEVICES": "0"}) as driver:
        told = driver.prepare(env=environ, is_whole=True)
        (found,) = driver.run(os.environ.get, "CUDA_VISIBLE_DEVICES")

    assert (told["gpus"], found) == (8, None)


def test_a_worker_is_no_task_of_slurm(driver: Driver) -> None:
    """The agent is the one task of its step: libraries that ask Slurm first would take each worker for rank 0."""

    def look() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}

    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": "2"}
    task = {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    driver.prepare(env={**os.environ, **job, **task, "SLURM_NNODES": "1"})

    assert driver.run(look) == [{**job, "SLURM_NNODES": "2"}]


# --- ends ------------------------------------------------------------------------------------------------------------


def _close(driver: Driver) -> None:
    driver.channel.close()


def _kill_agent(driver: Driver) -> None:
    os.kill(driver.process.pid, signal.SIGKILL)


def _terminate_agent(driver: Driver) -> None:
    os.kill(driver.process.pid, signal.SIGTERM)


def _kill_zygote(driver: Driver) -> None:
    os.kill(_zygote(driver), signal.SIGKILL)
    driver.wait("exited")
    driver.stop()


def _stop(driver: Driver) -> None:
    driver.stop(grace_s=0.2)


def _send_garbage(driver: Driver) -> None:
    driver.channel.send_raw(b"garbage" * 10)
    driver.channel.flush()


@pytest.mark.parametrize("end", [_close, _kill_agent, _terminate_agent, _kill_zygote, _stop, _send_garbage])
def test_nothing_is_left(driver: Driver, end: Callable[[Driver], None]) -> None:
    """However it ends, no worker is left and nothing that one has started: children, sessions, daemons."""
    driver.prepare()
    driver.start(_spawn_kin)
    pids = _kin(driver)

    assert len(pids) == 6
    assert all(map(alive, pids))

    end(driver)
    eventually(lambda: not any(map(alive, pids)))


def test_what_a_good_end_leaves_is_ended_too(driver: Driver) -> None:
    """A daemon of a worker does not outlive its launch, and the launch waits for no daemon."""

    def leave() -> int:
        return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid

    driver.prepare()
    pids = driver.run(leave, workers=2)

    assert not any(map(alive, pids))
    assert [each["code"] for each in driver.of("exited")] == [0, 0]


def test_the_end_of_one_worker_leaves_the_others_alone(driver: Driver) -> None:
    """A worker that is killed is told at once; others run on until they are stopped, or release themselves."""

    def work() -> str:
        import time

        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

        time.sleep(0.5)
        return "done"

    driver.prepare()
    driver.start(work, workers=3)
    driver.wait("exited", rank=1)  # it may have got a core only after the others have returned
    driver.wait("done", 2)
    driver.release()

    assert driver.of("exited")[0] | {"pid": 0, "tail": []} == {
        "t": "exited", "job": driver.job, "rank": 1, "local_rank": 1, "pid": 0, "code": None, "signal": 9,
        "tail": [], "crash": "", "oom": None,
    }  # fmt: skip
    assert {each["rank"]: each["code"] for each in driver.of("exited")} == {0: 0, 1: None, 2: 0}


def test_the_last_rows_of_a_killed_worker_arrive_though_the_job_is_stopped(driver: Driver, tmp_path: Path) -> None:
    """They are on their way when the launcher ends the other workers, and its file is removed by then."""
    driver.prepare()
    run = {"run_id": "a-run", "runs_dir": str(tmp_path), "flights": True}
    driver.start(_die_with_rows, 60_000, trace=run, env={"TRACEML_ENABLED": "0"})
    driver.wait("exited")
    driver.stop()

    flight = read_flight(unpack_flight(bytes(driver.parcels["flight", 0]), tmp_path / "copies", "node1-0"))
    assert flight.counters(STEPS.name).appended == 60_000


def test_a_zygote_that_was_killed_is_replaced(driver: Driver) -> None:
    """The workers' end says why, and the next launch works."""
    driver.prepare()
    driver.start(time.sleep, 1000)
    os.kill(_zygote(driver), signal.SIGKILL)
    told = driver.wait("exited")
    driver.stop()

    assert told["signal"] == 9
    assert "was killed by signal 9" in told["tail"][-1]

    driver.prepare()

    assert driver.run(lambda: "again") == ["again"]


def test_a_silent_launcher_is_a_lost_one(tmp_path: Path) -> None:
    """An agent whose launcher says nothing while a job runs ends the job; nothing else tells it of a cut network."""
    code = _REMOTE.format(silence_s=5, changes="")  # longer than this test is ever without a turn
    with Driver([sys.executable, "-c", code]) as driver:
        driver.prepare()
        driver.start(_spawn_kin)
        pids = _kin(driver)
        eventually(lambda: not any(map(alive, pids)))  # the channel is open all the time

        assert driver.process.wait(240) == 0


def test_an_idle_agent_waits_for_a_launcher_that_says_nothing(tmp_path: Path) -> None:
    """Between two launches nobody runs the launcher's loop: that is no silence."""
    code = _REMOTE.format(silence_s=4, changes="")
    with Driver([sys.executable, "-c", code]) as driver:
        driver.prepare()
        driver.run(os.getpid)
        time.sleep(5)
        driver.prepare()

        assert driver.run(lambda: 1) == [1]


# --- passing on ------------------------------------------------------------------------------------------------------


def test_an_agent_that_waits_for_other_hosts_is_not_idle() -> None:
    """Its launcher pings it; the import of torch may take a host longer than an agent without work stays."""
    changes = "from traceml.launch.agent import agent; agent._IDLE_S = 1.5"
    with Driver([sys.executable, "-c", _REMOTE.format(silence_s=60, changes=changes)]) as driver:
        driver.prepare()
        until_s = time.monotonic() + 4
        driver.until(lambda: driver.closed or time.monotonic() > until_s)

        assert driver.closed is None


def _stacks(driver: Driver, ranks: Sequence[int] = (0,)) -> dict[int, dict[str, Any]]:
    """Request stacks until these ranks have told theirs; one that has no core for a second has told none."""

    def told() -> dict[int, dict[str, Any]] | None:
        before = len(driver.of("stacks"))
        driver.channel.send(CollectStacks(job=driver.job))
        found: dict[int, dict[str, Any]] = driver.wait("stacks", before + 1)["ranks"]
        return found if all(found[rank]["stack"] for rank in ranks) else None

    return driver.until(told)  # type: ignore[no-any-return]


def test_stacks_of_all_ranks(driver: Driver) -> None:
    """Each rank's stacks are told: asleep, in a loop that holds the GIL, in several threads, or stopped."""

    def here() -> None:
        import re
        import threading
        import time

        rank = int(os.environ["RANK"])
        if rank == 1:
            print("ready", flush=True)
            re.match(r"(a+)+$", "a" * 60 + "b")  # one call into C, which lets go of the GIL at its end: never

        if rank == 2:
            inside = threading.Event()
            threading.Thread(target=sleep_in_a_thread, args=(inside,), daemon=True).start()
            inside.wait()

        print("ready", flush=True)
        time.sleep(1000)

    def sleep_in_a_thread(inside: Any) -> None:
        import time

        inside.set()
        time.sleep(1000)

    driver.prepare()
    driver.start(here, workers=4)
    driver.until(lambda: all(driver.text(rank) == "ready\n" for rank in range(4)))
    os.kill(driver.pid(3), signal.SIGSTOP)
    driver.until(lambda: Path(f"/proc/{driver.pid(3)}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    for _ in range(2):
        driver.channel.send(CollectStacks(job=driver.job))

    ranks = driver.wait("stacks", 1)["ranks"]
    if not all(ranks[rank]["stack"] for rank in range(3)):
        ranks = _stacks(driver, range(3))

    assert " in here" in ranks[0]["stack"]
    assert " in here" in ranks[1]["stack"]
    assert " in sleep_in_a_thread" in ranks[2]["stack"]
    assert (ranks[3]["stack"], ranks[3]["state"]) == ("", "stopped")
    assert ranks[1]["state"] == "running"

    driver.stop(grace_s=0)


def test_a_worker_whose_threads_run_python_survives_any_number_of_requests(driver: Driver, tmp_path: Path) -> None:
    """Its own thread answers: a signal handler that reads changing frames without the GIL crashes the process."""

    def busy(enough: Path) -> str:
        import threading
        import time

        over = threading.Event()

        def descend(depth: int) -> int:
            return depth and 1 + descend(depth - 1)

        def spin() -> None:
            inside.wait()
            while not over.is_set():
                descend(20)

        inside = threading.Barrier(4)  # a thread that has been started need not have called its function
        threads = [threading.Thread(target=spin) for _ in range(3)]
        for thread in threads:
            thread.start()

        inside.wait()
        print("ready", flush=True)
        while not enough.exists():
            time.sleep(0.001)

        over.set()
        return "alive"

    enough = tmp_path / "enough"
    driver.prepare()
    driver.start(busy, enough)
    driver.until(lambda: driver.text(0) == "ready\n")
    for _ in range(300):
        stack = _stacks(driver)[0]["stack"]
        assert stack.startswith("Thread 0x")
        assert " in busy" in stack.split("\n\n")[0]
        assert stack.count(" in spin") == 3
        assert "stack_thread" not in stack

    enough.touch()
    driver.wait("done")
    driver.release()
    assert driver.result(0) == "alive"


@pytest.mark.parametrize("holds_gil", [False, True])
def test_a_wait_in_c_code_is_not_ended_by_a_request(driver: Driver, tmp_path: Path, holds_gil: bool) -> None:
    """Neither of a worker that answers, nor of one that must be sent a signal as it holds the GIL."""

    def wait_in_c(pipe: Path) -> int:
        import ctypes
        import select
        import struct

        libc = ctypes.PyDLL(None) if holds_gil else ctypes.CDLL(None)
        wanted = ctypes.create_string_buffer(struct.pack("ihh", os.open(pipe, os.O_RDWR), select.POLLIN, 0))
        print("ready", flush=True)
        return int(libc.poll(wanted, 1, -1))

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    driver.prepare()
    driver.start(wait_in_c, pipe)
    driver.until(lambda: driver.text(0) == "ready\n")
    told = _stacks(driver)[0]

    assert not driver.of("done")
    assert " in wait_in_c" in told["stack"].split("\n\n")[0]
    pipe.write_text("go on")
    driver.wait("done")
    driver.release()
    assert driver.result(0) == 1  # there is something to read; -1 after a signal


def test_a_chatty_worker_slows_nobody(driver: Driver) -> None:
    """While the launcher takes nothing of one worker's output, the other works and the agent answers."""

    def talk() -> str:
        if os.environ["RANK"] == "0":
            line = b"x" * 99 + b"\n"
            for _ in range(200_000):  # 20 MB: more than all buffers on the way
                os.write(1, line)

        return "done"

    driver.prepare()
    held: dict[int, list[Any]] = {}
    take = driver._take

    def hold(message: Message) -> None:
        if isinstance(message, StreamOpened) and (message.rank, message.fd) == (0, "out"):
            driver.messages.append(message.to_map())
            size = [0]

            def count(view: memoryview) -> None:
                size[0] += len(view)

            held[message.id] = [driver.channel.accept(message.id, count, lambda _: None, manual=True), size]
            return

        take(message)

    driver._take = hold  # type: ignore[method-assign]
    driver.start(talk, workers=2)
    driver.wait("done", rank=1)
    driver.until(lambda: any(size[0] for _, size in held.values()))
    told = _stacks(driver)[0]

    assert not driver.of("done", rank=0)
    assert " in talk" in told["stack"]

    incoming, size = next(iter(held.values()))
    granted = 0
    while not driver.of("done", rank=0):
        if granted < size[0]:
            incoming.grant(size[0] - granted)
            granted = size[0]

        driver.poll()

    driver.channel.send(Release(job=driver.job))
    while not driver.of("idle"):
        if granted < size[0]:
            incoming.grant(size[0] - granted)
            granted = size[0]

        driver.poll()

    assert size[0] == 20_000_000


def test_workers_that_finish_at_once_do_not_break_the_group_of_others(driver: Driver) -> None:
    """A worker is held until it is released: its peers may still be connecting to it."""
    driver.prepare(need_torch=True)
    for _ in range(5):
        driver.prepare(need_torch=True)

        assert driver.run(lambda: os.environ["RANK"], workers=4, backend="gloo") == ["0", "1", "2", "3"]


def test_large_values_travel_both_ways(driver: Driver) -> None:
    """Far more than any buffer on the way, and no copy is left in the agent."""
    driver.prepare()
    data = os.urandom(1 << 20) * 20
    found = driver.run(lambda value: value[::-1], data)

    assert found[0] == data[::-1]
    assert [name for name in _descriptors(driver).values() if "memfd" in name] == []


def test_a_host_has_more_workers_than_its_soft_limit_of_open_files_allows() -> None:
    """The agent has many descriptors per worker: it raises its own limit, and workers keep theirs."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with Driver(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))) as driver:
        driver.prepare()
        limits = driver.run(resource.getrlimit, resource.RLIMIT_NOFILE, workers=12)

    assert limits == [(64, hard)] * 12


def test_an_agent_leaks_nothing(driver: Driver) -> None:
    """After many jobs it holds as many descriptors as after the first."""

    def held() -> int:
        return len(_descriptors(driver))

    driver.prepare()
    driver.run(os.getpid, workers=2)
    before = held()
    for _ in range(10):
        driver.prepare()
        driver.run(os.getpid, workers=2)
        driver.prepare()
        driver.start(time.sleep, 1000)
        driver.stop(grace_s=0)

    eventually(lambda: held() <= before, "the descriptors of the jobs to be closed")
