"""Experiments: what their rows tell the delivery, and which of them a call belongs to."""

from __future__ import annotations

import argparse
import getpass
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import traceml
from tests.eventually import eventually
from tests.track.conftest import Script, Stored, ended_run, finish, runs_in
from traceml.errors import ArgumentTypeError, UsageError
from traceml.track import wandb_sweep


def test_calls_belong_to_the_innermost_experiment(script: Script, tmp_path: Path) -> None:
    """Module-level calls too; an inner one names its parent; ends are told with how they ended."""
    finish(
        script(
            """
        import traceml
        with traceml.Experiment("outer", project="p", backend="jsonl, tensorboard", tags=["a"],
                                config={"lr": 1}) as outer:
            traceml.log_metric("x", 1)
            outer.set_iteration(7)
            outer.log_metric("y", 2)
            outer.log_metric("y", 3, iteration=8)
            outer.log_hyperparameter("depth", 3)
            outer.set_tags({"stage": 2})
            outer.set_tags(["late"])
            outer.set_tags("last")
            try:
                with traceml.Experiment("inner", backend=["jsonl"], resume="earlier") as inner:
                    assert traceml.get_active_experiment() is inner
                    traceml.log_metric("x", 10)
                    outer.log_metric("x", 2)
                    raise KeyError("broken")
            except KeyError:
                pass
            traceml.log_metric("x", 3)
            assert outer.config == {"lr": 1}
        assert traceml.get_active_experiment() is None
        traceml.log_metric("alone", 1)
        with traceml.Experiment("outer", backend="jsonl") as again:
            assert again.id != outer.id
        """,
            TRACEML_TRACK_ENV="1",
        )
    )

    stored = ended_run(tmp_path / "traceml_runs")
    outer, inner, again = stored.of("experiment")
    assert (outer["name"], outer["project"], outer["backends"]) == ("outer", "p", ["jsonl", "tensorboard"])
    assert (outer["tags"], outer["params"], outer["parent"]) == ({"a": ""}, {"lr": 1}, None)
    assert (Path(outer["source"]).name, outer["user"]) == ("script0.py", getpass.getuser())
    assert (inner["parent"], inner["resume"], inner["project"]) == (outer["id"], "earlier", "default")
    assert len({outer["experiment"], inner["experiment"], again["experiment"], 0}) == 4
    values = {(experiment, metric.name): [] for experiment, metric in stored.metrics}
    for experiment, metric in stored.metrics:
        values[experiment, metric.name].append((metric.value, metric.step))
    assert values == {
        (outer["experiment"], "x"): [(1.0, 0), (2.0, 7), (3.0, 1)],
        (outer["experiment"], "y"): [(2.0, 7), (3.0, 8)],
        (inner["experiment"], "x"): [(10.0, 0)],
        (0, "alone"): [(1.0, 0)],
    }
    ends = [(row["experiment"], row["state"]) for row in stored.of("end")]
    assert ends == [
        (inner["experiment"], "failed"),
        (outer["experiment"], "finished"),
        (again["experiment"], "finished"),
    ]
    assert [row["params"] for row in stored.of("params")] == [{"lr": 1}, {"depth": 3}]
    assert [row["tags"] for row in stored.of("tags")] == [{"stage": "2"}, {"late": ""}, {"last": ""}]


def test_an_exit_status_tells_how_an_experiment_ended(script: Script, tmp_path: Path) -> None:
    """Early stopping by `sys.exit()` was a failure at the trackers, of a run that has finished."""
    finish(
        script("""
        import contextlib, sys, traceml
        for status in (None, 130, 3):
            with contextlib.suppress(SystemExit), traceml.Experiment("one", backend="jsonl"):
                sys.exit(status)
        """)
    )

    ends = ended_run(tmp_path / "traceml_runs").of("end")
    assert [row["state"] for row in ends] == ["finished", "stopped", "failed"]


