"""Names that a tracker accepts, made from any name without two becoming one."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

__all__ = ["is_this_machine", "safe_name"]


@lru_cache(maxsize=1 << 17)  # a run may have 100,000 names, and each comes with every row
def safe_name(name: str, refused: re.Pattern[str], longest: int) -> str:
    """Return `name` where it is accepted, else a similar one that no other name becomes.

    What is refused turns into `_`, and 8 digits of the name's hash are added: `a%b` and `a(b` stay apart, and the same
    name gives the same result in every process, so that a resumed run goes on under it.

    Args:
        name: any text.
        refused: matches each part that the tracker refuses.
        longest: most characters that the tracker takes.
    """
    if name and len(name) <= longest and not refused.search(name):
        return name

    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = refused.sub("_", name)[: longest - 9]
    # What is cut may end in the middle of something refused as a whole (`..`, a closing slash).
    return refused.sub("_", f"{kept}~{digits}") if not refused.search("~") else refused.sub("_", f"{kept}_{digits}")


def is_this_machine(host: str | None) -> bool:
    """Whether an address surely means this machine: a loopback address or `localhost`."""
    import ipaddress

    if host is None or host == "localhost":
        return host is not None

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
