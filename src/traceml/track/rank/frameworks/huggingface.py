"""Capture of Hugging Face: values of `Trainer.log`, and the `TrainingArguments` as parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from traceml.database.schema import MetricKind
from traceml.track.plugins.plugin_metadata import PluginMetadata
from traceml.track.rank.frameworks.framework_capture import FrameworkCapture

__all__ = ["HuggingFaceCapture"]


class HuggingFaceCapture(FrameworkCapture):
    """Captures the handler through which a `Trainer` calls its callbacks; nothing that callbacks log elsewhere."""

    metadata = PluginMetadata(name="huggingface", version="1", description="transformers' Trainer")
    kind = MetricKind.HUGGINGFACE

    def targets(self) -> Mapping[str, Callable[[ModuleType], None]]:
        """Return the module of the handler."""
        return {"transformers.trainer_callback": self._patch}

    def _patch(self, module: ModuleType) -> None:
        self.around(module.CallbackHandler, "on_log", _logged, self.values)
        self.around(module.CallbackHandler, "on_train_begin", _arguments, self.params)


def _logged(
    _handler: Any, _args: Any, state: Any, _control: Any, logs: Mapping[str, Any], **_: Any
) -> tuple[dict[str, Any], int]:
    return dict(logs), int(state.global_step)  # copied: callbacks remove keys


def _arguments(_handler: Any, args: Any, *_: Any, **__: Any) -> dict[str, Any]:
    return dict(args.to_sanitized_dict())  # without the hub's token
