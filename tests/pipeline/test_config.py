"""Settings are checked before anything starts, and a field that nobody knows is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import JobConfig
from pipeline.decode import DecodeLimits

BASE = {"source": "a", "destination": "b"}


def nested(dotted: str, value: object) -> dict[str, Any]:
    *parents, name = dotted.split(".")
    document: dict[str, Any] = {name: value}
    for parent in reversed(parents):
        document = {parent: document}
    return {**BASE, **document}


def test_defaults_are_valid_and_survive_json() -> None:
    config = JobConfig.model_validate(BASE)
    assert JobConfig.model_validate_json(config.model_dump_json()) == config
    limits = config.job.limits
    assert DecodeLimits(max_pixels=limits.max_pixels, min_side=limits.min_side) == DecodeLimits()


@pytest.mark.parametrize(
    "section", ["", "job", "run", "job.method", "job.archive", "job.output", "job.check", "run.s3"]
)
def test_unknown_fields_are_refused(section: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        JobConfig.model_validate(nested(f"{section}.colour".lstrip("."), 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job.method.eps", 0),
        ("job.method.eps", 65),
        ("job.archive.unit_assets", 0),
        ("job.archive.unit_bytes", 0),
        ("job.archive.files_per_shard", 0),
        ("job.archive.other_images", "ignore"),
        ("job.limits.min_side", 6),
        ("job.limits.max_pixels", 0),
        ("job.output.format", "gif"),
        ("job.output.resolution", "half"),
        ("job.check.fraction", 1.1),
        ("job.check.min_per_shard", -1),
        ("run.actors", 0),
        ("run.wave_units", 50_001),
        ("run.max_deaths", 0),
        ("run.device", "tpu"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field.rpartition(".")[2]):
        JobConfig.model_validate(nested(field, value))


def test_a_config_cannot_be_changed() -> None:
    config = JobConfig.model_validate(BASE)
    with pytest.raises(ValidationError, match="frozen"):
        config.job.seed = 1
