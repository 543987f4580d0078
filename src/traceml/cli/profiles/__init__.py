"""`traceml profile`: asks ranks of a running job for traces, and merges them."""