def test_experiments_of_two_threads_are_no_children_of_each_other(script: Script, tmp_path: Path) -> None:
    """Each is a child of the main thread's experiment, where there is one, and of those of its own thread."""
    finish(
        script("""
        import threading
        import traceml

        both = threading.Barrier(2)

        def search(prefix):
            both.wait()
            with traceml.Experiment(f"{prefix}{threading.current_thread().name}", backend="jsonl") as trial:
                both.wait()
                trial.log_metric("x", 1)
                with traceml.Experiment(f"{prefix}{threading.current_thread().name} inner", backend="jsonl"):
                    both.wait()

        def search_twice(prefix):
            threads = [threading.Thread(target=search, args=(prefix,), name=name) for name in "ab"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        search_twice("alone ")
        with traceml.Experiment("sweep", backend="jsonl"):
            search_twice("")
        """)
    )

    rows = {row["name"]: row for row in ended_run(tmp_path / "traceml_runs").of("experiment")}
    names = {row["id"]: name for name, row in rows.items()} | {None: None}
    assert {name: names[row["parent"]] for name, row in rows.items()} == {
        "alone a": None, "alone b": None, "alone a inner": "alone a", "alone b inner": "alone b",
        "sweep": None, "a": "sweep", "b": "sweep", "a inner": "a", "b inner": "b",
    }  # fmt: skip


def test_an_experiment_begins_at_its_first_call(script: Script, tmp_path: Path) -> None:
    """As with other trackers; two of them stand side by side, and inside a `with` one is a child."""
    out = finish(
        script("""
        import traceml
        first = traceml.Experiment("first", backend="jsonl", config={"lr": 1})
        assert traceml.get_active_experiment() is None
        first.log_metric("x", 1)
        assert traceml.get_active_experiment() is first
        second = traceml.Experiment("second", backend="jsonl")
        second.log_text("note", "hello")
        first.log_metric("x", 2)
        try:
            second.end("FINISHED")
        except ValueError as error:
            print(error)
        second.end()
        second.log_metric("late", 1)
        with traceml.Experiment("block", backend="jsonl"):
            traceml.Experiment("inner", backend="jsonl").log_params({"depth": 3})
        traceml.Experiment("never", backend="jsonl")
        late = traceml.Experiment("late", backend="jsonl")
        traceml.Experiment("below", backend="jsonl", parent=late).log_metric("x", 3)
        """)
    )

    assert "ends as one of 'finished', 'stopped', 'failed', not as 'FINISHED'" in out
    stored = ended_run(tmp_path / "traceml_runs")
    rows = {row["name"]: row for row in stored.of("experiment")}
    assert list(rows) == ["first", "second", "block", "inner", "late", "below"]
    assert {name: row["parent"] for name, row in rows.items()} == {
        "first": None, "second": None, "block": None, "inner": rows["block"]["id"], "late": None,
        "below": rows["late"]["id"],
    }  # fmt: skip
    of = {name: row["experiment"] for name, row in rows.items()}
    assert [(number, metric.name) for number, metric in stored.metrics] == [
        (of["first"], "x"), (of["first"], "x"), (of["second"], "late"), (of["below"], "x"),
    ]  # fmt: skip
    assert [(row["experiment"], row["params"]) for row in stored.of("params")] == [
        (of["first"], {"lr": 1}), (of["inner"], {"depth": 3}),
    ]  # fmt: skip
    assert [row["experiment"] for row in stored.of("text")] == [of["second"]]
    assert {row["experiment"] for row in stored.of("end")} == {of["second"], of["block"]}


@pytest.mark.parametrize(
    ("uri", "said", "announced"),
    [
        (None, "in the file mlflow.db next to the runs", "local"),
        ("http://mlflow.company:5000", "to the MLflow server http://mlflow.company:5000", "http://mlflow.company:5000"),
        ("https://me:hunter2@mlflow.company", "to the MLflow server https://[masked:secret]@mlflow.company", None),
    ],
)
def test_the_choice_of_a_tracker_is_said(
    script: Script, tmp_path: Path, uri: str | None, said: str, announced: str | None
) -> None:
    """Once, with the address, which is where it then goes; an empty list is none, and says nothing."""
    process = script(
        """
        import traceml
        for name in ("first", "second"):
            with traceml.Experiment(name):
                pass
        with traceml.Experiment("none", backend=[]):
            traceml.log_metric("x", 1)
        """,
        **({"MLFLOW_TRACKING_URI": uri} if uri else {}),
    )
    _, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    assert err.count("no backend was named") == err.count(said) == 1, err
    assert "hunter2" not in err
    rows = {row["name"]: row for row in ended_run(tmp_path / "traceml_runs").of("experiment")}
    assert [rows[name]["backends"] for name in ("first", "second", "none")] == [["mlflow"], ["mlflow"], []]
    assert rows["first"]["options"].get("mlflow", {}).get("tracking_uri") == announced
    assert "hunter2" not in str(rows)


