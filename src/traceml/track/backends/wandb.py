"""Weights & Biases: online, or an offline run that `wandb sync` uploads later.

W&B counts its own steps, one per record of the history, and accepts no value for a past step. So values go into records
in the order of the store, those of one step together. The user's step is a separate value, `traceml/step`, which is the
axis of all others. So steps may go backwards, and nothing is dropped.

Its service holds up to 32 KiB of an offline run in memory until the run ends, and does not report how much of an online
one has arrived. So a delivery that died can only continue from the run's first row: an offline run is rewritten (the
incomplete one is removed), and of an online one as many records are skipped as the server counts. The content of a
record depends on the rows and their order alone, never on batches. That is exact for what one rank logs: frames that
the store has merged since then have another order among those of other ranks and tables, and a live verdict is no row.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from traceml.database.states import RunStatus
from traceml.errors import BackendBusyError, BackendError, BackendRefusedError, BackendUnauthorizedError
from traceml.loopback import is_on_this_machine
from traceml.track.backends.backend_bases import BatchBackend
from traceml.track.backends.safe_names import merged_tags, plain_value, safe_name, safe_path
from traceml.track.backends.wandb_formats import history_request, wait_for_end
from traceml.track.plugins.failure_kinds import FailureKind, classify
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata, first_set

__all__ = ["WandbBackend"]

STEP = "traceml/step"
# Keys that W&B or this backend reserves, and characters that UTF-8 cannot hold.
_REFUSED = re.compile("^_(?=(?:step|timestamp|runtime|wandb)$)|^traceml/step$|[\0\ud800-\udfff]")
_REFUSED_ID = re.compile(r"[^A-Za-z0-9_\-]")
_REFUSED_PROJECT = re.compile(r"[/\\#?%:\0\ud800-\udfff]")
# Of a path, also one of Windows.
_REFUSED_PART = re.compile(r"\\|^[A-Za-z]:|^\.{1,2}$")
_REFUSED_FILE = re.compile(r"[^A-Za-z0-9_.\-]")
_LONGEST_NAME = 1000
_LONGEST_PROJECT = 128
_MAX_KEYS = 500  # in one record
_MAX_BUCKETS = 512  # of a histogram in W&B
_LONGEST_TAG = 64
# Of all others 1; 255 is what W&B itself reports after Ctrl-C.
_EXIT_CODES = {RunStatus.FINISHED.value: 0, RunStatus.STOPPED.value: 255}
_START_S = 30.0  # longest start of an online run; delivery retries it, not the library


class WandbBackend(BatchBackend):
    """Delivers to one W&B run."""

    metadata = PluginMetadata(
        name="wandb",
        version="1",
        description="Weights & Biases, online or offline",
        dependencies=("wandb",),
        extra="wandb",
        options={"mode": str, "entity": str, "base_url": str, "dir": str},
        option_variables={
            "base_url": first_set("WANDB_BASE_URL"),
            "entity": first_set("WANDB_ENTITY"),
            "mode": lambda environ: mode if (mode := environ.get("WANDB_MODE", "")) in {"online", "offline"} else "",
        },
        address_option="base_url",
        key_variable="WANDB_API_KEY",
        project_variable="WANDB_PROJECT",
        environment=("WANDB_*",),
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = self.metadata.with_environment(config.get("options") or {})
        self._experiment = config["experiment"]
        self._mode: Any = options.get("mode") or _default_mode()
        self._entity = options.get("entity")
        self._base_url = options.get("base_url") or "https://api.wandb.ai"
        self._folder = Path(options.get("dir") or config["run_dir"]).expanduser().absolute()
        self._sweep = os.environ.get("WANDB_SWEEP_ID")
        joined = os.environ.get("WANDB_RUN_ID") if self._sweep else None
        self._continued = config.get("continue_run")
        self._id = str(self._continued or joined or safe_name(str(self._experiment["id"]), _REFUSED_ID, 128))
        self._run: Any = None
        self._first = 0  # records of the run before this experiment
        self._skip = 0  # records that the server has already
        self._resumed = False
        self._open: dict[str, float] = {}  # the record in progress
        self._open_step = 0
        self._open_time = 0.0
        self._exit_code = 0

    @property
    def target(self) -> str:
        """The folder of offline runs, or the server."""
        return str(self._folder / "wandb") if self._mode == "offline" else self._base_url

    @property
    def is_local(self) -> bool:
        """Whether it is an offline run, or a server on this machine."""
        return self._mode == "offline" or is_on_this_machine(self._base_url)

    @property
    def url(self) -> str | None:
        """The run's page, or the folder for `wandb sync`."""
        if self._run is None:
            return None

        return str(self._run.url) if self._mode == "online" else Path(self._run.dir).parent.as_uri()

    def resume(self, mark: Mapping[str, Any]) -> bool:
        """Request the run from its first row; see the module's docstring."""
        self._id, self._first, self._resumed = mark["id"], mark["first"], True
        if self._mode == "offline" and mark.get("dir"):
            shutil.rmtree(mark["dir"], ignore_errors=True)

        return False

    def start_experiment(self, name: str, project: str) -> str:
        """Start the run, or continue the one of that id."""
        self._set_environment()
        if self._mode == "offline" and not self._continued:
            self._remove_incomplete()

        with _errors():
            import wandb

            self._run = wandb.init(
                id=self._id,
                resume="allow" if self._mode == "online" else None,
                mode=self._mode,
                name=name,
                project=None if self._sweep else safe_name(project, _REFUSED_PROJECT, _LONGEST_PROJECT),
                entity=self._entity,
                group=str(self._experiment["parent"]) if self._experiment.get("parent") else None,
                dir=str(self._folder),
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    x_disable_stats=True,
                    x_disable_meta=True,
                    disable_git=True,
                    disable_code=True,
                    base_url=self._base_url,
                    init_timeout=_START_S,
                ),
            )
            existing = self._run.step if self._mode == "online" else 0
            if self._resumed:
                self._skip = max(0, existing - self._first)
            else:
                self._first = existing

            self._run.define_metric("*", step_metric=STEP)

        return self._id

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        """Send a batch; consecutive rows of one step share a record, and the last record stays open."""
        records = []
        for row in rows:
            key, step = safe_name(row.name, _REFUSED, _LONGEST_NAME), row.step or 0
            if self._open and (step != self._open_step or key in self._open or len(self._open) >= _MAX_KEYS):
                records.append(self._close_record())

            if not self._open:
                self._open_step, self._open_time = step, row.timestamp

            self._open[key] = row.value

        with _errors():
            self._publish(records)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Send parameters; a new value replaces the old one."""
        with _errors():
            self._run.config.update(
                {safe_name(str(key), _REFUSED, _LONGEST_NAME): plain_value(each) for key, each in params.items()},
                allow_val_change=True,
            )

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Send tags as `key` or `key:value`, in place of earlier values, cut at W&B's 64 characters.

        In full they are in the config.
        """
        with _errors():
            self._run.tags = tuple(merged_tags(self._run.tags or (), tags, ":", _LONGEST_TAG))
            self._run.config.update({f"tags/{key}": value for key, value in tags.items()}, allow_val_change=True)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Send a text as a value of the history."""
        self._log({name: plain_value(text)}, step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image; one that Pillow cannot open, and any without Pillow, becomes an artifact."""
        try:
            import PIL  # noqa: F401
            import wandb

            image = wandb.Image(str(path))
        except Exception:  # noqa: BLE001 - of many classes; what is wrong with the library fails below as well
            super().log_image(name, path, step)
        else:
            self._log({safe_path(name, _REFUSED, _LONGEST_NAME): image}, step)  # it is part of a file's name

    def log_histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Send a histogram; one with more buckets than W&B accepts becomes a text of JSON."""
        if len(counts) > _MAX_BUCKETS:
            super().log_histogram(name, counts, edges, step)
            return

        import wandb

        self._log({name: wandb.Histogram(np_histogram=(list(counts), list(edges)))}, step)

    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        """Send a file as an artifact of its own."""
        name = artifact_name or Path(artifact_path).name
        with _errors():
            import wandb

            artifact = wandb.Artifact(safe_name(name, _REFUSED_FILE, 120), type="artifact", metadata={"name": name})
            artifact.add_file(artifact_path, name=safe_path(Path(name).name or "file", _REFUSED_PART, 200))
            self._run.log_artifact(artifact)
            if self._mode == "online":
                artifact.wait()

    def end_state(self, state: str) -> None:
        """Record the state in which the training ended."""
        self._exit_code = _EXIT_CODES.get(state, 1)

    def end_experiment(self) -> None:
        """Finish the run; only then is all of it on disk, or at the server."""
        if self._run is None:
            return

        with _errors():
            self._publish([self._close_record()] if self._open else [])
            log = Path(self._run.dir).parent / f"run-{self._id}.wandb"
            before = log.stat().st_size if self._mode == "offline" else 0
            self._run.finish(exit_code=self._exit_code)
            if self._mode == "offline":
                wait_for_end(log, before)

        self._run = None

    def mark(self) -> dict[str, Any]:
        """Return the run, its folder, and its number of earlier records."""
        folder = str(Path(self._run.dir).parent) if self._run is not None and self._mode == "offline" else None
        return {"id": self._id, "first": self._first, "dir": folder}

    # --- records ----------------------------------------------------------------------------------------------------

    def _close_record(self) -> dict[str, Any]:
        """Complete and return the record in progress."""
        record = {**self._open, STEP: self._open_step, "_timestamp": self._open_time}
        self._open = {}
        return record

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        """Send a record of its own through the SDK, because its value may be a file."""
        with _errors():
            self._publish([self._close_record()] if self._open else [])
            if self._skip:
                self._skip -= 1
                return

            named = {safe_name(key, _REFUSED, _LONGEST_NAME): each for key, each in values.items()}
            self._run.log({**named, STEP: step, "_timestamp": self._row_s})

    def _publish(self, records: list[dict[str, Any]]) -> None:
        """Send complete records, in one write where the SDK's internals have the known form."""
        skipped = min(self._skip, len(records))
        self._skip -= skipped
        records = records[skipped:]
        if not records:
            return

        interface: Any = getattr(self._run, "_interface", None)
        client: Any = getattr(interface, "_client", None)
        asyncer: Any = getattr(interface, "_asyncer", None)
        if not hasattr(client, "_writer") or not hasattr(client, "_drain_writer") or asyncer is None:
            for record in records:
                self._run.log(record)

            return

        data = b"".join(history_request(record, interface._stream_id) for record in records)

        async def write() -> None:
            client._writer.write(data)
            await client._drain_writer()

        asyncer.run(write)

    def _set_environment(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ["WANDB_SILENT"] = "true"
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            os.environ.setdefault(name, str(self._folder / "wandb" / ".files"))

    def _remove_incomplete(self) -> None:
        """Remove offline runs of this id: they are of deliveries that died before they recorded anything."""
        for folder in (self._folder / "wandb").glob(f"offline-run-*-{self._id}"):
            shutil.rmtree(folder, ignore_errors=True)


def _default_mode() -> str:
    """Return the mode that nothing sets: online when there is a key."""
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    has_key = os.environ.get("WANDB_API_KEY") or (netrc.exists() and "wandb" in netrc.read_text(errors="replace"))
    return "online" if has_key else "offline"


@contextmanager
def _errors() -> Iterator[None]:
    """Convert W&B's errors to those that delivery classifies."""
    try:
        yield
    except (ImportError, AttributeError, BackendError):
        raise
    except Exception as error:
        why = f"W&B failed: {type(error).__name__}: {error}"
        if type(error).__name__ == "AuthenticationError" or re.search(r"api_key not configured|\b40[13]\b", str(error)):
            raise BackendUnauthorizedError(why) from error
        if re.search(r"\b(429|503)\b", str(error)):
            raise BackendBusyError(why) from error
        if classify(error).kind is FailureKind.REFUSED:  # a value that its library cannot take
            raise BackendRefusedError(why) from error

        raise BackendError(why) from error
