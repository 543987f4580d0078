"""A rank that is profiled on request: trace and sampled calls, sent in pieces."""
