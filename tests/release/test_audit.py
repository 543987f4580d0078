"""Licenses of dependencies: those of all extras are allowed, and others would be refused."""

from __future__ import annotations

import pytest
from release.audit import audit_licenses, tell_licenses, unreachable
from release.licenses import LicensedPackage, dependencies, is_allowed, license_of

from tests.ports import free_port


def test_licenses_of_all_dependencies_are_allowed() -> None:
    """Of what is installed here, with all extras; of torch and numpy at least."""
    packages, _ = audit_licenses(None)

    assert {"torch", "numpy", "msgpack", "rich", "mlflow-skinny"} <= {each.name for each in packages}
    assert [f"{each.name}: {each.said}" for each in packages if not each.is_allowed] == []


def test_dependencies_of_an_extra_come_with_it() -> None:
    """Without extras there is no torch; test tools are never among them."""
    core, missing = dependencies(set())
    plot, _ = dependencies({"plot"})

    assert missing == set()
    assert {"numpy", "rich", "pydantic-core"} <= core.keys()
    assert core.keys().isdisjoint({"torch", "matplotlib", "pytest", "traceml-torch"})
    assert {"matplotlib", "pillow"} <= plot.keys()


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("(GPL-3.0-only OR MIT) AND SSPL-1.0", False),
        ("MPL-2.0 AND (Apache-2.0 OR LGPL-3.0-only)", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("MIT WITH other-exception", False),
    ],
)
def test_expressions(expression: str, allowed: bool) -> None:
    """Of alternatives one is enough; of parts each must be allowed."""
    assert is_allowed(expression) is allowed


def test_what_is_no_expression() -> None:
    """A text that is not SPDX is an error, not allowed by chance."""
    with pytest.raises(ValueError, match="'as is, mostly' is no SPDX expression"):
        is_allowed("as is, mostly")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (("MIT AND Zlib", "BSD", []), "MIT AND Zlib"),
        (("", "3-Clause BSD License", []), "BSD-3-Clause"),
        (("", "UNKNOWN", ["License :: OSI Approved :: MIT License"]), "MIT"),
        (("", "Copyright (c) 2015", ["License :: OSI Approved :: BSD License"]), "BSD-3-Clause"),
        (
            ("", "Dual License", [f"License :: OSI Approved :: {name} License" for name in ("BSD", "Apache Software")]),
            "BSD-3-Clause AND Apache-2.0",
        ),
        (("", "", ["License :: OSI Approved :: MIT License", "License :: Public Domain"]), ""),
        (("", "", []), ""),
    ],
)
def test_metadata_of_all_ages(said: tuple[str, str, list[str]], name: str) -> None:
    """The expression, else the field, else all classifiers; "" where one is not known."""
    assert license_of(*said) == name


def test_a_refusal_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """The package, its license and the file to change; a package without a license is refused."""
    packages = [
        LicensedPackage("good", "1", "MIT", "MIT"),
        LicensedPackage("strict", "2.0", "AGPL-3.0-only", "AGPL-3.0-only"),
        LicensedPackage("silent", "3", "", "nothing"),
    ]
    assert not tell_licenses(packages, {"absent"})

    shown = capsys.readouterr().out
    assert "refused: strict 2.0: license AGPL-3.0-only" in shown
    assert "refused: silent 3: license unknown (its metadata says: nothing)" in shown
    assert "not installed, so not audited: absent" in shown
    assert "2 refused; allow it, or tell where its license stands, in release/licenses.toml" in shown
    assert tell_licenses(packages[:1], set())
    assert "licenses of 1 packages: 0 refused\n" in capsys.readouterr().out


def test_a_server_that_is_away() -> None:
    """The reason is told, so that the audit can say why it did not take place."""
    port = free_port()

    assert "refused" in unreachable(f"http://127.0.0.1:{port}")
