"""The flight file of a rank: rings and logs in memory, in which rows wait until an aggregator has stored them.

Also the journal on disk, for logged rows beyond that memory, and the reading of a dead rank's files.

Written in the rank; `postmortem` runs in the aggregator and on hosts of a launch. Imports `database.schema`; no numpy.
"""
