"""`traceml.launch` as its users call it: results, environment, agents that stay, and every place it is called from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import traceml
from tests.eventually import eventually
from tests.launch import jobs
from tests.launch.hosts import Hosts
from tests.launch.jobs import PYTHONPATH
from traceml.errors import ResultNotFoundError, UsageError
from traceml.launch.launcher.launch_options import matching

_HERE: dict[str, Any] = {"hostnames": ["localhost"], "log_handlers": None}


def script(tmp_path: Path, text: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script of a user to its end, in a process of its own."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, path, *arguments], capture_output=True, text=True, timeout=240, cwd=tmp_path, **options
    )


def test_what_each_worker_returned_is_found_by_rank_and_host() -> None:
    """Arguments arrive, each worker knows its place, and results are found in each of the three ways."""
    result = traceml.launch(jobs.who, (1, "two"), {"three": 3}, workers_per_host=3, **_HERE)

    assert result.rank(2) == result.index("localhost", 2) == result.index(hostname="localhost", local_rank=2)
    assert result.results["localhost"][2] is result.rank(2)
    assert result.rank(2)["args"] == (1, "two")
    assert result.rank(2)["kwargs"] == {"three": 3}
    for i in range(3):
        env = result.rank(i)["env"]
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (
            str(i),
            str(i),
            "3",
            "3",
        )
        assert env["MASTER_ADDR"] == "127.0.0.1"


def test_a_daemon_launches_with_closed_standard_streams(tmp_path: Path) -> None:
    """A pipe or socket to the agent could have their numbers, and the agent ended."""
    done = script(
        tmp_path,
        """
        import os, traceml
        os.closerange(0, 3)
        result = traceml.launch(pow, (2, 3), hostnames=["localhost"], workers_per_host=1, backend=None)
        assert result.rank(0) == 8
        assert [os.path.realpath(f"/proc/self/fd/{number}") for number in range(3)] == 3 * [os.devnull]
        """,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )

    assert done.returncode == 0


def test_a_result_that_is_not_there_is_reported() -> None:
    """Ranks and hosts that the launch did not have are IndexErrors and KeyErrors that say what it had."""
    result = traceml.LaunchResult({"a": [1, 2], "b": [3]})

    assert [result.rank(i) for i in range(3)] == [1, 2, 3]
    for missing in (3, -1):
        with pytest.raises(IndexError, match="the ranks 0 to 2"):
            result.rank(missing)

    with pytest.raises(KeyError, match="the hosts a, b"):
        result.index("c", 0)

    with pytest.raises(ResultNotFoundError, match="the local ranks 0 to 0 there"):
        result.index("b", 1)


def test_workers_are_in_a_process_group_unless_none_is_wanted() -> None:
    """The default group is gloo where there are no GPUs; with backend=None there is none. Lambdas and closures work."""
    factor = 2.0

    assert traceml.launch(lambda: jobs.summed(factor), workers_per_host=2, **_HERE).rank(1) == (6.0, "gloo")
    assert traceml.launch(jobs.group, workers_per_host=1, backend=None, **_HERE).rank(0) is False


def test_a_function_may_leave_its_process_group_for_another_one() -> None:
    """Both meet at MASTER_PORT."""
    assert traceml.launch(jobs.summed_by_another_group, (2.0,), workers_per_host=2, **_HERE).rank(1) == 6.0


def test_agents_stay_for_the_next_launch_and_end_when_told() -> None:
    """Two launches get their workers from one process; after keep_agents=False none of it is left."""
    one = {**_HERE, "workers_per_host": 1, "backend": None}
    first = traceml.launch(jobs.who, **one).rank(0)["parent"]
    second = traceml.launch(jobs.who, keep_agents=False, **one).rank(0)["parent"]

    assert first == second
    eventually(lambda: not psutil.pid_exists(first), "the fork server to be gone")
    assert traceml.launch(jobs.who, **one).rank(0)["parent"] != first


def test_an_agent_that_died_meanwhile_is_replaced() -> None:
    """A launch does not fail because an idle agent was killed."""
    one = {**_HERE, "workers_per_host": 1, "backend": None}
    server = traceml.launch(jobs.who, **one).rank(0)["parent"]
    psutil.Process(server).parent().kill()

    assert traceml.launch(jobs.who, **one).rank(0)["parent"] != server


def test_variables_match_by_pattern(tmp_path: Path) -> None:
    """Patterns match whole names and tell capitals apart; every default does match what it is meant for."""
    names = [
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "NCCL_DEBUG",
        "GLOO_X",
        "OMP_NUM_THREADS",
        "HF_HOME",
        "path",
        "HOME",
        "XPATH",
    ]

    assert list(matching(dict.fromkeys(names, ""), traceml.DEFAULT_ENV_VARS)) == names[:6]


def test_hosts_get_the_variables_that_match(hosts: Hosts, tmp_path: Path) -> None:
    """Another host gets what matches and nothing else, and what env_file exports."""
    env_file = tmp_path / "env.sh"
    env_file.write_text("export FROM_FILE=$LD_LIBRARY_PATH/x\nNOT_EXPORTED=1\nsource /dev/null\n")
    code = f"""
        import json, sys, traceml
        from tests.launch import jobs
        result = traceml.launch(jobs.environ, hostnames=["node1"], workers_per_host=1, backend=None, keep_agents=False,
            ssh_config_file=sys.argv[1], extra_env_vars=["WANDB_*"], env_file={str(env_file)!r}, log_handlers=None)
        print(json.dumps(result.rank(0)))
    """
    env = {"LD_LIBRARY_PATH": "/opt/lib", "WANDB_KEY": "secret", "OTHER": "1", "PYTHONPATH": PYTHONPATH}

    told = json.loads(hosts.launcher.python(textwrap.dedent(code), hosts.ssh_config, env=env).stdout)

    assert (told["LD_LIBRARY_PATH"], told["WANDB_KEY"], told["FROM_FILE"]) == ("/opt/lib", "secret", "/opt/lib/x")
    assert not {"OTHER", "NOT_EXPORTED"} & told.keys()


def test_two_functions_on_hosts_and_here(hosts: Hosts) -> None:
    """A model trained on two hosts with two workers each, reached by ssh aliases, is tested here."""
    code = """
        import sys, torch, traceml

        def train():
            import torch.distributed as dist
            model = torch.nn.Linear(2, 1, bias=False)
            with torch.no_grad():
                model.weight.fill_(dist.get_rank())
                dist.all_reduce(model.weight)
            return model

        def test(model):
            return model(torch.ones(2)).item()

        config = sys.argv[1]
        model = traceml.launch(train, hostnames=["alias1", "node2"], workers_per_host=2, ssh_config_file=config).rank(0)
        accuracy = traceml.launch(test, (model,), hostnames=["localhost"], workers_per_host=1).rank(0)
        print(f"Accuracy: {accuracy}")
    """
    done = hosts.launcher.python(textwrap.dedent(code), hosts.ssh_config)

    assert "Accuracy: 12.0" in done.stdout
    for host in hosts.all:
        eventually(lambda host=host: not host.processes(), f"{host.name} to be as before")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-N2", "--ntasks-per-node=2"], {node: [(node, 10.0)] * 2 for node in ("node1", "node2")}),
        (["-N1", "-n1", ":", "-N1", "-n2"], {"node1": [("node1", 6.0)], "node2": [("node2", 6.0)] * 2}),
    ],
)
def test_a_slurm_allocation_is_used(slurm: Any, hosts: Hosts, options: list[str], expected: Any) -> None:
    """Within an allocation nothing has to be said: srun starts the agents on its nodes, also of several components."""
    code = """
        import os, traceml
        from tests.launch import jobs

        def place():
            return os.environ["SLURMD_NODENAME"], jobs.summed(1.0)[0]

        if __name__ == "__main__":
            print(traceml.launch(place, log_handlers=None).results)
    """
    python, path = hosts.launcher.command()[0], hosts.launcher.script(textwrap.dedent(code))

    login = {"SSH_CONNECTION": "192.0.2.1 5000 192.0.2.2 22"}  # Slurm passes on that of the user's session
    done = slurm.run("salloc", "--quiet", *options, python, path, env={"PYTHONPATH": PYTHONPATH, **login})

    assert eval(done.stdout) == expected


def test_a_step_has_all_of_the_jobs_resources(slurm: Any, hosts: Hosts) -> None:
    """Variables of a job's tasks are options for srun; a script reads them as they were."""
    code = """
        import os, traceml

        def look():
            return [os.environ.get(f"{name}_PER_TASK") for name in ("SRUN_CPUS", "SLURM_CPUS", "SLURM_TRES")]

        def cores():
            return os.environ["SLURM_CPUS_ON_NODE"]

        if __name__ == "__main__":
            options = {"workers_per_host": 1, "backend": None, "log_handlers": None}
            print(traceml.launch(look, **options).rank(0), traceml.launch(cores, **options).rank(0))
    """
    python, path = hosts.launcher.command()[0], hosts.launcher.script(textwrap.dedent(code))
    env = {"PYTHONPATH": PYTHONPATH, "SRUN_CPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "cpu:1"}

    done = slurm.run("salloc", "--quiet", "-N1", "-n2", "-c2", python, path, env=env)

    assert done.stdout == "['1', '2', 'cpu:1'] 4\n"


def test_options_come_from_the_command_line(tmp_path: Path) -> None:
    """`tyro.cli(traceml.Launcher)` offers the options of the document, with their defaults, and runs."""
    code = """
        import traceml, tyro
        from tests.launch import jobs

        if __name__ == "__main__":
            launcher = tyro.cli(traceml.Launcher)
            print(launcher.run(jobs.summed, (1.0,)).results)
    """
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "120"}
    told = script(tmp_path, code, "--help", env=env).stdout
    for words in (
        "--hostnames {[STR [STR ...]]}|{auto,slurm}",
        "--workers-per-host INT|{[INT [INT ...]]}|{auto,slurm}",
        "--ssh-config-file {None}|STR|PATH",
        "--backend {None,nccl,gloo,mpi,ucc,auto}",
        "--timeout INT",
        "--default-env-vars [STR [STR ...]]",
        "--extra-env-vars [STR [STR ...]]",
        "--env-file {None}|STR|PATH",
    ):
        assert words in told

    done = script(tmp_path, code, "--hostnames", "localhost", "--workers-per-host", "2", "--backend", "gloo", env=env)

    assert done.stdout == "{'localhost': [(3.0, 'gloo'), (3.0, 'gloo')]}\n", done.stderr


