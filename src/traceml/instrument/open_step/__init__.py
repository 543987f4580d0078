"""Records of the step clock: the parts of the open step that have ended, and the rows that they become.

Runs in the rank; imports `phase_timer` and `database`.
"""
