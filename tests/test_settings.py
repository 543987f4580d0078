"""Settings: precedence, coercion, errors, the reference page, and the pydantic form."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import traceml
from traceml import setting_sources
from traceml.errors import SettingsError
from traceml.setting_sources import INTERNAL_ENV, USER_ENV
from traceml.settings import Config, declarations, load, reference

ROOT = Path(__file__).parents[1]


def read(environ: dict[str, str] | None = None, folder: Path | None = None, /, **arguments: object) -> Config:
    """Load with nothing of the machine in it."""
    return load(environ or {}, folder or Path("/proc"), **arguments)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a pyproject.toml, a user file, and a folder to work in."""
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "config" / "traceml").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[tool.traceml]\nport = 1003\nhost = "project"\nproject = "p"\n')
    (tmp_path / "config" / "traceml" / "config.toml").write_text('port = 1004\nhost = "user"\nrun_name = "u"\n')
    return tmp_path


def test_defaults_are_those_of_the_contract() -> None:
    """Nothing set anywhere gives the declared defaults, and says so."""
    config = read()

    assert (config.enabled, config.host, config.port) == (True, "127.0.0.1", 29765)
    assert config.frameworks == ("tensorboard", "lightning", "huggingface", "ray")
    assert (config.on_missing, config.connect_timeout, config.ring_rows) == ("raise", 5.0, 65536)
    assert set(config.sources.values()) == {"default"}
    assert set(config.sources) == set(declarations())


def test_precedence(project: Path) -> None:
    """Arguments win over environment over project file over user file, each naming itself as the source."""
    environ = {"XDG_CONFIG_HOME": str(project / "config"), "TRACEML_HOST": "env", "TRACEML_PORT": "1002"}

    config = load(environ, project / "work" / "deep", port=1001)

    assert (config.port, config.host, config.project, config.run_name) == (1001, "env", "p", "u")
    assert config.sources["port"] == "argument"
    assert config.sources["host"] == "TRACEML_HOST"
    assert config.sources["project"] == str(project / "pyproject.toml")
    assert config.sources["run_name"] == str(project / "config" / "traceml" / "config.toml")


def test_the_nearest_project_file_counts(project: Path) -> None:
    """traceml.toml below hides pyproject.toml above; a pyproject.toml without our table is passed over."""
    (project / "work" / "traceml.toml").write_text("port = 7\n")
    (project / "work" / "deep" / "pyproject.toml").write_text('[project]\nname = "traceml-user"\n')

    config = read({}, project / "work" / "deep")

    assert (config.port, config.host) == (7, "127.0.0.1")


def test_the_supervisor_wins_over_arguments() -> None:
    """The settings of `traceml run` for this process override init's arguments."""
    environ = {"TRACEML_ADDRESS": "[::1]:4711", "TRACEML_TOKEN": "t", "TRACEML_RUN_ID": "r"}

    config = read(environ, host="elsewhere", port=1, token="mine", run_id="mine")

    assert (config.host, config.port, config.token, config.run_id) == ("::1", 4711, "t", "r")
    assert config.supervised
    assert config.sources["port"] == "TRACEML_ADDRESS"
    assert not read().supervised


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("traceml_Port", "1", "port", 1),
        ("TRACEML_ENABLED", "off", "enabled", False),
        ("TRACEML_ENABLED", "1", "enabled", True),
        ("TRACEML_ENABLED", "", "enabled", True),
        ("TRACEML_BACKEND", "mlflow, wandb", "backend", ("mlflow", "wandb")),
        ("TRACEML_BACKENDS", '["a,b", "c"]', "backend", ("a,b", "c")),
        ("TRACEML_FRAMEWORKS", "", "frameworks", ()),
        ("TRACEML_SAMPLER_INTERVALS", '{"host": 5}', "sampler_intervals", {"host": 5.0}),
        ("TRACEML_RUN_ID", "", "run_id", None),
        ("TRACEML_KEEP_RUNS", "none", "keep_runs", None),
        ("TRACEML_RUNS_DIR", "/tmp/x", "runs_dir", Path("/tmp/x")),
        ("TRACEML_ON_MISSING", "WARN", "on_missing", "warn"),
        ("TRACEML_CONNECT_TIMEOUT", "2.5", "connect_timeout", 2.5),
        ("TRACEML_TOKEN", "secret\n", "token", "secret"),  # as a file that was mounted as a variable ends
        ("TRACEML_HOST", " node1 ", "host", "node1"),
        ("TRACEML_HOST", "[::1]", "host", "::1"),
        ("TRACEML_HOST", "fe80::1", "host", "fe80::1"),
    ],
)
def test_environment_text_becomes_typed(variable: str, text: str, name: str, value: object) -> None:
    """Variables are found in any case, and their texts are converted."""
    assert getattr(read({variable: text}), name) == value


