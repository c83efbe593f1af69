"""BRISQUE: how unnatural an image looks, without a reference.

Mittal, Moorthy, Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 21 (2012). The features
are computed here; the trained support vectors come from the files of the package `brisque` 0.2.0 (Apache-2.0). Its code
is not imported, and its pickle is not loaded but read as the list of numbers that it is.
"""

from __future__ import annotations

import importlib.util
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.special import gamma
from torch import Tensor

from pipeline.ids import sha256_hex
from pipeline.verify.metrics.base import Against, Facts, Metric, Reference, WeightsMissing

Floats = npt.NDArray[np.float64]

INSTALL = "pip install --no-deps brisque==0.2.0"
_SVM_SHA256 = "19526fb799c4c7992ccc109fcfecddb25976ba024b194cd3ee275d27e8909c8d"
_RANGES_SHA256 = "a91753fe7088efe0b40e4d091315201fdb067966fc6785cf465e1eab060acda9"
_FEATURES = 36
_SIGMA = 7 / 6
_SMALLEST = 32
# Shapes from peaked to nearly uniform, and the ratio of moments that tells them apart (paper, section III-A).
_SHAPES = np.arange(0.2, 10.0, 0.001)
_RATIOS = gamma(2 / _SHAPES) ** 2 / (gamma(1 / _SHAPES) * gamma(3 / _SHAPES))


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportVectors:
    """Trained regression: ``score(x) = sum of weights · exp(-width · |x - vector|^2) - offset``, on scaled features."""

    vectors: Floats  # (V, 36)
    weights: Floats  # (V,)
    width: float
    offset: float
    lowest: Floats  # (36,); features are scaled from lowest..highest to -1..1
    highest: Floats

    def score(self, features: Floats) -> float:
        """The score of features `(36,)`; 0 is natural, 100 is not."""
        scaled = -1 + 2 * (features - self.lowest) / (self.highest - self.lowest)
        distances = ((self.vectors - scaled) ** 2).sum(axis=1)
        return float(self.weights @ np.exp(-self.width * distances) - self.offset)


def read_support_vectors(model: str, ranges: bytes) -> SupportVectors:
    """Reads LIBSVM's text format, and a pickle's floats without running it: 36 lowest, then 36 highest.

    Raises:
        ValueError: no epsilon-SVR with Gaussian kernel, or not 72 numbers.
    """
    head, _, body = model.partition("\nSV\n")
    header = dict(line.split(maxsplit=1) for line in head.splitlines())
    if (header.get("svm_type"), header.get("kernel_type")) != ("epsilon_svr", "rbf"):
        raise ValueError("no epsilon-SVR with Gaussian kernel")
    rows = [line.split() for line in body.splitlines()]
    vectors = np.zeros((len(rows), _FEATURES))
    for place, (_, *entries) in enumerate(rows):
        for entry in entries:
            number, value = entry.split(":")
            vectors[place, int(number) - 1] = float(value)
    limits = [argument for opcode, argument, _ in pickletools.genops(ranges) if opcode.name == "BINFLOAT"]
    if len(limits) != 2 * _FEATURES:
        raise ValueError(f"{len(limits)} limits of features, not {2 * _FEATURES}")
    return SupportVectors(
        vectors=vectors,
        weights=np.array([float(row[0]) for row in rows]),
        width=float(header["gamma"]),
        offset=float(header["rho"]),
        lowest=np.array(limits[:_FEATURES]),
        highest=np.array(limits[_FEATURES:]),
    )


def installed_weights() -> SupportVectors:
    """The trained regression of the installed package.

    Raises:
        WeightsMissing: it is not installed, or another version is.
    """
    spec = importlib.util.find_spec("brisque")  # finds the folder, imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise WeightsMissing(f"the package brisque is not installed: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    try:
        model, ranges = (folder / "svm.txt").read_bytes(), (folder / "normalize.pickle").read_bytes()
    except OSError as error:
        raise WeightsMissing(f"{folder} lacks its files ({error}): {INSTALL}") from error
    if (sha256_hex(model), sha256_hex(ranges)) != (_SVM_SHA256, _RANGES_SHA256):
        raise WeightsMissing(f"{folder} holds other files than brisque 0.2.0: {INSTALL}")
    return read_support_vectors(model.decode(), ranges)


class Brisque(Metric):
    """BRISQUE of an image. Never a conclusion by itself: a purifier alone can raise it.

    Args:
        weights: the trained regression, of `installed_weights`.
    """

    needs = Reference.NOTHING

    def __init__(self, weights: SupportVectors) -> None:
        self._weights = weights

    @property
    def facts(self) -> Sequence[Facts]:
        """The score."""
        how = f"8-bit luma, full size and half size (bicubic); about 0..100; sides of at least {_SMALLEST} pixels"
        return (Facts(name="brisque", better="up", how=how, weights=_SVM_SHA256),)

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        if min(images.shape[2:]) < _SMALLEST:
            return {}
        return {"brisque": [self._weights.score(brisque_features(image)) for image in images]}


def brisque_features(image: Tensor) -> Floats:
    """The 36 features of one image, uint8 `(3, H, W)`; not numbers where the image is a plain surface."""
    luma = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L").convert("F")
    half = luma.resize(((luma.width + 1) // 2, (luma.height + 1) // 2), Image.Resampling.BICUBIC)
    return np.concatenate([_scale_features(np.asarray(scale, dtype=np.float64)) for scale in (luma, half)])


def _scale_features(luma: Floats) -> Floats:
    """Shape and spread of the normalised luma, and of the products of its neighbours in four directions."""
    normal = normalised(luma)
    shape, _, left, right = asymmetric_fit(normal)
    features = [shape, (left + right) / 2]
    for step in ((0, 1), (1, 0), (1, 1), (-1, 1)):
        features += asymmetric_fit(normal * np.roll(normal, step, axis=(0, 1)))
    return np.array(features)


def normalised(luma: Floats) -> Floats:
    """Luma less its local mean over its local deviation (paper, equations 1 to 3); values 0..255."""

    def blur(values: Floats) -> Floats:
        blurred: Floats = gaussian_filter(values, _SIGMA, radius=3, mode="nearest")
        return blurred

    mean = blur(luma)
    deviation = np.sqrt(np.abs(blur(luma**2) - mean**2))
    result: Floats = (luma - mean) / (deviation + 1)
    return result


def asymmetric_fit(values: Floats) -> tuple[float, float, float, float]:
    """Moment fit of an asymmetric generalised Gaussian: shape, mean, variance left and right of zero.

    Lasmar, Stitou, Berthoumieu, ICIP 2009; paper, equations 7 to 13. Not numbers where a side is empty.
    """
    # Zeros are on neither side, as when the weights were trained; in JPEG's flat blocks there are many.
    sides = [values[values < 0], values[values > 0]]
    if min(len(side) for side in sides) == 0:
        return (np.nan, np.nan, np.nan, np.nan)
    left, right = (float((side**2).mean()) for side in sides)
    skew = np.sqrt(left / right)
    ratio = np.abs(values).mean() ** 2 / (values**2).mean()
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = float(np.interp(ratio, _RATIOS, _SHAPES))
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    mean = (np.sqrt(right) - np.sqrt(left)) * scale * gamma(2 / shape) / gamma(1 / shape)
    return shape, float(mean), left, right
