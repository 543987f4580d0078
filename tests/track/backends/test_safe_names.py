"""Names that a tracker refuses become others that it accepts, each one of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.track.backends.conftest import Maker
from traceml.track.backends import clearml, mlflow, wandb
from traceml.track.backends.safe_names import (
    NO_PATH,
    NO_TEXT,
    flattened,
    merged_tags,
    plain_value,
    safe_name,
    safe_path,
)
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import BUILT_IN

REFUSED = [(mlflow._REFUSED, 250), (wandb._REFUSED, 1000), (wandb._REFUSED_ID, 128), (NO_TEXT, 1000)]


@given(
    st.lists(st.text(alphabet="ab/._~% \x00ü\ud800[", max_size=300), unique=True, max_size=50), st.sampled_from(REFUSED)
)
def test_names_stay_apart_and_are_accepted(names: list[str], rule: tuple[re.Pattern[str], int]) -> None:
    """No two become one, none is refused, and one that is accepted stays as it is."""
    refused, longest = rule
    safe = [safe_name(name, refused, longest) for name in names]

    assert len(set(safe)) == len(names)
    for name, result in zip(names, safe, strict=True):
        assert 0 < len(result) <= longest
        assert not refused.search(result)
        assert safe_name(result, refused, longest) == result
        if name and len(name) <= longest and not refused.search(name):
            assert result == name


@given(
    st.lists(
        st.text(alphabet="ab/. \0日", max_size=8) | st.text(alphabet="a日/.", min_size=60, max_size=300), unique=True
    )
)
def test_paths_stay_apart_and_fit_into_file_systems(names: list[str]) -> None:
    """A name that no file can have kept all rows of a run from MLflow, W&B, ClearML, Aim and JSON lines."""
    safe = [safe_path(name, NO_PATH, 1000) for name in names]

    assert len(set(safe)) == len(names)
    assert all(0 < len(part.encode()) <= 200 and part not in {".", ".."} for path in safe for part in path.split("/"))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model/weights.bin", "model/weights.bin"),
        ("日" * 100 + ".png", f"{'日' * 62}_0ee13f3f.png"),
        ("../up.txt", "_/up~8c722b8a.txt"),
        (".hidden", ".hidden"),
    ],
    ids=["short", "wide", "outside", "hidden"],
)
def test_a_path_keeps_its_extension(name: str, path: str) -> None:
    assert safe_path(name, NO_PATH, 1000) == path


@given(st.lists(st.text(alphabet="ab/", max_size=8), unique=True, max_size=100))
def test_plots_and_series_stay_apart(names: list[str]) -> None:
    """ClearML's two parts of a name tell every name from every other."""
    assert len({clearml._title_and_series(name) for name in names}) == len(names)


def test_nested_maps_become_one() -> None:
    """Keys are joined, also those that are no texts; an empty map is a value that stays."""
    nested = {"model": {"depth": 18, 3: {"x": None}}, "empty": {}, "list": [{"a": 1}]}
    assert flattened(nested, ".") == {"model.depth": 18, "model.3.x": None, "empty": {}, "list": [{"a": 1}]}


def test_values_become_plain() -> None:
    """Numbers, maps and lists stay; large integers, other objects and undecodable characters become texts."""
    value = {"a": [1, True, None, 2.5], 3: 2**63, "bad": "\udc80"}
    assert plain_value(value, largest=2**63) == {"a": [1, True, None, 2.5], "3": str(2**63), "bad": "\\udc80"}
    assert plain_value({"x": 2**70}, key=str.upper) == {"X": 2**70}


@pytest.mark.parametrize(
    ("before", "tags", "merged"),
    [
        ([], {"sweep": "", "best": "true"}, ["sweep", "best"]),
        (["mine", "phase: warm"], {"phase": "main"}, ["mine", "phase: main"]),
        (["phase"], {"phase": "main"}, ["phase: main"]),
        (["phases: 2"], {"phase": "main"}, ["phases: 2", "phase: main"]),
        (["a"], {"a": "true"}, ["a"]),
        (["mine"], {"mi\udcff": "1"}, ["mine", "mi\\udcff: 1"]),
    ],
)
def test_tags_replace_earlier_values_of_their_keys(before: list[str], tags: dict[str, str], merged: list[str]) -> None:
    """Those of other keys stay, also where a key is the beginning of another."""
    assert merged_tags(before, tags, ": ") == merged


def test_a_tag_whose_key_is_cut_replaces_the_earlier_one() -> None:
    """As for W&B, which takes 64 characters."""
    first = merged_tags([], {"x" * 70: "a"}, ":", 64)
    assert first == ["x" * 64]
    assert merged_tags(first, {"x" * 70: "b"}, ":", 64) == first


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["日" * 100, "n" * 300 + ".bin", "back\\slash.bin"], ids=["wide", "long", "backslash"])
@pytest.mark.parametrize("backend", sorted(BUILT_IN[PluginType.BACKEND]))
def test_every_tracker_takes_files_of_any_name(make: Maker, tmp_path: Path, backend: str, name: str) -> None:
    """One whose name no file system takes was tried again, with all that came after it, without an end."""
    if backend == "aim" and sys.version_info >= (3, 13):
        pytest.skip("there is no Aim for this Python")

    image = tmp_path / "red.png"
    Image.new("RGB", (3, 2), "red").save(image)
    mode = {"mode": "offline"} if backend in {"clearml", "wandb"} else {}
    made = make(backend, experiment={"name": name}, **mode)
    made.start_experiment(name, "tests")

    made.log_image(name, image, 1)
    made.log_artifact(str(image), name)
    made.log_text(name, "note", 1)
    made.end_experiment()
