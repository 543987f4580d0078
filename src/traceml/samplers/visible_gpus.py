"""GPUs that a process may use, by CUDA_VISIBLE_DEVICES; CUDA itself is not asked, as that would initialize it."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["VARIABLE", "has_own_gpus", "visible_gpus"]

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(text: str | None, uuids: Mapping[int, str]) -> list[int | str]:
    """Return the visible GPUs in CUDA's order: each by its index, or the name of a MIG device.

    The list ends at the first entry that names no device, as for CUDA, and a device that is named twice makes all
    invisible. Indices are taken as NVML's, which are CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID, or with equal GPUs.

    Args:
        text: the variable, None where it is not set.
        uuids: the UUID of each GPU, by its index.
    """
    if text is None:
        return list(uuids)

    found: list[int | str] = []
    for entry in _entries(text):
        device = _device_of(entry, uuids)
        if device is None:
            break

        found.append(device)

    return found if len(set(found)) == len(found) else []


def has_own_gpus(local_rank: int, text: str | None) -> bool:
    """Whether the launcher gave this rank GPUs of its own: none of those that it sees has its local rank as index."""
    return text is not None and 0 < len(_entries(text)) <= local_rank


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",")] if text.strip() else []


def _device_of(entry: str, uuids: Mapping[int, str]) -> int | str | None:
    if entry.startswith("MIG-"):
        return entry

    if entry.startswith("GPU-"):
        alike = [index for index, uuid in uuids.items() if uuid.lower().startswith(entry.lower())]
        return alike[0] if len(alike) == 1 else None

    return int(entry) if entry.isdecimal() and int(entry) in uuids else None
