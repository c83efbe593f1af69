"""Faces by dlib: its HOG detector, five landmarks, and its residual network. Needs the extra `faces`.

The trained files come from the package `face_recognition_models` 0.3.0 (CC0). Its code is not imported, and its model
of 68 landmarks is not used: the data that it learnt from exclude commercial use. The network learnt from public sets of
faces, VGG Face and FaceScrub among them: have your own use of it checked.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.ids import sha256_hex
from pipeline.verify.metrics.base import Licence, WeightsMissing
from pipeline.verify.metrics.faces import FaceIdentity

LICENCE: Licence = "CC0; learnt from public sets of faces, VGG Face among them: have your use checked"
INSTALL = "pip install 'fixative[faces]'"
_LANDMARKS = "shape_predictor_5_face_landmarks.dat"
_NETWORK = "dlib_face_recognition_resnet_model_v1.dat"
_SHA256 = {
    _LANDMARKS: "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
    _NETWORK: "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
}
_UPSAMPLINGS = 1
"""The detector knows faces from 80 pixels on; enlarged once, it finds those from 40 on."""
_CHIP, _PADDING = 150, 0.25  # what the network was trained on
_SAME_PERSON = 0.6
"""Distance below which two photos show one person (dlib's documentation of the network: 99.38 % on LFW)."""
_FARTHEST = 2 * _SAME_PERSON


@dataclass(frozen=True, slots=True)
class DlibDetector:
    """Frontal faces by histograms of oriented gradients, turned upright by their eyes and nose."""

    dlib: Any
    hog: Any
    landmarks: Any

    @property
    def how(self) -> str:
        """Version and settings; the detector's own weights are part of the library."""
        return f"frontal HOG detector of dlib {self.dlib.__version__}, enlarged {_UPSAMPLINGS}x, 5 landmarks"

    def detect(self, image: Tensor) -> Tensor | None:
        """The largest face, uint8 `(3, 150, 150)`, of an image uint8 `(3, H, W)`; None where there is none."""
        pixels = _pixels(image)
        boxes = self.hog(pixels, _UPSAMPLINGS)
        if not boxes:
            return None
        # Boxes of one size are taken from top left on: the order in which dlib lists them is not documented.
        box = min(boxes, key=lambda box: (-box.area(), box.top(), box.left()))
        chip = self.dlib.get_face_chip(pixels, self.landmarks(pixels, box), size=_CHIP, padding=_PADDING)
        return torch.from_numpy(np.array(chip)).permute(2, 0, 1)


@dataclass(frozen=True, slots=True)
class DlibEmbedder:
    """The residual network's 128 numbers, compared by Euclidean distance."""

    network: Any

    how = f"clip(1 - d/{_FARTHEST}, 0, 1), d = mean Euclidean distance of dlib's descriptor to those of the photos"
    same = 1 - _SAME_PERSON / _FARTHEST

    def embed(self, faces: Tensor) -> Tensor:
        """Vectors `(N, 128)`, about of length 1.4, of upright faces uint8 `(N, 3, 150, 150)`."""
        found = [np.asarray(self.network.compute_face_descriptor(_pixels(face))) for face in faces]
        return torch.from_numpy(np.stack(found)).float()

    def likeness(self, vector: Tensor, known: Tensor) -> float:
        """The mean of distances to single photos: the threshold was found on pairs, and a mean face is nearer to all.

        Shape: vector `(D,)`, known `(M, D)`. 0.5 is the threshold.
        """
        return alike(float((known - vector).norm(dim=1).mean()))


def alike(distance: float) -> float:
    """A distance as a likeness: 1 for equal faces, 0.5 at the threshold of one person, 0 from twice that on."""
    return min(1.0, max(0.0, 1 - distance / _FARTHEST))


def dlib_faces() -> FaceIdentity:
    """Identity by dlib, from the installed packages.

    Raises:
        WeightsMissing: one of them is not installed, or holds other files.
    """
    spec = importlib.util.find_spec("face_recognition_models")  # finds the folder, imports nothing
    if importlib.util.find_spec("dlib") is None or spec is None or not spec.submodule_search_locations:
        raise WeightsMissing(f"the packages dlib and face_recognition_models are not both installed: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    try:
        digests = {name: sha256_hex((folder / name).read_bytes()) for name in _SHA256}
    except OSError as error:
        raise WeightsMissing(f"{folder} lacks its files ({error}): {INSTALL}") from error
    if digests != _SHA256:
        raise WeightsMissing(f"{folder} holds other files than face_recognition_models 0.3.0: {INSTALL}")
    import dlib

    detector = DlibDetector(dlib, dlib.get_frontal_face_detector(), dlib.shape_predictor(str(folder / _LANDMARKS)))
    embedder = DlibEmbedder(dlib.face_recognition_model_v1(str(folder / _NETWORK)))
    weights = sha256_hex("".join(f"{name} {digest}\n" for name, digest in sorted(digests.items())).encode())
    return FaceIdentity(detector, embedder, weights=weights, licence=LICENCE, version=f"1, dlib {dlib.__version__}")


def _pixels(image: Tensor) -> Any:
    """uint8 `(3, H, W)` as `(H, W, 3)`, one piece of memory."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
