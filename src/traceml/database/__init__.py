"""Tables of rows: the schema, the rank's flight file (`flight`), and the run's store (`store`); snapshots of ranks.

`schema` runs in every process, `flight` in the rank, `store` in the aggregator and in readers. A module that runs
elsewhere says so in a line `Process:`. Imports only leaf modules.
"""
