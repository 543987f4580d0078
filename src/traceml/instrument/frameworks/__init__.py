"""Functions of Hugging Face, Lightning and Keras that are timed as phases of a step.

Runs in the rank. May import what `instrument` may.
"""
