"""Tables of rows: the schema, the rank's flight file, and the run's store.

`schema`, `rings`, `journal`, `journaled` and `flight` run in the rank; `postmortem` in whoever reads a dead rank's
file; the other modules in the aggregator and in readers. Imports only leaf modules.
"""