def test_backend_tables(tmp_path: Path) -> None:
    """Each [tool.traceml.backends.<name>] becomes that tracker's options; a list is the trackers' names."""
    (tmp_path / "traceml.toml").write_text('backend = ["mlflow"]\n[backends.mlflow]\ntracking_uri = "x"\n')

    config = read({}, tmp_path)

    assert config.backend == ("mlflow",)
    assert config.backend_options == {"mlflow": {"tracking_uri": "x"}}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"prot": 1},
            "its value is 1 (from argument). Did you mean 'port'? Allowed: the settings that `python -m",
        ),
        ({"port": "many"}, "'many' is not allowed (from argument). Allowed: an integer from 0 to 65535"),
        ({"port": 65536}, "an integer from 0 to 65535"),
        ({"port": True}, "an integer"),
        ({"port": 1.5}, "an integer"),
        ({"on_missing": "ignore"}, "raise or warn"),
        ({"flush_interval": float("nan")}, "a number of at least 0.01"),
        ({"max_backoff": 0}, "a number above 0"),
        ({"on_finding": [1]}, "a list of strings"),
        ({"on_finding_after": -1}, "a number of at least 0"),
        ({"sampler_intervals": {"host": -1}}, "a map (JSON) of names (gpu, host, "),
        ({"sampler_intervals": {"hots": 1}}, "a map (JSON) of names (gpu, host, "),
        ({"backend": [1]}, "a list of strings"),
        ({"tls": "maybe"}, "true or false"),
        ({"host": " "}, "a non-empty string"),
        (
            {"host": "node1:29765"},
            "'node1:29765' is not allowed (from argument). Allowed: a host name or an IP address",
        ),
        ({"host": "http://node1"}, "the port is a setting of its own"),
        ({"enabled": "perhaps"}, "true or false"),
        *(
            (
                {"run_id": text},
                "cannot be the name of a run's folder (from argument). Allowed: a string with a letter",
            )
            for text in ("..", "★", "latest")
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], expected: str) -> None:
    """An unknown name or a bad value says what it was and what is allowed."""
    with pytest.raises(SettingsError) as caught:
        read(**arguments)

    assert expected in str(caught.value)
    assert caught.value.source == "argument"
    assert isinstance(caught.value, ValueError)


def test_bad_variables_and_files_name_their_source(tmp_path: Path) -> None:
    """The error names the variable as it was written, or the file's path."""
    text = r"^Traceml_Prot: there is no such setting; its value is '1'\. Did you mean TRACEML_PORT\? Allowed: "
    with pytest.raises(SettingsError, match=text):
        read({"Traceml_Prot": "1"})

    with pytest.raises(SettingsError) as caught:
        read({"TRACEML_TOEKN": "sesame"})
    assert "TRACEML_TOKEN?" in str(caught.value)
    assert "sesame" not in str(caught.value)

    path = tmp_path / "traceml.toml"
    path.write_text("prot = 1\n")
    with pytest.raises(SettingsError) as caught:
        read({}, tmp_path)
    assert caught.value.source == str(path)

    for table in ("[traceml]\nport = 1\n", "[tool.traceml]\nport = 1\n"):
        path.write_text(table)
        with pytest.raises(SettingsError, match="In this file settings are at the top level"):
            read({}, tmp_path)

    path.write_text("port = \n")
    with pytest.raises(SettingsError, match=r"traceml\.toml: is not TOML"):
        read({}, tmp_path)


