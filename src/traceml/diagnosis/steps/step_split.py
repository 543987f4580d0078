"""The split of a step by phase: own work, waiting for other ranks, device time.

One rule for report, verdict, charts, live view, exports and trackers:

- Device times replace what the CPU measured of the device's phases, which on CUDA is only the launch. The other phases
  count for as long as the device is idle.
- Device times are measured on some steps. On the others they are the mean of the measured ones, so that no mean mixes
  the two clocks. They are used if every rank has some.
- With them a step is the time from step to step on the device: see `step_times_on_device`.
- Backward is own work until the last local gradient. The rest of it is waiting for other ranks, which counts as `comm`.
  A single rank waits for nobody.
- Own backward is measured on some steps. On the others it is the mean of the measured ones.
- Waiting for ranks that evaluate before a step, alone or longer, is no time of the step: it is that evaluation's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import DEVICE_PHASES, PHASE_LABELS

__all__ = [
    "DEVICE_LABELS", "PHASES", "Floats", "fitted_user_times", "leave_out_waiting", "mean_own", "named_times",
    "own_backward", "put_device_times", "split_backward", "spread_device_times", "step_times_on_device",
]  # fmt: skip

Floats = NDArray[np.floating[Any]]

PHASES = (*PHASE_LABELS, "other")
"""The phases of a step; they add up to its total. As rows have it, `backward` includes the waiting inside it."""

AHEAD_SHARE = 0.2
"""If the host's step times differ by this share from those of the device, it runs ahead of it."""
MAX_AHEAD = 64
"""A host runs ahead by so many steps at most: a longer wait is more than for the device."""

DEVICE_LABELS = tuple(phase.label for phase in DEVICE_PHASES)
"""The phases whose time passes on the device, where there is one."""

_HOST_LABELS = tuple(label for label in PHASE_LABELS if label not in DEVICE_LABELS)


def put_device_times(
    times: Mapping[str, Floats], own: Floats, total: Floats, device: Mapping[str, Floats], found: NDArray[np.bool_]
) -> None:
    """Replace CPU times of steps by device times, in place.

    Args:
        times: phase -> nanoseconds of each step; all phases but `other`.
        own: own backward of each step, NaN if not measured.
        total: wall time of each step.
        device: phase -> device nanoseconds, and `backward_own`, which is negative where not measured.
        found: steps that have device times.
    """
    for phase in DEVICE_LABELS:
        np.copyto(times[phase], device[phase], where=found)

    np.copyto(own, np.where(device["backward_own"] < 0, np.nan, device["backward_own"]), where=found)
    idle = np.maximum(total - sum(times[phase] for phase in DEVICE_LABELS), 0)
    for phase in _HOST_LABELS:
        np.copyto(times[phase], np.minimum(times[phase], idle), where=found)
        idle = idle - times[phase]


def step_times_on_device(total: Floats, device: Floats, found: NDArray[np.bool_], begins: NDArray[np.bool_]) -> Floats:
    """Return the times from step to step on the device.

    A host that only launches work runs ahead of the device, until something waits for it, such as `loss.item()` in
    every tenth step: its own step times say when it waited, not how long the steps took. Where the host does not run
    ahead, its times are those of the device. Else each step of the device ends when the host has launched it, and its
    work, of the usual time, is done after that of the step before.

    Args:
        total: time of each step on the host, rank x step.
        device: the same on the device, where measured.
        found: steps that were measured; each rank has some.
        begins: steps whose predecessor is not among them.
    """
    measured, of_host = np.where(found, device, 0), np.where(found, total, 0)
    ahead = np.abs(measured - of_host).sum(axis=1) > AHEAD_SHARE * measured.sum(axis=1)
    rows = np.flatnonzero(ahead & ~found.all(axis=1))
    times = total.copy()
    if len(rows):
        columns = found[rows].any(axis=0)
        known = np.where(found[rows][:, columns], device[rows][:, columns], np.nan)
        usual = np.nanmedian(known, axis=1)
        # The mean has what varies from step to step, but not what the host paused in a measured one.
        usual = np.nanmean(np.where(known <= 2 * usual[:, None], known, np.nan), axis=1)
        times[rows] = _paced(total[rows], usual, begins)

    return np.where(found, device, times)


def _paced(times: Floats, usual: Floats, begins: NDArray[np.bool_]) -> Floats:
    """Return times on devices that need the usual time for a step, and are given it at the end of the host's step.

    How far a device is behind where a block of steps begins is what the host's first wait in the block exceeds a usual
    step by.

    Args:
        times: of each step on the host, rank x step.
        usual: of a step on the device, by rank.
        begins: the first steps of blocks.
    """
    paced = times.copy()
    starts = np.flatnonzero(begins).tolist() or [0]
    ranks = np.arange(len(usual))
    for first, end in zip(starts, [*starts[1:], times.shape[1]], strict=True):
        block = times[:, first:end].astype(np.float64)
        before, behind = _behind(block, usual, np.zeros_like(usual))
        waits = (behind == 0) & (block > usual[:, None])
        exceeds = (block - before)[ranks, waits.argmax(axis=1)] - usual
        at_begin = np.where(waits.any(axis=1), np.clip(exceeds, 0, MAX_AHEAD * usual), 0)
        before, behind = _behind(block, usual, at_begin)
        paced[:, first:end] = block + behind - before

    return paced


