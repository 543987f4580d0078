"""Hardware of a host: addresses, cores, GPUs, and each worker's share of the cores."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

__all__ = ["addresses", "core_slices", "count_gpus", "interface_towards"]

_SIOCGIFADDR = 0x8915
_KFD = Path("/sys/class/kfd/kfd/topology/nodes")  # of AMD's driver: processors and GPUs


def addresses() -> dict[str, str]:
    """Return the IPv4 address of each interface by its name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue

            found[name] = socket.inet_ntoa(answer[20:24])

    return found


def interface_towards(address: str) -> str | None:
    """Return the interface by which this host reaches `address`, or None if unknown."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(target)  # sends nothing
            own = sock.getsockname()[0]
    except OSError:
        return None

    if family == socket.AF_INET6:
        return _interface_of_v6(own)

    if own.startswith("127."):
        return "lo"

    return next((name for name, each in addresses().items() if each == own), None)


def _interface_of_v6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        return None

    return next((fields[5] for line in lines if (fields := line.split())[0] == wanted), None)


def core_slices(workers: int) -> list[list[int]]:
    """Distribute this process's cores over workers, neighbors together; empty lists if there are too few."""
    cores = sorted(os.sched_getaffinity(0), key=_position_of)
    if workers > len(cores):
        return [[] for _ in range(workers)]

    size, more = divmod(len(cores), workers)
    starts = [i * size + min(i, more) for i in range(workers + 1)]
    return [sorted(cores[start:stop]) for start, stop in itertools.pairwise(starts)]


def _position_of(cpu: int) -> tuple[int, int, int]:
    """Return (socket, core, cpu): so hardware threads of a core are neighbors."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text()), cpu
    except (OSError, ValueError):
        return 0, cpu, cpu


def count_gpus(environ: Mapping[str, str], built_for: str | None = None) -> int:
    """Return the number of GPUs of a process with this environment, without torch or a CUDA context.

    Args:
        built_for: which its torch can use, see `ZygoteReady`; None: unknown, those of NVIDIA count.
    """
    if built_for == "hip":
        visible = environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES"))
        return _count_visible(visible, _count_visible(environ.get("ROCR_VISIBLE_DEVICES"), _amd_gpus()))

    return 0 if built_for == "" else _count_visible(environ.get("CUDA_VISIBLE_DEVICES"), _nvidia_gpus())


def _count_visible(visible: str | None, installed: int) -> int:
    if visible is None or not installed:
        return installed

    count = 0
    for word in map(str.strip, visible.split(",")):
        if not (word.startswith(("GPU-", "MIG-")) or (word.isdigit() and int(word) < installed)):
            break  # CUDA ignores all after the first invalid one

        count += 1

    return count


def _amd_gpus() -> int:
    count = 0
    for path in _KFD.glob("*/properties"):
        with contextlib.suppress(OSError):  # not ours to use
            found = re.search(r"^simd_count (\d+)$", path.read_text(), re.MULTILINE)
            count += found is not None and found[1] != "0"

    return count


def _nvidia_gpus() -> int:
    if not Path("/dev/nvidiactl").exists():
        return 0

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return 0

        count = ctypes.c_uint()
        status = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))

    return 0 if status else count.value
