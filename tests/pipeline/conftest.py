"""What all tests of the pipeline share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("pipeline", deadline=None)  # a busy machine is no failure
settings.load_profile("pipeline")


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    """Nobody cuts the power here, and waiting for the disk was two thirds of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
