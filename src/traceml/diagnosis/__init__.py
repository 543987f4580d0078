"""The verdict: pure functions from windows of steps to findings.

`kinds` declares the verdicts, `rules` holds one module per family, `ruleset` calls them; `steps` and `facts` are input.
Runs in the aggregator, in commands and in notebooks; `step_split` also in deliveries. Imports only `database`.
"""
