"""nano-embed: is the nearest photo in its space one of the same subject?"""

from __future__ import annotations

from collections.abc import Sequence

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


def figures(embedder: Embedder, images: Tensor, subjects: Sequence[str]) -> list[Figure]:
    """Leave-one-out nearest neighbour of the embedder, of colour histograms, and of raw pixels.

    Shape: images `(N, 3, S, S)` in [0, 1].
    """
    found = []
    sample = f"{len(images)} photos of {len(set(subjects))} subjects"
    ways = (
        ("embedding", embedder.embed(images), 0.70),
        ("colour histogram", colour_histograms(images), None),
        ("raw pixels", raw_pixels(images), None),
    )
    for name, vectors, bar in ways:
        hits = nearest_neighbour_hits(vectors, subjects)
        low, high = bootstrap_interval(hits)
        name = f"nearest neighbour is of the same subject, {name}"
        value = sum(hits) / len(hits)
        found.append(Figure(model=MODEL, name=name, value=value, sample=sample, low=low, high=high, at_least=bar))
    return found + _similarities(embedder.embed(images), subjects, sample)


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
