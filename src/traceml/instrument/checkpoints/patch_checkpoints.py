"""Wrappers of the functions that save checkpoints: one each, for time, line, folder and mark.

An exception that passes through a function of this file ended a save: see `recorder.exits`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.compiler import is_dynamo_compiling

from traceml.database.schema import Phase
from traceml.fail_open import fail_open
from traceml.instrument.checkpoints.checkpoint_marks import CheckpointMarks, Find
from traceml.instrument.checkpoints.save_log import SaveFolder, SaveLog
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock

__all__ = ["CheckpointPatches"]

_log = logging.getLogger("traceml")
_CHECKPOINT = int(Phase.CHECKPOINT)


class CheckpointPatches:
    """Wraps functions that save or load.

    Args:
        clock: times saves as `checkpoint`.
        folder: is called with each path before it is written, so that it is known when the disk is full.
        marks: are called with each path that was saved or loaded.
    """

    def __init__(self, clock: StepClock, log: SaveLog, folder: SaveFolder, marks: CheckpointMarks) -> None:
        self._clock, self._log, self._folder, self._marks = clock, log, folder, marks

    def patch_torch(self, patches: Patches) -> None:
        """Wrap `torch.save` and `torch.load`."""
        modules = sys.modules["torch"], sys.modules["torch.serialization"]
        patches.wrap_in(modules, "save", partial(self.saving, find=_argument(1, "f")))
        patches.wrap_in(modules, "load", partial(self._marks.loading, find=_argument(0, "f")))

    def patch_distributed(self, patches: Patches) -> None:
        """Wrap the functions of `torch.distributed.checkpoint`, whose checkpoint is a folder."""
        package = sys.modules["torch.distributed.checkpoint"]
        find = _argument(None, "checkpoint_id")
        for name, wrap in (
            ("save", self.saving),
            ("async_save", partial(self.saving, is_written=False)),
            ("save_state_dict", self.saving),
            ("load", self._marks.loading),
        ):
            original = getattr(package, name, None)
            if original is not None:
                patches.wrap_in((package, sys.modules.get(original.__module__)), name, partial(wrap, find=find))

    def patch_safetensors(self, patches: Patches) -> None:
        """Wrap two inner functions of safetensors: other packages hold references to the public ones."""
        module = sys.modules["safetensors.torch"]
        for name, find in (("_flatten", None), ("serialize_file", _argument(1, "filename"))):
            original = vars(module).get(name)
            if callable(original):
                patches.wrap(module, name, self.saving(original, find))

    @uncounted
    def saving(
        self, original: Callable[..., Any], find: Find | None = None, *, is_written: bool = True
    ) -> Callable[..., Any]:
        """Return a function that calls `original`, which saves.

        Args:
            find: finds its path or file; None: the first one among the arguments, which may be no checkpoint's.
            is_written: whether its files are complete when it returns.
        """
        clock, log = self._clock, self._log

        def call(*args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():
                return original(*args, **kwargs)

            target, steps = self._begin(find, args, kwargs)
            began = clock.enter(_CHECKPOINT)
            if began is None:
                if clock.current == _CHECKPOINT and clock.is_training_thread():  # it is part of another one
                    log.add_nested(clock, args, kwargs)

                result = original(*args, **kwargs)
            else:
                try:
                    result = original(*args, **kwargs)
                finally:
                    clock.leave(_CHECKPOINT, began)
                    log.end(clock, args, kwargs, began[1], sys._getframe(1), is_written=is_written)

            if target is not None:
                with fail_open(_log, "instrument", "a checkpoint could not be noted", once=True):
                    self._marks.saved(target, steps)

            return result

        return call

    def _begin(self, find: Find | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, int]:
        """Return the path or file of a save, None if it has none, and how many updates it has."""
        with fail_open(_log, "instrument", "the folder of checkpoints is not known", once=True):
            target = None if find is None else find(args, kwargs)
            if target is not None:
                self._folder.record(target)

            return target, self._marks.steps()

        return None, 0


def _argument(position: int | None, name: str) -> Find:
    """Return a function that finds an argument by its name, or by its position if it has one."""

    def find(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        return args[position] if position is not None and position < len(args) else kwargs.get(name)

    return find
