"""Steps that become slower, or are slow at first.

`slowdown` decides, `slow_steps` compares the slow part of the run with the rest, `slow_parts` names phases and the line
of them, `coinciding_changes` what else changed then; `related_findings` relates the finding to others. Runs in every
reader. May import what `diagnosis.rules` may.
"""
