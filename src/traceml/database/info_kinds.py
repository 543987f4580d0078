"""Kinds of rows of the log `info`: facts about a rank, its script and its devices, and which of them readers use.

A row is a map `{"kind": str, "t_ns": int, FIELD: value, ...}`, whose `t_ns` is monotonic. A field that is not known may
be missing, or None. A field that readers compute with is declared as `NAME:TYPE`; the aggregator stores such a row
without a value of another type, which a user's own loader may have. A new kind is one entry here, a sender, and a
reader, in most cases `JobFactsBuilder`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from types import NoneType
from typing import Any, Protocol

__all__ = ["InfoKind", "InfoSender", "wrong_fields"]

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "number": (int, float), "text": (str,), "list": (list,)}


class InfoKind(StrEnum):
    """Kinds of rows: name in the row, meaning, and fields.

    Attributes:
        doc: the meaning of a row.
        fields: names of the fields beside `kind` and `t_ns`.
        types: allowed types of those that readers rely on.
        is_only_stored: whether no reader uses it: it is for people, in an export or among the messages of a run.
    """

    doc: str
    fields: tuple[str, ...]
    types: Mapping[str, tuple[type, ...]]
    is_only_stored: bool

    def __new__(cls, value: str, doc: str, fields: str = "", is_only_stored: bool = False) -> InfoKind:
        """Make a member."""
        member = str.__new__(cls, value)
        member._value_ = value
        declared = [each.partition(":") for each in fields.split()]
        member.doc, member.is_only_stored = doc, is_only_stored
        member.fields = tuple(name for name, *_ in declared)
        member.types = {name: _TYPES[kind] for name, _, kind in declared if kind}
        return member

    # Process.
    PROCESS = (
        "process", "a recorder has started; of rank 0 also `git`, and what the aggregator is to `collect`",
        ("tracing hang_timeout_s on_hang python traceml executable argv folder rank_from cores machine_cores "
         "job_end_s:number job_limit_s:number store_restarts:int switches:list git collect"),
    )  # fmt: skip
    TRACING = "tracing", "a recorder that only logged so far traces from now on"
    IDENTITY = "identity", "the process group gives another rank after rows were sent", "rank world_size job", True
    SAMPLER = "sampler", "a sampler has failed for the first time", "name error", True
    SNAPSHOT = "snapshot", "what the rank does that makes no progress: the fields of `RankSnapshot`"
    STOPPED = "stopped", "all threads did not run for a while", "seconds step part from_step began_s"
    GROWTH = "growth", "variables that hold more objects than before", "step steps cost_ms grown:list"
    LAUNCHES = "launches", "the script runs functions by `traceml.launch` without tracing them"
    RETURNED = "returned", "the launched function or script is over", "last_step script"
    EXIT = (
        "exit", "how the process is about to end",
        ("code:int last_step:int step:int open_s:number open_phase:text exception:text message:text raised_as:text "
         "caught samples:int stack:text file:text line:int function:text saved_steps:int saved_in:int "
         "address_limit_bytes:int at_s:number batches:int epoch:int data_ended"),
    )  # fmt: skip
    # Data.
    LOADER = (
        "loader", "a data loader gave an iterator, or `trace_data` got an iterable",
        ("loader:text dataset:text length:int in_memory num_workers:int batch_size:int drop_last pin_memory "
         "persistent_workers prefetch_factor in_order start_method:text objects:list samplers:list is_iterable "
         "is_undivided trainer:text number:int"),
    )  # fmt: skip
    LOADERS_MADE = (
        "loaders_made", "number of loaders of one data set so far", "dataset:text length:int num_workers:int made",
    )  # fmt: skip
    TRAINING_LOADER = "training_loader", "number of the loader whose batches are trained on", "number"
    BATCH = "batch", "tensors and bytes of the largest of some batches, as a loader returns them", "tensors bytes"
    SAME_ORDER = "same_order", "a shuffling DistributedSampler gives the same order in each epoch", "number"
    WORKER_SAMPLES = (
        "worker_samples", "how often each worker of a loader, by its number, was seen to make a batch so far",
        "number:int samples:list",
    )  # fmt: skip
    WORKER_LOST = (
        "worker_lost", "a loader worker has died",
        "pid message step worker workers signal code oom_kills shm_bytes shm_used_bytes memory_limit_bytes",
    )  # fmt: skip
    INPUT = "input", "the input of the model", "dtype dimensions requires_grad tokens batch_first autocast tf32"
    # Model and training.
    SINGLE_CALLS = "single_calls", "the model is called for each sample of a loader's batch", "calls:int"
    MODEL = (
        "model", "a model was called",
        ("model:text parameters:int trainable:int dense_embeddings:int device:text dtype:text torch_threads:int "
         "bound_cores:list compiled parallel:text gradient_size:int gradient_ranks:list "
         "comm_hook:text reshards step"),
    )  # fmt: skip
    OPTIMIZER = (
        "optimizer", "an optimizer has stepped",
        "optimizer:text groups tensors:int lr fused foreach history_bytes:int step",
    )  # fmt: skip
    UNREAD_SKIPS = "unread_skips", "GradScaler has a fused optimizer skip steps on a device, where they are not read"
    TRAINING_BEGINS = "training_begins", "an optimizer of other parameters begins to step", "step"
    COMPILATION = "compilation", "time that torch.compile took in the whole run", "seconds graphs"
    ANOMALY_DETECTION = "anomaly_detection", "autograd's detection of anomalies is on, or off again", "on"
    EVALUATION_MODE = (
        "evaluation_mode", "a model was trained in eval(), in so many steps since the first of them",
        "model:text layers:list step:int steps:int",
    )  # fmt: skip
    KEPT_GRADIENTS = (
        "kept_gradients",
        "nothing clears the gradients of an optimizer",
        "optimizer:text",
    )
    UNCHANGED_WEIGHTS = (
        "unchanged_weights",
        "no optimizer has changed a parameter so far; an empty name: one has",
        "optimizer:text parameters:int trainable:int stepped:int",
    )
    PROFILER = "profiler", "torch's profiler records, or has ended", "on"
    OWN_UPDATE = "own_update", "a function that reads gradients outside the phases", "file function"
    PLAYS = "plays", "a trained model was called with one sample between trainings with more, without a loader"
    ROLLOUTS = "rollouts", "models are trained on what they were called with in evaluation"
    PLAIN_EVALUATION = "plain_evaluation", "models were evaluated without gradients"
    EVALUATES_GRADIENTS = "evaluates_gradients", "gradients were computed in an evaluation, as forces are"
    EVALUATING = (
        "evaluating", "an evaluation has run for some seconds: its row of `evals` follows at its end", "since_ns:int",
    )  # fmt: skip
    # Checkpoints.
    SAVES = "saves", "folder of the checkpoints", "folder"
    LOADED = "loaded", "a checkpoint was read before the first step", "place"
    RESUMED = "resumed", "the script gave the next step a number", "step before"
    # Process groups and devices.
    GROUP = "group", "the default process group exists", "group_size:int backends:text"
    MESH = "mesh", "coordinates of the rank in the device mesh, by dimension", "coordinates"
    JOINED = "joined", "step at whose end the rank waited in `with Join(...)`", "step"
    REDUCTIONS = "reductions", "reductions of gradients", "backwards_per_step:number reductions_per_step:number"
    COLLECTIVES = "collectives", "size of the largest tensor that a collective has carried", "elements:int messages"
    COPIES = "copies", "shares of copied bytes, in some copies to a device", "pinned:number non_blocking:number"
    RPC = "rpc", "the script uses torch.distributed.rpc"
    SEGMENTS = (
        "segments", "blocks of memory that the CUDA allocator requested and gave back",
        "device from_step step requested given_back",
    )  # fmt: skip
    GPU_HEALTH = (
        "gpu_health", "an XID event of a GPU, or counters that have changed",
        "index step xid ecc_errors remap_pending remap_failed max_clock_mhz power_limit_w default_power_limit_w",
    )  # fmt: skip
    NVLINK = "nvlink", "NVLink domain of the host", "domain"


class InfoSender(Protocol):
    """Appends a row of `info`."""

    def __call__(self, kind: InfoKind, /, **facts: Any) -> None:
        """Append a row of a kind with some fields."""


def wrong_fields(row: Mapping[str, Any]) -> list[str]:
    """Return the fields of a row that have another type than the declared one, or a number that is not finite."""
    kind = row.get("kind")
    types = _TYPES_OF.get(kind, {}) if isinstance(kind, str) else {}
    return [name for name in row.keys() & types if not _fits(row[name], types[name])]


_TYPES_OF = {kind.value: kind.types for kind in InfoKind}


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, (*types, NoneType)) and not (isinstance(value, float) and not math.isfinite(value))
