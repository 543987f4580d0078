"""Recorder of one rank: its tables, its thread, its connection, its start and its end.

Runs in the training process. May import `instrument`, `samplers`, `transport` and `database`, and neither numpy nor
SQLite. Packages above register with `current_recorder.on_start`, `on_change`, `Recorder.every_cycle` and `before_stop`.
"""
