"""The GitHub action: its steps as a runner runs them, with the files and variables of a runner."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_mcp import TRAIN, environ
from tests.forked.commands import Commands
from traceml.runs.report.report_types import read_report

ACTION = Path(__file__).parents[3] / ".github" / "actions" / "traceml"
(_WORKFLOW_TEXT,) = re.findall(
    r"```yaml\n(.*?)```", (Path(__file__).parents[3] / "docs" / "assistants.md").read_text(), re.DOTALL
)
WORKFLOW = yaml.safe_load(_WORKFLOW_TEXT)
_EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")
# Steps that alternate between two durations are independent, whatever else runs on the machine: a comparison decides.
QUICK = TRAIN.replace("return 60", "return 120").replace("time.sleep(0.02)", "time.sleep(0.01 + 0.01 * (at % 2))")
LATE = TRAIN.replace("return 60", "return 120").replace("time.sleep(0.02)", "time.sleep(0.04 + 0.02 * (at % 2))")


@dataclass
class Job:
    """Result of the action's steps."""

    status: int
    outputs: dict[str, str]
    summary: str
    log: str

    def kept(self, name: str) -> str:
        return (Path(self.outputs["folder"]) / name).read_text()


def run_action(folder: Path, **inputs: str) -> Job:
    """Run the steps of action.yml that are commands, as a runner does: the last status that is not 0 ends the job."""
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    given = {name: str(spec.get("default", "")) for name, spec in action["inputs"].items()}
    given |= {name.replace("_", "-"): value for name, value in inputs.items()}
    outputs: dict[str, str] = {}
    files = {name: folder / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for path in files.values():
        path.write_text("")

    def text(value: str) -> str:
        names = {f"inputs.{name}": each for name, each in given.items()}
        names |= {f"steps.check.outputs.{name}": each for name, each in outputs.items()}
        names["github.action_path"] = str(ACTION)
        return _EXPRESSION.sub(lambda found: names[found.group(1)], value)

    log, status = "", 0
    with closing(Commands(folder / "bin")) as commands:
        for step in action["runs"]["steps"]:
            if "run" not in step or step["name"] == "Install traceml":
                continue

            own = {name: text(str(value)) for name, value in step.get("env", {}).items()}
            env = {**environ(), **own, **{name: str(path) for name, path in files.items()}, "RUNNER_TEMP": str(folder)}
            where = folder / text(step.get("working-directory", "."))
            env["PATH"] = commands.path()
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text(step["run"])],
                cwd=where, env=env, capture_output=True, text=True, timeout=240, check=False,
            )  # fmt: skip
            log += done.stdout + done.stderr
            outputs |= dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
            status = done.returncode
            if status:
                break

    return Job(status, outputs, files["GITHUB_STEP_SUMMARY"].read_text(), log)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with trainings whose input is slow, and slower."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "slow.py").write_text(TRAIN)
    (folder / "quick.py").write_text(QUICK)
    (folder / "late.py").write_text(LATE)
    (folder / "broken.py").write_text("raise SystemExit(7)\n")
    return folder


@pytest.fixture(scope="module")
def baseline(place: Path) -> Path:
    """The report of an earlier job: as it is kept, without its run."""
    job = run_action(place, run="quick.py")
    assert job.status == 0, job.log
    kept = place / "base"
    kept.mkdir()
    (kept / "report.json").write_text(job.kept("report.json"))
    return kept


