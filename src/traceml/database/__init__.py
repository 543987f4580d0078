"""Tables of rows: the schema, the rank's flight file (`flight`), and the run's store (`store`).

`schema` and `flight` run in the rank; `flight.postmortem` in whoever reads a dead rank's file; `store` in the
aggregator and in readers. Imports only leaf modules.
"""
