"""Snapshots: what a rank that makes no progress is doing, as the rank or another process of its host describes it.

`rank_snapshot.py` has the types, which every reader uses. The rank imports `blocker_snapshot` and `snapshot_timing`;
aggregator and agent take `external_snapshots` of ranks that do not answer. May import `database.flight`, `schema` and
`info_kinds`.
"""
