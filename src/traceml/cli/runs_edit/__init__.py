"""Commands of `traceml runs` that change runs: remove, tag, note, archive."""
