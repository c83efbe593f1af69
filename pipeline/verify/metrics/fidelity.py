"""The cost of protection: how far a protected image is from its original. Needs no weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.util import view_as_blocks
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from pipeline.verify.metrics.base import Against, Facts, Metric, Reference
from protectors.reference.quality import psnr, ssim

_WINDOW = 11
# Five scales halve four times, and torchmetrics wants eleven pixels on the last.
_MULTISCALE_SIDE = _WINDOW * 2**4
_BLOCK = 32
_FLAT_SHARE = 0.10


class PixelChange(Metric):
    """Budget and spread of the change, in 8-bit levels."""

    needs = Reference.ORIGINALS

    @property
    def facts(self) -> Sequence[Facts]:
        """Largest, mean and share."""
        return (
            Facts(name="linf_levels", better="down", how="largest absolute change of a channel, 8-bit levels"),
            Facts(name="mean_levels", better="down", how="mean absolute change over pixels and channels, 8-bit levels"),
            Facts(name="changed_share", better="down", how="share of pixels with a changed channel"),
        )

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        change = (images.int() - _originals(against).int()).abs()
        return {
            "linf_levels": change.amax(dim=(1, 2, 3)).tolist(),
            "mean_levels": change.double().mean(dim=(1, 2, 3)).tolist(),
            "changed_share": change.amax(dim=1).gt(0).double().mean(dim=(1, 2)).tolist(),
        }


class Structure(Metric):
    """PSNR, SSIM (Wang et al., IEEE TIP 2004) and MS-SSIM (Wang et al., Asilomar 2003)."""

    needs = Reference.ORIGINALS

    @property
    def facts(self) -> Sequence[Facts]:
        """The three."""
        window = f"RGB, Gaussian window of {_WINDOW} pixels, sigma 1.5"
        scales = f"torchmetrics, {window}, 5 scales, borders reflected; sides of at least {_MULTISCALE_SIDE} pixels"
        return (
            Facts(name="psnr", better="up", how="RGB, dB; 100 for equal images"),
            Facts(name="ssim", better="up", how=f"{window}, inside the borders; sides of at least {_WINDOW} pixels"),
            Facts(name="ms_ssim", better="up", how=scales),
        )

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        output, target = images.float() / 255, _originals(against).float() / 255
        side = min(images.shape[2:])
        scores = {"psnr": psnr(output, target).tolist()}
        if side >= _WINDOW:
            scores["ssim"] = ssim(output, target).tolist()
        if side >= _MULTISCALE_SIDE:
            many = multiscale_structural_similarity_index_measure(output, target, data_range=1.0, reduction="none")
            scores["ms_ssim"] = many.reshape(-1).tolist()
        return scores


class Colour(Metric):
    """CIEDE2000 colour difference per pixel; once more in flat regions, where a change is seen first.

    Sharma, Wu, Dalal, "The CIEDE2000 Color-Difference Formula", Color Res. Appl. 30 (2005). One is about the smallest
    difference that is seen side by side.
    """

    needs = Reference.ORIGINALS

    @property
    def facts(self) -> Sequence[Facts]:
        """Mean and 95th percentile, everywhere and in flat regions."""
        how = "scikit-image, sRGB to CIELAB at D65, per pixel"
        flat = f"{how}; the {_FLAT_SHARE:.0%} of the original's {_BLOCK}x{_BLOCK} blocks whose L* varies least"
        return (
            Facts(name="ciede2000_mean", better="down", how=how),
            Facts(name="ciede2000_p95", better="down", how=how),
            Facts(name="ciede2000_flat_mean", better="down", how=flat),
            Facts(name="ciede2000_flat_p95", better="down", how=flat),
        )

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        scores: dict[str, list[float]] = {}
        for image, original in zip(images, _originals(against), strict=True):
            lab = rgb2lab(original.permute(1, 2, 0).numpy())
            difference = deltaE_ciede2000(lab, rgb2lab(image.permute(1, 2, 0).numpy()))
            regions = {"ciede2000": difference}
            if min(difference.shape) >= _BLOCK:
                regions["ciede2000_flat"] = _blocks(difference)[flat_blocks(lab[..., 0])]
            for name, values in regions.items():
                scores.setdefault(f"{name}_mean", []).append(float(values.mean()))
                scores.setdefault(f"{name}_p95", []).append(float(np.percentile(values, 95)))
        return scores


def flat_blocks(lightness: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Numbers of the blocks of least variance, a tenth of all and at least one; blocks count row by row.

    Shape: `(H, W)`, both at least 32; what is left over right and below belongs to no block.
    """
    variances = _blocks(lightness).var(axis=(1, 2))
    return np.argsort(variances, kind="stable")[: max(1, round(_FLAT_SHARE * len(variances)))]


def _blocks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    height, width = (side // _BLOCK * _BLOCK for side in values.shape)
    whole = np.ascontiguousarray(values[:height, :width])
    blocks: npt.NDArray[np.float64] = view_as_blocks(whole, (_BLOCK, _BLOCK)).reshape(-1, _BLOCK, _BLOCK)
    return blocks


def _originals(against: Against) -> Tensor:
    if against.originals is None:
        raise ValueError("fidelity needs the originals")
    return against.originals
