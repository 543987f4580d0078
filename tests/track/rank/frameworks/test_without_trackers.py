"""Numbers that frameworks log are metrics of the run also where no tracker is set."""

from __future__ import annotations

from importlib import import_module

from tests.track.rank.frameworks.conftest import RunScript
from traceml.database.schema import MetricKind
from traceml.runs.report.report import build_report
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import BUILT_IN
from traceml.track.rank.capture_without_trackers import MODULES

SCRIPT = """
    import os
    import traceml

    traceml.init(local=False, backend=[])
    import sys
    assert "traceml.track.rank.capture_lifecycle" not in sys.modules  # nothing is paid before a framework is used

    import torch
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter("events") as writer:
        for step in range(5):
            writer.add_scalar("written", 0.5 * step, step)
        writer.add_image("picture", torch.zeros(3, 8, 9), 1)
        writer.add_histogram("weights", torch.arange(10.0), 1)

    with traceml.Experiment("inside", backend=["jsonl"]), SummaryWriter("inside") as writer:
        writer.add_image("with a tracker", torch.zeros(3, 8, 9), 1)

    from transformers import Trainer, TrainingArguments

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return {"x": torch.full((4,), float(index)), "labels": torch.tensor([1.0])}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def forward(self, x, labels=None):
            out = self.layer(x)
            return {"loss": (out - labels).pow(2).mean(), "logits": out}

    arguments = TrainingArguments(
        "out", num_train_epochs=1, per_device_train_batch_size=4, logging_steps=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )
    Trainer(model=Model(), args=arguments, train_dataset=Data()).train()

    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, _):
            self.log("fitted", 2.5)
            return self.layer(batch["x"]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    trainer = pl.Trainer(
        max_epochs=1, log_every_n_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accelerator="cpu", enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Data(), batch_size=4))
    traceml.shutdown()
    print("{}")
"""


def test_three_frameworks(captured: RunScript) -> None:
    """SummaryWriter, Trainer and Lightning; images and histograms are kept only while there is a tracker."""
    found = captured(SCRIPT, imports="torch")

    assert ("written", 4, 2.0) in found.values(MetricKind.TENSORBOARD)
    assert [step for name, step, _ in found.values(MetricKind.HUGGINGFACE) if name == "loss"] == [2, 4]
    assert ("fitted", 3, 2.5) in found.values(MetricKind.LIGHTNING)
    assert [row["name"] for row in found.logged["image"]] == ["with a tracker"]
    assert "histogram" not in found.logged

    report = build_report(found.run_dir)
    assert report.metrics["written"].count == 5
    assert {"loss", "fitted"} <= report.metrics.keys()
    assert [tracker.backend for tracker in report.trackers if tracker.backend != "jsonl"] == []


def test_turned_off(captured: RunScript) -> None:
    """`frameworks=[]` captures nothing."""
    found = captured(
        """
        import traceml

        traceml.init(local=False, frameworks=[])
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter("events") as writer:
            writer.add_scalar("written", 0.5, 1)
        traceml.shutdown()
        """
    )

    assert found.values() == []


def test_the_watched_modules_are_those_of_the_captures() -> None:
    """Each built-in capture patches modules in the packages that are watched."""
    assert MODULES.keys() == BUILT_IN[PluginType.FRAMEWORK].keys()
    for name, packages in MODULES.items():
        place, _, capture = BUILT_IN[PluginType.FRAMEWORK][name].partition(":")
        for module in getattr(import_module(place), capture)().targets():
            assert any(module == package or module.startswith(f"{package}.") for package in packages)
