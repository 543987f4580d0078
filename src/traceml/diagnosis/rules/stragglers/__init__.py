"""Ranks whose own work makes the others wait.

`late_ranks` finds them, with `excess_tests` (is it chance?) and `core_lack` (do they lack a core?); `stragglers` has
the findings, in the words of `straggler_wording`. Runs in every reader. May import what `diagnosis.rules` may.
"""
