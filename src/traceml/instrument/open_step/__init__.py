"""Parts of the step clock: what the open step has so far, its rows, and which steps are measured in detail.

Runs in the rank; imports `phase_timer` and `database`.
"""
