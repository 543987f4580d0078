"""Rules: pure functions from steps and facts to findings, one module or folder per family of verdicts.

Run in the aggregator, in commands and in notebooks, called by `diagnosis.ruleset`.
May import `facts/`, `steps/`, `stalls/`, and the kinds, findings and advice beside them.
"""
