"""Wrapper for latent inpainting models, whose UNet also sees a mask and what is left of the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from protectors.diffusion import LatentModel, load_latent
from protectors.model_files import ModelError, resolve_folder


class InpaintingModel(LatentModel):
    """A frozen latent inpainting model; as ``LatentModel``, with masks ``(B, 1, H, W)`` of 0 (keep) and 1 (repaint).

    Its UNet takes noisy latents (C channels), the mask at the size of the latents (1), and the latents of the image
    with the repainted area blanked (C): nine channels with SD's four.
    """

    form = "latent inpainting"

    def condition(self, images: Tensor, repaint: Tensor, noise: Tensor) -> Tensor:
        """What the UNet sees beside the noisy latents, ``(B, 1 + C, h, w)``.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1]; where the mask is 1 they get a gradient of exactly zero.
            repaint: ``(B, 1, H, W)``, 0 and 1.
            noise: standard normal draws of the posterior ``(B, C, h, w)``.
        """
        # 0 in the networks' range [-1, 1] is how blank is written there: middle grey.
        kept = torch.where(repaint > 0, torch.full_like(images, 0.5), images)
        latents = self.latents(self.encode_moments(kept), noise)
        small = F.interpolate(self.pad(repaint), size=latents.shape[-2:], mode="nearest")
        return torch.cat([small, latents], dim=1)

    def predict(self, noisy: Tensor, condition: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The UNet's prediction (noise or v, see ``prediction_type``) for noisy latents ``(B, C, h, w)``."""
        return self._run_unet(torch.cat([noisy, condition], dim=1), t, embeddings)

    @staticmethod
    def _check_channels(taken: int, latent: int) -> None:
        if taken != 2 * latent + 1:
            raise ModelError(
                f"the UNet takes {taken} channels and the VAE gives {latent}: an inpainting model takes "
                f"{2 * latent + 1}; name one, such as a StableDiffusionInpaintPipeline folder"
            )


def load_inpainting_model(
    path_or_id: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> InpaintingModel:
    """Loads a latent inpainting model from a diffusers folder or a hub id; arguments and errors as ``load_model``."""
    return load_latent(InpaintingModel, resolve_folder(path_or_id), dtype).to(device)
