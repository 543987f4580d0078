"""Aim: a repository in a folder.

Exact: the key of a value is its name and step, so sending the same row again overwrites it with itself. Another value
under the same name and step gets the context `{"repeat": n}`, because it would overwrite the first. Rows are written in
batches with the time of the call; Aim's own `Run.track` can do neither.

Aim needs Python < 3.13, and only runs written by release 3.28.0 can be read back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from traceml.loopback import is_on_this_machine
from traceml.track.backends.backend_bases import BatchBackend
from traceml.track.backends.safe_names import NO_PATH, NO_TEXT, plain_value, safe_name, safe_path, utf8_text
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = ["AimBackend"]

_LONGEST_NAME = 1000
_MAX_BUCKETS = 512  # of a distribution in Aim
_LARGEST_INTEGER = 2**63  # Aim's are signed and have 64 bits
_TAKEN = {"hparams", "tags", "traceml", "state"}  # keys of this backend


class AimBackend(BatchBackend):
    """Delivers to one Aim run."""

    metadata = PluginMetadata(
        name="aim",
        version="1",
        description="an Aim repository",
        dependencies=("aim",),
        extra="aim",
        options={"repo": str},
        address_option="repo",
        environment=("AIM_*", "__AIM_*"),
    )
    idempotent: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        from importlib.metadata import version

        if (installed := version("aim")) != "3.28.0":
            raise ImportError(f"aim {installed} writes runs that cannot be read back: pip install 'aim==3.28.0'")

        options, self._experiment = config.get("options") or {}, config["experiment"]
        given = str(options.get("repo") or Path(config["run_dir"]).parent)
        self._repo = given if given.startswith("aim://") else str(Path(given).expanduser().absolute())
        self._traceml_run = str(config.get("run_id", ""))
        self._hash: str | None = config.get("continue_run")
        self._run: Any = None

    @property
    def target(self) -> str:
        """The repository."""
        return self._repo

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, or a server on this machine."""
        return not self._repo.startswith("aim://") or is_on_this_machine(self._repo)

    def resume(self, mark: Mapping[str, Any]) -> bool:
        """Continue the same run."""
        self._hash = mark["hash"]
        return True

    def start_experiment(self, name: str, project: str) -> str:
        """Open the repository and the run."""
        os.environ["AIM_UI_TELEMETRY_ENABLED"] = "0"
        from aim import Repo, Run

        if not self._repo.startswith("aim://"):
            Path(self._repo).mkdir(parents=True, exist_ok=True)

        is_new = self._hash is None
        repo = Repo.from_path(self._repo, init=True)
        self._run = Run(
            self._hash,
            repo=repo,
            experiment=project,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
            force_resume=not is_new,  # a killed delivery leaves its lock
        )
        self._hash = self._run.hash
        if is_new:  # a run that another experiment continues keeps its name and start
            self._set_about(name)

        if not self._repo.startswith("aim://"):
            self._run.set_artifacts_uri(Path(self._repo, ".aim_artifacts").as_uri())

        return str(self._hash)

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        """Send a batch: one write per name and column."""
        by_name: dict[str, list[Metric]] = {}
        for row in rows:
            by_name.setdefault(row.name, []).append(row)

        for name, part in by_name.items():
            self._sequence(safe_name(name, NO_TEXT, _LONGEST_NAME), part)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Send parameters, below `hparams`; a new value replaces the old one."""
        for key, value in params.items():
            self._run["hparams", safe_name(str(key), NO_TEXT, _LONGEST_NAME)] = _plain(value)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Send tags as `key` or `key: value`, in place of earlier values, and below `tags` for queries."""
        existing = set(self._run.tags)
        for key, value in tags.items():
            text = safe_name(str(key) if value in {"", "true"} else f"{key}: {value}", NO_TEXT, _LONGEST_NAME)
            for stale in existing - {text}:
                if stale == str(key) or stale.startswith(f"{key}: "):
                    self._run.remove_tag(stale)

            if text not in existing:
                self._run.add_tag(text)

            self._run["tags", safe_name(str(key), NO_TEXT, _LONGEST_NAME)] = _plain(value)

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Send facts below their collector: `system.host`."""
        for key, value in facts.items():
            collector, _, name = key.partition("/")
            names = [safe_name(part, NO_TEXT, _LONGEST_NAME) for part in (collector, name) if part]
            # `traceml` has the ids of the run already.
            self._run[tuple(["facts", *names] if collector in _TAKEN else names)] = _plain(value)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Send a text."""
        from aim import Text

        clean = utf8_text(text)
        self._object(Text(clean), "texts", name, step, lambda stored: stored.data == clean)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image's bytes unchanged; a file that Pillow cannot open becomes an artifact."""
        from aim import Image

        try:
            image = Image(str(path))
        except Exception:  # noqa: BLE001 - of many classes: another format, a truncated file, too many pixels
            super().log_image(name, path, step)
            return

        data = image.storage["data"].load()
        self._object(image, "images", name, step, lambda stored: stored.storage["data"].load() == data)

    def log_histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Send a histogram: as a distribution if Aim can hold it (even buckets, at most 512), else as a text."""
        from aim import Distribution

        width = (edges[-1] - edges[0]) / len(counts)
        even = all(math.isclose(edge, edges[0] + i * width, abs_tol=width * 1e-6) for i, edge in enumerate(edges))
        if not even or not math.isfinite(width) or len(counts) > _MAX_BUCKETS:
            super().log_histogram(name, counts, edges, step)
            return

        made = Distribution.from_histogram(list(counts), (edges[0], edges[-1]))

        def same(stored: Any) -> bool:
            return bool(stored.range == made.range and stored.weights.tolist() == made.weights.tolist())

        self._object(made, "distributions", name, step, same)

    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        """Copy a file to the artifacts of the repository."""
        name = safe_path(artifact_name or Path(artifact_path).name, NO_PATH, _LONGEST_NAME)
        self._run.log_artifact(artifact_path, name, block=True)

    def end_state(self, state: str) -> None:
        """Record the state in which the training ended."""
        self._run["state"] = state

    def end_experiment(self) -> None:
        """Finish the run."""
        if self._run is None:
            return

        if (ended := self._ended) is not None:
            tree = self._run.meta_run_tree
            # What `close` calls as well; its own takes the time of the call.
            self._run._resources.finalize_run = lambda: tree.__setitem__("end_time", ended)

        self._run.finalize()
        self._run.close()
        self._run = None

    def mark(self) -> dict[str, Any]:
        """Return what `resume` needs to find the run."""
        return {"hash": self._hash}

    def _set_about(self, name: str) -> None:
        self._run.name = name
        about = {"experiment": str(self._experiment["id"]), "run": self._traceml_run}
        if self._experiment.get("parent"):
            about["parent"] = str(self._experiment["parent"])

        self._run["traceml"] = about
        self._set_created()

    def _set_created(self) -> None:
        """Set the time at which the training began; Aim has no call for it, and none at all for a server."""
        started, props = self._experiment.get("started"), self._run.props
        model, session = getattr(props, "_model", None), getattr(props, "_session", None)
        if started and model is not None and session is not None:
            model.created_at = datetime.fromtimestamp(started, UTC).replace(tzinfo=None)
            session.add(model)
            session.commit()

    # --- rows ------------------------------------------------------------------------------------------------------

    def _sequence(self, name: str, rows: Sequence[Metric]) -> None:
        """Write the rows of one name: rising steps directly, others after a comparison with the stored rows."""
        first_slot = self._next_slot(name, 0, "metric")
        info = self._info(name, first_slot)
        unused = info.count if info.initialized else 0  # the first step without a value
        slots: dict[int, dict[int, tuple[float, float]]] = {first_slot: {}}
        for row in rows:
            step, value = row.step or 0, (float(row.value), row.timestamp)
            if step >= unused:
                slots[first_slot][step] = value
                unused = step + 1
                continue

            slot = first_slot
            while (old := slots.get(slot, {}).get(step) or self._stored_at(name, slot, step)) and not _same(old, value):
                slot = self._next_slot(name, slot + 1, "metric")

            slots.setdefault(slot, {})[step] = value

        for slot, values in slots.items():
            if values:
                self._put(name, slot, values)

    def _info(self, name: str, slot: int) -> Any:
        return self._run._tracker.sequence_infos[_context(slot).idx, name]

    def _next_slot(self, name: str, slot: int, sequence_type: str) -> int:
        """Return the first slot from `slot` on that is empty or holds this type; Aim mixes no types in a sequence."""
        from aim.sdk.sequences.sequence_type_map import SEQUENCE_TYPE_MAP

        while (info := self._info(name, slot)).initialized and SEQUENCE_TYPE_MAP.get(info.dtype) != sequence_type:
            slot += 1

        return slot

    def _stored_at(self, name: str, slot: int, step: int) -> tuple[float, float] | None:
        """Return the stored value and time of a step, or None."""
        info = self._info(name, slot)
        if not info.initialized:
            return None

        at = info.step_hash_fn(step)
        time = _read(info.time_view, at)
        return None if time is None else (_read(info.val_view, at), time)

    def _put(self, name: str, slot: int, values: Mapping[int, tuple[float, float]]) -> None:
        """Write values of one sequence at once, then the sequence's own facts."""
        tracker, context = self._run._tracker, _context(slot)
        first_step, (first, _) = next(iter(values.items()))
        info = self._info(name, slot)
        if not info.initialized:
            info = tracker._init_sequence_info(context.idx, name, first)

        tracker._update_context_data(context)
        _write(info, [(info.step_hash_fn(step), step, value, time) for step, (value, time) in values.items()])

        # Aim's own bookkeeping for the first, extreme and last values; others change nothing.
        finite = [value for value, _ in values.values() if not math.isnan(value)]
        notable = [(first_step, first)]
        notable += [(first_step, value) for value in ((min(finite), max(finite)) if finite else ())]
        last_step = max(values)
        for step, value in [*notable, (last_step, values[last_step][0])]:
            tracker._update_sequence_info(context.idx, name, value, step)

    def _object(self, made: Any, sequence_type: str, name: str, step: int, same: Callable[[Any], bool]) -> None:
        """Write an object to a free slot, or over an equal one."""
        key = safe_name(name, NO_TEXT, _LONGEST_NAME)
        slot = self._next_slot(key, 0, sequence_type)
        while (stored := self._object_at(key, slot, step)) is not None and not same(stored):
            slot = self._next_slot(key, slot + 1, sequence_type)

        # What `track` calls as well; its own takes the time of the call.
        self._run._tracker._track(made, self._row_s, key, step, context=_context(slot).to_dict())

    def _object_at(self, name: str, slot: int, step: int) -> Any:
        """Return the stored object of a step, or None."""
        from aim.storage.object import CustomObject

        info = self._info(name, slot)
        if not info.initialized:
            return None

        try:
            stored = info.val_view.tree.view(info.step_hash_fn(step), resolve=True)
        except KeyError:
            return None

        # A folder answers for a missing step with an empty view of it.
        return stored if isinstance(stored, CustomObject) else None


