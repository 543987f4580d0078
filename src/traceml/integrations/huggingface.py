"""Hugging Face `Trainer`: `TrainingArguments(report_to="traceml")`, `TraceMLCallback()`, or `TraceMLTrainer`.

Steps and phases are detected as in any script. This adds the start and end of a training, also by an exception.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from traceml.installation import install_command
from traceml.integrations.training_session import TrainingSession
from traceml.recorder.tracing_api import set_step

try:
    from transformers import Trainer, TrainerCallback
    from transformers.integrations import integration_utils
except ImportError as error:
    raise ImportError(
        f"traceml.integrations.huggingface needs transformers, which cannot be imported ({error}): "
        + install_command("huggingface")
    ) from error

__all__ = ["TraceMLCallback", "TraceMLTrainer"]


def _nothing(
    _self: Any, _args: Any, _state: Any, _control: Any, model: Any = None, processing_class: Any = None,
    optimizer: Any = None, lr_scheduler: Any = None, train_dataloader: Any = None, eval_dataloader: Any = None,
    **_: Any,
) -> None:  # fmt: skip
    """Do nothing. Named parameters make the call 0.2 us; collecting them into a dictionary makes it 0.7 us."""
    del model, processing_class, optimizer, lr_scheduler, train_dataloader, eval_dataloader


class TraceMLCallback(TrainerCallback):  # type: ignore[misc]
    """Traces each `train()` and shows the verdict at its end, on rank 0.

    Where tracing already runs, by `traceml.init()` or `traceml run`, that recorder stays, and prints its own verdict.

    Examples:
        >>> trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[TraceMLCallback(project="vision")])
        >>> trainer.train()

    Args:
        report: show the verdict.
        settings: as for `traceml.init`; `local=True` and `on_missing="warn"` unless set here or elsewhere.

    Raises:
        SettingsError: an unknown setting or a bad value.
    """

    on_step_begin = on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = _nothing

    def __init__(self, *, report: bool = True, **settings: Any) -> None:
        self.session = TrainingSession(settings, report=report)
        _watch(self)

    def on_init_end(self, *_: Any, **__: Any) -> None:
        """Watch a copy of the callback too."""
        _watch(self)

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Begin: group, model and optimizer exist. A resumed training continues its step numbers."""
        name = getattr(args, "run_name", None)
        hooks = self.session.begin(**({"run_name": str(name)} if name and name != args.output_dir else {}))
        if hooks is not None:
            set_step(int(state.global_step))


class TraceMLTrainer(Trainer):  # type: ignore[misc]
    """A `Trainer` with a `TraceMLCallback`.

    Examples:
        >>> trainer = TraceMLTrainer(model=model, args=args, train_dataset=data, traceml_kwargs={"project": "vision"})
        >>> trainer.train()

    Args:
        args: as for `Trainer`.
        traceml_enabled: False makes it a plain `Trainer`.
        traceml_kwargs: for `TraceMLCallback`.
        kwargs: as for `Trainer`.
    """

    def __init__(
        self, *args: Any, traceml_enabled: bool = True, traceml_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if traceml_enabled and not _callbacks(self):
            self.add_callback(TraceMLCallback(**(traceml_kwargs or {})))


# Known by name even where torch has not called our entry point.
getattr(integration_utils, "INTEGRATION_TO_CALLBACK", {}).setdefault("traceml", TraceMLCallback)


# --- end of a training -------------------------------------------------------------------------------------------

_watched: set[int] = set()  # ids of the callbacks that are alive


def _watch(callback: TraceMLCallback) -> None:
    """Wrap `train` as long as a callback lives, because no event reports an exception."""
    if id(callback) in _watched:
        return

    if not _watched:
        Trainer.train = _ending(Trainer.train)

    _watched.add(id(callback))
    weakref.finalize(callback, _unwatch, id(callback)).atexit = False


def _unwatch(ident: int) -> None:
    _watched.discard(ident)
    if not _watched and hasattr(Trainer.train, "_traceml_original"):
        Trainer.train = Trainer.train._traceml_original


def _ending(original: Any) -> Any:
    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = original(self, *args, **kwargs)
        except BaseException as error:
            _end(self, error)
            raise

        _end(self, None)
        return result

    train._traceml_original = original  # type: ignore[attr-defined]
    return train


def _end(trainer: Any, error: BaseException | None) -> None:
    for callback in _callbacks(trainer):
        callback.session.end(error)


def _callbacks(trainer: Any) -> list[TraceMLCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, TraceMLCallback)]
