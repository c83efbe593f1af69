"""How much generated images look like the subject, or like their prompt, by a given embedding model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from pipeline.verify.digest import folder_digest
from pipeline.verify.embed import Embedder
from pipeline.verify.metrics.base import COSINE_DELTA, GIVEN, Against, Facts, Licence, Metric, Reference
from protectors.model_files import ModelError


class SubjectSimilarity(Metric):
    """Mean cosine of an image's embedding to those of real photos of the subject: DINO-I, CLIP-I and their like.

    The photos must be others than those an attack was trained on. Ruiz et al., "DreamBooth", CVPR 2023, section 4.1.

    Args:
        name: of the number, after its model, e.g. "dino_i".
        embedder: the model.
        licence: of its weights.
    """

    needs = Reference.PHOTOS

    def __init__(self, name: str, embedder: Embedder, *, licence: Licence = GIVEN) -> None:
        self._name, self._embedder, self._licence = name, embedder, licence
        self._weights = folder_digest(embedder.folder)

    @property
    def facts(self) -> Sequence[Facts]:
        """The cosine."""
        how = "mean cosine to every photo; size, crop and normalisation by the folder's preprocessor_config.json"
        name, weights, licence = self._name, self._weights, self._licence
        return (Facts(name=name, better="down", how=how, weights=weights, licence=licence, delta=COSINE_DELTA),)

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        if against.photos is None:
            raise ValueError(f"{self._name} needs photos")
        photos = torch.cat([self._embedder.embed(photo[None].float() / 255) for photo in against.photos])
        return {self._name: (self._embedder.embed(images.float() / 255) @ photos.T).mean(dim=1).tolist()}


class PromptSimilarity(Metric):
    """CLIP-T: cosine of an image to its prompt. A drop says that the model broke, not that the subject is hidden.

    Args:
        folder: a CLIP model of `save_pretrained` with tokenizer; safetensors only.

    Raises:
        ModelError: the folder is incomplete or no CLIP model.
    """

    needs = Reference.PROMPTS

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPConfig, CLIPTextModelWithProjection
        from transformers.utils import logging

        self._images = Embedder(folder, device=device)
        self._weights = folder_digest(folder)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it lists the weights of the image side, which are not wanted here
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            config = CLIPConfig.from_pretrained(str(folder), local_files_only=True)
            # Some checkpoints say the width of the projection at the top only.
            config.text_config.projection_dim = config.projection_dim
            self._text: Any
            self._text, info = CLIPTextModelWithProjection.from_pretrained(
                str(folder),
                config=config.text_config,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder} is no CLIP model with tokenizer: {error}") from error
        finally:
            logging.set_verbosity(verbosity)
        if missing := sorted(info["missing_keys"]):
            raise ModelError(f"{folder} lacks weights of CLIP's text side: {missing[:3]}; name a CLIP folder")
        self._text.to(device).eval().requires_grad_(False)

    @property
    def facts(self) -> Sequence[Facts]:
        """The cosine."""
        how = "cosine of image and prompt, cut at the text model's length; the rest by the folder's configuration"
        return (Facts(name="clip_t", better="neither", how=how, weights=self._weights, licence=GIVEN),)

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        if against.prompts is None:
            raise ValueError("clip_t needs prompts")
        tokens = self._tokenizer(
            list(against.prompts),
            padding="max_length",
            max_length=self._text.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        texts = F.normalize(self._text(**tokens.to(self._text.device)).text_embeds, dim=1).cpu()
        return {"clip_t": (self._images.embed(images.float() / 255) * texts).sum(dim=1).tolist()}
