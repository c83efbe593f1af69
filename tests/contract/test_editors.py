"""One contract for every registered editor. A new method costs one row in ``SMALL``.

1. Pixels: uint8 of the images' shape at any size; under 0 of a mask the original, exactly.
2. Randomness: the same seed gives the same pixels, alone or in any batch.
3. Side effects: the checkpoint's weights, scheduler and attention processors stay as they are, on errors too.
4. Form: bad input, unusable parameters and missing or wrong checkpoints raise.

Tiny random models show mechanics, never how strong an attack is.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind, ModelMissing
from pipeline.verify.editors import EDITORS
from pipeline.verify.editors.base import Edit, Editor
from pipeline.verify.editors.diffedit import DiffEdit
from pipeline.verify.editors.inpaint import BlendedInpaint, Inpaint
from pipeline.verify.editors.instruct import InstructPix2Pix
from pipeline.verify.editors.masactrl import MasaCtrl
from pipeline.verify.editors.sdedit import SDEdit
from protectors.model_files import ModelError
from tests.pipeline.edit_models import middle_masks, pictures, save_edit_models

# Parameters that keep a test under a second on the tiny models.
SMALL: dict[str, dict[str, Any]] = {
    "sdedit": {"steps": 4},
    "inpaint": {"steps": 3},
    "inpaint-blended": {"steps": 4},
    "diffedit": {"steps": 3, "maps": 2},
    "masactrl": {"steps": 3, "from_step": 1},
    "instruct-pix2pix": {"steps": 2},
}
# Settings of one method that are equal once they are small are tested once.
SMALL_EDITORS = list(dict.fromkeys(replace(editor, **SMALL[editor.name]) for editor in EDITORS.values()))
ON_LATENT = [editor for editor in SMALL_EDITORS if editor.needs is ModelKind.LATENT]
NOT_RANDOM = {"masactrl"}
WISH = Edit(target="a red fox", source="a dog")


def name_of(editor: Any) -> str:
    return f"{editor.name}-{getattr(editor, 'strength', '')}" if isinstance(editor, Editor) else ""


every_editor = pytest.mark.parametrize("editor", SMALL_EDITORS, ids=name_of)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[ModelKind, str]:
    return save_edit_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(folders: dict[ModelKind, str]) -> AttackModels:
    return AttackModels(folders)


@pytest.fixture(scope="module")
def embedded() -> AttackModels:
    return AttackModels()


def run(editor: Editor, images: Tensor, models: AttackModels, seeds: list[int], **changes: Any) -> Tensor:
    masks = middle_masks(images) if editor.needs_mask else None
    arguments = {"edits": [WISH] * len(images), "masks": masks, **changes}
    return editor.edit(images, arguments.pop("edits"), seeds=seeds, models=models, **arguments)


def state(given: Any) -> dict[str, Any]:
    """All that an attack could change of a pipeline. Objects are compared by identity, weights by value."""
    parts = {name: part for name, part in given.components.items() if part is not None}
    networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {
        "parts": {name: id(part) for name, part in parts.items()},
        "weights": {
            f"{name}.{key}": value.double().sum().item()
            for name, network in networks.items()
            for key, value in network.state_dict().items()
        },
        "training": {name: network.training for name, network in networks.items()},
        "configs": {name: dict(part.config) for name, part in parts.items() if name in ("unet", "vae", "scheduler")},
        "timesteps": given.scheduler.timesteps.tolist(),
        "processors": {name: id(processor) for name, processor in given.unet.attn_processors.items()},
    }


def test_every_setting_is_of_a_known_method_and_quick_ones_are_quick() -> None:
    assert {editor.name for editor in EDITORS.values()} == set(SMALL)
    for name, editor in EDITORS.items():
        assert name.startswith(editor.name)
        assert json.loads(json.dumps(editor.parameters()))["name"] == editor.name
        if name.endswith("-quick"):
            assert editor.parameters()["steps"] <= 20
            assert name.removesuffix("-quick") in EDITORS


@every_editor
def test_pixels(editor: Editor, models: AttackModels) -> None:
    images = pictures(2)
    edited = run(editor, images, models, [1, 2])
    assert edited.shape == images.shape
    assert edited.dtype == torch.uint8
    assert edited.device.type == "cpu"
    assert not torch.equal(edited, images)


@every_editor
def test_the_seed_decides(editor: Editor, models: AttackModels) -> None:
    image = pictures(1)
    first = run(editor, image, models, [7])
    assert torch.equal(run(editor, image, models, [7]), first)
    assert torch.equal(run(editor, image, models, [8]), first) == (editor.name in NOT_RANDOM)


@every_editor
def test_a_batch_is_its_images_one_by_one(editor: Editor, models: AttackModels) -> None:
    images, seeds = pictures(3), [5, 6, 7]
    wishes = [WISH, Edit(target="a cat"), Edit(target="")]
    if editor.name == "diffedit":
        wishes[2] = Edit(target="", source="a cat")
    together = run(editor, images, models, seeds, edits=wishes)
    for row in (2, 0, 1):
        alone = run(editor, images[row : row + 1], models, [seeds[row]], edits=[wishes[row]])
        assert torch.equal(alone[0], together[row])


@every_editor
def test_any_size(editor: Editor, models: AttackModels) -> None:
    for height, width in ((33, 61), (5, 48)):
        images = pictures(1, height, width)
        assert run(editor, images, models, [1]).shape == images.shape


@pytest.mark.parametrize("editor", ON_LATENT, ids=name_of)
def test_sizes_on_the_embedded_model(editor: Editor, embedded: AttackModels) -> None:
    for height, width in ((48, 48), (49, 300)):
        images = pictures(1, height, width)
        assert run(editor, images, embedded, [1]).shape == images.shape


@pytest.mark.parametrize("editor", [e for e in SMALL_EDITORS if e.needs_mask], ids=name_of)
def test_outside_the_mask_is_the_original(editor: Editor, models: AttackModels) -> None:
    images = pictures(2, 37, 45)
    masks = middle_masks(images)
    masks[1, 0, 30, 2] = 1  # one pixel, which a mask at latent size could lose
    edited = run(editor, images, models, [1, 2], masks=masks)
    kept = masks.expand_as(images) == 0
    assert torch.equal(edited[kept], images[kept])
    assert not torch.equal(edited[~kept], images[~kept])
    assert not torch.equal(edited[1, :, 30, 2], images[1, :, 30, 2])


@every_editor
def test_the_checkpoint_stays_as_it_was(editor: Editor, models: AttackModels) -> None:
    given = models.get(editor.needs)
    before = state(given)
    run(editor, pictures(1), models, [1])
    assert state(given) == before


@every_editor
def test_the_checkpoint_stays_as_it_was_when_it_fails(editor: Editor, models: AttackModels) -> None:
    given = models.get(editor.needs)
    before = state(given)

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    for network in (given.unet, given.vae.decoder):
        hook = network.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            run(editor, pictures(1), models, [1])
        hook.remove()
        assert state(given) == before


@every_editor
def test_not_a_number_never_becomes_pixels(editor: Editor, models: AttackModels) -> None:
    decoder = models.get(editor.needs).vae.decoder
    hook = decoder.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        run(editor, pictures(1), models, [1])
    hook.remove()


@every_editor
def test_bad_input(editor: Editor, models: AttackModels) -> None:
    images = pictures(2)
    for wrong in (images.float(), images[0], images[:, :1], images[:0]):
        with pytest.raises(ValueError, match="images must be uint8"):
            editor.edit(wrong, [WISH] * 2, seeds=[1, 2], models=models)
    with pytest.raises(ValueError, match="2 images, 1 edits, 2 seeds"):
        run(editor, images, models, [1, 2], edits=[WISH])
    with pytest.raises(ValueError, match="2 images, 2 edits, 3 seeds"):
        run(editor, images, models, [1, 2, 3])
    with pytest.raises(ValueError, match="unsigned 64-bit"):
        run(editor, images, models, [1, -2])
    with pytest.raises(ValueError, match="masks"):
        run(editor, images, models, [1, 2], masks=None if editor.needs_mask else middle_masks(images))


def test_bad_masks(models: AttackModels) -> None:
    editor, images = BlendedInpaint(steps=4), pictures(2)
    masks = middle_masks(images)
    empty = masks.clone()
    empty[1] = 0
    for wrong, message in (
        (masks[:, 0], "must be"),
        (masks * 255, "0 where"),
        (masks * 0.5, "0 where"),
        (empty, "0 ev"),
    ):
        with pytest.raises(ValueError, match=message):
            run(editor, images, models, [1, 2], masks=wrong)


@every_editor
def test_missing_checkpoint(editor: Editor) -> None:
    with pytest.raises(ModelMissing, match=str(editor.needs)):
        run(editor, pictures(1), AttackModels({}), [1])


def test_a_model_without_mask_channels_is_no_inpainting_model(folders: dict[ModelKind, str]) -> None:
    models = AttackModels({ModelKind.INPAINT: folders[ModelKind.LATENT]})
    with pytest.raises(ModelError, match="takes 4 channels, not 9"):
        run(Inpaint(steps=4), pictures(1), models, [1])


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        *[(method, {"steps": 0}) for method in (SDEdit, Inpaint, BlendedInpaint, DiffEdit, InstructPix2Pix)],
        *[(method, {"steps": 9, "strength": 0.1}) for method in (SDEdit, Inpaint, BlendedInpaint, DiffEdit)],
        *[(method, {"strength": wrong}) for method in (SDEdit, DiffEdit) for wrong in (0, -0.1, 1.1)],
        (DiffEdit, {"maps": 0}),
        (DiffEdit, {"mask_cut": 0.0}),
        (DiffEdit, {"mask_strength": 0.01}),
        (MasaCtrl, {"steps": 0, "from_step": 0}),
        (MasaCtrl, {"steps": 3, "from_step": 4}),
        (MasaCtrl, {"from_step": -1}),
        (MasaCtrl, {"levels": 0}),
        (InstructPix2Pix, {"image_guidance": 0.5}),
    ],
)
def test_unusable_parameters(method: type[Editor], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=method.name):
        method(**wrong)
