"""The lock file that a thread of Python looks at again and again, by the frames of the library that does so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from types import FrameType

from traceml.inspection.thread_frames import stack_frames

__all__ = ["awaited_lock"]

# Files of torch.utils.cpp_extension and of filelock, and the attribute that has the path.
_LIBRARIES = {"/torch/utils/file_baton.py": "lock_file_path", "/filelock/_api.py": "lock_file"}
_DEPTH = 40  # torch.utils.cpp_extension is itself 20 calls deep


def awaited_lock(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> str:
    """Return the path of the file; empty where the user's code waits for none."""
    for each in takewhile(lambda each: not is_user(each), stack_frames(frame, _DEPTH)):
        name = next((name for file, name in _LIBRARIES.items() if each.f_code.co_filename.endswith(file)), None)
        if name is not None:
            path = getattr(each.f_locals.get("self"), name, "")
            return path if isinstance(path, str) else ""

    return ""
