"""What a comparison keeps in its folder: protected photos, scores of trials, and their pictures."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import AlreadyExists, NotFound
from pipeline.storage import StorageOptions, Store, get_json, open_store, put_json_new
from pipeline.verify.scores import Score
from pipeline.verify.trial import Pixels, TrialResult, scores_from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """The protected training photos of one subject."""

    # uint8 (S, S, 3), in the subject's order.
    photos: list[Pixels]
    # By name of the metric, one value per photo.
    fidelity: Mapping[str, list[float]]
    # Processor time that it took: what else ran on the machine does not count.
    seconds: float


class Results:
    """A folder of results. One object per result, each written whole or not at all.

    Args:
        folder: of this machine; it will hold pictures of the originals.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: Store = open_store(str(folder), StorageOptions())

    def protections(self) -> set[str]:
        """Keys of the stored ones."""
        return self._keys("protected/", ".npz")

    def trials(self) -> set[str]:
        """Keys of the stored ones; those that failed are to be run again, and not among them."""
        return {key for key in self._keys("trials/", ".json") if self.error(key) is None}

    def put_protected(self, key: str, protected: Protected) -> None:
        """Stores photos and facts in one file; one that is there stays."""
        facts = json.dumps({"fidelity": dict(protected.fidelity), "seconds": protected.seconds})
        file = io.BytesIO()
        np.savez_compressed(file, photos=np.stack(protected.photos), facts=np.array(facts))
        with suppress(AlreadyExists):
            self.store.put_new(f"protected/{key}.npz", file.getvalue())

    def protected(self, key: str) -> Protected:
        """Reads them back. Raises NotFound."""
        with np.load(io.BytesIO(self.store.get(f"protected/{key}.npz")), allow_pickle=False) as file:
            return Protected(photos=list(file["photos"]), **json.loads(str(file["facts"])))

    def put_trial(self, key: str, result: TrialResult, seconds: float) -> None:
        """Stores the pictures, then the scores: a trial counts as done when its scores are there.

        A stored one stays, unless it failed.
        """
        with suppress(NotFound):
            if self.error(key) is not None:
                self.store.delete(f"trials/{key}.json")
        for label, data in result.pictures.items():
            with suppress(AlreadyExists):
                self.store.put_new(_picture(key, label), data)
        document = {"writer_id": uuid.uuid4().hex, "title": result.title, "seconds": seconds, **result.to_json()}
        put_json_new(self.store, f"trials/{key}.json", document)

    def scores(self, key: str) -> list[Score]:
        """Scores of a stored trial. Raises NotFound."""
        return scores_from_json(self._trial(key))

    def error(self, key: str) -> str | None:
        """Why a stored trial failed; None: it has not. Raises NotFound."""
        return next((score.error for score in self.scores(key) if score.error is not None), None)

    def seconds(self, key: str) -> float:
        """Processor time of a stored trial. Raises NotFound."""
        return float(self._trial(key)["seconds"])

    def picture(self, key: str, label: str) -> bytes:
        """A PNG of a stored trial, photos side by side. Raises NotFound."""
        return self.store.get(_picture(key, label))

    def _trial(self, key: str) -> dict[str, Any]:
        return get_json(self.store, f"trials/{key}.json")

    def _keys(self, prefix: str, suffix: str) -> set[str]:
        return {item.key.removeprefix(prefix).removesuffix(suffix) for item in self.store.list(prefix)}


def _picture(key: str, label: str) -> str:
    return f"pictures/{key}/{label}.png"
