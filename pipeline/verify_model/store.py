"""What a verification keeps in its folder: scores and pictures of trials, and arrays of numbers."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np

from pipeline.compare.store import Results as TrialResults
from pipeline.errors import AlreadyExists, NotFound
from pipeline.verify.bootstrap import Floats


class Results(TrialResults):
    """As that of a comparison, and arrays beside trials."""

    def finished(self) -> set[str]:
        """Keys of everything that is stored and has not failed."""
        return self.trials() | self._keys("values/", ".npz")

    def put_values(self, key: str, values: Floats, seconds: float) -> None:
        """Stores an array and the processor time that it took; one that is there stays."""
        file = io.BytesIO()
        np.savez_compressed(file, values=values, seconds=np.array(seconds))
        with suppress(AlreadyExists):
            self.store.put_new(f"values/{key}.npz", file.getvalue())

    def values(self, key: str) -> Floats:
        """Reads it back. Raises NotFound."""
        return self._array(key, "values")

    def seconds(self, key: str) -> float:
        """Processor time of anything that is stored. Raises NotFound."""
        try:
            return super().seconds(key)
        except NotFound:
            return float(self._array(key, "seconds"))

    def _array(self, key: str, name: str) -> Floats:
        with np.load(io.BytesIO(self.store.get(f"values/{key}.npz")), allow_pickle=False) as file:
            found: Floats = file[name]
            return found
