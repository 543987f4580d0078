"""Capture of what frameworks' own logging calls report: TensorBoard, Lightning, Hugging Face, Ray.

Runs in the training process; a framework that is not imported is waited for, never imported. May import what
`track.rank` may.
"""
