"""The demo's archive: its subjects are subjects, and its attack can run on it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flows.demo import ATTACK, SUBJECTS, build_archive
from pipeline.config import AttackSettings
from pipeline.errors import UserError
from pipeline.verify.customizers import customizer
from pipeline.verify.embed import Embedder, mean_similarity_among
from pipeline.verify.groups import LEAST_LIKENESS, TRAIN
from pipeline.verify.trial import square, tensor


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_archive(tmp_path_factory.mktemp("demo") / "archive")


def rows(archive: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(archive / "crops.parquet").to_pylist()
    return found


def test_subjects_have_enough_different_pictures_that_are_alike(archive: Path) -> None:
    torch.set_num_threads(1)
    embedder = Embedder()
    for subject, kind in SUBJECTS.items():
        own = [row for row in rows(archive) if row[ATTACK["subject_column"]] == subject]
        assert {row[ATTACK["class_column"]] for row in own} == {kind}
        assert len({row["image"]["bytes"] for row in own}) == len(own) >= TRAIN + 2
        pixels = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in own]
        images = torch.stack([tensor(square(crop, 128)) for crop in pixels]).float() / 255
        assert mean_similarity_among(embedder.embed(images)) > LEAST_LIKENESS


def test_the_attack_on_it_can_be_configured() -> None:
    settings = AttackSettings(**ATTACK)
    attack = customizer(settings.customizer, settings.customizer_preset, settings.customizer_overrides)
    assert attack.batch == ATTACK["customizer_overrides"]["batch"]


def test_an_archive_is_built_once_and_nothing_else_is_taken_for_one(archive: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in archive.rglob("*")}
    assert build_archive(archive) == archive
    assert {file: file.stat().st_mtime_ns for file in archive.rglob("*")} == before
    with pytest.raises(UserError, match="no archive of the demo"):
        build_archive(tmp_path)
