"""Faces by dlib: the rules with a library of our own, and the real one where it is installed."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from pipeline.verify.metrics.base import Against, WeightsMissing
from pipeline.verify.metrics.faces import FaceIdentity
from pipeline.verify.metrics.faces_dlib import DlibDetector, DlibEmbedder, alike, dlib_faces


@dataclass(frozen=True)
class Box:
    left_: int
    top_: int
    side: int

    def area(self) -> int:
        return self.side**2

    def left(self) -> int:
        return self.left_

    def top(self) -> int:
        return self.top_


def detector(boxes: list[Box]) -> DlibDetector:
    """A chip is the box itself: the landmarks are it."""

    def chip(pixels: npt.NDArray[np.uint8], box: Box, size: int, padding: float) -> npt.NDArray[np.uint8]:
        part = pixels[box.top_ : box.top_ + box.side, box.left_ : box.left_ + box.side]
        return np.asarray(Image.fromarray(part).resize((size, size)))

    library = SimpleNamespace(__version__="20", get_face_chip=chip)
    return DlibDetector(library, lambda pixels, enlarged: boxes, lambda pixels, box: box)


def test_the_largest_face_is_taken_whatever_the_order() -> None:
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :32, 32:] = 200
    boxes = [Box(0, 0, 8), Box(32, 0, 32), Box(0, 32, 32)]
    for order in (boxes, boxes[::-1]):
        face = detector(order).detect(image)
        assert face is not None
        assert face.shape == (3, 150, 150)
        assert int(face.min()) == 200
    assert detector([]).detect(image) is None


def test_distance_as_likeness() -> None:
    """The threshold of one person is one half; equal faces are one, and far ones zero."""
    assert [alike(d) for d in (0.0, 0.3, 0.6, 1.2, 1.5)] == pytest.approx([1, 0.75, 0.5, 0, 0])
    network = SimpleNamespace(compute_face_descriptor=lambda pixels: np.full(128, float(pixels.max())))
    embedder = DlibEmbedder(network)
    vectors = embedder.embed(torch.full((2, 3, 150, 150), 2, dtype=torch.uint8))
    assert vectors.shape == (2, 128)
    assert float(vectors.min()) == 2
    step = torch.zeros(128)
    step[0] = 0.6
    # One photo is at 0 and one at 0.6: 0.3 on the mean, though the mean of the photos is as near.
    assert embedder.likeness(vectors[0], torch.stack([vectors[0], vectors[0] + step])) == pytest.approx(0.75)
    assert embedder.same == pytest.approx(0.5)


def test_without_the_packages_or_with_other_files_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsMissing, match=r"fixative\[faces\]"):
        dlib_faces()
    spec = ModuleSpec("face_recognition_models", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(WeightsMissing, match="lacks its files"):
        dlib_faces()
    (tmp_path / "models").mkdir()
    for name in ("shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat"):
        (tmp_path / "models" / name).write_bytes(b"other")
    with pytest.raises(WeightsMissing, match="other files"):
        dlib_faces()


@pytest.fixture(scope="module")
def installed() -> Iterator[FaceIdentity]:
    pytest.importorskip("dlib")
    try:
        yield dlib_faces()
    except WeightsMissing as error:
        pytest.skip(str(error))


def face() -> Tensor:
    """Eileen Collins, NASA, public domain."""
    return torch.from_numpy(np.ascontiguousarray(data.astronaut())).permute(2, 0, 1)


def test_a_person_is_found_again_and_is_no_cat(installed: FaceIdentity) -> None:
    photo = face()
    file = io.BytesIO()
    Image.fromarray(photo.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=30)
    jpeg = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    cat = torch.from_numpy(np.ascontiguousarray(data.chelsea())).permute(2, 0, 1)
    against = Against(photos=photo[None])
    same = installed.score(torch.stack([photo, photo.flip(2), jpeg]), against)
    assert same["ism_all"][0] == pytest.approx(1, abs=1e-6)
    assert min(same["ism_all"]) > 0.8
    assert same["face_found"] == same["face_match"] == [1, 1, 1]
    assert installed.score(cat[None], against) == {"ism_all": [0.0], "face_found": [0.0], "face_match": [0.0]}
    assert installed.found(torch.stack([photo, photo.flip(2)])) == [1, 1]
    facts = {fact.name: fact for fact in installed.facts}
    assert len(facts["ism_all"].weights) == 64
    assert "have your use checked" in facts["ism_all"].licence
    assert "dlib" in facts["ism_all"].version


def test_strangers_do_not_match(installed: FaceIdentity) -> None:
    """Small grey faces of LFW (scikit-image's subset): where one is found at all, it is another person."""
    rows = [Image.fromarray((side * 255).astype(np.uint8)).resize((200, 200)) for side in data.lfw_subset()[:12]]
    strangers = torch.stack([torch.from_numpy(np.array(row.convert("RGB"))).permute(2, 0, 1) for row in rows])
    scores = installed.score(strangers, Against(photos=face()[None]))
    assert sum(scores["face_found"]) >= 3
    assert max(scores["ism_all"]) < 0.5
    assert sum(scores["face_match"]) == 0
