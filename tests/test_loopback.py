"""Tests of `traceml.loopback`."""

from __future__ import annotations

from traceml.loopback import is_on_this_machine


def test_this_machine() -> None:
    """Loopback is this machine; a name that only may resolve to it is not surely."""
    assert all(is_on_this_machine(f"http://{host}:80/x") for host in ("localhost", "127.0.0.9", "[::1]"))
    others = ("", "file:///x", "http://10.0.0.1", "http://example.com", "aim://localhost.example.com:53800")
    assert not any(is_on_this_machine(url) for url in others)