def test_the_launcher_imports_no_torch(tmp_path: Path) -> None:
    """Neither the import of traceml nor a launch imports torch here; the folder of the same name hides no function."""
    code = """
        import sys, traceml
        from traceml.launch.launcher.logs.log_handlers import file_handler
        from tests.launch import jobs
        assert traceml.file_handler is file_handler
        print(traceml.launch(jobs.summed, (1.0,), hostnames=["localhost"], workers_per_host=1).rank(0))
        print(sorted({"torch", "numpy", "pydantic", "asyncio"} & set(sys.modules)))
    """
    done = script(tmp_path, code, env={**os.environ, "PYTHONPATH": PYTHONPATH})

    assert done.stdout == "(1.0, 'gloo')\n[]\n", done.stderr


def test_it_can_be_called_from_anywhere(tmp_path: Path) -> None:
    """From a thread, in a running event loop, beside a process group of one's own, in a worker of another launch."""
    code = """
        import asyncio, threading, traceml
        import torch.distributed as dist
        from tests.launch import jobs

        options = {"hostnames": ["localhost"], "log_handlers": None}

        def inner():
            return traceml.launch(jobs.summed, (1.0,), workers_per_host=2, **options).rank(0)

        async def cell():
            return inner()

        if __name__ == "__main__":
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            print(inner())
            thread = threading.Thread(target=lambda: print(inner()))
            thread.start()
            thread.join()
            print(asyncio.run(cell()))
            print(traceml.launch(inner, workers_per_host=1, **options).results)
            print(dist.get_world_size())
    """
    done = script(tmp_path, code, env={**os.environ, "PYTHONPATH": PYTHONPATH})

    one = "(3.0, 'gloo')"
    assert done.stdout.splitlines() == [one, one, one, f"{{'localhost': [{one}]}}", "1"], done.stderr


