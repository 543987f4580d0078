"""Addresses that are certainly this machine's: loopback; names are not resolved."""

from __future__ import annotations

__all__ = ["host_of", "is_loopback", "is_on_this_machine"]


def is_loopback(host: str) -> bool:
    """Whether a host is `localhost` or a loopback address."""
    if host == "localhost":
        return True

    import ipaddress  # most commands that parse options need none

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def host_of(url: str) -> str:
    """Return the host of a URL, without name and password; empty if the URL names none."""
    from urllib.parse import urlsplit

    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # a bracket that is not closed
        return ""


def is_on_this_machine(url: str) -> bool:
    """Whether the host of a URL is this machine."""
    return is_loopback(host_of(url))
