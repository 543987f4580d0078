"""The command `traceml fleet`."""
