"""Errors keep their text and attributes between processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from featurestore import ShardCorruptError
from featurestore.errors import OneLineError
from stages.common.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (ShardCorruptError("damaged", path="a/b", expected=1, actual=2), {"path": Path("a/b")}),
        (DataError("a/b", "damaged", expected=1, actual=2), {"path": Path("a/b")}),
        (ConfigError("a/b", "damaged", expected=1, actual=2), {"key": "a/b"}),
    ],
)
def test_errors_can_be_pickled(error: OneLineError, place: dict[str, object]) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.args) == ("a/b: damaged", ("a/b: damaged",))
    assert vars(copy) == {"expected": 1, "actual": 2, **place}