def test_a_forked_child_has_agents_of_its_own(tmp_path: Path) -> None:
    """A child that was forked with idle agents at hand neither uses nor keeps its parent's, and warns of nothing."""
    code = """
        import multiprocessing, traceml, warnings
        from tests.launch import jobs
        warnings.simplefilter("error")

        def parent_of_worker():
            options = {"hostnames": ["localhost"], "workers_per_host": 1, "backend": None, "log_handlers": None}
            return traceml.launch(jobs.who, **options).rank(0)["parent"]

        if __name__ == "__main__":
            first = parent_of_worker()
            with multiprocessing.get_context("fork").Pool(1) as pool:
                other = pool.apply(parent_of_worker)
                pool.close()
                pool.join()
            print(first != other, first == parent_of_worker())
    """
    done = script(tmp_path, code, env={**os.environ, "PYTHONPATH": PYTHONPATH})

    assert (done.stdout, done.stderr) == ("True True\n", "")


_HANG = """
    import sys, traceml
    from tests.launch import jobs
    backend = None if sys.argv[2] == "None" else sys.argv[2]
    traceml.launch(jobs.hang_with_child, (sys.argv[1],), hostnames=["localhost"], workers_per_host=2, backend=backend)
"""


@pytest.mark.parametrize(
    ("send", "words", "backend"),  # workers in a process group take a torch of their own: two ends have them
    [
        (lambda pid: os.kill(pid, signal.SIGINT), True, "None"),
        (lambda pid: os.killpg(pid, signal.SIGINT), True, "gloo"),
        (lambda pid: os.kill(pid, signal.SIGTERM), False, "None"),
        (lambda pid: os.kill(pid, signal.SIGKILL), False, "gloo"),
    ],
    ids=["interrupt", "interrupt-group", "terminate", "kill"],
)
def test_nothing_is_left_when_the_launcher_ends(
    tmp_path: Path, send: Callable[[int], None], words: bool, backend: str
) -> None:
    """However it ends, workers and what they started end too; Ctrl-C also tells where each rank was."""
    path, marker = tmp_path / "script.py", tmp_path / "marker"
    path.write_text(textwrap.dedent(_HANG))
    process = subprocess.Popen(
        [sys.executable, path, marker, backend],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        start_new_session=True,
    )
    with process:
        marks = [Path(f"{marker}-{i}") for i in range(2)]
        pids = [
            int(pid)
            for mark in marks
            for pid in eventually(lambda mark=mark: mark.exists() and mark.read_text().split(), "the workers to run")
        ]
        send(process.pid)
        _, told = process.communicate(timeout=240)

    eventually(lambda: not any(map(psutil.pid_exists, pids)), "workers and their children to be gone")
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in told) is words
    assert ("ranks 0, 1 were here" in told or ("rank 0" in told and "in dawdle" in told)) is words


