"""Trainings of a run: their models, and whether the script or a library has the loop.

Gathered in the aggregator and by readers. Imports the other `diagnosis.facts` and `database`.
"""
