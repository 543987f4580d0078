"""Tracking: what a script logs, and its delivery to trackers.

This folder holds what several processes read: the state of a delivery, the filters of a tracker, and what a W&B sweep
agent sets. It imports `diagnosis`, `recorder`, `instrument`, `transport` and `database`.
"""
