"""One wrapper for unconditional pixel-space diffusion models, from any diffusers folder or hub id."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protectors.denoiser import Denoiser
from protectors.model_files import ModelError, check_folder, load_network, model_digest, read_json, resolve_folder
from protectors.schedule import NoiseSchedule


class PixelModel(Denoiser):
    """A frozen pixel-space diffusion model that sees square tiles of one size.

    Tiles, noise and schedule arithmetic are float32; only the network runs in ``dtype``. Gradients flow
    wherever the caller has a graph; weights never receive any.

    Args:
        unet: diffusers' ``UNet2DModel``; it is frozen and set to evaluation in place.
        schedule: noise schedule and prediction type.
        digest: names the content of the model's files, see ``model_digest``.

    Shape: tiles, noise and predictions ``(N, 3, S, S)`` float32 with S = ``base_size``; t ``(N,)`` int64,
        counted from 0 as the network counts (the papers' timestep t is index t - 1).

    Raises:
        ModelError: the network is not unconditional, not for RGB or not for square images.
    """

    def __init__(self, unet: Any, schedule: NoiseSchedule, *, digest: str) -> None:
        self.base_size: int = _side(unet.config)
        super().__init__(unet, schedule, digest=digest)
        self.unet.requires_grad_(False).eval()
        self.to(self.device)

    def to(self, device: torch.device | str) -> PixelModel:
        """Moves everything to the device; returns self."""
        self.unet.to(device)
        self.schedule = self.schedule.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """What the network sees of images in [0, 1]: the range [-1, 1]."""
        return images * 2 - 1

    def predict_noise(self, noisy: Tensor, t: Tensor) -> Tensor:
        """The network's estimate of the noise in noisy tiles; a learned variance is left out."""
        prediction: Tensor = self.unet(noisy.to(self.dtype), t).sample[:, :3].float()
        return self.schedule.predict_noise(noisy, prediction, t)

    def predict_x0(self, noisy: Tensor, predicted_noise: Tensor, t: Tensor) -> Tensor:
        """The clean tiles that ``predict_noise`` implies, in [-1, 1] up to its errors: not clipped."""
        return self.schedule.remove_noise(noisy, predicted_noise, t)


def load_pixel_model(
    path_or_id: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PixelModel:
    """Loads a pixel-space diffusion model from a diffusers folder (DDPMPipeline) or a hub id.

    Only safetensors weights are read. A hub id that is in the local cache needs no network.

    Args:
        path_or_id: folder with a ``model_index.json``, or ``owner/name``.
        device: where the network runs.
        dtype: of the network; tiles and perturbations stay float32 (bf16 cannot hold one 8-bit level).

    Raises:
        ModelError: not found, incomplete, pickled, or of a kind that is not supported.
    """
    folder = resolve_folder(path_or_id)
    check_folder(folder, "pixel-space")
    # Imported here: it costs seconds, and methods can be listed and configured without it.
    from diffusers import UNet2DModel

    schedule = NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    unet = load_network(UNet2DModel, folder / "unet", dtype)
    return PixelModel(unet, schedule, digest=model_digest(str(folder))).to(device)


def _side(config: Any) -> int:
    """The side of the network's tiles, after a check that it takes RGB tiles and a time and nothing else."""
    if config.in_channels != 3 or config.out_channels not in (3, 6):
        raise ModelError(
            f"the UNet takes {config.in_channels} channels and gives {config.out_channels}; name an RGB model: 3 to 3, "
            "or 3 to 6 with a learned variance"
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise ModelError("the UNet wants a class label: not supported; name an unconditional model")
    size = config.sample_size
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise ModelError(f"the UNet's sample_size is {size}; name a model of square images")
    return int(sides.pop())
