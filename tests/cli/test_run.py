"""`traceml run` as far as it goes before anything is started."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

from traceml import cli, settings
from traceml.cli import run
from traceml.cli.notices import print_unused_address
from traceml.supervise import page_process


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing/r.json", "there is no folder"), ("folder", "is a folder"), ("plain/r.json", "there is no folder")],
)
def test_a_report_that_could_not_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    """A wrong --report is a usage error before the training, not a surprise after it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").touch()
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it was started')\n")

    status = cli.main(["run", "--report", str(tmp_path / name), str(script)])

    shown = capsys.readouterr().err
    assert status == 2
    assert said in shown
    assert "started" not in shown


@pytest.mark.parametrize("words", [["python", "train.py"], ["torchrun", "train.py"], ["--no-python", "./train.sh"]])
def test_what_is_no_script_is_refused_with_the_way_that_works(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of the PATH, as other tools take it, was a missing file; an option of torchrun was unknown."""
    program = tmp_path / words[0]
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    status = cli.main(["run", *words])

    assert status == 2
    assert f"`TRACEML=1 {'torchrun ' if words[0].startswith('-') else ''}{words[0]} ...`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "launch"])
def test_code_on_the_command_line_is_refused_with_the_way_that_works(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's own option; `-c` of the script is the script's."""
    status = cli.main([command, "-c", "import this"])

    assert status == 2
    assert "-c: only scripts and modules are started here" in (shown := capsys.readouterr().err)
    assert "`TRACEML=1 python -c CODE`" in shown


def test_a_live_view_without_a_terminal_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--live terminal in a pipe is a usage error before anything is started."""
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it was started')\n")

    status = cli.main(["run", "--live", "terminal", "--runs-dir", str(tmp_path / "runs"), str(script)])

    assert status == 2
    assert "--live terminal needs a terminal" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_torchrun_without_torch_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ranks where PyTorch is missing: what to install, and no traceback."""
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    script = tmp_path / "train.py"
    script.touch()

    status = cli.main(["run", "--nproc-per-node", "2", str(script)])

    shown = capsys.readouterr().err
    assert status == 3
    assert shown.splitlines() == [shown.strip()]
    assert "pip install 'traceml-torch[torch]'" in shown


def test_the_page_without_its_libraries_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--live web where NiceGUI is missing: what to install, before anything is started."""
    monkeypatch.setattr(page_process, "find_spec", lambda name: None)
    monkeypatch.setattr(page_process.auth, "discover", lambda *_, **__: None)
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it was started')\n")

    status = cli.main(["run", "--live", "web", "--runs-dir", str(tmp_path), str(script)])

    shown = capsys.readouterr().err
    assert status == 3
    assert "pip install 'traceml-torch[web]'" in shown
    assert "started" not in shown


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "srun has started 4 tasks"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 tasks"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, None),  # the first one has said it
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_TASK_PID": "7", "SLURM_NTASKS": "4"}, None),  # a batch script
        ({"RANK": "0", "WORLD_SIZE": "2"}, None),  # it may be a program that a rank starts
    ],
)
def test_each_task_of_a_launcher_makes_a_run_of_its_own(
    variables: dict[str, str], told: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of all tasks are one run where the script is started without the command."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    run._warn_of_other_tasks()

    printed = capsys.readouterr().err
    assert printed.startswith(f"traceml: {told}") if told else printed == ""


def test_variables_of_torchrun_count_as_its_options() -> None:
    """Kubeflow sets them, and torchrun reads them; a program that one of its ranks starts is no job of its own."""
    pet = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_RDZV_ID": "", "PET_STANDALONE": "0"}

    def parsed(*words: str, **environ: str) -> argparse.Namespace:
        parser = run.make_parser()
        parser.set_defaults(**run._torchrun_defaults(environ))
        return parser.parse_args([*words, "train.py"])

    options = parsed(**pet)
    assert run._has_other_nodes(options)
    assert run._torchrun_words(options) == ["--nproc-per-node=8", "--nnodes=2", "--"]
    assert run._torchrun_words(parsed("--nnodes=1", **{**pet, "PET_STANDALONE": "1"}))[1:3] == [
        "--nnodes=1",
        "--standalone",
    ]
    assert not run._uses_torchrun(parsed(TORCHELASTIC_RUN_ID="x", **pet))


@pytest.mark.parametrize(
    ("live", "report", "missing"),
    [
        ("auto", None, ""),
        ("web", None, "; no page is opened here"),
        ("terminal", Path("copy.html"), "; the live view is not shown here; copy.html is not written here"),
    ],
)
def test_a_node_that_has_joined_a_run_says_where_it_is(
    live: str, report: Path | None, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no run of its own, no view of it, and no copy of the report."""
    run._print_joined(SimpleNamespace(node="node1", run_dir="/runs/r-1"), live, report)  # type: ignore[arg-type]

    assert capsys.readouterr().err == (
        "traceml: the ranks of this node are part of the run of node1, which is stored, shown and reported there: "
        f"/runs/r-1; live: `traceml top` on node1, `traceml stacks` also here{missing}\n"
    )


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"TRACEML_HOST": "10.0.0.5"}, "host=10.0.0.5 (TRACEML_HOST)"),
        ({"TRACEML_HOST": "h", "TRACEML_PORT": "300"}, "host=h (TRACEML_HOST) and port=300 (TRACEML_PORT)"),
        ({"TRACEML_ADDRESS": "127.0.0.1:300"}, ""),
        ({"TRACEML_HOST": "10.0.0.5", "TRACEML_QUIET": "1"}, ""),
        ({}, ""),
    ],
)
def test_an_address_that_is_not_used_is_named(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`traceml run` has an aggregator of its own; an address of another command of ours is no setting."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    print_unused_address(settings.load(), "traceml run")

    begin = f"traceml: not used: {told}. `traceml run` stores the run itself"
    assert capsys.readouterr().err.startswith(begin) if told else not capsys.readouterr().err
