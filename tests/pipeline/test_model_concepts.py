"""The concepts of a model's protection.

1. A folder and the rows of a Parquet file with the same photos give the same images, in the order of their names.
2. An image that cannot be read is an error that names it; nothing is left out silently.
3. What is missing or unclear is said, with what there is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.protect_model.concepts import read_concept
from pipeline.protect_model.job import ConceptSource
from tests.pipeline.archives import photo, write_folder, write_parquet
from tests.pipeline.images import bomb_png
from tests.pipeline.model_jobs import SIDE, world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


def test_folder_and_parquet_agree(folder: Path) -> None:
    photos = read_concept(ConceptSource(path=f"{folder}/photos", class_word=" hound "), side=SIDE, most=None)
    rows = read_concept(ConceptSource(path=f"{folder}/subjects.parquet#rex"), side=SIDE, most=None)
    assert (photos.class_word, rows.class_word) == ("hound", "dog")
    assert photos.images.shape == (3, 3, SIDE, SIDE)
    assert torch.equal(photos.images, rows.images)
    few = read_concept(ConceptSource(path=f"{folder}/subjects.parquet#rex", class_word="hound"), side=SIDE, most=2)
    assert few.class_word == "hound"
    assert torch.equal(few.images, rows.images[:2])
    fewer = read_concept(ConceptSource(path=f"{folder}/photos", class_word="dog"), side=SIDE, most=2)
    assert torch.equal(fewer.images, few.images)


def test_a_single_subject_needs_no_name(tmp_path: Path) -> None:
    columns = {"asset_id": ["a"], "subject": ["rex"], "subject_class": ["dog"]}
    write_parquet(tmp_path / "one.parquet", [photo(0)], columns)
    (tmp_path / "with#mark").mkdir()
    write_folder(tmp_path / "with#mark", {"a.png": photo(0)})
    one = read_concept(ConceptSource(path=f"{tmp_path}/one.parquet"), side=SIDE, most=None)
    marked = read_concept(ConceptSource(path=f"{tmp_path}/with#mark", class_word="dog"), side=SIDE, most=None)
    assert torch.equal(one.images, marked.images)


@pytest.mark.parametrize(
    ("data", "words"), [(b"nothing", "7 bytes that are no JPEG"), (bomb_png(), "decompression bomb")]
)
def test_a_bad_image_is_named(data: bytes, words: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", {"0.png": photo(0), "bad.png": data, "rex.png": photo(1)})
    columns = {"asset_id": ["0", "bad.png"], "subject": ["rex"] * 2, "subject_class": ["dog"] * 2}
    write_parquet(tmp_path / "rex.parquet", [photo(0), data], columns)
    for name in ("photos", "rex.parquet"):
        with pytest.raises(UserError, match=rf"bad\.png.*{words}.*take it out"):
            read_concept(ConceptSource(path=f"{tmp_path}/{name}", class_word="dog"), side=SIDE, most=None)


@pytest.mark.parametrize(
    ("path", "word", "words"),
    [
        ("nowhere", "dog", "name a folder of images, or FILE.parquet#SUBJECT"),
        ("nowhere.parquet#rex", "dog", "name a folder of images, or FILE.parquet#SUBJECT"),
        ("photos", None, "--class-word dog"),
        ("photos", " ", "--class-word dog"),
        ("subjects.parquet", None, "name a subject, as subjects.parquet#SUBJECT; it has mia, rex"),
        ("subjects.parquet#max", None, "no subject 'max'.* it has mia, rex"),
        ("", "dog", "subjects.parquet: name a folder of one subject"),
        ("photos/a.png", "dog", "name a folder of images"),
    ],
)
def test_what_is_unclear(path: str, word: str | None, words: str, folder: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_concept(ConceptSource(path=f"{folder}/{path}", class_word=word), side=SIDE, most=None)


def test_columns_are_needed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "bare.parquet", [photo(0)], {"asset_id": ["a"]})
    with pytest.raises(UserError, match="no column subject, subject_class"):
        read_concept(ConceptSource(path=f"{tmp_path}/bare.parquet#rex"), side=SIDE, most=None)
