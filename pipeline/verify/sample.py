"""Chooses which assets are checked: by hash, so that every run and every resume checks the same ones."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.config import CheckSettings
from pipeline.ids import sha256_hex


def choose_sample(asset_ids: Iterable[str], settings: CheckSettings) -> set[str]:
    """The assets of one shard that are checked.

    An asset is chosen when the hash of its id lies below ``fraction``; where that leaves fewer than
    ``min_per_shard``, the next lowest hashes are added.
    """
    ranked = sorted((sha256_hex(f"{settings.salt}|{name}"), name) for name in asset_ids)
    limit = settings.fraction * 16.0**16
    chosen = [name for digest, name in ranked if int(digest[:16], 16) < limit]
    return set(chosen) | {name for _, name in ranked[: settings.min_per_shard]}
