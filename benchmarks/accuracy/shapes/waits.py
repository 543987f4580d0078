"""A training that waits for ever after its 40th step, for what its name tells; or for so long that it only looks so.

python waits.py HOW [--rank 0]: with several ranks only that one does it, and the others wait for it in backward.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import fcntl
import multiprocessing
import os
import queue
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

STEPS, AT, BATCH = 80, 40, 8
FIRST, SECOND = threading.Lock(), threading.Lock()
EVIL = "a" * 34 + "!"


def hold_second(ready: threading.Event) -> None:
    """Take the locks in the other order."""
    with SECOND:
        ready.set()
        with FIRST:
            pass


def two_locks() -> None:
    """Take two locks that a thread takes in the other order."""
    ready = threading.Event()
    with FIRST:
        threading.Thread(target=hold_second, args=(ready,), daemon=True).start()
        ready.wait()
        with SECOND:
            pass


def no_producer() -> None:
    """Wait for an item that nobody puts into the queue."""
    queue.Queue().get()


def report_life() -> None:
    """Print that the process lives, again and again."""
    while True:
        print("alive", flush=True)
        time.sleep(2)


def beside_signs_of_life() -> None:
    """Wait for an item that nobody puts into the queue, beside a thread that prints now and then."""
    threading.Thread(target=report_life, daemon=True).start()
    queue.Queue().get()


def locked_database() -> None:
    """Write to a database that another connection has locked."""
    path = Path(tempfile.mkdtemp()) / "index.db"
    first = sqlite3.connect(path, isolation_level=None)
    first.execute("begin exclusive")
    second = sqlite3.connect(path, timeout=3600)
    second.execute("create table seen (number)")


def locked_file() -> None:
    """Wait for a file that another process has locked."""
    path = Path(tempfile.mkdtemp()) / "build.lock"
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(999)"
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def unread_child() -> None:
    """Wait for a child whose output nobody reads: the pipe is full."""
    child = subprocess.Popen([sys.executable, "-c", "print('x' * 1_000_000)"], stdout=subprocess.PIPE)
    child.wait()


def silent_peer() -> None:
    """Receive from a server that sends nothing."""
    server = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(server.getsockname()) as client:
        client.recv(1)


def silent_server() -> None:
    """Fetch a page from a server that never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    urllib.request.urlopen(f"http://127.0.0.1:{server.getsockname()[1]}/weights.bin")


def full_backlog() -> None:
    """Connect to a server that accepts nobody, and whose queue is full."""
    server = socket.create_server(("127.0.0.1", 0), backlog=0)
    kept = []
    while True:
        kept.append(socket.create_connection(server.getsockname()))


def question() -> None:
    """Ask at the standard input."""
    input("overwrite? ")


def long_child() -> None:
    """Run a program that does not end."""
    subprocess.run(["sleep", "3600"], check=False)


def unjoined_queue() -> None:
    """Wait until an item is done that nobody takes."""
    jobs: multiprocessing.queues.JoinableQueue[int] = multiprocessing.JoinableQueue()
    jobs.put(1)
    jobs.join()


def spin() -> None:
    """Loop in Python until a flag is set that nobody sets."""
    done = False
    while not done:
        pass


def poll_file() -> None:
    """Wait for a file that nobody writes."""
    path = Path(tempfile.mkdtemp()) / "ready"
    while not path.exists():
        time.sleep(0.5)


def backtrack() -> None:
    """Match a regular expression that takes for ever, with the interpreter's lock held."""
    re.match(r"(a+)+$", EVIL)


def pause_in_c() -> None:
    """Wait in C with the interpreter's lock free."""
    ctypes.CDLL(None).pause()


def hold_interpreter() -> None:
    """Wait in C with the interpreter's lock held."""
    ctypes.PyDLL(None).pause()


