"""The verdict: pure functions from windows of steps to findings.

`kinds` declares the verdicts. Rules are in `rules` (bottlenecks, late ranks, correctness), `deaths`, `hangs`, `memory`
and `stalls`, one module per family; `ruleset` calls them. `steps` and `facts` are their input.
Runs in the aggregator, in commands and in notebooks; `step_split` also in deliveries. Imports only `database`.
"""
