"""Editing trials: a control that a null protection passes, four cells on tiny models, failures that are no numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import FatalWorkerError
from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.cells import build_tables
from pipeline.verify.edit_trial import EDIT_METRIC, EditTrial, middle_mask, noisy_as, run_edit_trial
from pipeline.verify.editors.base import Edit
from pipeline.verify.scores import Cell
from pipeline.verify.tables import Question
from pipeline.verify.trial import Pixels, TrialResult
from tests.pipeline.edit_models import pictures
from tests.protectors.tiny import save_tiny_model

SIDE = 32  # half of what the tiny model takes: quick
EDITOR = "sdedit-0.3-quick"
LEVELS = 48  # a random model's edits hardly feel less


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> AttackModels:
    return AttackModels({ModelKind.LATENT: str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))})


def clean_pictures(count: int) -> list[Pixels]:
    return [image.permute(1, 2, 0).numpy() for image in pictures(count, SIDE, SIDE)]


def trial(number: int, clean: Pixels, protected: Pixels) -> EditTrial:
    return EditTrial(
        key=f"verifications/x/images/shard-0/{number}-{EDITOR}.json",
        shard_id="shard-0",
        asset_id=f"a{number}",
        unit=f"shard-0/{number}",
        editor=EDITOR,
        edit=Edit(target="a painting", source="a photo"),
        clean=clean,
        protected=protected,
        purifiers=("jpeg75",),
        seed=number,
    )


def values(result: TrialResult) -> dict[tuple[Cell, str], float]:
    return {(score.cell, score.purifier): float(score.value or 0) for score in result.scores}


def noise(clean: Pixels, seed: int, levels: int = LEVELS) -> Pixels:
    drawn = np.random.default_rng(seed).integers(-levels, levels + 1, clean.shape)
    return np.clip(clean + drawn, 0, 255).astype(np.uint8)


def test_what_was_not_changed_is_edited_alike(models: AttackModels) -> None:
    (clean,) = clean_pictures(1)
    result = run_edit_trial(trial(0, clean, clean), models)
    found = values(result)
    assert found[Cell.CLEAN, "none"] == found[Cell.PROTECTED, "none"] == found[Cell.CEILING, "none"] == 1.0
    # A purifier hinders the edit, of either side alike.
    assert found[Cell.PURIFIED, "jpeg75"] == found[Cell.PURIFIED_PROTECTED, "jpeg75"] < 1
    assert found[Cell.FLOOR, "none"] < 1
    assert (result.title, result.row) == ("a0", "a0")
    assert {(score.unit, score.metric) for score in result.scores} == {("shard-0/0", EDIT_METRIC)}
    assert list(result.pictures) == [
        "original",
        "protected",
        f"original edited by {EDITOR}",
        f"protected edited by {EDITOR}",
        f"protected, after jpeg75, edited by {EDITOR}",
    ]
    # The picture of the original's edit shows what the attacker wanted, not the control with its noise.
    assert result.pictures[f"original edited by {EDITOR}"] == result.pictures[f"protected edited by {EDITOR}"]


def test_noise_in_place_of_a_protection_shows_nothing(models: AttackModels) -> None:
    scores = []
    for number, clean in enumerate(clean_pictures(4)):
        scores += run_edit_trial(trial(number, clean, noise(clean, number)), models).scores
    (table,) = build_tables(scores, [Question(metric=EDIT_METRIC, primary=True)])
    assert table.cells["A"] is not None
    hindered = 1 - table.cells["A"]
    assert hindered > 0.02  # with the clean image as control, this would pass for protection
    for row in table.rows:
        assert row.residual is not None
        assert row.residual.value is not None
        assert abs(row.residual.value) < 0.5 * hindered


def test_a_change_that_hinders_more_than_noise_shows(models: AttackModels) -> None:
    """Stripes of the same l_inf move the edit further than noise, whose signs cancel."""
    (clean,) = clean_pictures(1)
    stripes = np.where(np.arange(SIDE) // 4 % 2, LEVELS, -LEVELS)[None, :, None]
    protected = np.clip(clean + stripes, 0, 255).astype(np.uint8)
    found = values(run_edit_trial(trial(0, clean, protected), models))
    assert found[Cell.PROTECTED, "none"] < found[Cell.CLEAN, "none"] < 1


@given(st.integers(0, 255), st.integers(-255, 255), st.integers(0, 2**63))
def test_the_noise_is_no_larger_than_the_protection(level: int, change: int, seed: int) -> None:
    clean = torch.full((1, 3, 6, 6), level, dtype=torch.uint8)
    protected = clean.clone()
    protected[0, 0, 0, 0] = min(255, max(0, level + change))
    noisy = noisy_as(clean, protected, seed)
    bound = int((protected.short() - clean.short()).abs().max())
    assert noisy.dtype == torch.uint8
    assert int((noisy.short() - clean.short()).abs().max()) <= bound
    assert torch.equal(noisy, noisy_as(clean, protected, seed))


def test_the_noise_uses_the_whole_budget_and_its_own_seed() -> None:
    clean = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    protected = clean + 3
    noisy = noisy_as(clean, protected, 0)
    assert set(noisy.flatten().tolist()) == set(range(125, 132))
    assert not torch.equal(noisy, noisy_as(clean, protected, 1))


def test_editors_that_repaint_get_the_middle(models: AttackModels) -> None:
    (clean,) = clean_pictures(1)
    found = values(run_edit_trial(replace(trial(0, clean, clean), editor="inpaint-blended-quick"), models))
    assert found[Cell.PROTECTED, "none"] == 1.0
    assert middle_mask(torch.zeros(2, 3, 8, 12)).sum(dim=(1, 2, 3)).tolist() == [4 * 6] * 2


def test_an_attack_that_fails_is_an_error_and_no_number(models: AttackModels) -> None:
    (clean,) = clean_pictures(1)
    result = run_edit_trial(replace(trial(0, clean, clean), edit=Edit(target=""), editor="diffedit-quick"), models)
    assert result.scores
    assert all(score.value is None and "ValueError" in str(score.error) for score in result.scores)


def test_a_checkpoint_that_is_gone_stops_the_run_and_stores_nothing() -> None:
    (clean,) = clean_pictures(1)
    with pytest.raises(FatalWorkerError, match="no folder '/nowhere'"):
        run_edit_trial(trial(0, clean, clean), AttackModels({ModelKind.LATENT: "/nowhere"}))
