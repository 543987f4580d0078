"""Run a script as `python` would, under a recorder: `python .../session/entry.py [-m] SCRIPT [ARGS ...]`.

`traceml run` starts it for each rank. This file is `__main__` itself until the script is. It is started by its path:
`python -m` imports modules of the standard library from the working directory, where users have their `types.py`.
"""

from __future__ import annotations

import sys

__all__: list[str] = []

if __name__ == "__main__":
    import signal

    # Until the script begins, Ctrl-C ends the process without a traceback of our own start.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    # Python has put this folder (with `-m`, the working directory) first on the path: it is not for imports.
    if not sys.flags.safe_path:
        del sys.path[0]

    from traceml.session.script import main

    main(sys.argv[1:])
