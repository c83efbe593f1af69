"""Fidelity of reconstructed pixels: PSNR and SSIM."""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each image in decibel. Shape: `(N, 3, H, W)` in [0, 1] -> `(N,)`."""
    error = (output - target).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    return -10 * error.log10()


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """Returns the structural similarity of each image: Gaussian window of 11 pixels, sigma 1.5, mean over channels.

    Shape: `(N, 3, H, W)` in [0, 1] -> `(N,)`. Agrees with scikit-image's `structural_similarity` with
    `gaussian_weights=True, use_sample_covariance=False`.
    """
    offsets = torch.arange(11, dtype=output.dtype, device=output.device) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line[None, :]).expand(3, 1, 11, 11)

    def blur(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=3)

    mean_x, mean_y = blur(output), blur(target)
    var_x = blur(output * output) - mean_x.square()
    var_y = blur(target * target) - mean_y.square()
    covariance = blur(output * target) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    score = score / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return score.mean(dim=(1, 2, 3))
