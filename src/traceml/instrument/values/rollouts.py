"""Rollouts of the script's own simulator: what the model sees in `eval()` is trained on afterwards.

Both an evaluation and a rollout call the model without gradients between training steps. But only a rollout collects
data: samples of its calls are among those of the next training batches, and they are new ones each time. A language
model that is rewarded for its answers is trained on texts that begin with its prompts.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["RolloutSearch", "is_readable"]

_ROWS = 16  # samples of a call that are remembered
_MAX_NUMBERS = 1 << 16
_DISTINCT = 3  # numbers of a sample that differ: a constant one could be equal by chance
_FOUND = 3  # samples of a call must be trained on this many times, different ones each time
_BATCHES = 8  # training batches after a call in which its samples are looked for: they are drawn in another order
_SEARCHES = 256  # after this many batches without, there are none: a search takes some 20 us


class RolloutSearch:
    """Compares the first call of each period without gradients with the training batches after it."""

    def __init__(self) -> None:
        self._seen: Any = None
        self._trained_on: set[tuple[float, ...]] = set()
        self._searches = self._batches_left = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is looked for any more."""
        return self._searches >= _SEARCHES or self.found

    @property
    def found(self) -> bool:
        """Whether the calls collect what is trained on."""
        return len(self._trained_on) >= _FOUND

    @property
    def is_looking(self) -> bool:
        """Whether the next training batch may have the samples."""
        return self._seen is not None and not self.is_over

    def called(self, tensor: Any) -> None:
        """Remember samples of a call without gradients."""
        self._seen, self._batches_left = None, _BATCHES
        if not is_readable(tensor) or not tensor.numel():
            return

        rows = tensor.detach() if tensor.dim() > 1 else tensor.detach()[None]  # a state alone, without a batch
        if rows[0].numel() * _ROWS <= _MAX_NUMBERS:
            self._seen = rows.shape[0], rows[:_ROWS].clone()

    def trained(self, tensor: Any) -> None:
        """Look for the samples in a training batch, which has more of them than a call, or longer texts."""
        seen, self._batches_left = self._seen, self._batches_left - 1
        if self._batches_left <= 0:
            self._seen = None

        if seen is None or not is_readable(tensor) or tensor.dtype != seen[1].dtype:
            return

        continued = _continued(tensor, seen[1])
        if continued is None and (tensor.shape[0] <= seen[0] or tensor.shape[1:] != seen[1].shape[1:]):
            return

        self._searches += 1
        with torch.no_grad():
            batch = (tensor if continued is None else continued).detach().flatten(1)
            for row in seen[1].flatten(1):
                if bool((batch == row).all(1).any()):
                    self._record(row)
                    self._seen = None
                    return

    def _record(self, row: Any) -> None:
        numbers = tuple(row[:64].tolist())
        if len(set(numbers)) >= _DISTINCT:
            self._trained_on.add(numbers)


def is_readable(tensor: Any) -> bool:
    """Return whether numbers of a tensor can be read unseen: not where its class or a mode sees each operation."""
    if type(tensor) is not torch.Tensor or torch._C._len_torch_dispatch_stack():
        return False

    return bool(tensor.is_cpu) and tensor.layout is torch.strided


def _continued(batch: Any, texts: Any) -> Any:
    """Return the beginnings of the longer texts of a batch, as long as others; None where they are no longer."""
    is_text = batch.dim() == texts.dim() == 2 and not batch.is_floating_point()
    return batch[:, : texts.shape[1]] if is_text and batch.shape[1] > texts.shape[1] else None
