"""A rank that makes no progress: noticed, and looked at, on the recorder's thread."""
