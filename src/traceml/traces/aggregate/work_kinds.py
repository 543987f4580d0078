"""Kinds of work of spans (computing, I/O, communication, copying), by category and name.

The categories are those of dftracer (`POSIX`, `STDIO`, ...), torch.profiler (`kernel`, `gpu_memcpy`, `cpu_op`, ...)
and traceml's own export. Operators on the host count as computing and communication if a trace has no kernels of a
device; otherwise they only start those.
"""

from __future__ import annotations

import re

__all__ = ["COMM", "COMPUTE", "COPY", "HOST", "HOST_COMM", "IO", "OTHER", "WORK_KINDS", "classify", "io_direction"]

COMPUTE, IO, COMM, COPY, HOST, HOST_COMM, OTHER = range(7)
WORK_KINDS = ("compute", "io", "comm", "copy", "host", "host_comm", "other")

_BY_CATEGORY = {
    COMPUTE: "kernel compute ai_framework forward backward optimizer",
    IO: "posix stdio mpiio mpi-io mpi_io hdf5 netcdf io i/o reader read write data_loader dataloader data_io input"
    " input_wait checkpoint storage file",
    COMM: "comm communication collective mpi nccl rccl gloo c10d ucc",
    COPY: "gpu_memcpy gpu_memset gpu_user_memcpy h2d d2h memcpy copy",
    HOST: "cpu_op operator",
}
_CLASS_OF = {word: kind for kind, words in _BY_CATEGORY.items() for word in words.split()}
_COLLECTIVE = re.compile(
    r"nccl|rccl|gloo:|c10d|all_?reduce|all_?gather|reduce_?scatter|broadcast_?coalesced|^comm$", re.IGNORECASE
)
_BY_NAME = (
    (COMM, _COLLECTIVE),
    (IO, re.compile(r"dataloader|input_wait|^checkpoint$|torch\.save|torch\.load", re.IGNORECASE)),
    (COPY, re.compile(r"^h2d$|^memcpy", re.IGNORECASE)),
    (COMPUTE, re.compile(r"^(forward|backward|optimizer)$", re.IGNORECASE)),
)
_COLLECTIVES = {COMPUTE: COMM, HOST: HOST_COMM}  # a kernel or an operator may be one
_SILENT = {"python_function", "cuda_runtime", "cuda_driver", "gpu_user_annotation", "trace", "overhead", "dftracer"}
# Not getc, putchar and the like, which return a character.
_READS = re.compile(r"read|load|recv|\bget(?!c)", re.IGNORECASE)
_WRITES = re.compile(r"write|save|send|\bput(?!c)", re.IGNORECASE)


def classify(cat: object, name: object) -> int:
    """Return one of COMPUTE, IO, COMM, COPY, HOST, HOST_COMM, OTHER."""
    category, words = str(cat or "").lower(), str(name or "")
    known = _class_of(category)
    if known in _COLLECTIVES and _COLLECTIVE.search(words):
        return _COLLECTIVES[known]

    if known is not None:
        return known

    if category in _SILENT:
        return OTHER

    kind = next((kind for kind, pattern in _BY_NAME if pattern.search(words)), OTHER)
    return HOST_COMM if kind == COMM and category == "user_annotation" else kind


def io_direction(name: object) -> str:
    """Return the direction of an I/O call: `read`, `write` or `other`."""
    words = str(name or "")
    if _WRITES.search(words):
        return "write"

    return "read" if _READS.search(words) else "other"


def _class_of(category: str) -> int | None:
    if category in _CLASS_OF:
        return _CLASS_OF[category]

    return next((_CLASS_OF[part] for part in category.split(",") if part in _CLASS_OF), None)
