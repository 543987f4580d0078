"""Deaths: ranks that were lost, the first of them, and what ended it.

Runs in the aggregator and in readers. Imports kinds, findings, advice, `diagnosis.facts`, `diagnosis.memory` and
`database`.
"""
