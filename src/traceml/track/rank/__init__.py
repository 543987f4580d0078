"""The rank's half of tracking: the `log_*` calls, automatic capture of frameworks' logging, and collectors.

Runs in the training process, so it imports neither numpy nor SQLite nor a tracker's library. It imports `recorder`,
`instrument`, `database`, `track.plugins` and the modules beside this folder; nothing of `delivery` or `backends`.
"""
