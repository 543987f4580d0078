"""Functions that tests launch; a module of its own, so that workers need not import a test framework."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import traceml

__all__ = ["PYTHONPATH", "rank"]

FOREVER_S = 3600
# By which scripts of tests find this module, and the package that is tested.
PYTHONPATH = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(traceml.__file__).parents[1])])


class OddError(ValueError):
    """An exception whose class cannot be called with its `args`."""

    def __init__(self, code: int, *, why: str) -> None:
        super().__init__(f"{why} ({code})")
        self.code = code


def rank() -> int:
    return int(os.environ["RANK"])


def who(*args: Any, **kwargs: Any) -> dict[str, Any]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {"args": args, "kwargs": kwargs, "parent": os.getppid(), "env": {name: os.environ[name] for name in names}}


def summed(value: float) -> tuple[float, str]:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return tensor.item(), dist.get_backend()


def summed_by_another_group(value: float) -> float:
    import torch.distributed as dist

    dist.destroy_process_group()
    dist.init_process_group("gloo")
    return summed(value)[0]


def group() -> bool:
    import torch.distributed as dist

    return dist.is_initialized()


def environ() -> dict[str, str]:
    return dict(os.environ)


def nothing() -> None:
    return


# --- what goes wrong: on rank 1, while rank 0 would go on for ever ----------------------------------------------------


def deep() -> None:
    raise OddError(7, why="not like this")


def raise_odd() -> None:
    if rank() == 1:
        deep()

    time.sleep(FOREVER_S)


def raise_local() -> None:
    class LocalError(OSError):
        pass

    if rank() == 1:
        raise LocalError("of a class that only the worker knows")

    time.sleep(FOREVER_S)


class RarelySeen(BaseException):
    """An exception that `except Exception` lets pass."""


def raise_rare() -> None:
    raise RarelySeen("passes")


def raise_long() -> None:
    raise ValueError("x" * (80 << 20))


def raise_decoding() -> None:
    b"\xff".decode()


def read_nothing() -> None:
    pickle.loads(b"")


def leave_with_words() -> None:
    if os.environ["RANK"] == "1":
        raise SystemExit("gone for good")

    time.sleep(600)


def raise_with_lock() -> None:
    error = LookupError("holds a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    if rank() == 1:
        raise error

    time.sleep(FOREVER_S)


def raise_before_barrier() -> None:
    import torch.distributed as dist

    if rank() == 1:
        time.sleep(0.5)
        raise ZeroDivisionError("the first cause")

    dist.barrier()


def return_lock() -> Any:
    return {"fine": 1, "loader": [threading.Lock()]}


def be_killed() -> None:
    if rank() == 1:
        print("the last word", flush=True)
        os.kill(os.getpid(), 9)

    time.sleep(FOREVER_S)


def segfault() -> None:
    if rank() == 1:
        import ctypes

        ctypes.string_at(0)

    time.sleep(FOREVER_S)


def exit_now() -> None:
    if rank() == 1:
        logging.getLogger("jobs").error("it exits")
        os._exit(3)

    time.sleep(FOREVER_S)


def exit_system() -> None:
    if rank() == 1:
        sys.exit(4)

    time.sleep(FOREVER_S)


def interrupt() -> None:
    if rank() == 1:
        raise KeyboardInterrupt

    time.sleep(FOREVER_S)


def leave_well() -> None:
    sys.exit(0)


def miss_the_barrier() -> None:
    import torch.distributed as dist

    if rank() == 1:
        dawdle()

    dist.barrier()


def dawdle() -> None:
    time.sleep(FOREVER_S)


def hang_with_child(marker: str) -> None:
    """Start a process that wants to survive, say so, and stay."""
    child = subprocess.Popen(["sleep", "86300"], start_new_session=True)
    Path(f"{marker}-{rank()}").write_text(f"{os.getpid()} {child.pid}")
    dawdle()
