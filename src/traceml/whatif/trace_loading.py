"""Read a job's operations from Parquet, and its layout from YAML.

A missing, non-numeric or invalid value raises an error that names its row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.errors import TraceEmptyError, TraceInvalidError, TraceNotFoundError, UsageError
from traceml.installation import install_command
from traceml.whatif.operations import KINDS, JobTrace, Layout, Operation

__all__ = ["layout_differences", "load_job", "unknown_kinds"]

_NEEDED_LAYOUT = ("dp_size", "pp_size")  # the trace is compared with these
_NEEDS = f"the simulation needs {{}}: {install_command('whatif')}"

Integers = NDArray[np.int64]


def load_job(trace: Path, meta: Path) -> JobTrace:
    """Return the operations of a job.

    Args:
        trace: Parquet file with a row for each operation: `dp_rank`, `stage`, `rank`, `step`, `optype`, `start_ts` and
            `duration` in seconds, `seq_id`, `mc`, `gmc`, `mb_id`.
        meta: YAML file with `dp_size`, `pp_size`, `tp_size`, `vpp_size`, `world_size`.

    Raises:
        TraceNotFoundError: a file does not exist.
        TraceEmptyError: the trace has no complete step.
        TraceInvalidError: a file cannot be read, or the two do not fit together.
    """
    layout = _layout(meta)
    rows = _trace_columns(trace, _table(trace))
    steps, step_of = np.unique(rows["step"], return_inverse=True)
    dp_ranks, dp_of = np.unique(rows["dp_rank"], return_inverse=True)
    operations, operation_of = _operations(rows)
    if len(dp_ranks) != layout.dp_size or len({each.stage for each in operations}) != layout.pp_size:
        raise TraceInvalidError(
            f"{trace} has {len(dp_ranks)} data-parallel ranks and {len({each.stage for each in operations})} stages, "
            f"but {meta} says dp_size {layout.dp_size} and pp_size {layout.pp_size}"
        )

    where = (operation_of, dp_of, step_of)
    shape = (len(operations), len(dp_ranks), len(steps))
    counts = np.zeros(shape, np.int64)
    np.add.at(counts, where, 1)
    _refuse_duplicates(trace, operations, counts)
    kept_operations, kept_steps = _complete(counts.astype(bool))
    if not kept_steps.any():
        raise TraceEmptyError(f"{trace} has no step in which every data-parallel rank has the same operations")

    times = {}
    for name in ("start_ts", "duration"):
        matrix = np.full(shape, np.nan)
        matrix[where] = rows[name]
        times[name] = matrix[kept_operations][:, :, kept_steps]

    return JobTrace(
        layout=layout,
        operations=tuple(operation for operation, kept in zip(operations, kept_operations, strict=True) if kept),
        dp_ranks=tuple(dp_ranks.tolist()),
        steps=tuple(steps[kept_steps].tolist()),
        steps_left_out=int((~kept_steps).sum()),
        ranks=_worker_ranks(rows, dp_of, layout),
        start_s=times["start_ts"],
        duration_s=times["duration"],
    )


def layout_differences(job: JobTrace) -> list[str]:
    """Return where the layout's file differs from itself or from the trace, in words that follow `FILE says`."""
    layout, chunks = job.layout, max(operation.chunk for operation in job.operations) + 1
    differences = []
    if layout.world_size != layout.product:
        differences.append(
            f"world_size {layout.world_size}, but its sizes give {layout.product} ranks; "
            "the result does not depend on tensor-parallel ranks"
        )
    if layout.vpp_size != chunks > 0:
        differences.append(f"vpp_size {layout.vpp_size}, but workers of the trace have {chunks} chunks; these count")

    return differences


def unknown_kinds(job: JobTrace) -> list[str]:
    """Return the kinds of operations whose place in a step is not known; they delay no other operation."""
    return sorted({operation.kind for operation in job.operations} - set(KINDS))


def _layout(path: Path) -> Layout:
    try:
        import yaml
    except ImportError as error:
        raise UsageError(_NEEDS.format("PyYAML")) from error

    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise TraceNotFoundError(f"there is no file {path}: --meta is the YAML file with the job's layout") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise TraceInvalidError(f"{path} is not YAML: {' '.join(str(error).split())}") from error

    if not isinstance(values, Mapping):
        raise TraceInvalidError(f"{path} has no fields: expected dp_size, pp_size, tp_size and world_size")

    known = {name: values[name] for name in Layout.__struct_fields__ if name in values}
    for name, value in known.items():
        if name != "trial_name" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise TraceInvalidError(f"{path}: {name} is {value!r}, expected a positive integer")

    if missing := [name for name in _NEEDED_LAYOUT if name not in known]:
        raise TraceInvalidError(f"{path} has no {' and no '.join(missing)}: add the sizes of the job's layout")

    layout = Layout(**{**known, "trial_name": str(known.get("trial_name", ""))})
    return layout if "world_size" in known else replace(layout, world_size=layout.product)


