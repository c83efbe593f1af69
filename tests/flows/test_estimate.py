"""The estimate of a dry run: how long, of which number of steps, measured how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flows.estimate import estimate
from pipeline.config import JobConfig
from pipeline.run import prepare
from protectors.base import ImageProtector
from tests.pipeline.archives import photos, write_folder
from tests.pipeline.local_job import job_config
from tests.protectors.tiny import save_tiny_model


def config(tmp_path: Path, **method: Any) -> JobConfig:
    files = {f"{n}.png": data for n, data in enumerate(photos(3))}
    return job_config(write_folder(tmp_path / "in", files), tmp_path / "out", method=method)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of every call of a protector."""
    found: list[int] = []
    protect = ImageProtector.protect

    def counted(protector: ImageProtector[Any, Any], *args: Any, **options: Any) -> Any:
        found.append(protector.steps)
        return protect(protector, *args, **options)

    monkeypatch.setattr(ImageProtector, "protect", counted)
    return found


def test_a_method_without_a_number_of_steps_runs_once_in_full(tmp_path: Path, lengths: list[int]) -> None:
    found = estimate(*prepare(config(tmp_path, overrides={"sleep_s": 0.3}), dry_run=True))
    assert found.open_assets == 3
    seconds = re.match(r"estimate: (\d+\.\d\d) s per image on one cpu actor", found.text)
    assert seconds is not None
    assert float(seconds[1]) >= 0.3
    assert "1 steps on 1 tiles, from one tile with the preset's full settings" in found.text
    assert lengths == [1]


def test_steps_are_those_of_all_stages(tmp_path: Path, lengths: list[int]) -> None:
    model = save_tiny_model(tmp_path / "model")
    few = {"epochs": 2, "pt_steps": 3, "pgd_steps": 2, "unet_steps": 1}
    found = estimate(*prepare(config(tmp_path, name="anti_diffusion", model=str(model), overrides=few), dry_run=True))
    (steps,) = lengths
    assert steps > 3 + 2 + 1
    assert f"({steps} steps on 1 tiles, from one tile with" in found.text


def test_two_short_trials_tell_the_cost_of_a_step(tmp_path: Path, lengths: list[int]) -> None:
    model = save_tiny_model(tmp_path / "model")
    few = {"steps": 700}
    found = estimate(*prepare(config(tmp_path, name="photoguard", model=str(model), overrides=few), dry_run=True))
    assert "(700 steps on 1 tiles, from trials with steps=1 and steps=4 on one)" in found.text
    assert lengths == [1, 1, 4]


def test_without_a_readable_image_there_is_no_estimate(tmp_path: Path, lengths: list[int]) -> None:
    source = write_folder(tmp_path / "in", {"a.png": b"no picture"})
    found = estimate(*prepare(job_config(source, tmp_path / "out"), dry_run=True))
    assert found.text == "no estimate: no image of the first unit can be read"
    assert lengths == []
