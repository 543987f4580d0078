"""Facts of devices: faults that they report, and memory that goes back and forth between torch and the driver.

Gathered in the aggregator and by readers. Imports `database`.
"""
