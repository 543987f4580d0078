"""Merging of hosts: one message per host and second, from which the same rules give the same verdict.

`host_*` merge in the aggregator of a host; `row_requests` and the sums of `host_sums` are used in the center too. They
import findings, intake, `diagnosis.facts`, `diagnosis.steps` and `database`.
"""
