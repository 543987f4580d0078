"""Train without tracing, with it, and after its end, in one process: `python equality_ranks.py RANK WORLD STORE OUT`.

Writes to OUT the names of trainings that were not the same, and whatever `shutdown` has left.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, dataloader

import traceml
from tests.instrument.equal_trainings import ON_ONE_RANK, ON_TWO_RANKS, kept, results

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_OWNERS: tuple[Any, ...] = (
    torch, torch.Tensor, torch.autograd, torch.autograd.graph, torch.amp.GradScaler, nn.utils, torch.serialization,
    torch.optim.Optimizer, torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS, nn.Module,
    nn.Sequential, nn.modules.module, nn.parallel.DistributedDataParallel, DataLoader, dataloader,
    dataloader._BaseDataLoaderIter, dataloader._SingleProcessDataLoaderIter,
    dist, dist.distributed_c10d, torch.utils.checkpoint,
)  # fmt: skip


def attributes() -> dict[tuple[str, str], Any]:
    """Return what torch has under which name, and what the interpreter calls; dictionaries as copies."""
    found: dict[tuple[str, str], Any] = {}
    for owner in _OWNERS:
        for name, value in vars(owner).items():
            if name == "reduce_op":  # warns when it is used
                continue

            found[owner.__name__, name] = dict(value) if isinstance(value, dict) and "hook" in name else value

    for module, names in ((sys, ("excepthook", "unraisablehook", "meta_path", "path_hooks")), (gc, ("callbacks",))):
        for name in names:
            value = getattr(module, name)
            found[module.__name__, name] = list(value) if isinstance(value, list) else value

    found |= {
        ("signal", number.name): signal.getsignal(number)
        for number in signal.valid_signals()
        if hasattr(number, "name")
    }
    return found | {("threading", "excepthook"): threading.excepthook}


def differences(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> list[str]:
    """Return names that mean something else, or something of ours, after the end."""
    changed = [
        f"{'.'.join(key)} is {after.get(key)!r}"
        for key, value in before.items()
        if after.get(key) is not value and after.get(key) != value
    ]
    new = [
        f"{'.'.join(key)} is new: {value!r}" for key, value in after.items() if key not in before and _is_ours(value)
    ]
    return [text[:300] for text in changed + new]


def _is_ours(value: Any) -> bool:
    module = inspect.getmodule(value) if not isinstance(value, ModuleType) else value
    return module is not None and module.__name__.partition(".")[0] == "traceml"


def shape_of(value: Any) -> list[Any]:
    """Return the attributes of a model or optimizer, and how many hooks each of its parts has."""
    if not isinstance(value, nn.Module):
        return [type(value).__name__, sorted(vars(value)), *(len(vars(value).get(name) or ()) for name in _HOOKS)]

    parts = [
        (type(each).__name__, sorted(vars(each)), [len(getattr(each, name)) for name in _HOOKS])
        for each in value.modules()
    ]
    tensors = [
        len(each._backward_hooks or ()) + len(each._post_accumulate_grad_hooks or ()) for each in value.parameters()
    ]
    return [parts, tensors]


def unequal(plain: dict[str, list[Any]], other: dict[str, list[Any]]) -> list[str]:
    """Return the trainings that were not the same, each with the first difference."""
    found = []
    for name, wanted in plain.items():
        if len(wanted) != len(other[name]):
            found.append(f"{name}: {len(other[name])} instead of {len(wanted)} values")
            continue

        different = [
            f"{name}, {i}: {a!r}, {b!r}" for i, (a, b) in enumerate(zip(wanted, other[name], strict=True)) if a != b
        ]
        found += different[:1]

    return found


def threads() -> set[str]:
    """Return the names of this process's threads in Python."""
    return {thread.name for thread in threading.enumerate()}


def main(rank: int, world_size: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    trainings = ON_ONE_RANK if world_size == 1 else ON_TWO_RANKS
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)

    plain = results(trainings)
    plain_shapes = [shape_of(each) for each in kept]
    kept.clear()
    gc.collect()
    attributes_before, threads_before = attributes(), threads()

    traceml.init(quiet=True)
    traced = results(trainings)
    traceml.shutdown()
    shapes = [shape_of(each) for each in kept]
    left = differences(attributes_before, attributes()) + sorted(threads() - threads_before)
    left += [f"{mine} instead of {wanted}" for mine, wanted in zip(shapes, plain_shapes, strict=True) if mine != wanted]
    afterwards = results(trainings)

    found = {
        "traced": unequal(plain, traced),
        "afterwards": unequal(plain, afterwards),
        "left": left,
    }
    Path(out).write_text(json.dumps(found))
    if world_size > 1:
        dist.barrier()

    os._exit(0)  # gloo's threads abort now and then at the end of an interpreter, also without traceml


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
