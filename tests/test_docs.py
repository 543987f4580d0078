"""The documentation is true where a program can tell: links lead somewhere, commands exist, tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_packages import LEAVES, NARROW, PACKAGES, SUBPACKAGES
from tests.track.contents import CONTENTS
from tests.track.readers import READERS
from traceml.cli import COMMANDS
from traceml.diagnosis.hangs.blame import HangCause
from traceml.diagnosis.kinds import Kind
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import BUILT_IN, known_backends

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RAW = "https://raw.githubusercontent.com/traceml/traceml/main/"  # pictures of the README, which a registry shows too
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_OUTSIDE_ITS_ENTRY = re.compile(r"\n {1,3}(?:-|\d+\.) .*|(?<=\n\n) {1,3}\S.*|\n {4}\S.*(?=\n(?:-|\d+\.) )")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    return {_anchor(heading) for heading in _HEADING.findall(page.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link names a file, and each anchor a heading in it."""
    for link in _LINK.findall(page.read_text().replace(f"]({RAW}", f"]({ROOT}/")):
        if "://" in link:
            continue

        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in _anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_inside_an_entry_of_a_list_is_indented_by_four(page: Path) -> None:
    """With less the site shows a list in it beside it, and a paragraph ends the list, whose numbers begin again.

    The next entry has an empty line before it: else it is shown as text.
    """
    assert _OUTSIDE_ITS_ENTRY.findall(_BLOCK.sub("", page.read_text())) == []


def test_the_site_has_every_page() -> None:
    """A page stands in the navigation of mkdocs.yml; decisions are listed by a page of their own."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}

    listed = re.findall(r"- [^:\n]+: (\S+\.md)$", navigation, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert {page for page in pages if not page.startswith("decisions/")} - set(listed) == set()


def test_every_tracker_is_in_its_table() -> None:
    """A built-in tracker says what it needs, whether it is exact, and each of its options."""
    section = (ROOT / "docs" / "tracking.md").read_text().partition("\n## Trackers\n")[2].partition("\n## ")[0]

    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    assert sorted(rows) == sorted(BUILT_IN[PluginType.BACKEND])
    options = {name: metadata.options for name, metadata in known_backends().items()}
    assert [(name, each) for name, cell in rows.items() for each in options[name] if f"`{each}`" not in cell] == []


def test_every_tracker_is_read_back() -> None:
    """The recipe for a tracker has readers, with which `tests/track/backends/test_round_trip.py` covers it."""
    assert sorted(READERS) == sorted(CONTENTS) == sorted(BUILT_IN[PluginType.BACKEND])


def test_pictures_of_the_readme_are_absolute() -> None:
    """A package registry shows the README without the files beside it."""
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())

    assert pictures
    assert [each for each in pictures if not each.startswith(RAW)] == []


def test_every_command_is_in_the_readme() -> None:
    """The table of commands leaves none out."""
    readme = (ROOT / "README.md").read_text()

    assert [name for name in COMMANDS if f"`traceml {name}" not in readme] == []


def test_tables_of_packages_are_those_of_the_test() -> None:
    """docs/architecture.md lists every package and divided folder, with what it may import."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([a-z_/]+)/` \|.*\| ([^|]+) \|$", page, re.MULTILINE)
    tables = {name.replace("/", "."): set(re.findall(r"`([a-z_.]+)`", allowed)) for name, allowed in rows}

    below = {"cli": set(), "launch": set(), "database": set()}  # in words: all packages below, nothing
    assert tables == {**below, **NARROW, **SUBPACKAGES}
    assert [name for name, _ in rows if name in PACKAGES] == list(PACKAGES)
    assert [leaf for leaf in LEAVES if f"`{leaf}.py`" not in page and f"`{leaf}/`" not in page] == []


def test_every_folder_and_leaf_module_is_in_the_architecture() -> None:
    """A reader finds each folder of the package, and each module beside the folders, with what it is for."""
    package, page = ROOT / "src/traceml", (ROOT / "docs/architecture.md").read_text()
    folders = [f"{path.parent.relative_to(package)}/" for path in package.rglob("*/__init__.py")]
    modules = [path.name for path in package.glob("*.py") if not path.name.startswith("__")]

    assert len(folders) > len(modules) > 0
    assert [name for name in sorted(folders + modules) if f"{name}`" not in page] == []


