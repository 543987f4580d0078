from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace
from typing import Any

from tests.forked import sibling


def test_an_address_whose_upper_half_is_the_id_is_not_taken_for_it() -> None:
    thread = (ctypes.c_int * 512)()
    thread[1] = thread[3] = thread[180] = os.getpid()
    libc: Any = SimpleNamespace(pthread_self=lambda: ctypes.addressof(thread))

    assert sibling._address_of_thread_id(libc) == ctypes.addressof(thread) + 4 * 180
