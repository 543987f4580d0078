"""Recorder of one rank: its tables, its thread, its connection, its start and its end.

Runs in the training process. May import `instrument`, `samplers`, `transport` and `database`, and neither numpy nor
SQLite. Packages above register with `current_recorder.on_start`, `on_change`, `Recorder.every_cycle` and `before_stop`.

It moves rows of steps, and makes none: steps are detected in `instrument.step_clock`. A step that is missing was not
detected there, or is counted as lost in the report (`telemetry`).
"""
