"""Delivery of one run's rows to one tracker: the loop, retries, masking, and exact resumption after a death.

Runs in a delivery process (`python -m traceml.track.delivery`), one per run and tracker; `__main__` is its program.
`delivery_manager` and `delivery_process`, the handle, run in its parent instead: the aggregator or `traceml sync`.
`delivery_plan`, `record_reader` and `credentials` run in both. `probe` is a separate process of `traceml doctor`.
It imports `track.plugins`, what `track` itself holds, and `database`.
"""
