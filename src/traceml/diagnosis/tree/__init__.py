"""Merging of hosts: one message per host and second, from which the same rules give the same verdict.

Runs in the aggregator of a host and, `central_merger` and `row_requests`, in the center. Imports findings, intake,
`diagnosis.facts`, `diagnosis.steps` and `database`.
"""
