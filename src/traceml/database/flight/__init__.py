"""The flight file of a rank: rings and logs in memory, in which rows wait until an aggregator has stored them.

Also the journal on disk, for logged rows beyond that memory, and the reading of a dead rank's files.

Runs in the rank, except for modules with a line `Process:`, which read the files of other processes. Imports
`database.schema` and `database.file_contents`; no numpy.
"""
