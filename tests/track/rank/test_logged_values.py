"""Logged values become what a row can hold."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from traceml import fail_open
from traceml.track.rank.logged_values import PlainList, params_of, plain


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fail_open, "_logged", set())


@pytest.mark.parametrize(
    ("value", "kept", "told"),
    [
        ([0] * 10_001, [0] * 10_000, "a logged list of 10,001 items is cut after 10,000; log_artifact"),
        (
            dict.fromkeys(map(str, range(10_001))),
            dict.fromkeys(map(str, range(10_000))),
            "a logged map of 10,001 items",
        ),
        ("x" * 2_000_001, "x" * 2_000_000, "a logged text of 2,000,001 characters is cut after 2,000,000"),
    ],
    ids=["list", "map", "text"],
)
def test_a_value_that_is_cut_is_reported_once(
    value: Any, kept: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it is inside another one."""
    assert plain(value) == kept
    assert plain({"inner": [value]}) == {"inner": [kept]}

    (message,) = caplog.messages
    assert message.startswith(told)


@pytest.mark.parametrize(
    "value", [[0] * 10_000, "x" * 2_000_000, PlainList([0] * 65_537)], ids=["list", "text", "checked"]
)
def test_a_value_that_fits_stays_whole(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """So does a list whose length was checked: of the counts of a histogram."""
    assert plain(value) == value
    assert not caplog.messages


def test_a_tensor_of_many_values_on_a_device_is_not_read() -> None:
    """Its text has what is known without waiting for the device."""
    assert plain(torch.empty(2, 3, device="meta")) == "Tensor of shape (2, 3), torch.float32, on meta"


class Incomplete(UserDict[str, Any]):
    """A map that holds what cannot be read, as one of OmegaConf with a missing value."""

    def __getitem__(self, key: str) -> Any:
        if (value := super().__getitem__(key)) == "???":
            raise LookupError(f"missing mandatory value: {key}")

        return value


def test_an_item_that_cannot_be_read_costs_no_other() -> None:
    """It was an error of `log_params`, and ended the training."""
    config = Incomplete(lr=0.1, data="???")
    expected = {"lr": 0.1, "data": "<LookupError>"}

    assert params_of(config) == expected
    assert plain({"config": config}) == {"config": expected}