def test_modules_to_begin_with_exist() -> None:
    """CONTRIBUTING.md names modules without links, by their paths in the package."""
    begin = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where to begin")[2].partition("\n\nTo find")[0]
    named = re.findall(r"`([a-z_/]+/\w+\.py)`", begin)

    assert len(named) > 15
    assert [name for name in named if not (ROOT / "src/traceml" / name).is_file()] == []


def test_every_kind_is_explained() -> None:
    """A verdict that can be given stands in docs/verdicts.md."""
    verdicts = (ROOT / "docs" / "verdicts.md").read_text()

    assert [kind.value for kind in Kind if f"`{kind.value}`" not in verdicts] == []


def test_every_cause_of_a_hang_is_explained() -> None:
    """The table of `evidence.cause` has the causes that can be given, and no other."""
    table = (ROOT / "docs" / "verdicts.md").read_text().partition("| cause | meaning |")[2].partition("\n\n")[0]
    named = [
        cause for row in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE) for cause in re.findall(r"`(\w+)`", row)
    ]

    assert sorted(named) == sorted(cause.value for cause in HangCause)


def test_every_command_of_the_wire_is_explained() -> None:
    """What an aggregator does itself, and what its ranks do."""
    tables = (ROOT / "docs" / "wire.md").read_text().partition("\nCommands of a client")[2].partition("\n### ")[0]
    explained = re.findall(r"^\| `(\w+)", tables, re.MULTILINE)

    own = re.findall(r'^            "(\w+)": self\._\w+,$', _source("aggregator/commands.py"), re.MULTILINE)
    of_ranks = re.findall(r'^                "(\w+)": ', _source("recorder/recording.py"), re.MULTILINE)
    assert len(own) > 5
    assert len(of_ranks) > 2
    assert set(explained) == {*own, *of_ranks}


def test_every_message_of_the_wire_is_explained() -> None:
    """Whoever sends it; agents of a launch have a protocol of their own."""
    page, package = (ROOT / "docs" / "wire.md").read_text(), ROOT / "src/traceml"
    sources = [
        path.read_text() for name in ("aggregator", "recorder", "transport") for path in (package / name).rglob("*.py")
    ]
    sent = {kind for text in sources for kind in re.findall(r'"t": "(\w+)"', text)}

    assert len(sent) > 10
    assert [kind for kind in sorted(sent) if not re.search(rf"`{kind}\b", page)] == []


def _source(module: str) -> str:
    return (ROOT / "src/traceml" / module).read_text()


def test_every_benchmark_is_reported() -> None:
    """`make bench` runs every benchmark, and its page tells of each."""
    from benchmarks.run import BENCHMARKS

    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"run", "peers", "__init__"}
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert scripts == set(BENCHMARKS)
    assert [name for name in BENCHMARKS if f"{name}.py" not in page] == []


def _figures(text: str) -> list[str]:
    """Return the figures with a unit, without those of addresses."""
    return re.findall(r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?) ?(?:%|x|us|ms|s|kB|MB|GB)(?!\w)", _LINK.sub("]", text))


def _strangers(text: str, measured: str) -> list[str]:
    """Return the figures of a text that no number of the other one rounds to."""
    numbers = [float(each.replace(",", "")) for each in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", measured)]
    figures = [each.replace(",", "") for each in _figures(text)]
    return [each for each in figures if all(f"{n:.{len(each.partition('.')[2])}f}" != each for n in numbers)]


def test_figures_beside_a_link_to_a_benchmark_are_its_own() -> None:
    """Figures of a sentence that links to a section are in it; those of the README's tables are in the page."""
    benchmarks = (ROOT / "docs/benchmarks.md").read_text()
    sections = {_anchor(part.partition("\n")[0]): part for part in benchmarks.split("\n## ")}
    wrong = []
    for page in PAGES:
        for sentence in re.split(r"(?<=[.:])\s|\n\n", page.read_text()):
            for anchor in re.findall(r"benchmarks\.md#([\w-]+)\)", sentence):
                wrong += [(page.name, anchor, each) for each in _strangers(sentence, sections[anchor])]

    costs = (ROOT / "README.md").read_text().partition("\n## Cost and guarantees\n")[2].partition("Measured by")[0]
    assert not wrong + _strangers(costs, benchmarks)
    assert len(_figures(costs)) > 15
