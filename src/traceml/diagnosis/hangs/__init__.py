"""Hangs: whether a job makes no progress, which rank the others wait for, and the sentence about it.

`hang_detection` decides, `rank_state` reads a snapshot, `blame` compares the ranks, `hang_wording` makes the sentences,
and `hang` the finding. Runs in the aggregator and in readers. Imports `kinds`, `findings`, `advice`, `facts`,
`steps` and `rules` of the diagnosis, and `database`.
"""
