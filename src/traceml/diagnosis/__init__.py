"""The verdict: pure functions from windows of steps to findings.

Runs in the aggregator, in commands and in notebooks; `phases` also in the delivery processes. Imports only `database`.
"""
