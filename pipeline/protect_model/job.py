"""What the protection of a model is asked to do."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import S3Settings
from pipeline.job import storage_options
from pipeline.protect_model.fetch import is_far
from pipeline.storage import StorageOptions, Store, local_path, open_store, public_url
from protectors.randomness import SEED_LIMIT


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConceptSource(_Settings):
    """Where photos of one subject lie."""

    # Folder or s3:// prefix of images, or FILE.parquet#SUBJECT with columns asset_id, image, subject, subject_class.
    path: str
    # What the subject is, e.g. "dog". None: as subject_class says.
    class_word: str | None = None


class ModelJob(_Settings):
    """One model, and the subjects that nobody shall be able to teach it."""

    # An embedded model, a diffusers folder or s3:// prefix, or a hub id.
    model: str
    # Their order counts: updates take turns.
    concepts: Annotated[tuple[ConceptSource, ...], Field(min_length=1)]
    # Folder of the protected model, or s3:// prefix; absent or empty.
    out: str
    # Folder or prefix of checkpoints, empty again when the model is finished. None: beside ``out``, as OUT.training.
    work: str | None = None
    method: str = "apdm"
    # None: fast on an embedded model, whose rates would ruin a real one; else paper.
    preset: str | None = None
    # Single fields of the method's configuration that replace the preset's.
    overrides: dict[str, Any] = Field(default_factory=dict)
    # Images per concept, at most, the first by name or asset id; the others stay unseen, to verify with. None: all.
    images: Annotated[int | None, Field(ge=1)] = None
    # Folder with positives and their manifest, as an earlier run left it in OUT/positives. None: the model draws them.
    positives: str | None = None
    # Parquet file of photos of other things (asset_id, image, caption), on which the model shall do as before. None:
    # pictures that it draws itself.
    keep: str | None = None
    # At most so many of them, spread over their captions.
    keep_images: Annotated[int, Field(ge=1)] = 1024
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] = 0
    device: str = "cpu"
    # Updates between two checkpoints; each writes three times the UNet's weights.
    checkpoint_every: Annotated[int, Field(ge=1)] = 10

    s3: S3Settings = S3Settings()
    # OUT and WORK cannot refuse a second writer, and you promise that there is none.
    single_writer: bool = False

    @property
    def work_url(self) -> str:
        """Of checkpoints."""
        if self.work is not None:
            return self.work
        return f"{self.out.rstrip('/') if is_far(self.out) else local_path(self.out)}.training"

    @property
    def out_name(self) -> str:
        """OUT, as texts may show it."""
        return public_url(self.out)

    @property
    def work_name(self) -> str:
        """WORK, as texts may show it."""
        return public_url(self.work_url)

    def out_store(self) -> Store:
        """Where the model goes."""
        return _opened(self.out, storage_options(self.s3), self.single_writer)

    def work_store(self) -> Store:
        """Where checkpoints go."""
        return _opened(self.work_url, storage_options(self.s3), self.single_writer)

    def source_store(self, url: str) -> Store:
        """What is only read."""
        return _opened(url, storage_options(self.s3), False)


@lru_cache(16)
def _opened(url: str, options: StorageOptions, single_writer: bool) -> Store:
    """One connection for all that is done with a store: making one takes as long as many requests."""
    return open_store(url, options, single_writer=single_writer)