def _context(slot: int) -> Any:
    from aim.storage.context import Context

    if slot not in _contexts:
        _contexts[slot] = Context({"repeat": slot} if slot else {})

    return _contexts[slot]


_contexts: dict[int, Any] = {}


def _write(info: Any, rows: Sequence[tuple[int, int, float, float]]) -> None:
    """Write rows of (key, step, value, time) at once.

    Aim itself deletes a range before it writes each cell, and thousands of such ranges make the database slow to read.
    """
    from aim.storage.encoding import encode, encode_path

    views = [info.val_view, info.epoch_view, info.step_view, info.time_view]
    if not hasattr(views[0].tree, "container"):  # a repository behind a server, which writes
        for at, step, value, time in rows:
            for view, cell in zip(views, (value, None, step, time), strict=True):
                view[at] = cell

        return

    columns = [view.tree.container for view in views]
    batch = columns[0].batch()
    for at, step, value, time in rows:
        key = encode_path((at,))
        for column, cell in zip(columns, (value, None, step, time), strict=True):
            column.set(key, encode(cell), store_batch=batch)

    columns[0].commit(batch)


def _read(column: Any, at: int) -> Any:
    """Return one cell of a column, or None; Aim itself would iterate."""
    from aim.storage.encoding import decode, encode_path

    if not hasattr(column.tree, "container"):
        try:
            return column[at]
        except KeyError:
            return None

    cell = column.tree.container.get(encode_path((at,)))
    return None if cell is None else decode(cell)


def _same(stored: tuple[float, float], given: tuple[float, float]) -> bool:
    """Whether two values are the same row; NaN equals NaN."""
    return stored[1] == given[1] and (stored[0] == given[0] or (math.isnan(stored[0]) and math.isnan(given[0])))


def _plain(value: Any) -> Any:
    return plain_value(value, lambda name: safe_name(name, NO_TEXT, _LONGEST_NAME), _LARGEST_INTEGER)
