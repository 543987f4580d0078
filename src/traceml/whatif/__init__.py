"""Simulation of a hybrid-parallel job without its stragglers, from the operations of its trace.

Runs in the process of `traceml whatif`. Imports the leaf modules only.

Source: "Understanding Stragglers in Large Model Training Using What-if Analysis", OSDI 2025, sections 3 and 4.
"""
