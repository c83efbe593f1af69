"""nano-embed: is the nearest photo in its space one of the same subject?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.laboratory.figures import Figure, bootstrap_interval
from pipeline.verify.embed import Embedder

MODEL = "nano-embed"


def nearest_neighbour_hits(vectors: Tensor, subjects: Sequence[str]) -> list[float]:
    """1.0 for each unit vector `(N, D)` whose nearest other one is of the same subject, else 0.0."""
    alike = vectors @ vectors.T
    alike.fill_diagonal_(-torch.inf)
    nearest = alike.argmax(dim=1).tolist()
    return [float(subjects[there] == subjects[here]) for here, there in enumerate(nearest)]


def figures(embedder: Embedder, images: Tensor, subjects: Sequence[str], sample: str) -> list[Figure]:
    """Leave-one-out nearest neighbour of the embedder, of colour histograms, and of raw pixels.

    Shape: images `(N, 3, S, S)` in [0, 1].
    """
    vectors = embedder.embed(images)
    own = nearest_neighbour_hits(vectors, subjects)
    found = [_share("nearest neighbour is of the same subject, embedding", own, subjects, 0.70)]
    for name, others in (("colour histogram", colour_histograms(images)), ("raw pixels", raw_pixels(images))):
        hits = nearest_neighbour_hits(others, subjects)
        found.append(_share(f"nearest neighbour is of the same subject, {name}", hits, subjects, None))
        ahead = [mine - theirs for mine, theirs in zip(own, hits, strict=True)]
        found.append(_share(f"embedding ahead of {name}, paired", ahead, subjects, None))
    return [*(replace(figure, sample=sample) for figure in found), *_similarities(vectors, subjects, sample)]


def _share(name: str, values: Sequence[float], subjects: Sequence[str], bar: float | None) -> Figure:
    low, high = bootstrap_interval(values, subjects)
    mean = sum(values) / len(values)
    return Figure(model=MODEL, name=name, value=mean, sample="", low=low, high=high, at_least=bar)


def _similarities(vectors: Tensor, subjects: Sequence[str], sample: str) -> list[Figure]:
    alike = vectors @ vectors.T
    same = torch.tensor([[one == other for other in subjects] for one in subjects])
    others = ~torch.eye(len(subjects), dtype=torch.bool)
    pairs = (("of one subject", same & others), ("of two subjects", ~same))
    return [
        Figure(model=MODEL, name=f"mean cosine of photos {what}", value=alike[mask].mean().item(), sample=sample)
        for what, mask in pairs
    ]


def colour_histograms(images: Tensor, bins: int = 8) -> Tensor:
    """Square roots of joint RGB histograms, `(N, bins^3)` of length 1: their product is the Bhattacharyya measure."""
    levels = (images * bins).long().clamp(max=bins - 1)
    cells = (levels[:, 0] * bins + levels[:, 1]) * bins + levels[:, 2]
    counts = torch.stack([torch.bincount(cell.flatten(), minlength=bins**3) for cell in cells]).float()
    return F.normalize(counts.sqrt(), dim=1)


def raw_pixels(images: Tensor, size: int = 32) -> Tensor:
    """Centred pixels of the image at `size` pixels, `(N, 3 * size^2)` of length 1."""
    small = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False).flatten(1)
    return F.normalize(small - small.mean(dim=1, keepdim=True), dim=1)