@pytest.mark.parametrize(
    ("explicit", "name", "shown"), [(False, "named", "named"), (False, "", "script0"), (True, "named", "mine")]
)
def test_the_runs_own_experiment(script: Script, tmp_path: Path, explicit: bool, name: str, shown: str) -> None:
    """Trackers of the settings get the run itself, unless the script begins an experiment in its place.

    Its name is that of the run, by default the script's, and not the id that `traceml run` gives.
    """
    finish(
        script(
            """
        import sys, traceml
        traceml.init(local=True)
        with traceml.trace_step():
            pass
        if sys.argv[1] == "True":
            with traceml.Experiment("mine"):
                traceml.log_metric("x", 1)
        """,
            explicit,
            TRACEML_BACKEND="jsonl",
            TRACEML_RUN_ID="20250102-030405-script-abcd",
            **({"TRACEML_RUN_NAME": name} if name else {}),
        )
    )

    (row,) = ended_run(tmp_path / "traceml_runs").of("experiment")
    assert (row["name"], row["backends"]) == (shown, ["jsonl"])
    assert (row["experiment"] == 0) is not explicit


@pytest.mark.parametrize("quiet", ["", "1"])
def test_a_script_that_only_logs_says_where_and_ends_with_its_card(script: Script, quiet: str) -> None:
    """One line at the start, as a traced one; the card says that its steps are not traced."""
    process = script("import traceml; traceml.Experiment('e', backend=[]).log_metric('x', 1)", TRACEML_QUIET=quiet)
    _, err = process.communicate(timeout=240)

    line = re.match(r"traceml: recording this run; results in traceml_runs/\S+; live: `traceml top`\n", err)
    assert (line is None, err == "") == (bool(quiet), bool(quiet)), err
    assert ("its steps are not traced" in " ".join(err.split())) is not bool(quiet)


def test_a_script_that_calls_init_says_that_it_is_traced(script: Script) -> None:
    """Although the aggregator answers before the hooks are there."""
    _, err = script("import traceml; traceml.init(local=True)", TRACEML_QUIET="").communicate(timeout=240)

    assert re.match(r"traceml: tracing this run; results in traceml_runs/\S+; live: `traceml top`\n", err), err


def test_the_settings_trackers_get_everything_without_any_init(script: Script, tmp_path: Path) -> None:
    """A `log_*` call alone is enough for captures and collectors, where the settings name a tracker."""
    finish(
        script(
            """
        import contextlib, os, psutil, traceml
        traceml.log_metric("x", 1)
        from tensorboardX import SummaryWriter
        with SummaryWriter("events") as writer:
            writer.add_scalar("y", 2.0, 3)
        # A script that ends gives its collectors 3 s, which is not enough on a busy machine.
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.ZombieProcess):
                if "collector_main" in "".join(child.cmdline()):
                    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        """,
            TRACEML_BACKEND="jsonl",
            TRACEML_TRACK_ENV="1",
            TRACEML_TRACK_SYSTEM="1",
        )
    )

    stored = ended_run(tmp_path / "traceml_runs")
    assert (stored.values("x"), stored.values("y")) == ([1.0], [2.0])
    assert {row["name"] for row in stored.of("collected")} >= {"environment", "system"}


def test_an_experiment_that_a_shutdown_has_ended_loses_nothing(script: Script, tmp_path: Path) -> None:
    """Its own end, by `with`, comes too late to be a row, and nothing is said to be lost; a later value is."""
    process = script("""
        import sys, traceml
        with traceml.Experiment("e", backend="jsonl") as experiment:
            experiment.log_metric("x", 1)
            traceml.shutdown()
        assert traceml.get_active_experiment() is None
        print("closed", file=sys.stderr)
        traceml.log_metric("x", 2)
        """)
    _, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    until_closed, _, rest = err.partition("closed")
    assert "not recorded" not in until_closed
    assert "what is logged from now on is not recorded" in rest
    stored = ended_run(tmp_path / "traceml_runs")
    assert (stored.values("x"), stored.of("end"), stored.state) == ([1.0], [], "finished")


