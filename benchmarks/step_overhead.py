"""What a training step costs more with everything on, and with the peer; and whether every step has its row.

    python benchmarks/step_overhead.py [--rounds 9] [--steps 4000] [--no-peer] [--json FILE]

One Linear(64, 64) on a fixed batch, one thread: the smallest step there is (60-120 us). Each round is a process that
runs a block of the plain loop, two blocks under a recorder which is connected to a running aggregator, and a plain one
after `shutdown()`; the differences within a process are compared. (Many recorders in one process would be none of a
user's: the interpreter adapts to the first.) The peer, which cannot be switched off again, takes turns as whole
processes with plain ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import environment
from startup import BIN, PEER, _Aggregator, _environ

LOOP = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
kind, rounds, count, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
model = torch.nn.Linear(64, 64)
optimizer = (torch.optim.AdamW if kind == "adamw" else torch.optim.SGD)(model.parameters(), lr=0.01)
x, y = torch.randn(32, 64), torch.randn(32, 64)
clock = time.perf_counter_ns

def block(n):
    took = []
    for _ in range(n):
        start = clock()
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        took.append(clock() - start)
    return took
"""

OURS = (
    LOOP
    + """
import traceml
block(2000)
plain, traced = [block(count)], []
recorder = traceml.init()
block(2000)
for _ in range(rounds):
    traced.append(block(count))
own = recorder.instrumentation.hook_ns_per_step()
traceml.shutdown()
block(2000)
plain.append(block(count))
json.dump({"plain": plain, "traced": traced, "own_ns": own}, open(out, "w"))
"""
)

RATE = (
    LOOP
    + """
import traceml
traceml.init()
start, steps = time.monotonic(), 0
while time.monotonic() - start < rounds:
    block(1000)
    steps += 1000
took = time.monotonic() - start
traceml.shutdown()
json.dump({"steps": steps, "seconds": took}, open(out, "w"))
"""
)

PLAIN = LOOP + 'block(1000); json.dump(block(count), open(out, "w"))'

THEIRS = (
    LOOP
    + """
import traceml_ai as traceml

def traced(n):
    took = []
    for _ in range(n):
        start = clock()
        with traceml.trace_step(model):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        took.append(clock() - start)
    return took

traced(1000)
json.dump(traced(count), open(out, "w"))
"""
)


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {}
        with _Aggregator(folder) as address:
            for kind in ("sgd", "adamw"):
                found[kind] = measure_ours(kind, options, folder, address)

            found["rate"] = measure_rate(options, folder, address)

        if options.peer:
            found["peer"] = measure_peer(options, folder)
            ratio = found["peer"]["added_us"] / found["sgd"]["added_us"]
            print(f"ratio: the peer adds {ratio:.1f} x as much per step (goal: 40 x)")

    if options.json:
        options.json.write_text(json.dumps(found))

    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4000, help="steps per block")
    parser.add_argument("--seconds", type=int, default=20, help="how long to run at full speed")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure_ours(kind: str, options: argparse.Namespace, folder: Path, address: dict[str, str]) -> dict[str, float]:
    """Plain and traced blocks in turn, in one process per round."""
    rounds = [_script(OURS, folder, [kind, "2", str(options.steps)], address) for _ in range(options.rounds)]
    found = {arm: [block for one in rounds for block in one[arm]] for arm in ("plain", "traced")}
    medians = {arm: [statistics.median(block) / 1e3 for block in found[arm]] for arm in found}
    added = statistics.median(
        statistics.fmean(medians["traced"][i : i + 2]) - statistics.fmean(medians["plain"][i : i + 2])
        for i in range(0, 2 * options.rounds, 2)
    )
    own_us = statistics.median(one["own_ns"] for one in rounds) / 1e3
    p999 = {arm: _quantile([step for block in found[arm] for step in block], 0.999) / 1e3 for arm in medians}
    print(
        f"{kind}: plain {statistics.median(medians['plain']):.1f} us, added {added:+.2f} us (goal: 1.5); "
        f"p99.9 plain {p999['plain']:.0f} us, traced {p999['traced']:.0f} us (goal: + 500); "
        f"the rank's own estimate {own_us:.1f} us"
    )
    return {"plain_us": statistics.median(medians["plain"]), "added_us": added, "own_us": own_us} | {
        f"p999_{arm}_us": value for arm, value in p999.items()
    }


def measure_rate(options: argparse.Namespace, folder: Path, address: dict[str, str]) -> dict[str, float]:
    """As many steps as there can be: each must be in the store afterwards."""
    from traceml.database.store.reader import StoreReader

    found = _script(RATE, folder, ["sgd", str(options.seconds), "0"], address)
    newest = max((folder / "runs").glob("*/store.db"), key=lambda path: path.stat().st_mtime)
    reader = StoreReader(newest)
    stored, lost = reader.stored("steps"), reader.lost("steps")
    per_second = found["steps"] / found["seconds"]
    print(f"rate: {per_second:,.0f} steps/s, {stored:,} of {found['steps']:,} rows stored, {lost} lost")
    return {"per_second": per_second, "steps": found["steps"], "stored": stored, "lost": lost}


def measure_peer(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Whole processes in turn: the peer's way to run a script, and plain python in the peer's environment."""
    peer = environment(PEER, "torch")
    plain, traced = [], []
    for _ in range(3):
        for code, values, words in (
            (PLAIN, plain, [str(peer / "python")]),
            (THEIRS, traced, [str(peer / "traceml"), "run"]),
        ):
            values.append(_script(code, folder, ["sgd", "0", str(options.steps * 2)], {}, words))

    medians = [statistics.median(statistics.median(block) for block in arm) / 1e3 for arm in (plain, traced)]
    p999 = [_quantile([step for block in arm for step in block], 0.999) / 1e3 for arm in (plain, traced)]
    print(
        f"peer (traceml-ai 0.5.0): plain {medians[0]:.1f} us, added {medians[1] - medians[0]:+.1f} us; "
        f"p99.9 plain {p999[0]:.0f} us, traced {p999[1]:.0f} us"
    )
    return {"plain_us": medians[0], "added_us": medians[1] - medians[0], "p999_us": p999[1]}


def _script(
    code: str, folder: Path, arguments: list[str], environ: dict[str, str], words: list[str] | None = None
) -> Any:
    """Run code as a script that writes JSON; return what it wrote."""
    script, out = folder / "train.py", folder / "out.json"
    script.write_text(code)
    command = [*(words or [str(BIN / "python")]), str(script)]
    command += ["--args", *arguments, str(out)] if words and words[-1] == "run" else [*arguments, str(out)]
    out.unlink(missing_ok=True)
    done = subprocess.run(
        command, cwd=folder, env=_environ() | environ, capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode != 0 or not out.exists():
        raise SystemExit(
            f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )

    return json.loads(out.read_text())


def _quantile(values: list[int], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


if __name__ == "__main__":
    os.environ.pop("TRACEML_RUN_ID", None)
    sys.exit(main())