def test_action_is_valid() -> None:
    """By the schema that the public validator has, and every variable of the script is given by a step."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-actions"]
    done = subprocess.run([*command, str(ACTION / "action.yml")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout

    steps = yaml.safe_load((ACTION / "action.yml").read_text())["runs"]["steps"]
    given = {name for step in steps for name in step.get("env", {})}
    used = set(re.findall(r"ACTION_TRACEML_\w+", (ACTION / "traceml_ci.sh").read_text())) - {"ACTION_TRACEML_"}
    assert used <= given
    assert not [step["name"] for step in steps if "${{" in step.get("run", "")]  # an input in a script is injected


def test_a_finding_fails_the_job(place: Path) -> None:
    """After the report was kept: summary, comment and outputs have the verdict."""
    job = run_action(place, run="slow.py", fail_on="RANK_LOST INPUT_BOUND")

    assert job.status == 1
    report = read_report(Path(job.outputs["report"]))
    verdict = report.verdict.kind  # INPUT_BOUND, where the cores are free
    assert job.outputs["verdict"] == verdict
    assert job.outputs["outcome"] == "none"
    assert "INPUT_BOUND" in {finding.kind for finding in report.findings}
    assert "<html" in job.kept("report.html")
    assert job.summary == Path(job.outputs["comment-file"]).read_text()
    assert f"## traceml: {verdict}" in job.summary
    assert "found INPUT_BOUND (--fail-on)" in job.summary
    assert "\n\n\n" not in job.summary
    assert str(place) not in job.summary  # paths on the runner mean nothing to readers of the comment
    assert _uploaded(job) == {"report.html", "report.json", "comment.md"}
    assert _commented(job, place) == f"pr comment 7 --body-file {job.outputs['comment-file']}\n"
    assert read_report(place / "baseline" / "report.json").verdict.kind == verdict


def _uploaded(job: Job) -> set[str]:
    """Return what the action's step after the training uploads, which also runs where that has failed."""
    steps = yaml.safe_load((ACTION / "action.yml").read_text())["runs"]["steps"]
    (upload,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert upload["if"].startswith("always() && ")
    assert steps.index(upload) < [step["name"] for step in steps].index("Gate")
    folder = upload["with"]["path"].replace("${{ steps.check.outputs.folder }}", job.outputs["folder"])
    return {path.name for path in Path(folder).iterdir()}


def _commented(job: Job, place: Path) -> str:
    """Run the steps that follow the action in the documented workflow; return the arguments that gh was given."""
    given = {f"steps.traceml.outputs.{name}": value for name, value in job.outputs.items()}
    given |= {"github.token": "secret", "github.event.number": "7"}

    def text(value: str) -> str:
        return _EXPRESSION.sub(lambda found: given[found.group(1)], value)

    (place / "gh").write_text('#!/bin/sh\necho "$@" > gh.txt\n')
    (place / "gh").chmod(0o755)
    steps = WORKFLOW["jobs"]["speed"]["steps"]
    later = steps[[step.get("id") for step in steps].index("traceml") + 1 :]
    for step in (step for step in later if "run" in step):
        env = {name: text(value) for name, value in step.get("env", {}).items()}
        path = f"{place}:{Path(str(shutil.which('bash'))).parent}"
        command = ["bash", "-e", "-c", text(step["run"])]
        subprocess.run(command, cwd=place, env={"PATH": path, **env}, timeout=60, check=True)

    return (place / "gh.txt").read_text()


def test_other_findings_do_not(place: Path) -> None:
    """Only the kinds that were named."""
    job = run_action(place, run="slow.py", fail_on="RANK_LOST", baseline="nosuch.json")

    assert job.status == 0, job.log
    assert "No baseline yet: nosuch.json does not exist" in job.summary


def test_a_regression_fails_the_job(place: Path, baseline: Path) -> None:
    """35 ms more in each step, compared with the kept report alone; over a limit of 1,000 % it passes."""
    job = run_action(place, run="late.py", baseline=str(baseline))

    assert (job.status, job.outputs["outcome"]) == (1, "slower"), job.log
    assert "B is slower" in job.summary
    assert "over 10 % and significant (--fail-over)" in job.summary
    assert json.loads(job.kept("comparison.json"))["outcome"] == "slower"
    passed = run_action(place, run="late.py", baseline=str(baseline / "report.json"), fail_over="1000")
    assert passed.status == 0, passed.log


def test_an_undecided_comparison_fails_if_asked(place: Path, baseline: Path) -> None:
    """Two ranks cannot be compared with one."""
    report: dict[str, Any] = json.loads((baseline / "report.json").read_text())
    report["run"]["world_size"] = 2
    (place / "wide.json").write_text(json.dumps(report))

    job = run_action(place, run="quick.py", baseline="wide.json")
    assert (job.status, job.outputs["outcome"]) == (0, "unknown"), job.log
    assert "--fail-over cannot be decided: A ran on 2 ranks" in job.summary
    assert "\n\n\n" not in job.summary
    assert run_action(place, run="quick.py", baseline="wide.json", fail_on_unknown="true").status == 3


def test_the_status_of_the_script_is_the_jobs(place: Path) -> None:
    """Whatever the gates say; words of the command are the shell's."""
    job = run_action(place, run="'broken.py' --name 'a b; echo $HOME'", fail_on="INPUT_BOUND")

    assert job.status == 7
    assert job.summary.startswith("## traceml")


def test_the_workflow_in_the_documentation_is_valid(tmp_path: Path) -> None:
    """By the schema of workflows; it gives inputs and reads outputs that the action has."""
    (tmp_path / "workflow.yml").write_text(_WORKFLOW_TEXT)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, str(tmp_path / "workflow.yml")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout

    action = yaml.safe_load((ACTION / "action.yml").read_text())
    (step,) = [step for step in WORKFLOW["jobs"]["speed"]["steps"] if step.get("id") == "traceml"]
    assert set(step["with"]) <= set(action["inputs"])
    assert set(re.findall(r"steps\.traceml\.outputs\.([\w-]+)", _WORKFLOW_TEXT)) <= set(action["outputs"])
