"""Values that transformers' real Trainer logs are captured."""

from __future__ import annotations

from tests.track.rank.frameworks.conftest import RunScript
from traceml.database.schema import MetricKind

SCRIPT = """
    import json
    import torch
    import traceml
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import CallbackHandler

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

    original = vars(CallbackHandler)["on_log"]
    with traceml.Experiment("capture", backend=["jsonl"]):
        arguments = TrainingArguments(
            "out", num_train_epochs=1, per_device_train_batch_size=4, logging_steps=1, report_to=["tensorboard"],
            use_cpu=True, save_strategy="no", eval_strategy="epoch", disable_tqdm=True, learning_rate=0.03,
            hub_token="hf_" + "a" * 34,
        )
        trainer = Trainer(model=Model(), args=arguments, train_dataset=Data(), eval_dataset=Data())
        trainer.train()

    traceml.shutdown()
    put_back = vars(CallbackHandler)["on_log"] is original
    print(json.dumps({"history": trainer.state.log_history, "put_back": put_back}))
"""


def test_trainer(captured: RunScript) -> None:
    """Names, steps and values are those of the Trainer's own history; its TensorBoard callback adds none."""
    found = captured(SCRIPT)
    expected = [
        (name, int(line["step"]), float(value))
        for line in found.said["history"]
        for name, value in line.items()
        if name != "step"
    ]

    assert len(expected) == 4 * 4 + 5 + 6
    assert found.values() == expected
    assert {row.kind for row in found.metrics} == {MetricKind.HUGGINGFACE}
    [params] = [row["params"] for row in found.logged["params"]]
    assert params["learning_rate"] == 0.03
    assert "a" * 34 not in repr(params)
    assert found.said["put_back"]
