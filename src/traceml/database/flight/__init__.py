"""The flight file of a rank: rings and logs in memory, the journal on disk, and how a dead rank's files are read.

Written in the rank; `postmortem` runs in the aggregator and on hosts of a launch. Imports `database.schema`; no numpy.
"""
