"""Kernels of notebooks, each forked from a process that has imported what its cells import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from jupyter_client import launcher
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from tests.forked import client as forked

__all__ = ["Kernel", "forked_kernels"]


class Kernel(AsyncKernelManager):
    """This interpreter as the kernel, whichever kernels are installed for others."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """Return how it is started."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="here", language="python")


@contextmanager
def forked_kernels(imports: str = "torch") -> Iterator[None]:
    """Fork the kernels that are started meanwhile; each computes on one thread.

    Args:
        imports: what they import, as in `forked.Popen`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(launcher, "Popen", partial(forked.Popen, imports=imports, forks=True))
        yield
