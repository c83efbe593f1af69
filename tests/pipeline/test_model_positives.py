"""The positives of a protected model.

1. What is stored is what the training used: hashes, seeds and prompt lead to the same latents when drawn again.
2. Taken up again, for photos in any order, they give the same weights and the same files of positives.
3. Positives of other photos, of another model, or damaged, are refused, and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.protect_model.job import ConceptSource
from pipeline.protect_model.plan import plan_model
from pipeline.protect_model.run import protect_model
from protectors.diffusion import load_model
from protectors.dreambooth import draw_class_latents
from tests.pipeline.model_jobs import COUNT, QUICK, SIDE, contents, job, world

pytestmark = pytest.mark.usefixtures("one_thread")
# As many as are sampled in one batch: drawn with and without positives after them, class images are the same then.
CLASS_IMAGES = 8
OVERRIDES: dict[str, Any] = {**QUICK, "class_images": CLASS_IMAGES}


@pytest.fixture(scope="module")
def folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, with a model protected in ``protected``."""
    folder = world(tmp_path_factory.mktemp("world"))
    protect_model(plan_model(job(folder, folder / "protected", overrides=OVERRIDES)))
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_what_is_stored_was_used(folder: Path) -> None:
    found = manifest(folder / "protected" / "positives")
    provenance = json.loads((folder / "protected" / "provenance.json").read_text())
    (concept,) = found["concepts"]
    assert (found["base"], concept["class_word"]) == (provenance["identity"]["base"], "dog")
    assert [(pair["image_sha256"], pair["latents_sha256"]) for pair in concept["pairs"]] == [
        (pair["sha256"], pair["positive_latents_sha256"]) for pair in provenance["pairs"][0]["images"]
    ]
    latents = load_file(folder / "protected" / "positives" / concept["latents"])["latents"]
    assert latents.dtype == torch.float32
    hashes = [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in latents]
    assert hashes == [pair["latents_sha256"] for pair in concept["pairs"]]
    assert (concept["drawn"]["sampler"], concept["drawn"]["steps"], concept["drawn"]["guidance"]) == ("ddim", 50, 7.5)
    seeds = [pair["seed"] for pair in concept["pairs"]]
    drawn = draw_class_latents(load_model(str(folder / "model")), concept["drawn"]["prompt"], max(seeds) + 1)
    assert torch.equal(drawn[seeds], latents)
    assert seeds == list(range(CLASS_IMAGES, CLASS_IMAGES + COUNT))
    with Image.open(folder / "protected" / "positives" / concept["sheet"]) as picture:
        assert picture.size == (COUNT * SIDE, SIDE)


def test_the_manifest_has_the_prompt_that_was_used(folder: Path, tmp_path: Path) -> None:
    quoted = {**OVERRIDES, "steps": 1, "compat_prompts": True}
    protect_model(plan_model(job(folder, tmp_path / "quoted", overrides=quoted)))
    (concept,) = manifest(tmp_path / "quoted" / "positives")["concepts"]
    assert concept["drawn"]["prompt"] == '"a_photo_of_a_dog"'
    latents = load_file(tmp_path / "quoted" / "positives" / concept["latents"])["latents"]
    drawn = draw_class_latents(load_model(str(folder / "model")), concept["drawn"]["prompt"], CLASS_IMAGES + COUNT)
    assert torch.equal(drawn[CLASS_IMAGES:], latents)


def test_taken_up_again(folder: Path, tmp_path: Path) -> None:
    positives = folder / "protected" / "positives"
    moved = shutil.copytree(folder / "photos", tmp_path / "photos")
    (moved / "a.png").rename(moved / "z.png")
    concepts = (ConceptSource(path=str(moved), class_word="dog"),)
    again = job(folder, tmp_path / "again", overrides=OVERRIDES, positives=str(positives), concepts=concepts)
    plan = plan_model(again)
    hashes = [pair["latents_sha256"] for pair in manifest(positives)["concepts"][0]["pairs"]]
    assert plan.identity["positives"] == [hashes]
    protect_model(plan)
    made, before = contents(tmp_path / "again"), contents(folder / "protected")
    assert {name for name in before if made[name] != before[name]} == {"provenance.json"}
    assert plan_model(again).finished


def test_those_of_others_are_refused(folder: Path, tmp_path: Path) -> None:
    found = shutil.copytree(folder / "protected" / "positives", tmp_path / "positives")

    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            plan_model(job(folder, tmp_path / "out", overrides=OVERRIDES, **{"positives": str(found), **changes}))

    refused("does not exist.*name the folder 'positives'", positives=str(folder / "photos"))
    refused("is for 3 photos, and knows 2 of these 2 of a dog", images=2)
    mia = (ConceptSource(path=f"{folder}/subjects.parquet#mia"),)
    refused("is for 3 photos, and knows 0 of these 1 of a cat", concepts=mia)
    refused("drawn by another model", model="nano-sd")
    latents = load_file(found / "0.safetensors")["latents"]
    save_file({"latents": latents[:2].contiguous()}, found / "0.safetensors")
    refused("holds 2 positives, and the manifest names 3")
    save_file({"latents": latents.flip(0).contiguous()}, found / "0.safetensors")
    refused("number 0 is not the one that the manifest names")
    (found / "0.safetensors").write_bytes(b"no tensors")
    refused("0.safetensors cannot be read")
    (found / "manifest.json").write_text("{}")
    refused("lacks what a manifest has: 'base'")
    assert {path.name for path in tmp_path.iterdir()} == {"positives"}
