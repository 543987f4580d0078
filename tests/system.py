"""System parts that tests need: how each is recognized, and the Debian packages that provide it.

`python3 tests/system.py install` installs the missing ones where this is allowed (Debian or Ubuntu, as root or with
sudo without a password). Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PARTS", "Part", "chromium", "install_command", "missing"]

_HEADLESS = "chromium-headless-shell"


@dataclass(frozen=True)
class Part:
    """A part of the system that some tests need.

    Attributes:
        name: the argument of the marker `needs`.
        packages: the Debian packages that provide it; none where no package helps.
        is_there: whether this machine has it.
        remedy: what to do where no package helps.
        is_optional: whether tests run without it, though slower.
    """

    name: str
    packages: tuple[str, ...]
    is_there: Callable[[], bool]
    remedy: str = ""
    is_optional: bool = False


def _programs(*names: str) -> Callable[[], bool]:
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return lambda: all(shutil.which(name, path=folders) for name in names)


def chromium() -> str | None:
    """Return the path of a Chromium; first of the one without windows and toolbars, which takes half the CPU time."""
    names = (_HEADLESS, "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def _can_make_environments() -> bool:
    command = [sys.executable, "-c", "import ensurepip, venv"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            return False

        subprocess.run(["umount", "-l", folder], check=False)
        return True


PARTS = (
    Part("venv", ("python3-venv",), _can_make_environments),
    Part("compiler", ("g++",), _programs("g++")),  # torch.compile builds its kernels with it
    Part("hosts", ("iproute2", "openssh-client", "openssh-server"), _programs("ip", "ssh", "sshd")),
    Part("slurm", ("slurm-client", "slurmctld", "slurmd", "munge"), _programs("srun", "slurmctld", "slurmd", "munged")),
    Part("prometheus", ("prometheus",), _programs("promtool")),
    Part("shells", ("fish", "zsh"), _programs("fish", "zsh")),
    Part("tmux", ("tmux",), _programs("tmux")),
    Part("chromium", ("chromium",), lambda: chromium() is not None),
    Part("headless", (_HEADLESS,), _programs(_HEADLESS), is_optional=True),
    Part("root", (), lambda: os.getuid() == 0 and _can_mount(), "run the tests as root"),  # namespaces, mounts, chown
)


def missing(names: Iterable[str] | None = None) -> list[Part]:
    """Return the parts, of those named or of all, that this machine lacks."""
    return [part for part in PARTS if (names is None or part.name in names) and not part.is_there()]


def install_command(parts: Sequence[Part]) -> str:
    """Return the one command that provides the parts, or an empty text where none does."""
    packages = [package for part in parts for package in part.packages]
    sudo = "" if os.getuid() == 0 else "sudo "
    return f"{sudo}apt-get install -y --no-install-recommends {' '.join(packages)}" if packages else ""


def _install(parts: Sequence[Part]) -> None:
    command = install_command(parts)
    if not command or not shutil.which("apt-get"):
        return

    prefix = ["env", "DEBIAN_FRONTEND=noninteractive"]
    if command.startswith("sudo "):
        if subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode:
            return

        prefix = ["sudo", "-n", *prefix]

    print(f"installing system packages for the tests (once): {command}", flush=True)
    subprocess.run([*prefix, "apt-get", "update", "-qq"], check=False)
    apt = [*prefix, "apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    for is_optional in (False, True):  # apart: apt-get installs nothing where it does not know one of the packages
        packages = [package for part in parts if part.is_optional is is_optional for package in part.packages]
        if packages:
            subprocess.run([*apt, *packages], check=False)


if __name__ == "__main__":
    if sys.argv[1:2] != ["install"]:
        sys.exit(f"usage: python3 {Path(__file__).name} install [PART ...]")

    _install(missing(sys.argv[2:] or None))