@pytest.mark.parametrize("text", ["re:sk-[a-z]{3,5}", "*_key,re:a{1,2}b", "re:cust,?omer", "re:cust,*_key"])
def test_a_regular_expression_is_not_cut_at_its_comma(text: str) -> None:
    """Its parts would be valid patterns that mask nothing."""
    with pytest.raises(SettingsError) as caught:
        read({"TRACEML_MASK": text})

    assert str(caught.value).startswith(f"TRACEML_MASK: {text!r}: the comma after 're:")
    assert "may be part of that regular expression. Allowed: a JSON list" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ('["re:sk-[a-z]{3,5}"]', ("re:sk-[a-z]{3,5}",)),
        ("*_key, re:sk-[a-z]{3}", ("*_key", "re:sk-[a-z]{3}")),
        ("re:one,re:two,!email", ("re:one", "re:two", "!email")),
        ("", ()),
    ],
)
def test_lists_of_patterns_in_the_environment(text: str, patterns: tuple[str, ...]) -> None:
    """Regular expressions last, or as JSON."""
    assert read({"TRACEML_MASK": text}).mask == patterns


def test_a_text_in_a_file_or_an_argument_is_the_same_list(tmp_path: Path) -> None:
    """But one command: lists of their own are at hand there."""
    (tmp_path / "traceml.toml").write_text("mask = 'customer_*,*_ref'\n")
    assert read({}, tmp_path).mask == ("customer_*", "*_ref")
    assert read(mask="").mask == ()
    with pytest.raises(SettingsError, match="the comma after"):
        read(mask="re:sk-[a-z]{3,5}")

    assert read(mask=["re:sk-[a-z]{3,5}"]).mask == ("re:sk-[a-z]{3,5}",)
    assert read(on_finding=" notify --to a,b ").on_finding == ("notify --to a,b",)
    assert read(backend="mlflow,wandb").backend == ("mlflow", "wandb")


def test_a_token_is_not_shown() -> None:
    """Neither the record's text nor an error about it contains a secret."""
    assert "secret-word" not in repr(read(token="secret-word"))
    with pytest.raises(SettingsError) as caught:
        read(token=["secret-word"])

    assert "secret-word" not in str(caught.value)


def test_a_key_among_options_of_a_tracker_is_not_quoted() -> None:
    """The error for a map that is no JSON names the variable, and not the value."""
    with pytest.raises(SettingsError, match="TRACEML_BACKEND_OPTIONS: a value is not allowed") as caught:
        read({"TRACEML_BACKEND_OPTIONS": '{"wandb": {"api_key": "secret-word"'})

    assert "secret-word" not in str(caught.value)


def test_variables_of_our_own_processes_are_exempt() -> None:
    """INTERNAL_ENV is not mistaken for settings, and none of it is one."""
    read(dict.fromkeys(INTERNAL_ENV, "host:1"))

    assert not set(INTERNAL_ENV) & {each.env for each in declarations().values()}


@pytest.mark.parametrize("name", sorted({*INTERNAL_ENV, *USER_ENV}))
def test_an_exempt_variable_is_used(name: str) -> None:
    """One that nothing reads hides a misspelt setting, as TRACEML_RUN_DIR did TRACEML_RUNS_DIR."""
    sources = [path for path in (ROOT / "src" / "traceml").rglob("*.py") if path.name != "setting_sources.py"]

    assert any(name in path.read_text() for path in sources)


def test_the_reference_page_is_current() -> None:
    """docs/settings.md is what `python -m traceml.settings` writes."""
    assert (ROOT / "docs" / "settings.md").read_text() == reference()


