"""One image under the editing attacks: does the edit of the protected image still do what the attacker wanted?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pipeline.verify.attack_models import AttackModels
from pipeline.verify.editors import EDITORS
from pipeline.verify.editors.base import Edit
from pipeline.verify.scores import NO_PURIFIER, Cell, Score
from pipeline.verify.trial import NOT_MEASURED, Pixels, TrialResult, cells_of, failed_trial, purified_by, sheet, tensor
from pipeline.worker import exit_on_device_fault
from protectors.reference.quality import ssim

EDIT_METRIC = "edit kept (SSIM)"


@dataclass(slots=True, kw_only=True)
class EditTrial:
    """One image, one editor, all cells. Holds pixels: it travels to the actor that runs it."""

    key: str
    # Names the image: its asset id.
    unit: str
    editor: str
    edit: Edit
    # Centre squares at the model's size, uint8 (S, S, 3).
    clean: Pixels
    protected: Pixels
    purifiers: tuple[str, ...]
    seed: int


def run_edit_trial(trial: EditTrial, models: AttackModels) -> TrialResult:
    """Edits the image in every cell with the same wish and draws.

    What the attacker wants is the edit of the clean image; a score is the structural similarity of a cell's edit to
    it, 1 for cell A by definition. The floor is the clean image edited with other draws: an edit that is no further
    off than that has not been hindered.
    """
    images: dict[tuple[Cell, str], Tensor] = {
        (Cell.CLEAN, NO_PURIFIER): tensor(trial.clean)[None],
        (Cell.PROTECTED, NO_PURIFIER): tensor(trial.protected)[None],
    }
    try:
        for name in trial.purifiers:
            for cell, side in ((Cell.PURIFIED, trial.clean), (Cell.PURIFIED_PROTECTED, trial.protected)):
                images[cell, name] = purified_by(name, tensor(side)[None], models, trial.seed)
        editor = EDITORS[trial.editor]
        edited = {
            place: editor.edit(image, [trial.edit], seeds=[trial.seed], models=models)
            for place, image in images.items()
        }
        wanted = edited[Cell.CLEAN, NO_PURIFIER]
        other = editor.edit(images[Cell.CLEAN, NO_PURIFIER], [trial.edit], seeds=[trial.seed + 1], models=models)
    except Exception as error:  # noqa: BLE001 - whatever an attack raises is a failed measurement, not a failed run
        exit_on_device_fault(error)
        return failed_trial(trial.key, trial.unit, error, [_score(trial, place) for place in cells_of(trial.purifiers)])
    scores = [_score(trial, place, _likeness(image, wanted)) for place, image in edited.items()]
    scores += [_score(trial, (Cell.FLOOR, NO_PURIFIER), _likeness(other, wanted))]
    scores += [_score(trial, (Cell.CEILING, NO_PURIFIER), 1.0)]
    return TrialResult(
        key=trial.key, title=trial.unit, row=trial.unit, scores=scores, pictures=_pictures(trial.editor, edited, images)
    )


def _likeness(left: Tensor, right: Tensor) -> float:
    return float(ssim(left.float() / 255, right.float() / 255))


def _pictures(
    editor: str, edited: Mapping[tuple[Cell, str], Tensor], images: Mapping[tuple[Cell, str], Tensor]
) -> dict[str, bytes]:
    found = {"original": images[Cell.CLEAN, NO_PURIFIER], "protected": images[Cell.PROTECTED, NO_PURIFIER]}
    names = {Cell.CLEAN: "original", Cell.PROTECTED: "protected"}
    for (cell, purifier), image in edited.items():
        if purifier == NO_PURIFIER:
            found[f"{names[cell]} edited by {editor}"] = image
        elif cell is Cell.PURIFIED_PROTECTED:
            found[f"protected, after {purifier}, edited by {editor}"] = image
    return {label: sheet(image) for label, image in found.items()}


def _score(trial: EditTrial, place: tuple[Cell, str], value: float | None = None) -> Score:
    cell, purifier = place
    return Score(
        attack=trial.editor,
        metric=EDIT_METRIC,
        unit=trial.unit,
        cell=cell,
        purifier=purifier,
        image=trial.unit,
        prompt=trial.edit.target,
        value=value,
        error=NOT_MEASURED if value is None else None,
    )