def test_an_experiment_after_a_shutdown_is_recorded_too(script: Script, tmp_path: Path) -> None:
    """Each has a run of its own, with nothing of the other's in it; a mere call after a shutdown only warns."""
    process = script(
        """
        import traceml
        traceml.init(local=True, run_name="named", quiet=True)
        for name in ("first", "second"):
            with traceml.Experiment(name, backend="jsonl"):
                traceml.log_metric(name, 1)
            traceml.shutdown()
            traceml.log_metric("late", 1)
            traceml.log_metric("late", 2)
        front = traceml.Orchestrator()
        front.start()
        print(front.health()["state"])
        front.stop()
        front.stop()
        print(front.health()["state"])
        """
    )
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert err.count("what is logged from now on is not recorded") == 1

    def is_over() -> list[Stored]:
        runs = [Stored(run_dir) for run_dir in runs_in(tmp_path / "traceml_runs")]
        return runs if len(runs) == 3 and all(run.ended for run in runs) else []

    found = {run.of("experiment")[0]["name"]: run for run in eventually(is_over) if run.of("experiment")}
    assert found.keys() == {"first", "second"}
    for name, run in found.items():
        assert run.values(name) == [1.0]
        assert run.values("late") == []
        assert len(run.of("experiment")) == 1
        assert ("-named-" in run.run_dir.name) is (name == "first")


def test_a_tracker_that_does_not_exist_is_reported_at_once(script: Script) -> None:
    """A slip in a name raises where the experiment begins; in a setting it is a warning, and logging goes on."""
    code = """
        import traceml
        try:
            traceml.start_logging("x", backend=NAMES)
        except traceml.PluginError as error:
            print(error)
        traceml.log_metric("y", 1)
    """
    assert "Did you mean 'mlflow'?" in finish(script(code.replace("NAMES", '["jsonl", "mlfow"]')))

    process = script(code.replace("NAMES", "None"), TRACEML_BACKEND="mlfow")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (0, ""), err
    assert "Did you mean 'mlflow'?" in err


def test_wrong_settings_are_reported_where_an_experiment_begins(script: Script) -> None:
    """As `init` does; a mere call warns, and the training goes on."""
    out = finish(
        script(
            """
        import traceml
        try:
            traceml.Experiment("x").start()
        except traceml.SettingsError as error:
            print(error)
        traceml.log_metric("y", 1)
        """,
            TRACEML_TRACK_GIT="maybe",
        )
    )
    assert "TRACEML_TRACK_GIT: 'maybe' is not allowed" in out


def test_options_are_checked_at_once_and_add_to_those_of_the_settings(script: Script, tmp_path: Path) -> None:
    """A slip raises where the experiment begins; what the experiment does not say, the settings do."""
    out = finish(
        script(
            """
        import traceml
        for options in ({"nonsense": 1}, {"path": 1}, {"sample": 0}, {"fallback": "jsonll"}):
            try:
                traceml.Experiment("x", backend="jsonl", options={"jsonl": options}).start()
            except traceml.PluginError as error:
                print(error)
        with traceml.Experiment("y", backend="jsonl", options={"jsonl": {"sample": 10}}):
            traceml.log_metric("z", 1)
        """,
            TRACEML_BACKEND_OPTIONS='{"jsonl": {"path": "elsewhere", "sample": 2}}',
        )
    )
    for said in ("no option 'nonsense'", "'path' of backend 'jsonl' is 1", "'sample'", "Did you mean 'jsonl'"):
        assert said in out

    (row,) = ended_run(tmp_path / "traceml_runs").of("experiment")
    assert row["options"] == {"jsonl": {"path": "elsewhere", "sample": 10}}


def test_secrets_are_refused_where_they_would_be_stored() -> None:
    """Keys in arguments and options are errors which say where they belong, without repeating them."""
    with pytest.raises(UsageError, match=r"'api_key' of backend 'wandb'.*WANDB_API_KEY") as caught:
        traceml.Experiment("e", options={"wandb": {"api_key": "hunter2"}})
    assert "hunter2" not in str(caught.value)

    traceml.Experiment("e", options={"wandb": {"api_key_file": "/run/key"}})


