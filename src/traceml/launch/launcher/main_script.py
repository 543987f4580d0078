"""The launcher's `__main__`: its description for workers, and checks before a launch."""

from __future__ import annotations

import sys
from pathlib import Path

from traceml.errors import UsageError

__all__ = ["describe", "pickle_by_value", "refuse_in_spawned"]


def describe() -> dict[str, str | None]:
    """Return what workers need to stand in for our `__main__`: `name`, where it was run by `-m`, and `path`."""
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return {
        "name": None if spec is None else spec.name,
        "path": str(Path(path).absolute()) if isinstance(path, str) else None,
    }


def pickle_by_value() -> None:
    """Make the script's functions travel by value also from a multiprocessing child, where it is `__mp_main__`."""
    main = sys.modules.get("__mp_main__")
    if main is not None and main.__name__ == "__mp_main__":
        import cloudpickle

        cloudpickle.register_pickle_by_value(main)


def refuse_in_spawned() -> None:
    """Refuse a launch while a process that multiprocessing has spawned imports the script.

    Raises:
        UsageError: it does; each such process would launch all over again.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and getattr(process.current_process(), "_inheriting", False):
        raise UsageError(
            "launch was called while a process that multiprocessing has spawned imports this script. "
            "Put the call under `if __name__ == '__main__':`"
        )
