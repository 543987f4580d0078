"""Licenses and known vulnerabilities of what traceml depends on.

    python release/audit.py [--extras NAME ...] [--vulnerabilities fail|tell|no]

Reads the installed packages that `traceml-torch` needs, directly or not, with all extras. Exits with 1 for a license
that `licenses.toml` does not allow, and for a known vulnerability. Vulnerabilities are asked of OSV by pip-audit. Where
OSV cannot be reached, it says so and exits by the licenses alone. `tell` only prints vulnerabilities: CI must not fail
on the day on which somebody reports one.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from release.licenses import LicensedPackage, dependencies, licensed

OSV = "https://api.osv.dev"
_REACH_TIMEOUT_S = 10.0


def audit_licenses(extras: set[str] | None) -> tuple[list[LicensedPackage], set[str]]:
    """Return the installed dependencies with their licenses, by name, and those that are not installed."""
    found, missing = dependencies(extras)
    return sorted((licensed(each) for each in found.values()), key=lambda each: each.name), missing


def tell_licenses(packages: list[LicensedPackage], missing: set[str]) -> bool:
    """Print what was found; return whether every license is allowed."""
    for name, count in Counter(each.license for each in packages if each.is_allowed).most_common():
        print(f"{count:4}  {name}")

    refused = [each for each in packages if not each.is_allowed]
    for each in refused:
        license_name = each.license or "unknown"
        print(f"refused: {each.name} {each.version}: license {license_name} (its metadata says: {each.said})")

    if missing:
        print(f"not installed, so not audited: {', '.join(sorted(missing))}")

    advice = "; allow it, or tell where its license stands, in release/licenses.toml" if refused else ""
    print(f"licenses of {len(packages)} packages: {len(refused)} refused{advice}")
    return not refused


def unreachable(url: str = OSV) -> str:
    """Return why a server does not answer; "" if it does, with any status."""
    try:
        urllib.request.urlopen(url, timeout=_REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        return str(getattr(error, "reason", error))

    return ""


def tell_vulnerabilities(packages: list[LicensedPackage]) -> bool:
    """Print known vulnerabilities; return whether there are none, or they cannot be known here."""
    if why := unreachable():
        print(f"vulnerabilities: not audited, because {OSV} cannot be reached ({why})")
        return True

    program = shutil.which("pip-audit", path=str(Path(sys.executable).parent))
    if program is None:
        print("vulnerabilities: not audited, because pip-audit is not installed: pip install --group audit")
        return True

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{each.name}=={each.version.partition('+')[0]}\n" for each in packages)
        file.flush()
        options = [
            "--vulnerability-service",
            "osv",
            "--no-deps",
            "--disable-pip",
            "--strict",
            "--progress-spinner",
            "off",
        ]
        return subprocess.run([program, *options, "-r", file.name], check=False).returncode == 0


def main() -> int:
    """Audit, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="*", metavar="NAME", help="follow these extras only; without a NAME, none")
    parser.add_argument("--vulnerabilities", choices=("fail", "tell", "no"), default="fail", help="default: fail")
    options = parser.parse_args()
    packages, missing = audit_licenses(None if options.extras is None else set(options.extras))
    is_good = tell_licenses(packages, missing)
    if options.vulnerabilities != "no":
        is_safe = tell_vulnerabilities(packages)
        is_good = is_good and (is_safe or options.vulnerabilities == "tell")

    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
