"""Values that Lightning's own loggers get are captured, under both import names."""

from __future__ import annotations

import csv

import pytest

from tests.track.rank.frameworks.conftest import RunScript
from traceml.database.schema import MetricKind

SCRIPT = """
    import json, sys
    from importlib import import_module
    import torch
    import traceml

    name, loggers_wanted = sys.argv[1:]
    lightning = import_module(name)
    loggers = import_module(name + ".loggers")

    class Module(lightning.LightningModule):
        def __init__(self, lr=0.1, width=4):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 1)

        def training_step(self, batch, index):
            loss = self.layer(batch[0]).pow(2).mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, index):
            self.log("val", self.layer(batch[0]).mean())

        def on_train_end(self):
            for logger in self.loggers:
                logger.log_metrics({"direct": 1.5}, 77)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    two = [loggers.CSVLogger("csv", version=0), loggers.TensorBoardLogger("events")]
    given = two if loggers_wanted == "two" else False
    connector = import_module(name + ".trainer.connectors.logger_connector.logger_connector")._LoggerConnector
    original = vars(connector)["log_metrics"]
    with traceml.Experiment("capture", backend=["jsonl"]):
        trainer = lightning.Trainer(
            max_epochs=2, logger=given, log_every_n_steps=2, accelerator="cpu", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(Module(), loader, loader)

    traceml.shutdown()
    print(json.dumps({"put_back": vars(connector)["log_metrics"] is original}))
"""


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_trainer_with_loggers(captured: RunScript, name: str) -> None:
    """Values, steps and number of values are those of the CSV logger; the TensorBoard logger's are not taken again."""
    found = captured(SCRIPT, name, "two")
    with (found.folder / "csv" / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))

    expected = [
        (key, int(line["step"]), float(value))
        for line in lines
        for key, value in line.items()
        if value and key != "step"
    ]
    assert len(expected) == 25
    assert sorted(found.values()) == sorted(expected)
    assert {row.kind for row in found.metrics} == {MetricKind.LIGHTNING}
    assert [row["params"] for row in found.logged["params"]] == [{"lr": 0.1, "width": 4}]
    assert found.said["put_back"]


def test_trainer_without_loggers(captured: RunScript) -> None:
    """`self.log` is captured also where Lightning itself would log nowhere."""
    found = captured(SCRIPT, "lightning.pytorch", "none")
    steps = [step for name, step, _ in found.values() if name == "loss_step"]

    assert steps == [1, 3, 5, 7, 9, 11, 13, 15]
    assert [step for name, step, _ in found.values() if name == "val"] == [7, 15]


def test_fabric(captured: RunScript) -> None:
    """Fabric's values are captured once, whatever its loggers do with them."""
    found = captured(
        """
        import torch, traceml
        from lightning.fabric import Fabric
        from lightning.fabric.loggers import CSVLogger, TensorBoardLogger

        with traceml.Experiment("capture", backend=["jsonl"]):
            fabric = Fabric(accelerator="cpu", loggers=[CSVLogger("csv"), TensorBoardLogger("events")])
            fabric.log("a", torch.tensor(0.25), step=3)
            fabric.log_dict({"b": 1.5, "c": 2}, step=4)

        traceml.shutdown()
        """
    )
    assert sorted(found.values(MetricKind.LIGHTNING)) == [("a", 3, 0.25), ("b", 4, 1.5), ("c", 4, 2.0)]
    assert len(found.metrics) == 3
