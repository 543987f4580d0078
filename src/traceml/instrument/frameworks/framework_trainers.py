"""Calls of Hugging Face, Lightning, Keras and Opacus, timed in every traced training, also without our callbacks.

Lightning calls `training_step`, not the model, and calls it inside the optimizer's step. So `training_step` is timed as
the forward, as users of Lightning see it. Trainers save more than torch.save writes. A training that
resumes from a checkpoint continues its step numbers. The optimizers of Keras are not torch's and have no method `step`.
Those of Opacus clip the gradients and add noise before they step the user's optimizer, or only clip them and skip it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from traceml.instrument.frameworks.framework_calls import FrameworkCalls

__all__ = ["TRAINERS"]

_LIGHTNING_STEPS = ("training_step", "validation_step")


def _hugging_face(hooks: FrameworkCalls) -> None:
    module: Any = sys.modules["transformers.trainer"]
    hooks.time_saving(module.Trainer, "_save_checkpoint")
    hooks.time_saving(module.Trainer, "save_model")
    hooks.time_update(module.Accelerator, "clip_grad_norm_")
    hooks.before_call(
        module.CallbackHandler, "on_train_begin", lambda *call: _continue_steps(hooks, call[2].global_step)
    )


def _lightning_strategy(package: str) -> Callable[[FrameworkCalls], None]:
    def install(hooks: FrameworkCalls) -> None:
        base = sys.modules[f"{package}.strategies.strategy"].Strategy
        for name in _LIGHTNING_STEPS:
            hooks.time_forward(base, name, _module_of)

        hooks.before_call(base, "on_train_start", lambda strategy: _begin_fit(hooks, strategy))

    return install


def _saving(module: str, owner: str, name: str) -> Callable[[FrameworkCalls], None]:
    return lambda hooks: hooks.time_saving(getattr(sys.modules[module], owner), name)


def _keras(hooks: FrameworkCalls) -> None:
    hooks.time_update(sys.modules["keras.src.optimizers.base_optimizer"].BaseOptimizer, "apply")


def _opacus(hooks: FrameworkCalls) -> None:
    for found in vars(sys.modules["opacus.optimizers"]).values():
        if isinstance(found, type):
            hooks.time_update(found, "pre_step")


TRAINERS: dict[str, Callable[[FrameworkCalls], None]] = {
    "transformers.trainer": _hugging_face,
    "keras.src.optimizers.base_optimizer": _keras,
    "opacus.optimizers": _opacus,
    **{f"{name}.strategies.strategy": _lightning_strategy(name) for name in ("lightning.pytorch", "pytorch_lightning")},
    **{
        module: _saving(module, owner, name)
        for module, owner, name in (
            ("lightning.pytorch.trainer.trainer", "Trainer", "save_checkpoint"),
            ("pytorch_lightning.trainer.trainer", "Trainer", "save_checkpoint"),
            ("lightning.fabric.fabric", "Fabric", "save"),
            ("lightning_fabric.fabric", "Fabric", "save"),
            ("accelerate.accelerator", "Accelerator", "save_state"),
        )
    },
}
"""Module of a framework -> function that times its calls, once the script has imported it."""


def _module_of(strategy: Any) -> Any:
    return strategy.lightning_module


def _begin_fit(hooks: FrameworkCalls, strategy: Any) -> None:
    """Time the steps of a strategy that has its own, and continue its step numbers: Lightning counts per optimizer."""
    for name in _LIGHTNING_STEPS:
        owner = next((cls for cls in type(strategy).__mro__ if name in vars(cls)), type(strategy))
        hooks.time_forward(owner, name, _module_of)

    if len(strategy.optimizers) == 1:
        _continue_steps(hooks, strategy.lightning_module.trainer.global_step)


def _continue_steps(hooks: FrameworkCalls, step: int) -> None:
    """Continue the step numbers of a resumed training; do nothing if it is new, or has fewer steps than the run."""
    if step:
        hooks.set_step(int(step))
