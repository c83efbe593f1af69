"""What the protection of a model is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from protectors.randomness import SEED_LIMIT


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConceptSource(_Settings):
    """Where photos of one subject lie."""

    # Folder of images, or FILE.parquet#SUBJECT with columns asset_id, image, subject, subject_class.
    path: str
    # What the subject is, e.g. "dog". None: as subject_class says.
    class_word: str | None = None


class ModelJob(_Settings):
    """One model, and the subjects that nobody shall be able to teach it."""

    # An embedded model, a diffusers folder, or a hub id.
    model: str
    # Their order counts: updates take turns.
    concepts: Annotated[tuple[ConceptSource, ...], Field(min_length=1)]
    # Folder of the protected model; absent or empty.
    out: Path
    # Folder of checkpoints, gone when the model is finished. None: beside ``out``, as OUT.training.
    work: Path | None = None
    method: str = "apdm"
    # None: fast on an embedded model, whose rates would ruin a real one; else paper.
    preset: str | None = None
    # Single fields of the method's configuration that replace the preset's.
    overrides: dict[str, Any] = Field(default_factory=dict)
    # Images per concept, at most, the first by name or asset id; the others stay unseen, to verify with. None: all.
    images: Annotated[int | None, Field(ge=1)] = None
    # Folder with positives and their manifest, as an earlier run left it in OUT/positives. None: the model draws them.
    positives: str | None = None
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] = 0
    device: str = "cpu"
    # Updates between two checkpoints; each writes three times the UNet's weights.
    checkpoint_every: Annotated[int, Field(ge=1)] = 10

    @property
    def work_folder(self) -> Path:
        """Of checkpoints."""
        return self.work or self.out.with_name(f"{self.out.name}.training")