def test_the_pydantic_form_agrees(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    """traceml.Settings has the same fields, descriptions, values and sources as the loader."""
    monkeypatch.setenv("TRACEML_HOST", "env")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(project / "config"))
    monkeypatch.chdir(project / "work")

    settings, config = traceml.Settings(port=9, project=None), load(port=9)

    values = {name: getattr(config, name) for name in declarations()}
    assert settings.model_dump() == {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    assert settings.backend == settings.backends == settings.include == []
    assert settings.sources == config.sources
    described = {name: each.description for name, each in type(settings).model_fields.items()}
    assert described == {name: each.doc for name, each in declarations().items()}
    with pytest.raises(SettingsError, match="Did you mean 'port'"):
        traceml.Settings(prot=9)


@pytest.mark.parametrize(
    ("variable", "here"),
    [
        ("TRACEML_AGGREGATOR_PORT", "Here: TRACEML_PORT"),
        ("TRACEML_SESSION_ID", "Here: TRACEML_RUN_ID"),
        ("TRACEML_DISABLED", "Here: `enabled=False`, or TRACEML_ENABLED=0"),
        ("TRACEML_UI_MODE", "Here: `traceml run --live terminal|web|none`"),
    ],
)
def test_variables_of_traceml_ai_are_reported_by_their_names_here(variable: str, here: str) -> None:
    """Whoever moves from it reads what to set, and its automatic mode is what there is."""
    with pytest.raises(SettingsError) as caught:
        read({variable: "1"})

    assert f"{variable}: is a setting of traceml-ai. Here: " in str(caught.value)
    assert here in str(caught.value)
    assert read({}, mode="auto").sources == read({}).sources
    with pytest.raises(SettingsError, match="trace_step"):
        read({}, mode="manual")
    with pytest.raises(SettingsError, match="Here: `port`"):
        read({}, aggregator_port=1)


def test_settings_over_others() -> None:
    """Arguments replace some, with their checks and their source; the others stay, and so does the original."""
    config = read({"TRACEML_PROJECT": "p", "TRACEML_EXCLUDE": "a,b"})
    changed = config.over(project="q", backends="jsonl")

    assert (changed.project, changed.backend, changed.exclude) == ("q", ("jsonl",), ("a", "b"))
    assert (changed.sources["project"], changed.sources["exclude"]) == ("argument", "TRACEML_EXCLUDE")
    assert config.project == "p"
    with pytest.raises(SettingsError, match="Did you mean 'project'"):
        config.over(projct="q")


@pytest.mark.process
def test_the_loader_needs_the_standard_library_alone() -> None:
    """Loading settings imports neither pydantic nor numpy nor torch."""
    code = (
        "import sys, traceml.settings as s; s.load(); print(sorted({'pydantic', 'numpy', 'torch'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_ranks_that_hydra_moves_share_a_runs_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`job.chdir` gives each rank a folder of its own; a relative path means the one in which Hydra was started."""
    runtime = SimpleNamespace(runtime=SimpleNamespace(cwd="/started/here"))
    fake = SimpleNamespace(HydraConfig=SimpleNamespace(initialized=lambda: True, get=lambda: runtime))
    monkeypatch.setitem(sys.modules, "hydra.core.hydra_config", fake)
    monkeypatch.chdir(tmp_path)

    assert load({}).runs_dir == Path("/started/here/traceml_runs")
    assert load({"TRACEML_RUNS_DIR": "mine"}).runs_dir == Path("/started/here/mine")
    assert load({}, runs_dir="/else/where").runs_dir == Path("/else/where")
    monkeypatch.setattr(fake.HydraConfig, "initialized", lambda: False)
    assert load({}).runs_dir == Path("traceml_runs")


def test_variables_without_a_setting_are_not_unknown_settings():
    """A variable that one command documents must not stop the others."""
    assert load(dict.fromkeys(USER_ENV, "0")).sources["port"] == "default"
    assert {"TRACEML_CACHE_DIR", "TRACEML_NATIVE"} == USER_ENV.keys()


@pytest.mark.parametrize("address", ["host:\u00b2", "host:999999", "host:", ":1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    """A digit of another script is not a port."""
    with pytest.raises(SettingsError, match=r"TRACEML_ADDRESS: .* is not an address"):
        read({"TRACEML_ADDRESS": address})


@pytest.mark.parametrize("variable", ["TRACEML_RUNS_DIR=~nobody-of-this-name/runs", "TRACEML_BACKEND=" + "[" * 5000])
def test_values_that_cannot_be_converted_name_their_variable(variable: str) -> None:
    """A home of nobody and JSON without end are bad values, not errors of Python."""
    name, _, text = variable.partition("=")
    with pytest.raises(SettingsError, match=f"{name}: .* is not allowed"):
        read({name: text})


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, f"port = {'9' * 5000}"])
def test_files_that_python_cannot_read_are_no_toml(tmp_path: Path, text: str) -> None:
    """Arrays too deep and numbers too long are an error with the file's name."""
    (tmp_path / "traceml.toml").write_text(text)
    with pytest.raises(SettingsError, match=r"traceml\.toml: is not TOML"):
        read({}, tmp_path)


def test_a_project_whose_tools_are_no_table_is_passed_over(tmp_path: Path) -> None:
    """Somebody else's mistake in pyproject.toml does not stop a training."""
    (tmp_path / "pyproject.toml").write_text('tool = 3\nname = "traceml"\n')
    assert read({}, tmp_path).port == 29765


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A pipe does not stop its reader, and a folder is not passed over without a word."""
    make(tmp_path / "traceml.toml")
    with pytest.raises(SettingsError, match=rf"traceml.toml: cannot be read: .* regular file \(from {tmp_path}/"):
        read({}, tmp_path)

    (tmp_path / "home" / "traceml").mkdir(parents=True)
    make(tmp_path / "home" / "traceml" / "config.toml")
    with pytest.raises(SettingsError, match=r"config.toml: cannot be read"):
        read({"XDG_CONFIG_HOME": str(tmp_path / "home")})


def test_a_pyproject_that_cannot_be_read_is_reported_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have no settings of ours, and be somebody else's; the next file upwards counts."""
    (tmp_path / "traceml.toml").write_text("port = 7\n")
    (tmp_path / "work").mkdir()
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / "work" / "pyproject.toml")
        monkeypatch.setattr("traceml.fail_open._logged", set())
        caplog.clear()

        assert [read({}, tmp_path / "work").port for _ in range(2)] == [7, 7]
        (text,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
        assert text.startswith("settings in a pyproject.toml are not used: pyproject.toml: cannot be read: ")
        if make is os.mkdir:
            shutil.rmtree(tmp_path / "work" / "pyproject.toml")
        else:
            (tmp_path / "work" / "pyproject.toml").unlink()

    (tmp_path / "work" / "pyproject.toml").write_bytes(b"name = '\xe9'\n")
    assert read({}, tmp_path / "work").port == 7
    (tmp_path / "work" / "pyproject.toml").write_bytes(b"[tool.traceml]\nname = '\xe9'\n")
    with pytest.raises(SettingsError, match=r"pyproject.toml: is not TOML: 'utf-8' codec"):
        read({}, tmp_path / "work")


def test_a_file_that_others_may_not_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless its folder is closed to this user, too: then there may be none."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(setting_sources, "read_regular", refuse)
    assert read({}, tmp_path).port == 29765
    (tmp_path / "traceml.toml").touch()
    with pytest.raises(SettingsError, match=r"traceml.toml: cannot be read: Permission denied \(from "):
        read({}, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('backend = ["mlflow"]\nbackends = ["jsonl"]\n', "backends: sets the same as 'backend', which is set, too"),
        ("[backend_options]\n[backends.jsonl]\n", "backends: sets the same as 'backend_options', which is set, too"),
    ],
)
def test_a_setting_under_two_names_is_refused(tmp_path: Path, text: str, told: str) -> None:
    """One would win silently. Sources may differ in the name, and a variable in its case: ours is in upper case."""
    (tmp_path / "traceml.toml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        read({}, tmp_path)

    assert str(caught.value) == f"{told} (from {tmp_path}/traceml.toml). Allowed: one of the two"
    with pytest.raises(SettingsError, match=r"^TRACEML_BACKENDS: sets the same as 'TRACEML_BACKEND'"):
        read({"TRACEML_BACKEND": "mlflow", "TRACEML_BACKENDS": "mlflow"})
    with pytest.raises(SettingsError, match=r"backends: sets the same as 'backend', which is set, too \(from argument"):
        read(backend="mlflow", backends="jsonl")

    (tmp_path / "traceml.toml").write_text("backends = ['mlflow']\n")
    assert read({"TRACEML_BACKEND": "jsonl"}, tmp_path).backend == ("jsonl",)
    for environ in ({"TRACEML_PORT": "1", "traceml_port": "2"}, {"traceml_port": "2", "TRACEML_PORT": "1"}):
        assert read(environ).port == 1
