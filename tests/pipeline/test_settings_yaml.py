"""Numbers in settings are numbers, however they are written."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from pipeline.settings_yaml import read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-5E6", -5e6), (".5e+1", 5.0), ("1.e2", 100.0), ("3", 3), ("1e-x", "1e-x"), ("true", True)],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    found = read_yaml(f"field: {text}")["field"]
    assert found == value
    assert type(found) is type(value)


def test_objects_are_refused() -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml("!!python/object/apply:os.getcwd []")
