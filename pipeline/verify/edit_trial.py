"""One image under the editing attacks: does the edit of the protected image still do what the attacker wanted?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels
from pipeline.verify.editors import EDITORS
from pipeline.verify.editors.base import Edit
from pipeline.verify.further import FurtherMetrics
from pipeline.verify.scores import NO_PURIFIER, Cell, Score
from pipeline.verify.trial import (
    NOT_MEASURED,
    Pixels,
    TrialResult,
    cells_of,
    failed_trial,
    purified_by,
    sheet,
    stop_if_transient,
    tensor,
)
from protectors.randomness import streams
from protectors.reference.quality import ssim

EDIT_METRIC = "edit kept (SSIM to the edit of the clean image)"


@dataclass(slots=True, kw_only=True)
class EditTrial:
    """One image, one editor, all cells. Holds pixels: it travels to the actor that runs it."""

    key: str
    shard_id: str
    # Names the image for people; ids may repeat across shards, so `unit` is what scores are counted by.
    asset_id: str
    unit: str
    editor: str
    edit: Edit
    # Centre squares at the model's size, uint8 (S, S, 3).
    clean: Pixels
    protected: Pixels
    purifiers: tuple[str, ...]
    seed: int
    # Of the noise of the control in 8-bit levels; None: the l_inf of the protection.
    control_levels: int | None = None


def run_edit_trial(trial: EditTrial, models: AttackModels, further: FurtherMetrics | None = None) -> TrialResult:
    """Edits the image in every cell with the same wish and draws.

    What the attacker wants is the edit of the clean image; a score is the structural similarity of a cell's edit to
    it. Any change of the input moves an edit, random noise included, so the clean side of the control is not the
    clean image itself: cell A is the clean image with uniform noise of the protection's own l_inf, B the same after
    the purifier. A protection that does no more than such noise shows a residual of about 0. Where methods are
    compared, all of them need the same control: noise of `control_levels`.

    The floor is the clean image edited with other draws: an edit that is no further off than that has not been
    hindered. The ceiling is 1, the wanted edit itself. Further metrics are measured on the same edits.
    """
    further = further or FurtherMetrics()
    clean, protected = tensor(trial.clean)[None], tensor(trial.protected)[None]
    levels = trial.control_levels
    noisy = noisy_as(clean, protected, trial.seed) if levels is None else with_noise(clean, levels, trial.seed)
    images: dict[tuple[Cell, str], Tensor] = {
        (Cell.CLEAN, NO_PURIFIER): noisy,
        (Cell.PROTECTED, NO_PURIFIER): protected,
    }
    editor = EDITORS[trial.editor]
    masks = middle_mask(clean) if editor.needs_mask else None

    def edited(image: Tensor, seed: int) -> Tensor:
        return editor.edit(image, [trial.edit], seeds=[seed], models=models, masks=masks)

    try:
        for name in trial.purifiers:
            images[Cell.PURIFIED, name] = purified_by(name, noisy, models, trial.seed)
            images[Cell.PURIFIED_PROTECTED, name] = purified_by(name, protected, models, trial.seed)
        edits = {place: edited(image, trial.seed) for place, image in images.items()}
        wanted, other = edited(clean, trial.seed), edited(clean, trial.seed + 1)
    except Exception as error:  # noqa: BLE001 - whatever an attack raises is a failed measurement, not a failed run
        stop_if_transient(error)
        names = (EDIT_METRIC, *further.edit_names)
        planned = [_score(trial, place, metric=name) for name in names for place in cells_of(trial.purifiers)]
        return failed_trial(trial.key, trial.asset_id, error, planned)
    judged = edits | {(Cell.FLOOR, NO_PURIFIER): other, (Cell.CEILING, NO_PURIFIER): wanted}
    scores = [_score(trial, place, _likeness(image, wanted)) for place, image in judged.items()]
    for place, image in judged.items():
        found = further.of_edit(image, wanted)
        scores += [_score(trial, place, out.value, metric=name, error=out.error) for name, out in found.items()]
    pictures = {"original": clean, "protected": protected, f"original edited by {trial.editor}": wanted}
    pictures |= _edits_of_protected(trial.editor, edits)
    return TrialResult(
        key=trial.key,
        title=trial.asset_id,
        row=trial.asset_id,
        scores=scores,
        pictures={label: sheet(image) for label, image in pictures.items()},
    )


def noisy_as(clean: Tensor, protected: Tensor, seed: int) -> Tensor:
    """The clean image with independent uniform noise in whole levels, of the l_inf of the protection.

    Args:
        clean: uint8 `(1, 3, H, W)`.
        protected: the same, protected.
        seed: unsigned 64-bit; the noise has a stream of its own.

    Returns:
        uint8 `(1, 3, H, W)`; equal to `clean` where nothing was changed.
    """
    return with_noise(clean, int((protected.short() - clean.short()).abs().max()), seed)


def with_noise(clean: Tensor, levels: int, seed: int) -> Tensor:
    """Images with independent uniform noise between -levels and levels: uint8 `(1, 3, H, W)` in and out."""
    (generator,) = streams([seed], "edit control")
    noise = torch.randint(-levels, levels + 1, clean.shape, generator=generator, dtype=torch.int16)
    return (clean.short() + noise).clamp(0, 255).to(torch.uint8)


def middle_mask(image: Tensor) -> Tensor:
    """The middle half in either direction of images `(B, 3, H, W)`: float `(B, 1, H, W)`, 1 where it is repainted."""
    height, width = image.shape[-2:]
    masks = torch.zeros(len(image), 1, height, width)
    masks[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    return masks


def _likeness(left: Tensor, right: Tensor) -> float:
    return float(ssim(left.float() / 255, right.float() / 255))


def _edits_of_protected(editor: str, edits: Mapping[tuple[Cell, str], Tensor]) -> dict[str, Tensor]:
    found = {f"protected edited by {editor}": edits[Cell.PROTECTED, NO_PURIFIER]}
    for (cell, purifier), image in edits.items():
        if cell is Cell.PURIFIED_PROTECTED:
            found[f"protected, after {purifier}, edited by {editor}"] = image
    return found


def _score(
    trial: EditTrial,
    place: tuple[Cell, str],
    value: float | None = None,
    *,
    metric: str = EDIT_METRIC,
    error: str | None = None,
) -> Score:
    cell, purifier = place
    return Score(
        attack=trial.editor,
        metric=metric,
        unit=trial.unit,
        cell=cell,
        purifier=purifier,
        image=trial.unit,
        prompt=trial.edit.target,
        value=value,
        error=(error or NOT_MEASURED) if value is None else None,
    )