_SAVE = """
    import os, signal, subprocess, sys, time, traceml
    from pathlib import Path

    def train():
        loader, calls = subprocess.Popen(["sleep", "600"]), []

        def save(*_):
            calls.append(1)
            time.sleep(2)
            Path("saved-" + os.environ["RANK"]).write_text(f"{len(calls)} {loader.poll()}")
            sys.exit(1)

        signal.signal(signal.SIGTERM, save)
        Path("ready-" + os.environ["RANK"]).touch()
        while True:
            time.sleep(0.1)

    if len(sys.argv) == 1:
        train()
    else:
        traceml.launch(train, workers_per_host=1, backend=None, log_handlers=None)
"""


def _saved(folder: Path, send: Callable[[], object]) -> list[str]:
    """Send a signal once both ranks run; return what they have saved."""
    eventually(lambda: len(list(folder.glob("ready-*"))) == 2, "the workers to run")
    send()
    return [
        eventually(lambda rank=rank: (path := folder / f"saved-{rank}").exists() and path.read_text(), "a checkpoint")
        for rank in range(2)
    ]


def test_workers_may_save_when_the_launcher_gets_sigterm(tmp_path: Path) -> None:
    """They alone get the signal: the death of a loader worker would be an exception in their handler."""
    (tmp_path / "train.py").write_text(textwrap.dedent(_SAVE))
    command = [sys.executable, "-m", "traceml", "launch", "--hostnames=localhost", "--workers-per-host=2", "train.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert _saved(tmp_path, process.terminate) == ["1 None"] * 2

    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("nodes", "words"),
    [("2", "train.py launch"), ("1", "-m traceml launch --hostnames localhost --workers-per-host 2 train.py")],
)
def test_workers_may_save_when_slurm_ends_the_job(slurm: Any, tmp_path: Path, nodes: str, words: str) -> None:
    """Also where its SIGTERM, which they get once, has ended the launcher first, or reaches the agent as well."""
    (tmp_path / "train.py").write_text(textwrap.dedent(_SAVE))
    (tmp_path / "job.sh").write_text(f"#!/bin/sh\nexec {sys.executable} {words}\n")
    job = slurm.run("sbatch", "-N", nodes, "--parsable", "job.sh", cwd=tmp_path, env={"PYTHONPATH": PYTHONPATH}).stdout

    saved = _saved(tmp_path, lambda: slurm.run("scancel", job.strip()))

    assert [text.split()[0] for text in saved] == ["1", "1"]