def test_a_secret_in_the_settings_leaves_no_experiment_open(script: Script, tmp_path: Path) -> None:
    """An experiment that is begun by the script raises, and what is logged afterwards belongs to the run."""
    (tmp_path / "traceml.toml").write_text('[backends.mlflow]\ntracking_uri = "http://jane:hunter22@tracking"\n')
    finish(
        script("""
        import traceml
        try:
            traceml.Experiment("x", backend="mlflow").start()
        except ValueError as error:
            assert "looks like a secret" in str(error)
        else:
            raise AssertionError
        assert traceml.get_active_experiment() is None
        traceml.log_metric("loss", 1)
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    assert [number for number, _ in stored.metrics] == [0]


def test_a_sweeps_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The file that W&B's agent leaves is read before the experiment begins; that needs PyYAML, as W&B does."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "wandb_version: 1\n\nlr:\n  value: 0.01\nmodel:\n  desc: null\n  value: resnet\nbig:\n  value: 1.0e-05\n"
        "flag:\n  value: true\nlayers:\n  value:\n  - 1\n  - 2\noptimizer:\n  value:\n    lr: 0.1\n"
    )
    environ = {"WANDB_SWEEP_ID": "s", "WANDB_SWEEP_PARAM_PATH": str(path)}

    plain = {"lr": 0.01, "model": "resnet", "big": 1e-05, "flag": True}
    nested = {"layers": [1, 2], "optimizer": {"lr": 0.1}}
    assert wandb_sweep.parameters(environ) == plain | nested
    assert wandb_sweep.parameters({}) == {}
    assert wandb_sweep.parameters(environ | {"WANDB_SWEEP_PARAM_PATH": str(tmp_path / "none")}) == {}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert traceml.Experiment("x", backend=[], config={"lr": 1.0, "depth": 3}).config == plain | nested | {"depth": 3}
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert wandb_sweep.parameters(environ) == {}
    assert "no parameters of the sweep: pip install pyyaml" in caplog.text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"config": argparse.Namespace(lr=1)}, "(config=...) takes a dict of names and values, not Namespace"),
        ({"settings": 5}, "(settings=...) takes a dict of names and values, not int 5"),
        ({"options": 5}, "(options=...) takes a dict of names and values, not int 5"),
        ({"options": {"jsonl": 5}}, "(options={'jsonl': ...}) takes a dict of names and values, not int 5"),
        ({"tags": 5}, "tags must be a dict of names and values, or a list of names, not int 5"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        traceml.Experiment("a", **given)


def test_wrong_arguments_are_reported(script: Script, tmp_path: Path) -> None:
    """At the call; a step that is a whole float is taken."""
    out = finish(
        script("""
        import argparse, traceml
        for step in ("one", 1.5, 2**63, None, 3.0):
            try:
                traceml.log_metric("x", 1, step)
            except traceml.TraceMLError as error:
                print(type(error).__name__, error)
        for call in (traceml.log_metric, traceml.log_text, traceml.log_histogram):
            try:
                call(5, [1.0], 0)
            except traceml.ArgumentTypeError as error:
                print(call.__name__, error)
        try:
            traceml.log_metric(["a"], 1)
        except traceml.ArgumentTypeError as error:
            print(error)
        for call, given in (
            (traceml.log_params, 5),
            (traceml.log_params, ["ab", 3]),
            (traceml.log_params, argparse.Namespace(lr=1)),
            (traceml.log_metrics, None),
        ):
            try:
                call(given)
            except traceml.ArgumentTypeError as error:
                print(error)
        """)
    )

    assert "ArgumentTypeError a step must be a whole number, not str 'one'" in out
    assert "ArgumentTypeError a step must be a whole number, not 1.5" in out
    assert "UsageError a step must fit into 64 bits" in out
    for call in ("log_metric", "log_text", "log_histogram"):
        assert f"{call} the name of a logged value must be a string, not int 5" in out
    assert "the name of a logged value must be a string, not list ['a']" in out
    assert "log_params takes a dict of names and values, not int 5" in out
    assert "log_params takes a dict of names and values, not list ['ab', 3]" in out
    assert "log_metrics takes a dict of names and values, not NoneType None\n" in out
    assert "log_params takes a dict of names and values, not Namespace Namespace(lr=1): vars() makes one of it" in out
    assert ended_run(tmp_path / "traceml_runs").steps("x") == [0, 3]


def test_names_of_backends_come_in_any_collection() -> None:
    """A set, too, or what a function yields."""
    assert traceml.Experiment(backend={"jsonl"}).backends == ("jsonl",)  # type: ignore[arg-type]
    assert traceml.Experiment(backend=(name for name in ("aim ", "jsonl"))).backends == ("aim", "jsonl")  # type: ignore[arg-type]


@pytest.mark.parametrize(("backend", "told"), [(5, "not int 5"), ([None], r"not list \[None\]")])
def test_backend_that_is_no_name(backend: Any, told: str) -> None:
    """The error has the value, and says what to give."""
    with pytest.raises(ArgumentTypeError, match=f"{told}. Register a plugin by traceml.register"):
        traceml.Experiment(backend=backend)


def test_resume_takes_an_id():
    """`resume=True` would only be refused by the trackers, when nothing can be changed any more."""
    with pytest.raises(ArgumentTypeError, match="the id of a run or of an experiment, not bool True"):
        traceml.Experiment(resume=True)

    assert traceml.Experiment(resume="").resume is None


def test_each_call_in_a_compiled_function_breaks_its_graph_once(script: Script, tmp_path: Path) -> None:
    """Dynamo traces none of our code: it would warn of locks and clocks in it, and break the graph ten times."""
    out = finish(
        script("""
        import torch, traceml
        traceml.init(local=True)
        model = torch.nn.Linear(8, 8)
        experiment = traceml.Experiment("compiled", backend=[]).start()

        @torch.compile(backend="eager")
        def loss(x):
            value = model(x).sum()
            traceml.log_metric("loss", value)
            traceml.log_metrics({"a": 1.0, "b": value})
            experiment.log_text("words", "text")
            return value

        for _ in range(3):
            loss(torch.randn(4, 8)).backward()

        experiment.end()
        print(list(torch._dynamo.utils.counters["graph_break"]))
        """)
    )

    assert out.count("Explanation") == out.count("traceml logs outside of compiled code") == 3, out
    assert len(ended_run(tmp_path / "traceml_runs").steps("loss")) == 3


def test_an_init_after_a_logged_value_is_reported(script: Script, tmp_path: Path) -> None:
    """Its settings come too late, except those of connecting itself; steps are traced from then on."""
    out = finish(
        script("""
        import sys, traceml
        sys.stderr = sys.stdout
        traceml.log_metric("x", 1)
        traceml.init(local=True, run_name="late", project="p", runs_dir="elsewhere")
        with traceml.trace_step():
            pass
        """)
    )

    assert "init(runs_dir, run_name, project) was called too late" in out
    assert "TRACEML_RUN_NAME" in out
    assert ended_run(tmp_path / "traceml_runs").steps("x") == [0]


def test_an_init_before_anything_is_logged_adds_its_trackers(script: Script, tmp_path: Path) -> None:
    """`traceml run` has started the recorder before the script. What is not of tracking alone is told as late."""
    out = finish(
        script("""
        import sys, traceml
        sys.stderr = sys.stdout
        traceml.init(local=True)
        traceml.init(backends="jsonl", project="p", exclude=["hidden"], mask=["key-*"], run_name="late")
        traceml.log_metrics({"x": 1.0, "hidden": 2.0})
        traceml.log_params({"note": "key-17"})
        traceml.init(backend=["tensorboard"])
        assert traceml.flush(timeout=60)
        """)
    )

    assert "init(run_name, mask) was called too late" in out
    assert "init(backend) was called too late" in out
    stored = ended_run(tmp_path / "traceml_runs")
    [experiment] = stored.of("experiment")
    assert (experiment["backends"], experiment["project"]) == (["jsonl"], "p")
    (delivered,) = (each.read_text() for each in tmp_path.glob("traceml_runs/2*/jsonl/*.jsonl"))
    assert '"x"' in delivered
    assert "hidden" not in delivered
    assert "key-17" not in delivered


def test_empty_names_of_trackers_are_left_out() -> None:
    """As in the setting: `backend=os.environ.get("B", "")` names none."""
    assert [traceml.Experiment(backend=text).backends for text in ("", "jsonl, ")] == [(), ("jsonl",)]


@pytest.mark.parametrize(
    "metric",
    [
        5,
        None,
        {"name": "a"},
        traceml.Metric("a", 1, kind="user"),
        traceml.Metric("a", 1, timestamp="now"),
        traceml.Metric("a", 1, timestamp=1e300),
    ],
)
def test_what_is_no_metric_is_an_error_of_the_package(metric: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"route_metric\(\) takes a traceml\.Metric, not"):
        traceml.Orchestrator().route_metric(metric)


@pytest.mark.parametrize("timestamp", [1e12, float("inf"), float("nan"), "now"])
def test_what_is_no_time_is_an_error_of_the_package(timestamp: Any) -> None:
    """Also of values that are no metrics."""
    orchestrator = traceml.Orchestrator()
    for log in (
        lambda: orchestrator.log_text("a", "b", timestamp=timestamp),
        lambda: orchestrator.log_image("a", "b", timestamp=timestamp),
        lambda: orchestrator.log_histogram("a", [1], [0, 1], timestamp=timestamp),
    ):
        with pytest.raises(ArgumentTypeError, match="a timestamp is in epoch seconds, not"):
            log()
