"""Trainings of a run: their models, loaders and step numbers, and use of the process group.

Gathered in the aggregator and by readers. Imports the other `diagnosis.facts` and `database`.
"""
