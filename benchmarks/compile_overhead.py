"""What hooks cost a compiled model, and whether torch.compile sees any difference.

    python benchmarks/compile_overhead.py [--rounds 9] [--steps 1000] [--backend inductor] [--json FILE]

A two-layer model, compiled in three ways; blocks with and without hooks take turns in one process per way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LOOP = """
import json, sys, time
import torch
from pathlib import Path
from traceml.database.flight.flight import FlightFile
from traceml.instrument import install

torch.set_num_threads(1)
form, backend, rounds, count, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.second(self.first(x).relu())

model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
if form == "in place":
    model.compile(backend=backend)
    call = model
else:
    call = torch.compile(model, backend=backend, fullgraph=form == "full graph")
x = torch.randn(32, 64)
clock = time.perf_counter_ns

def block(n):
    took = []
    for _ in range(n):
        start = clock()
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
        took.append(clock() - start)
    return took

block(500)
counters = torch._dynamo.utils.counters
before = [sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]]
flight = FlightFile.create(folder, {})
plain, traced = [], []
for _ in range(rounds):
    block(100)
    plain.append(block(count))
    instrumentation = install(flight)
    block(300)
    traced.append(block(count))
    assert instrumentation.clock.errors == 0
    instrumentation.uninstall()
after = [sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]]
flight.close(unlink=True)
print(json.dumps({"plain": plain, "traced": traced, "breaks": [before[0], after[0]], "graphs": [before[1], after[1]]}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1000, help="steps per block")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    found = {}
    for form in ("torch.compile(model)", "in place", "full graph"):
        found[form] = measure(form, options)

    if options.json:
        options.json.write_text(json.dumps(found))

    return int(any(case["new_breaks"] or case["new_graphs"] for case in found.values()))


def measure(form: str, options: argparse.Namespace) -> dict[str, float]:
    """Plain and hooked blocks in turn, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [form, options.backend, str(options.rounds), str(options.steps), folder]
        done = subprocess.run([sys.executable, "-c", LOOP, *arguments], capture_output=True, text=True, check=False)

    if done.returncode != 0:
        raise SystemExit(done.stderr)

    case = json.loads(done.stdout.splitlines()[-1])
    medians = {arm: [statistics.median(block) / 1e3 for block in case[arm]] for arm in ("plain", "traced")}
    added = statistics.median(t - p for p, t in zip(medians["plain"], medians["traced"], strict=True))
    breaks, graphs = case["breaks"][1] - case["breaks"][0], case["graphs"][1] - case["graphs"][0]
    plain = statistics.median(medians["plain"])
    print(f"{form}: plain {plain:.1f} us, added {added:+.2f} us; {breaks} new graph breaks, {graphs} new graphs")
    return {"plain_us": plain, "added_us": added, "new_breaks": breaks, "new_graphs": graphs}


if __name__ == "__main__":
    sys.exit(main())
