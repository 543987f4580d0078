"""What a step by Hugging Face's or Lightning's trainer costs more with our callback than with plain tracing.

    python benchmarks/integrations.py [--rounds 15] [--steps 400] [--json FILE]

Both arms are traced by `traceml.init`; one of them has the callback as well. A trainer's step takes hundreds of
microseconds and jitters by tens, so two figures are given: the median step of whole trainings in turn, and, also in
turn, all that a callback adds to a step, called as the frameworks call it: each hook of a step through the framework's
own dispatcher, and the functions that are timed, of which the originals do nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

GOAL_US = 2.0


def main() -> int:
    options = _options()
    if options.framework:
        print(json.dumps({"huggingface": huggingface, "lightning": lightning}[options.framework](options)))
        return 0

    found = {name: _own_process(name, options) for name in ("huggingface", "lightning")}
    for name, one in found.items():
        print(
            f"{name}: calls of a step {one['calls_us']:+.2f} us (goal: at most {GOAL_US:.0f}); "
            f"whole step {one['step_us']:.0f} us, with the callback {one['added_us']:+.1f} us "
            f"(spread of equal blocks {one['spread_us']:.1f} us)"
        )

    if options.json:
        options.json.write_text(json.dumps(found))

    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=400, help="steps per training")
    parser.add_argument("--framework", choices=("huggingface", "lightning"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: at least 2, as blocks are compared with the next ones")

    return options


def _own_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure in a process of its own, in a folder of its own, with an aggregator of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--framework", name]
        command += ["--rounds", str(options.rounds), "--steps", str(options.steps)]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")}
        environ = kept | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "TRACEML_PORT": "29790"}
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)

    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")

    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def paired(plain: Callable[[], float], ours: Callable[[], float], rounds: int) -> dict[str, float]:
    """Return the medians of plain, ours, and their difference, of blocks in turn; and how equal blocks differ."""
    plain(), ours()
    pairs = [(plain(), ours()) for _ in range(rounds)]
    return {
        "plain": statistics.median(one for one, _ in pairs),
        "added": statistics.median(other - one for one, other in pairs),
        "spread": statistics.median(abs(a[0] - b[0]) for a, b in itertools.pairwise(pairs)),
    }


class Stamped(list[Any]):
    """Rows of a data set that note when each is asked for."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__(rows)
        self.stamps: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.stamps.append(time.perf_counter_ns())
        return super().__getitem__(index)

    def step_us(self) -> float:
        """Return the median time from one row to the next in us, of the last training."""
        took = [after - before for before, after in itertools.pairwise(self.stamps)]
        self.stamps.clear()
        return statistics.median(took) / 1e3


def _block(call: Callable[[], object], count: int = 2000) -> float:
    """Return the time of a call in us, the median of its repetitions."""
    clock = time.perf_counter_ns
    took = []
    for _ in range(count):
        start = clock()
        call()
        took.append(clock() - start)

    return statistics.median(took) / 1e3


def _figures(steps: dict[str, float], calls: dict[str, float]) -> dict[str, float]:
    return {
        "step_us": steps["plain"], "added_us": steps["added"], "spread_us": steps["spread"],
        "calls_us": calls["added"],
    }  # fmt: skip


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def huggingface(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

    import traceml
    from traceml.integrations.huggingface import TraceMLCallback

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
            out = self.layer(x)
            return {"loss": (out - labels).square().mean(), "logits": out}

    rows = Stamped([{"x": torch.randn(8), "labels": torch.tensor([1.0])} for _ in range(options.steps)])

    def trainer(*callbacks: Any) -> Trainer:
        arguments = TrainingArguments(
            "out", num_train_epochs=1, per_device_train_batch_size=1, use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model=Model(), args=arguments, train_dataset=rows, callbacks=list(callbacks))

    def step_us(*callbacks: Any) -> float:
        trainer(*callbacks).train()
        return rows.step_us()

    traceml.init(local=True)
    steps = paired(step_us, lambda: step_us(TraceMLCallback()), options.rounds)
    traceml.shutdown()

    Accelerator.clip_grad_norm_ = lambda *_: None
    arms = []
    for callbacks in ((), (TraceMLCallback(),)):
        one = trainer(*callbacks)
        arms.append((one, one.callback_handler))

    def calls(one: Any, handler: Any) -> Callable[[], None]:
        args, state, control, clip = one.args, one.state, one.control, one.accelerator

        def step() -> None:
            handler.on_step_begin(args, state, control)
            clip.clip_grad_norm_(None, 1.0)
            handler.on_pre_optimizer_step(args, state, control)
            handler.on_optimizer_step(args, state, control)
            handler.on_step_end(args, state, control)

        return step

    def block(arm: int) -> float:
        if arm:
            arms[1][0].callback_handler.on_train_begin(arms[1][0].args, arms[1][0].state, arms[1][0].control)
        else:
            traceml.init(local=True)

        took = _block(calls(*arms[arm]))
        traceml.shutdown()
        return took

    return _figures(steps, paired(lambda: block(0), lambda: block(1), options.rounds))


# --- Lightning -------------------------------------------------------------------------------------------------------


def lightning(options: argparse.Namespace) -> dict[str, float]:
    import logging

    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.trainer.call import _call_callback_hooks

    import traceml
    from traceml.integrations.lightning import TraceMLCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, _index: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    rows = Stamped(list(torch.randn(options.steps, 8)))

    def trainer(*callbacks: Any) -> Any:
        return pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=list(callbacks),
        )  # fmt: skip

    def step_us(*callbacks: Any) -> float:
        trainer(*callbacks).fit(Module(), torch.utils.data.DataLoader(rows, batch_size=1))
        return rows.step_us()

    # Each with tracing of its own: what Lightning's functions are replaced by goes with the recorder alone.
    def traced(*callbacks: Any) -> float:
        traceml.init(local=True)
        try:
            return step_us(*callbacks)
        finally:
            traceml.shutdown()

    steps = paired(traced, lambda: traced(TraceMLCallback()), options.rounds)

    def calls(callbacks: list[Any]) -> Callable[[], None]:
        one, module = trainer(*callbacks), Module()
        one.strategy.connect(module)
        module.training_step = lambda *_: None
        names = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
                 "on_before_optimizer_step", "on_train_batch_end")  # fmt: skip
        for callback in callbacks:
            callback.on_fit_start(one, module)

        def step() -> None:
            for name in names:
                _call_callback_hooks(one, name)

            one.strategy.training_step(None, 0)

        return step

    def block(*callbacks: Any) -> float:
        traceml.init(local=True)
        took = _block(calls(list(callbacks)))
        traceml.shutdown()
        return took

    assert "training_step" not in vars(SingleDeviceStrategy)
    return _figures(steps, paired(block, lambda: block(TraceMLCallback()), options.rounds))


if __name__ == "__main__":
    sys.exit(main())
