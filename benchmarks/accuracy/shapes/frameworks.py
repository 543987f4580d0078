"""The same small training by Hugging Face's Trainer, Lightning and Accelerate."""

import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

torch.manual_seed(0)
FAULT = sys.argv[2] if len(sys.argv) > 2 else "none"


class Rows(Dataset):
    def __init__(self, count=960):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if FAULT == "input":
            augment()

        return {"x": torch.randn(64), "labels": index % 10}


def augment():
    time.sleep(0.002)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
        )

    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def hugging_face():
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        "out",
        per_device_train_batch_size=8,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        logging_steps=20,
        disable_tqdm=True,
    )
    Trainer(model=Net(), args=arguments, train_dataset=Rows(), eval_dataset=Rows(80)).train()


def lightning():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        enable_model_summary=False,
    ).fit(Module(), DataLoader(Rows(), 8))


def accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Net()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), DataLoader(Rows(), 8))
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()


if __name__ == "__main__":
    {"hf": hugging_face, "lightning": lightning, "accelerate": accelerate}[sys.argv[1]]()