def _behind(block: Floats, usual: Floats, at_begin: Floats) -> tuple[Floats, Floats]:
    """Return the time by which devices are behind the host at the begin and at the end of each of its steps.

    In a step a device falls behind by the usual time, and catches up by the host's, but not further than to the host.
    """
    gained = np.cumsum(usual[:, None] - block, axis=1)
    behind = gained - np.minimum(np.minimum.accumulate(gained, axis=1), -at_begin[:, None])
    return np.concatenate([at_begin[:, None], behind[:, :-1]], axis=1), behind


def mean_own(own: Floats) -> Floats:
    """Return the mean own backward of each rank over the steps that measured it; NaN if none did."""
    known = ~np.isnan(own)
    count = known.sum(axis=1)
    whole = np.where(known, own, 0).sum(axis=1, dtype=np.float64)
    return np.where(count > 0, whole / np.maximum(count, 1), np.nan)


def leave_out_waiting(times: Mapping[str, Floats], own: Floats, total: Floats, evaluation: Floats) -> None:
    """Take the waiting for other ranks' evaluation out of the steps, in place.

    Args:
        times: phase -> nanoseconds of each step, rank x step.
        own: own backward of each step, NaN if not measured.
        total: wall time of each step.
        evaluation: nanoseconds of evaluation before each step.
    """
    columns = np.flatnonzero(evaluation.min(axis=0) < evaluation.max(axis=0))
    if not len(columns):
        return

    left = evaluation[:, columns].max(axis=0) - evaluation[:, columns]
    usual = np.where(np.isnan(own), mean_own(own)[:, None], own)[:, columns]
    waits = {"comm": times["comm"][:, columns], "backward": np.nan_to_num(times["backward"][:, columns] - usual)}
    for phase, waiting in waits.items():
        taken = np.clip(waiting, 0, left)
        times[phase][:, columns] -= taken
        total[:, columns] -= taken
        left = left - taken


def spread_device_times(
    device: Mapping[str, Floats], total: Floats, steps: Floats | int, found: Floats
) -> dict[str, Floats]:
    """Return the device times of all steps in cells of which some steps have them.

    The other steps have the mean of the cell; where it has none, the mean of the rank, which is the last axis. They are
    not longer than the cell.

    Args:
        device: phase -> device nanoseconds of the steps that have them, 0 in a cell without any.
        total: wall time of all steps of the cell.
        steps: number of steps in the cell.
        found: number of them that have device times; not zero for a whole rank.
    """
    of_rank = np.maximum(found.sum(axis=-1, keepdims=True, dtype=np.float64), 1)
    values = {}
    for phase in DEVICE_LABELS:
        mean = device[phase].sum(axis=-1, keepdims=True, dtype=np.float64) / of_rank
        values[phase] = np.where(found > 0, device[phase] / np.maximum(found, 1), mean) * steps

    fits = np.minimum(total / np.maximum(sum(values.values()), 1), 1)
    return {phase: np.where(found < steps, value * fits, value) for phase, value in values.items()}


def named_times(times: Mapping[str, Floats], user: Mapping[str, Floats]) -> dict[str, Floats]:
    """Return times by phase with the user's phases by name in place of their sum.

    Args:
        times: phase -> nanoseconds, all of `PHASES`.
        user: the user's phases by name; what they lack of `times["user"]` counts as `other`.
    """
    named = {name: values for name, values in times.items() if name != "user"}
    unnamed = times["user"] - sum(user.values(), np.float32(0))
    named["other"] = named["other"] + np.maximum(unnamed, 0)
    for name, values in user.items():
        named[name] = named[name] + values if name in named else values

    return named


def fitted_user_times(user: Mapping[str, Floats], whole: Floats) -> dict[str, Floats]:
    """Return times of the user's phases by name, each cut by the same share where their sum exceeds the whole.

    Args:
        whole: `times["user"]` of devices, that is cut to the time in which the device was idle.
    """
    kept = np.minimum(whole / np.maximum(sum(user.values()), 1.0), 1.0)
    return {name: values * kept for name, values in user.items()}


def own_backward(backward: Floats, own_mean: Floats, steps: Floats | int = 1) -> Floats:
    """Return the own work in backward time; all of it where own work was never measured.

    Args:
        backward: nanoseconds, summed over `steps` steps.
        own_mean: mean own backward of a step, NaN if not measured.
        steps: number of steps.
    """
    return np.where(np.isnan(own_mean), backward, np.minimum(own_mean * steps, backward))


def split_backward(
    times: Mapping[str, Floats], own_mean: Floats, steps: Floats | int = 1, *, grouped: bool
) -> dict[str, Floats]:
    """Return times by phase with the waiting in `backward` moved to `comm`.

    Args:
        times: phase -> nanoseconds, summed over `steps` steps.
        own_mean: mean own backward of a step, NaN if not measured.
        steps: number of steps.
        grouped: whether there are ranks to wait for; see `GroupUse`.
    """
    if not grouped:
        return dict(times)

    own = own_backward(times["backward"], own_mean, steps)
    return {**times, "backward": own, "comm": times["comm"] + times["backward"] - own}
