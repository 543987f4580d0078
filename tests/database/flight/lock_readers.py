"""Look at another process's flight file: run as `python -m tests.database.flight.lock_readers PATH`, prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from traceml.database.flight.flight_owner import is_alive, remove_stale

if __name__ == "__main__":
    target = Path(sys.argv[1])
    removed = [str(path) for path in remove_stale(target.parent, grace_s=-1)]
    print(json.dumps({"alive": is_alive(target), "removed": removed}))
