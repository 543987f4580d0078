"""Formats of W&B: records for its service, and the file that the service writes."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traceml.errors import BackendError
from traceml.formatting import left_text

__all__ = ["history_request", "wait_for_end"]

_CLOSED_WITHIN_S = 20.0
# LevelDB's log: blocks of this size, a header in the first; records in one part (1), or first (2) … last (4).
_BLOCK, _LOG_HEADER = 32768, 7
_BEGINS, _ENDS = {1, 2}, {1, 4}


def history_request(record: Mapping[str, Any], stream: str) -> bytes:
    """Return a record of the history in the form that W&B's service reads from its socket."""
    from wandb.proto import wandb_internal_pb2 as pb
    from wandb.proto import wandb_server_pb2 as spb

    request = spb.ServerRequest()
    inner = request.record_publish
    inner._info.stream_id = stream
    history = inner.request.partial_history
    for key, value in record.items():
        item = history.item.add()
        item.key = key
        item.value_json = json.dumps(value)

    history.action.CopyFrom(pb.HistoryAction(flush=True))
    data: bytes = request.SerializeToString()
    return struct.pack("<BI", ord("W"), len(data)) + data


def wait_for_end(log: Path, before: int) -> None:
    """Wait until the run's last record is in its file, shortly after `finish` has returned."""
    deadline = time.monotonic() + _CLOSED_WITHIN_S
    while not _has_exit(log, before):
        if time.monotonic() > deadline:
            raise BackendError(f"W&B did not complete {log} within {left_text(_CLOSED_WITHIN_S)}")

        time.sleep(0.005)


def _has_exit(log: Path, since: int) -> bool:
    """Whether a run's file, in LevelDB's log format, has its exit record after an offset."""
    from wandb.proto import wandb_internal_pb2 as pb

    data = log.read_bytes()
    # From the start of a block; a record that began before it is skipped.
    at, parts = max(since // _BLOCK * _BLOCK, _LOG_HEADER), None
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue

        _, length, kind = struct.unpack_from("<IHB", data, at)
        part, at = data[at + 7 : at + 7 + length], at + 7 + length
        if len(part) < length:
            return False

        parts = part if kind in _BEGINS else None if parts is None else parts + part
        if kind in _ENDS and parts is not None:
            record = pb.Record()
            record.ParseFromString(parts)
            if record.WhichOneof("record_type") == "exit":
                return True

    return False