def stop_itself() -> None:
    """Be stopped by a signal."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fill_stderr() -> None:
    """Print to a standard error whose pipe nobody reads."""
    _, end = os.pipe()
    os.dup2(end, 2)
    while True:
        print("x" * 500, file=sys.stderr)


def upload() -> None:
    """Receive from a server that sends nothing, in a thread."""
    silent_peer()


def thread_result() -> None:
    """Wait for a thread that waits for a server."""
    ThreadPoolExecutor(1).submit(upload).result()


def retry_nan(model: torch.nn.Module) -> None:
    """Repeat a forward pass until its loss is finite, which it never is."""
    while True:
        with torch.no_grad():
            if model(torch.full((BATCH, 64), float("nan"))).isfinite().all():
                break

        time.sleep(0.01)


def at_exit_waits() -> None:
    """Wait when the interpreter ends."""
    atexit.register(no_producer)


def thread_at_exit() -> None:
    """Leave a thread behind that the interpreter waits for."""
    threading.Thread(target=silent_peer).start()


def evaluate_long(model: torch.nn.Module) -> None:
    """Evaluate for 30 s."""
    end_s = time.monotonic() + 30
    model.eval()
    with torch.no_grad():
        while time.monotonic() < end_s:
            model(torch.randn(256, 64))
            time.sleep(0.02)

    model.train()


def save_long() -> None:
    """Write a file slowly."""
    with tempfile.TemporaryFile() as file:
        for _ in range(60):
            file.write(bytes(1 << 16))
            file.flush()
            time.sleep(0.5)


def fetch_with_output() -> None:
    """Tell a line per second, as a download does."""
    for number in range(25):
        print(f"{4 * number} %", flush=True)
        time.sleep(1)


def solve() -> None:
    """Compute in C for 25 s, with calls that take seconds."""
    end_s = time.monotonic() + 25
    while time.monotonic() < end_s:
        torch.linalg.svd(torch.randn(900, 900))


def fetch_slowly() -> None:
    """Receive some bytes each 6 s from a server that is slow."""
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_slowly, args=(server,), daemon=True).start()
    with socket.create_connection(server.getsockname()) as client:
        while client.recv(1 << 16):
            pass


def serve_slowly(server: socket.socket) -> None:
    """Send five parts of a file."""
    connection, _ = server.accept()
    with connection:
        for _ in range(5):
            time.sleep(6)
            connection.sendall(bytes(1 << 12))


def debug() -> None:
    """Stop in the debugger, which asks at a terminal."""
    breakpoint()


class Items(Dataset):  # type: ignore[type-arg]
    """Random items, one of which never comes."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == AT * BATCH and self.how in IN_WORKER:
            IN_WORKER[self.how]()

        return torch.randn(64)


def item_in_c() -> None:
    """Read an item in C, for ever."""
    ctypes.CDLL(None).pause()


def item_backtracks() -> None:
    """Parse an item for ever."""
    backtrack()


def item_from_server() -> None:
    """Read an item from a server that never answers."""
    silent_server()


def item_locked() -> None:
    """Take a lock that the training process held when it started this worker."""
    with FIRST:
        pass


IN_WORKER: dict[str, Callable[[], None]] = {
    "item_in_c": item_in_c, "item_backtracks": item_backtracks, "item_from_server": item_from_server,
    "item_locked": item_locked,
}  # fmt: skip
OF_MODEL = (retry_nan, evaluate_long)
PLAIN = (
    two_locks, no_producer, locked_database, locked_file, unread_child, silent_peer, silent_server, full_backlog,
    question, long_child, unjoined_queue, spin, poll_file, backtrack, pause_in_c, thread_result, at_exit_waits,
    thread_at_exit, save_long, fetch_with_output, fetch_slowly, solve, debug, hold_interpreter, stop_itself,
    fill_stderr, beside_signs_of_life,
)  # fmt: skip


def batches_of(loader: DataLoader[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Start the workers while a thread, which writes a log for example, holds a lock."""
    with FIRST:
        return iter(loader)


def wait(how: str, model: torch.nn.Module) -> None:
    """Do what the name tells."""
    for function in OF_MODEL:
        if function.__name__ == how:
            function(model)

    for plain in PLAIN:
        if plain.__name__ == how:
            plain()


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how")
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args()
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    is_it = int(os.environ.get("RANK", "0")) == options.rank
    if many:
        dist.init_process_group("gloo")

    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    model = DistributedDataParallel(net) if many else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    workers = 2 if options.how in IN_WORKER else 0
    loader = DataLoader(Items(options.how if is_it else ""), batch_size=BATCH, num_workers=workers)
    batches = batches_of(loader) if options.how == "item_locked" else loader
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        model(batch).pow(2).mean().backward()
        optimizer.step()
        time.sleep(0.02)
        if step == AT and is_it:
            wait(options.how, net)

    if many:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
