"""Facts about NVIDIA's devices that need no NVML: whether there is a driver, and which devices this process may use."""

from __future__ import annotations

import ctypes

__all__ = ["VISIBLE_DEVICES", "device_entries", "has_own_gpus", "load_nvml"]

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
"""CUDA itself is not asked for its devices, as that would initialize it."""


def load_nvml() -> ctypes.CDLL:
    """Load NVML's library.

    Raises:
        OSError: there is no driver.
    """
    return ctypes.CDLL("libnvidia-ml.so.1")


def device_entries(text: str) -> list[str]:
    """Return the entries of a value of CUDA_VISIBLE_DEVICES."""
    return [entry.strip() for entry in text.split(",")] if text.strip() else []


def has_own_gpus(local_rank: int, text: str | None) -> bool:
    """Whether the launcher gave this rank GPUs of its own: none of those that it sees has its local rank as index."""
    return text is not None and 0 < len(device_entries(text)) <= local_rank
