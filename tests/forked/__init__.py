"""Python processes forked from one that has imported torch already: a start in milliseconds in place of seconds.

For scripts that import torch. A forked process ends after its exit handlers, without the interpreter's clean-up.
`client` stands in for `subprocess` in tests, `server` is the process that forks, `preloaded` the modules it shares.
A forked program may fork too (`forks=True`): the ranks of `traceml run` and torchrun. They are its real children, by
`sibling`: it has beside it a process as clean as it was at its start, which forks for it.
With `inside`, a process is forked into the namespaces of another one: on a host of `tests/launch/hosts.py`.
The workers of pytest-xdist are forked, too, by `workers`: from a process that has imported the tests.
"""