def _table(path: Path) -> Any:
    """Return the trace as a table of pyarrow, with one row or more."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(_NEEDS.format("pyarrow")) from error

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := [name for name in _COLUMNS if name not in file.schema_arrow.names]:
                raise TraceInvalidError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(_COLUMNS)}")

            table = file.read(columns=list(_COLUMNS))
    except FileNotFoundError as error:
        raise TraceNotFoundError(f"there is no file {path}") from error
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise TraceInvalidError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from error

    if not table.num_rows:
        raise TraceEmptyError(f"{path} has no operation")

    return table


def _operations(rows: Mapping[str, Any]) -> tuple[list[Operation], Integers]:
    """Return the distinct operations of a step, and the operation of each row."""
    labels, codes = rows["optype"]
    numbers = np.unique(rows["seq_id"], return_inverse=True)[1]  # small, so that keys do not overflow
    keys = (rows["stage"] * len(labels) + codes) * (int(numbers.max()) + 1) + numbers
    _, first, operation_of = np.unique(keys, return_index=True, return_inverse=True)
    operations = [
        Operation(
            kind=str(labels[codes[row]]),
            number=int(rows["seq_id"][row]),
            stage=int(rows["stage"][row]),
            chunk=int(rows["mc"][row]),
            global_chunk=int(rows["gmc"][row]),
            micro_batch=int(rows["mb_id"][row]),
        )
        for row in first.tolist()
    ]
    return operations, operation_of


def _refuse_duplicates(path: Path, operations: list[Operation], counts: Integers) -> None:
    if counts.max() > 1:
        operation, dp_rank, _ = np.argwhere(counts > 1)[0].tolist()
        raise TraceInvalidError(
            f"{path} has {operations[operation]} more than once in a step of data-parallel rank {dp_rank}: "
            "it must have the operations of one worker for each data-parallel rank and stage"
        )


def _complete(present: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the operations that most steps have, and the steps that have exactly these on all ranks."""
    alike = (present == present[:, :1]).all(axis=(0, 1))
    sets = [present[:, 0, step].tobytes() if alike[step] else None for step in range(present.shape[2])]
    common = Counter(each for each in sets if each is not None).most_common(1)
    if not common:
        return present[:, 0, 0], alike

    return np.frombuffer(common[0][0], bool), np.array([each == common[0][0] for each in sets])


def _worker_ranks(rows: Mapping[str, Any], dp_of: Integers, layout: Layout) -> Integers:
    ranks = np.zeros((layout.dp_size, layout.pp_size), np.int64)
    _, stage_of = np.unique(rows["stage"], return_inverse=True)
    ranks[dp_of, stage_of] = rows["rank"]
    return ranks


_NEEDED = ("dp_rank", "stage", "rank", "step", "seq_id")
_OPTIONAL = ("mc", "gmc", "mb_id")  # -1, or no value, where an operation has none
_LARGEST = 2**53  # integer that a float holds with all before it
_SECONDS = ("start_ts", "duration")
_COLUMNS = (*_NEEDED, *_OPTIONAL, "optype", *_SECONDS)


def _trace_columns(path: Path, table: Any) -> dict[str, Any]:
    """Return the columns of a table of pyarrow as arrays; `optype` as (labels, codes).

    Raises:
        TraceInvalidError: a value is not what its column holds.
    """
    rows: dict[str, Any] = {name: _integers(path, table, name) for name in (*_NEEDED, *_OPTIONAL)}
    for name in _SECONDS:
        values = _numbers(path, table, name).astype(np.float64)
        is_wrong = ~np.isfinite(values) if name == "start_ts" else ~(np.isfinite(values) & (values >= 0))
        expected = "a time in seconds" if name == "start_ts" else "seconds, 0 or more"
        _refuse_first(path, table, name, is_wrong, expected)
        rows[name] = values

    rows["optype"] = _kinds(path, table)
    return rows


def _numbers(path: Path, table: Any, name: str) -> NDArray[Any]:
    """Return a column, NaN if it has no value; of a column without a missing one its own type."""
    import pyarrow.types as types

    column = table[name]
    is_number = types.is_integer(column.type) or types.is_floating(column.type)
    _refuse_first(path, table, name, np.array([not is_number]), f"a number, not {column.type}")
    return np.asarray(column.to_numpy())


def _integers(path: Path, table: Any, name: str) -> NDArray[np.int64]:
    values = _numbers(path, table, name)
    if values.dtype.kind != "f":
        return values.astype(np.int64)

    if name in _OPTIONAL:
        values = np.where(np.isnan(values), -1, values)

    _refuse_first(path, table, name, ~((np.abs(values) <= _LARGEST) & (values == np.round(values))), "an integer")
    return values.astype(np.int64)


def _kinds(path: Path, table: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    import pyarrow

    texts = table["optype"].cast(pyarrow.string()).fill_null("").to_numpy().astype(str)
    labels, codes = np.unique(texts, return_inverse=True)
    _refuse_first(path, table, "optype", (labels == "")[codes], "a kind of operation")
    return labels, codes


def _refuse_first(path: Path, table: Any, name: str, is_wrong: NDArray[np.bool_], expected: str) -> None:
    """Refuse a column with a value that is wrong, by its first one."""
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        value = table[name][row].as_py()
        found = "missing" if value is None else repr(value)
        raise TraceInvalidError(f"{path}: {name} of row {row} is {found}, expected {expected}")
