from __future__ import annotations

from dataclasses import dataclass

import pytest

from protectors.config import PgdConfig, ProtectorConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(PgdConfig):
    limits: tuple[float, ...] = (0.5,)
    note: str | None = None


def test_equal_values_have_one_json() -> None:
    assert ProtectorConfig(eps_levels=8).canonical_json() == '{"eps_levels":8.0}'
    first, second = Example(limits=[1, 2], steps=3), Example(steps=3, limits=(1.0, 2.0))  # type: ignore[arg-type]
    assert first == second
    assert first.canonical_json() == second.canonical_json()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eps_levels", 0.5),
        ("eps_levels", 256),
        ("eps_levels", "8"),
        ("eps_levels", float("nan")),
        ("eps_levels", True),
        ("steps", 0),
        ("steps", 2.0),
        ("steps", True),
        ("step_levels", 0),
        ("random_start", 1),
        ("eval_draws", 0),
        ("limits", 3.0),
        ("limits", ["a"]),
        ("note", 7),
    ],
)
def test_bad_value_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}=.*use"):
        Example.from_dict({field: value})


def test_replace_checks_like_new() -> None:
    assert Example().replace(steps=7).steps == 7
    with pytest.raises(ValueError, match="no field"):
        Example().replace(step=7)
    with pytest.raises(ValueError, match="steps=-1"):
        Example().replace(steps=-1)
