"""Cost of a task: a Runtime, ThreadPoolExecutor and dftracer-utils, in turns and each in a new process.

    python benchmarks/tasks.py [--rounds 5] [--skip-peer] [--json FILE]

No-op tasks count their own executions, and the count is checked. Tasks of 100 us hash bytes, which releases the GIL;
the ideal is the same number of calls on as many bare threads, in turns with the executor. The Runtime has its default
settings: contexts, names, records of the last tasks, counters and the check for stalled tasks are on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import environment

PEER = "dftracer-utils==0.0.14"
GOALS = {"noop_per_s": 600_000, "share_of_ideal": 0.97, "submit_us": 1.0, "pending_bytes": 400}

WORK = """
import gc, hashlib, itertools, json, statistics, sys, threading, time
which, clock, THREADS, TASKS = sys.argv[1], time.perf_counter, 2, 100_000

if which == "traceml":
    from traceml import Runtime
    make, close = (lambda threads: Runtime(threads=threads)), (lambda pool: pool.shutdown())
elif which == "peer":
    from dftracer.utils import Runtime
    make, close = (lambda threads: Runtime(threads=threads)), (lambda pool: pool.shutdown())
else:
    from concurrent.futures import ThreadPoolExecutor
    make, close = ThreadPoolExecutor, (lambda pool: pool.shutdown())

def finish(pool, handles):
    if which == "pool":
        for handle in handles:
            handle.result()
    else:
        pool.wait_all()

def noop():
    counter, pool = itertools.count(), make(THREADS)
    task, submit = counter.__next__, pool.submit
    handles = [] if which == "pool" else None
    start, cpu = clock(), time.process_time()
    if handles is None:
        for _ in range(TASKS):
            submit(task)
    else:
        handles = [submit(task) for _ in range(TASKS)]
    finish(pool, handles)
    took, cpu = clock() - start, time.process_time() - cpu
    assert next(counter) == TASKS, "a task was lost"
    close(pool)
    return TASKS / took, cpu / TASKS * 1e6

def work_of(seconds):
    size = 20_000
    while True:
        data = bytes(size)
        took = min(timed(lambda: [hashlib.sha256(data) for _ in range(50)]) for _ in range(5)) / 50
        if took > 0.9 * seconds:
            return lambda: hashlib.sha256(data)
        size = int(size * min(4, seconds / took)) + 1

def timed(call):
    start = clock()
    call()
    return clock() - start

def ideal(task, count):
    def loop():
        for _ in range(count // THREADS):
            task()
    threads = [threading.Thread(target=loop) for _ in range(THREADS)]
    def run():
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    return timed(run)

def pooled(pool, task, count):
    def run():
        finish(pool, [pool.submit(task) for _ in range(count)])
    return timed(run)

def share_of_ideal(count=1000, rounds=15):
    task, pool = work_of(100e-6), make(THREADS)
    pooled(pool, task, count)
    shares = [ideal(task, count) / pooled(pool, task, count) for _ in range(rounds)]
    close(pool)
    return statistics.median(shares)

def pending():
    import tracemalloc
    pool, release, counter = make(1), threading.Event(), itertools.count()
    pool.submit(release.wait)
    time.sleep(0.05)
    task, took = counter.__next__, []
    for _ in range(20_000):
        start = clock()
        pool.submit(task)
        took.append(clock() - start)
    found = {"submit_us": statistics.median(took) * 1e6}
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    handles = [pool.submit(task) for _ in range(TASKS)]
    found["pending_bytes"] = (tracemalloc.get_traced_memory()[0] - before) / TASKS
    tracemalloc.stop()
    if which == "traceml":
        found["progress_counts_ms"] = median(lambda: pool.get_progress(tasks=False), 100) * 1e3
        found["progress_ms"] = median(pool.get_progress, 100) * 1e3
    release.set()
    finish(pool, handles)
    close(pool)
    return found

def median(call, count):
    return statistics.median(timed(call) for _ in range(count))

def round_trip():
    pool, take = make(THREADS), "result" if which == "pool" else "get"
    took = median(lambda: getattr(pool.submit(len, "a"), take)(), 3000) * 1e6
    close(pool)
    return took

def nested(threads):
    pool = make(threads)
    took = pool.submit(lambda: median(lambda: pool.submit(len, "a").get(), 3000)).get() * 1e6
    close(pool)
    return took

part = sys.argv[2]
if part == "noop":
    rates, cpus = zip(*(noop() for _ in range(3)))
    found = {"noop_per_s": statistics.median(rates), "noop_cpu_us": statistics.median(cpus)}
    if which == "traceml":
        gc.disable()
        found["noop_cpu_without_gc_us"] = statistics.median(noop()[1] for _ in range(3))
elif part == "work":
    found = {"share_of_ideal": share_of_ideal(), "round_trip_us": round_trip()}
    if which == "traceml":
        found |= {"in_task_free_thread_us": nested(2), "in_task_in_place_us": nested(1)}
else: found = pending()
print(json.dumps(found))
"""


def measure(python: Path, which: str, part: str) -> dict[str, float]:
    done = subprocess.run([python, "-c", WORK, which, part], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        raise SystemExit(f"{which}, {part}: {done.stderr.strip()[-2000:]}")

    return dict(json.loads(done.stdout.splitlines()[-1]))


def rounds_of(pythons: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {which: {} for which in pythons}
    for _ in range(rounds):
        for part in ("noop", "work", "pending"):
            for which, python in pythons.items():
                for name, value in measure(python, which, part).items():
                    found[which].setdefault(name, []).append(value)

    return found


def medians(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {which: {name: statistics.median(one) for name, one in each.items()} for which, each in found.items()}


def show(found: dict[str, dict[str, list[float]]]) -> None:
    middle, ours = medians(found), found["traceml"]
    shown = {"traceml": "Runtime", "pool": "ThreadPoolExecutor", "peer": PEER.replace("==", " ")}
    print(f"{'':34}" + "".join(f"{shown[which]:>24}" for which in found))
    for name in middle["traceml"]:
        cells = "".join(f"{each[name]:24,.3f}" if name in each else f"{'-':>24}" for each in middle.values())
        goal = f"   goal {GOALS[name]:,}" if name in GOALS else ""
        print(f"{name:34}{cells}{goal}")

    for which in [one for one in found if one != "traceml"]:
        ratios = [mine / theirs for mine, theirs in zip(ours["noop_per_s"], found[which]["noop_per_s"], strict=True)]
        between = f"{min(ratios):.1f}-{max(ratios):.1f}"
        print(f"no-op tasks/s, ours / {shown[which]}: {statistics.median(ratios):.1f} x ({between})")

    best = max(ours["noop_per_s"])
    print(
        f"no-op tasks/s of the best round: {best:,.0f}; it depends on the load of the machine; the ratios depend less"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-peer", action="store_true", help="do not install and run dftracer-utils")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pythons = {"traceml": Path(sys.executable), "pool": Path(sys.executable)}
    if not options.skip_peer:
        pythons["peer"] = environment(PEER) / "python"

    found = rounds_of(pythons, options.rounds)
    show(found)
    if options.json:
        result: dict[str, Any] = {"medians": medians(found), "rounds": found, "goals": GOALS}
        options.json.write_text(json.dumps(result, indent=1))

    return 0


if __name__ == "__main__":
    sys.exit(main())
