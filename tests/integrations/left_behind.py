"""State that hooks and captures replace: equal before and after when everything is restored."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils.data import dataloader

__all__ = ["digest", "state_of"]

_MODULES = {
    "transformers.trainer": ("Trainer",),
    "transformers.trainer_callback": ("CallbackHandler",),
    "accelerate.accelerator": ("Accelerator",),
    "accelerate.optimizer": ("AcceleratedOptimizer",),
    "keras.src.optimizers.base_optimizer": ("BaseOptimizer",),
    "safetensors.torch": (),
    "lightning.pytorch.trainer.trainer": ("Trainer",),
    "lightning.pytorch.strategies.strategy": ("Strategy",),
    "pytorch_lightning.trainer.trainer": ("Trainer",),
    "pytorch_lightning.strategies.strategy": ("Strategy",),
}


def state_of() -> dict[str, Any]:
    """Return every attribute that could have been replaced, by name."""
    owners: dict[str, Any] = {
        "torch": torch, "autograd": torch.autograd, "loader": dataloader.DataLoader,
        "iterator": dataloader._BaseDataLoaderIter, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW,
        "optimizer": torch.optim.Optimizer, "module": torch.nn.Module,
    }  # fmt: skip
    for name, kinds in _MODULES.items():
        if name in sys.modules:
            owners[name] = sys.modules[name]
            owners |= {f"{name}.{kind}": getattr(sys.modules[name], kind) for kind in kinds}

    return {
        f"{owner}.{name}": value
        for owner, holder in owners.items()
        for name, value in vars(holder).items()
        if callable(value) and not name.startswith("__getattr")
    }


def digest(model: torch.nn.Module) -> str:
    """Return all parameters to the last bit."""
    return "".join(parameter.detach().numpy().tobytes().hex() for parameter in model.parameters())
