"""Delivery of one run's rows to one tracker: the loop, retries, masking, and exact resumption after a death.

Runs in a delivery process (`python -m traceml.track.delivery`), one per run and tracker. `delivery_manager`,
`delivery_process` and `delivery_plan` also run in the aggregator and in `traceml sync`, which start these processes;
`probe` runs for `doctor`.
`delivery_process.py` is the handle in the parent; `__main__.py` is the process itself.
It imports `track.plugins`, what `track` itself holds, and `database`.
"""
