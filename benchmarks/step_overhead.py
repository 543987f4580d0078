"""What a training step costs more with everything on, and with the peer; and whether every step has its row.

    python benchmarks/step_overhead.py [--rounds 9] [--steps 1000] [--no-peer] [--json FILE]

One Linear(64, 64) on a fixed batch, one thread: the smallest step there is (60-120 us). Each round is a process that
runs blocks of the plain loop, blocks under a recorder which is connected to a running aggregator, and plain ones after
`shutdown()`. (Many recorders in one process would be none of a user's: the interpreter adapts to the first.) The first
traced blocks have the start of the run; the others come after a second. Processes whose recorder is switched off take
turns with these: what they seem to add is noise. The peer, which cannot be switched off again, takes turns as whole
processes with plain ones; it is measured after a second, too.

A shared machine runs at two speeds, for seconds at a time. So the fastest blocks of each kind are compared: the tenth
of all rounds whose median step is shortest. The median leaves out what is done in some steps only; the mean of the
fastest 99 % of a block's steps has it. In a process group of two ranks, whose second one sleeps, some steps measure own
backward, too: there the mean counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import environment
from startup import BIN, PEER, _Aggregator, _environ

_BLOCKS = 5
LOOP = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
kind, rounds, count, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if kind == "group":
    import subprocess
    rendezvous = f"file://{os.path.abspath(out)}.{os.getpid()}"
    code = (
        "import sys, torch\\n"
        "torch.distributed.init_process_group('gloo', init_method=sys.argv[1], rank=1, world_size=2)\\n"
        "sys.stdin.read()"
    )
    partner = subprocess.Popen([sys.executable, "-c", code, rendezvous], stdin=subprocess.PIPE)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=2)

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

def run_for(seconds, block):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        block(500)
"""

OURS = (
    LOOP
    + """
import traceml
block(2000)
plain = [block(count) for _ in range(rounds)]
recorder = traceml.init()
block(2000)
first = [block(count) for _ in range(rounds)]
run_for(1, block)
traced = [block(count) for _ in range(2 * rounds)]
own = recorder.instrumentation.hook_ns_per_step() if traceml.is_enabled() else 0
traceml.shutdown()
block(2000)
plain += [block(count) for _ in range(rounds)]
json.dump({"plain": plain, "traced": traced, "first": first, "own_ns": own}, open(out, "w"))
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

PLAIN = LOOP + 'run_for(1, block); json.dump([block(count) for _ in range(rounds)], open(out, "w"))'

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

run_for(1, traced)
json.dump([traced(count) for _ in range(rounds)], open(out, "w"))
"""
)


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {}
        with _Aggregator(folder) as address:
            for kind in ("sgd", "adamw", "group"):
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
    parser.add_argument("--steps", type=int, default=1000, help="steps per block")
    parser.add_argument("--seconds", type=int, default=20, help="how long to run at full speed")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure_ours(kind: str, options: argparse.Namespace, folder: Path, address: dict[str, str]) -> dict[str, float]:
    """Plain and traced blocks in turn, in one process per round, and the same without tracing."""
    rounds, untraced = [], []
    for _ in range(options.rounds):
        for switch, results in (("1", rounds), ("0", untraced)):
            environ = address | {"TRACEML_ENABLED": switch}
            results.append(_script(OURS, folder, [kind, str(_BLOCKS), str(options.steps)], environ))

    found = {arm: _fastest([block for one in rounds for block in one[arm]]) for arm in ("plain", "traced", "first")}
    still = {arm: _fastest([block for one in untraced for block in one[arm]]) for arm in ("plain", "traced")}
    plain_us = _typical_us(found["plain"])
    added, first = (_typical_us(found[arm]) - plain_us for arm in ("traced", "first"))
    mean = _typical_us(found["traced"], _usual_mean) - _typical_us(found["plain"], _usual_mean)
    noise = _typical_us(still["traced"]) - _typical_us(still["plain"])
    own_us = statistics.median(one["own_ns"] for one in rounds) / 1e3
    p999 = {arm: _quantile([step for block in found[arm] for step in block], 0.999) / 1e3 for arm in still}
    print(
        f"{kind}: plain {plain_us:.1f} us, added {added:+.2f} us (goal: 1.5), "
        f"mean {mean:+.2f} us, in the first second {first:+.2f} us, without tracing {noise:+.2f} us; "
        f"p99.9 plain {p999['plain']:.0f} us, traced {p999['traced']:.0f} us (goal: + 500); "
        f"the rank's own estimate {own_us:.1f} us"
    )
    return {
        "plain_us": plain_us,
        "added_us": added,
        "added_mean_us": mean,
        "added_first_us": first,
        "noise_us": noise,
        "own_us": own_us,
    } | {f"p999_{arm}_us": value for arm, value in p999.items()}


def _fastest(blocks: list[list[int]]) -> list[list[int]]:
    """Return the tenth of the blocks whose median step is shortest."""
    return sorted(blocks, key=statistics.median)[: max(len(blocks) // 10, 1)]


def _typical_us(blocks: list[list[int]], typical: Callable[[list[int]], float] = statistics.median) -> float:
    return statistics.fmean(typical(block) for block in blocks) / 1e3


def _usual_mean(block: list[int]) -> float:
    return statistics.fmean(sorted(block)[: len(block) * 99 // 100])


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
    plain: list[list[int]] = []
    traced: list[list[int]] = []
    for _ in range(options.rounds):
        for code, values, words in (
            (PLAIN, plain, [str(peer / "python")]),
            (THEIRS, traced, [str(peer / "traceml"), "run"]),
        ):
            values += _script(code, folder, ["sgd", str(_BLOCKS), str(options.steps)], {}, words)

    medians = [_typical_us(_fastest(arm)) for arm in (plain, traced)]
    p999 = [_quantile([step for block in _fastest(arm) for step in block], 0.999) / 1e3 for arm in (plain, traced)]
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
