"""The positives of a protected model: which picture, drawn by the model itself, stood beside which photo."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import IntegrityError, NotFound, UserError
from pipeline.storage import Store, get_json, join_url, json_bytes
from pipeline.verify.trial import sheet
from protectors.concepts import Concept, image_digests
from protectors.diffusion import DiffusionModel

FOLDER = "positives"
MANIFEST = "manifest.json"
_TENSOR = "latents"
_SHEET_SIDE = 128


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positives:
    """Those of one concept."""

    class_word: str
    pairs: tuple[tuple[str, str], ...]
    """sha256 of each photo (8 bit) and of its positive, in the order of the photos' hashes."""
    seeds: tuple[int, ...]
    """Of each, in the same order."""
    drawn: Mapping[str, Any]
    """Prompt, sampler, steps, guidance."""
    latents: Tensor
    """``(N, C, h, w)`` float32, scaled, in the same order."""

    def given_to(self, concept: Concept) -> Tensor:
        """The latents in the order of the concept's images, which are these photos."""
        names = image_digests(concept.images)
        placed = torch.empty_like(self.latents)
        placed[sorted(range(len(names)), key=names.__getitem__)] = self.latents
        return placed


def write_positives(folder: Path, base: str, concepts: Sequence[Positives], model: DiffusionModel) -> None:
    """Writes latents and a sheet of decoded pictures per concept, and the manifest.

    Args:
        folder: absent.
        base: digest of the model that drew them.
        concepts: one per concept.
        model: whose VAE decodes them.
    """
    folder.mkdir()
    entries = []
    for number, found in enumerate(concepts):
        files = {"latents": f"{number}.safetensors", "sheet": f"{number}.png"}
        save_file({_TENSOR: found.latents.contiguous()}, folder / files["latents"])
        (folder / files["sheet"]).write_bytes(_sheet(found.latents, model))
        pairs = [
            {"image_sha256": image, "latents_sha256": positive, "seed": seed}
            for (image, positive), seed in zip(found.pairs, found.seeds, strict=True)
        ]
        entries.append({"class_word": found.class_word, "drawn": dict(found.drawn), "pairs": pairs, **files})
    (folder / MANIFEST).write_bytes(json_bytes({"base": base, "concepts": entries}))


def read_positives(store: Store, base: str, concepts: Sequence[Concept]) -> tuple[Positives, ...]:
    """Those that the manifest pairs with the photos of each concept.

    Args:
        store: a folder that ``write_positives`` wrote.
        base: digest of the model that is to be protected.
        concepts: their photos decide; their order and that of their photos do not.

    Raises:
        UserError: they are of another model or of other photos, or not what the manifest says.
    """
    where = f"--positives {store.url}"
    try:
        manifest = get_json(store, MANIFEST)
    except (NotFound, IntegrityError) as error:
        raise UserError(f"{where}: {error}; name the folder {FOLDER!r} of a protected model") from error
    try:
        if manifest["base"] != base:
            raise UserError(
                f"{where} was drawn by another model ({manifest['base'][:12]}) than the one given ({base[:12]})"
            )
        return tuple(_found(store, manifest["concepts"], concept) for concept in concepts)
    except (KeyError, TypeError) as error:
        raise UserError(f"{join_url(where, MANIFEST)} lacks what a manifest has: {error}") from error


def _found(store: Store, entries: Sequence[Mapping[str, Any]], concept: Concept) -> Positives:
    photos = sorted(image_digests(concept.images))
    for entry in entries:
        pairs = tuple((pair["image_sha256"], pair["latents_sha256"]) for pair in entry["pairs"])
        if [photo for photo, _ in pairs] == photos:
            return Positives(
                class_word=concept.class_word,
                pairs=pairs,
                seeds=tuple(pair["seed"] for pair in entry["pairs"]),
                drawn=entry["drawn"],
                latents=_latents(store, entry["latents"], [positive for _, positive in pairs]),
            )
    known = {pair["image_sha256"] for entry in entries for pair in entry["pairs"]}
    raise UserError(
        f"--positives {store.url} is for {' and '.join(str(len(entry['pairs'])) for entry in entries)} photos, and "
        f"knows {len(known.intersection(photos))} of these {len(photos)} of a {concept.class_word}: give the very "
        "photos and --images that it was made with"
    )


def _latents(store: Store, name: str, digests: Sequence[str]) -> Tensor:
    where = join_url(f"--positives {store.url}", name)
    try:
        latents: Tensor = load(store.get(name))[_TENSOR]
    except (NotFound, SafetensorError, KeyError) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    found = [hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest() for values in latents]
    if len(found) != len(digests):
        raise UserError(f"{where} holds {len(found)} positives, and the manifest names {len(digests)}")
    if wrong := [number for number, (one, other) in enumerate(zip(found, digests, strict=True)) if one != other]:
        raise UserError(f"{where}: number {wrong[0]} is not the one that the manifest names; fetch the folder again")
    return latents


@torch.no_grad()
def _sheet(latents: Tensor, model: DiffusionModel) -> bytes:
    """PNG of the decoded pictures side by side, small."""
    pictures = [model.decode(one[None].to(model.device)).clamp(0, 1).cpu() for one in latents]
    side = min(_SHEET_SIDE, model.base_size)
    small = [F.interpolate(picture, size=(side, side), mode="area")[0] for picture in pictures]
    return sheet((torch.stack(small) * 255).round().byte())