def test_a_child_forked_during_a_launch_does_not_keep_it_alive(tmp_path: Path) -> None:
    """It holds no end of the channel: when its parent is killed, the agents notice, and the workers end."""
    code = """
        import os, sys, threading, time, traceml

        def work(path):
            with open(path, "w") as file:
                file.write(str(os.getpid()))
            time.sleep(600)

        if __name__ == "__main__":
            options = {"hostnames": ["localhost"], "workers_per_host": 1, "log_handlers": None, "backend": None}
            threading.Thread(target=traceml.launch, args=(work, (sys.argv[1],)), kwargs=options, daemon=True).start()
            while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():
                time.sleep(0.01)

            if os.fork() == 0:
                print(os.getpid(), flush=True)
                time.sleep(600)

            os.kill(os.getpid(), 9)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    pid, out = tmp_path / "pid", tmp_path / "out"
    with out.open("w") as file:  # no pipe: the child would hold it
        subprocess.run([sys.executable, "script.py", pid], cwd=tmp_path, stdout=file, timeout=240, check=False)

    child = psutil.Process(int(eventually(out.read_text, "the child to run")))
    try:
        eventually(lambda: not psutil.pid_exists(int(pid.read_text())), "the worker to be gone")
        assert child.is_running()
    finally:
        child.kill()


@pytest.mark.parametrize("given", [5, "WANDB_*", [5], None])
def test_variables_are_a_list_of_names(given: Any) -> None:
    """A number gave the TypeError of an iteration."""
    with pytest.raises(UsageError, match=r"extra_env_vars=.*: give a list of names or patterns"):
        traceml.launch(print, extra_env_vars=given)
