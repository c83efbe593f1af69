"""Every error that Fixative raises on purpose, and the reasons for which an asset is quarantined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["fetch", "decode", "protect", "verify", "encode"]
"""Where an asset failed; the value of the quarantine table's ``stage`` column."""


class PipelineError(Exception):
    """Base of all errors whose message is meant for the user: what, which key or id, what to do."""


class UserError(PipelineError):
    """The command cannot run as given. The command line prints the message in one line and exits with 2."""


class StorageError(PipelineError):
    """The object store refused or failed an operation after all retries."""


class NotFound(StorageError):
    """The key does not exist."""


class AlreadyExists(StorageError):
    """A create-only write found the key taken. The object that was there is untouched."""


class PreconditionFailed(StorageError):
    """A compare-and-swap write found another version than the one it was told to replace."""


class BindingConflict(UserError):
    """The destination already holds results of another configuration."""


class SourceChanged(PipelineError):
    """A source object is no longer the one that the plan lists (another etag, size, or gone)."""


class IntegrityError(PipelineError):
    """Stored bytes do not match what the manifest, the plan or the part says of them."""


class FatalWorkerError(PipelineError):
    """The worker or machine is ill (device fault, too many deaths): stop the job, quarantine nothing."""


class AssetError(PipelineError):
    """One asset cannot be processed; it is quarantined with this stage and reason, the job goes on."""

    stage: Stage = "decode"


class FetchError(AssetError):
    """The asset's bytes are missing from its shard (null image, empty file)."""

    stage: Stage = "fetch"


class DecodeError(AssetError):
    """The bytes are no image that can be protected: truncated, hostile, or of an unsupported kind."""

    stage: Stage = "decode"


class ProtectError(AssetError):
    """The optimizer gave no valid result for this image (not finite, or it crashed the worker)."""

    stage: Stage = "protect"


class CrashLoop(AssetError):
    """The image killed the worker that handled it, again and again."""


class EncodeError(AssetError):
    """The protected pixels could not be written in the output format."""

    stage: Stage = "encode"


class BudgetExceeded(AssetError):
    """The decoded stored bytes differ from the original by more than the budget."""

    stage: Stage = "verify"


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """Why an asset was quarantined: the columns of its row in the quarantine table."""

    stage: Stage
    error_type: str
    message: str

    @classmethod
    def of(cls, error: Exception, stage: Stage) -> ErrorInfo:
        """Describes an exception; an ``AssetError`` names its own stage, any other takes the given one."""
        own = error.stage if isinstance(error, AssetError) else stage
        return cls(stage=own, error_type=type(error).__name__, message=" ".join(str(error).split())[:500])
