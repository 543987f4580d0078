"""Rows of a run, read by cursor and summed in bounded memory: summary, totals, samples, metrics, series for charts.

Used where runs are read: the command, page, report and notebook. Imports `diagnosis` and `database`.
"""
