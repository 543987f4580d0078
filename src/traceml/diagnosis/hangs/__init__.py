"""Hangs: whether a job stands still, which rank the others wait for, and the sentence about it.

`standstill` decides, `rank_state` reads a snapshot, `blame` compares the ranks, `hang_words` makes the sentences,
and `hang` the finding. Runs in the aggregator and in readers. Imports the rest of `diagnosis` but its tree, and
`database`.
"""
