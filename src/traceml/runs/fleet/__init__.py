"""The fleet: summaries of many runs as a Parquet dataset, each model's own history, and hosts that are often slow.

Runs in the process that writes a report, in the command, and on Dask's workers. May import `runs.report`, `runs.find`,
`runs.run_query`, `runs.json_document`, `runs.export.table_columns`, `diagnosis` and `traces`.
"""
