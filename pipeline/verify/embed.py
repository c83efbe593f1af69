"""Image embeddings for subject similarity, from any transformers folder: nano-embed, DINO, CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protectors.model_files import ModelError
from protectors.reference import NANO_EMBED, reference_path, verify_reference

_BATCH = 32


class Embedder:
    """Maps images to unit vectors whose inner product says how alike their subjects are.

    CLIP models answer with their projected image features, a ViT without trained pooler such as DINO with its
    first token, all others with their pooled output. Only safetensors are read, from a local folder.

    Args:
        folder: of `save_pretrained`, with a `preprocessor_config.json`; the embedded nano-embed by default.

    Raises:
        ModelError: the folder is incomplete or not an image model.
    """

    def __init__(self, folder: Path | None = None, *, device: str = "cpu") -> None:
        # Imported here: costs seconds, and reports that embed nothing do not need it.
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging

        if folder is None:
            verify_reference(NANO_EMBED)
        self.folder = folder or reference_path(NANO_EMBED)
        self.device = device
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it advises to install torchvision, which the PIL processors do not need
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(str(self.folder), local_files_only=True)
            self._model: Any
            self._model, info = AutoModel.from_pretrained(
                str(self.folder),
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder} is no image embedder: {error}") from error
        finally:
            logging.set_verbosity(verbosity)
        # A ViT's first token is its answer: DINO's checkpoints hold no pooler, and transformers makes a random one.
        self._first_token = "pooler.dense.weight" in info["missing_keys"]
        missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
        if missing:
            raise ModelError(f"{self.folder} lacks weights: {sorted(missing)[:3]}; fetch it again")
        self._model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Returns `(N, D)` float32 of length 1 on the CPU.

        Shape: images `(N, 3, H, W)` in [0, 1]; they are rounded to 8 bit, as a file would be.
        """
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        return torch.cat([self._embed(part) for part in torch.split(pixels, _BATCH)])

    def _embed(self, pixels: Tensor) -> Tensor:
        inputs = self._processor(list(pixels.numpy()), return_tensors="pt", input_data_format="channels_first")
        values = inputs.pixel_values.to(self.device)
        if hasattr(self._model, "get_image_features"):
            features = self._model.get_image_features(pixel_values=values)
            features = getattr(features, "pooler_output", features)  # transformers 5 wraps the projected features
        else:
            output = self._model(pixel_values=values)
            features = output.last_hidden_state[:, 0] if self._first_token else output.pooler_output
        return F.normalize(features.flatten(1).float(), dim=1).cpu()


def mean_similarity(left: Tensor, right: Tensor) -> float:
    """Mean cosine over all pairs of unit vectors `(N, D)` and `(M, D)`."""
    return float((left @ right.T).mean())


def mean_similarity_among(vectors: Tensor) -> float:
    """Mean cosine over all pairs of different rows of `(N, D)`; N must be at least 2."""
    count = len(vectors)
    if count < 2:
        raise ValueError("one image has no pairs; give at least two")
    total = (vectors @ vectors.T).sum() - vectors.square().sum()
    return float(total / (count * (count - 1)))
