"""One asset on its way from the source shard to the part, and one unit of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import ErrorInfo


@dataclass(slots=True, kw_only=True)
class Asset:
    """One image. Every stage fills in its part; a failure stops the later ones."""

    row: int
    asset_id: str
    source_uri: str
    source_etag: str
    data: bytes | None = field(repr=False)
    source_sha256: str | None = None
    # Upright sRGB at the optimizer's size, uint8 (h, w, 3). None: the optimizer decodes by itself (large images).
    view: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    seed: int | None = None
    # What it shows, where the configuration names a column of subjects.
    subject: str | None = None
    # What the optimizer found: int8 (h, w, 3) in 8-bit levels, upright, at the view's size.
    delta: npt.NDArray[np.int8] | None = field(default=None, repr=False)
    steps: int | None = None
    objective_before: float | None = None
    objective_after: float | None = None
    failure: ErrorInfo | None = None
    attempt: int = 0
    # Name of the device that protected it.
    device: str | None = None


@dataclass(slots=True, kw_only=True)
class Unit:
    """The unit of scheduling and of resume: a few consecutive rows of one shard, one part object."""

    shard_id: str
    unit_id: str
    rung: int
    assets: list[Asset]
    # The customer's columns as the source has them, one row per asset.
    customer: pa.Table = field(default_factory=lambda: pa.table({}), repr=False)

    @property
    def part_key(self) -> str:
        """Where the unit's results go."""
        return f"parts/{self.shard_id}/{self.unit_id}.parquet"

    @property
    def healthy(self) -> list[Asset]:
        """Assets that have not failed."""
        return [asset for asset in self.assets if asset.failure is None]
