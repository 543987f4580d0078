"""Limits of open files."""

from __future__ import annotations

import resource

from traceml.launch.shared.descriptor_limit import room_for, soft_limit


def test_the_limit_is_raised_for_what_needs_more() -> None:
    """And set back, for the programs that the script starts later."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with soft_limit(256):
        with room_for(200):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, hard)

        with room_for(257):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, hard)

    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before, hard)
