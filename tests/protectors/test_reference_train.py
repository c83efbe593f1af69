"""Training of the reference models, with the real classes at tiny size on random pictures.

Contract: 1. an interrupted and resumed training gives the same weights as an undisturbed one; 2. the result is a
folder that diffusers opens without our code; 3. held-out photos are never trained on; 4. the shipped weights are
the pinned ones.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import structural_similarity
from transformers import CLIPTokenizer

from protectors import reference
from protectors.reference.checkpoint import Cursor, load_checkpoint, save_checkpoint
from protectors.reference.data import CropRule, is_held_out, load_photos, order, random_crop
from protectors.reference.learner import rate_factor
from protectors.reference.quality import psnr, ssim
from protectors.reference.tokenizer import ADDED, IDENTIFIERS, build_tokenizer, save_vocabulary
from protectors.reference.train import main

CAPTIONS = ["a photo of a red tram", "a photo of a joshua tree", "a photo of a tin can", "a photo"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        coarse = rng.integers(0, 256, size=(5, 6, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(data, "PNG")
        image = {"bytes": data.getvalue(), "path": f"{number}.png"}
        rows.append({"asset_id": f"asset-{number}", "image": image, "caption": CAPTIONS[number % 4]})
    path = tmp_path_factory.mktemp("photos") / "photos.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def train(photos: Path, folder: Path, part: str, *extra: str) -> None:
    arguments = [part, "--data", str(photos), "--out", str(folder / "out"), "--work", str(folder / "work")]
    settings = ["--size", "tiny", "--threads", "1", "--minutes", "5", "--report-every", "3", "--seed", "3"]
    main([*arguments, *settings, "--vae-steps", "6", "--sd-steps", "6", "--crops", "2", *extra])


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(photos, folder, "all")
    return folder


def test_resumed_training_equals_an_undisturbed_one(photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    # The autoencoder's two stages change at step 4, the denoiser's latents are made before its first step.
    for part, stop in (("vae", "2"), ("vae", "5"), ("vae", "99"), ("sd", "2"), ("sd", "99")):
        train(photos, tmp_path, part, "--stop-at", stop)
    files = sorted(file.relative_to(undisturbed / "out") for file in (undisturbed / "out").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        expected, resumed = load_file(undisturbed / "out" / file), load_file(tmp_path / "out" / file)
        assert expected.keys() == resumed.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, resumed[name]), f"{file}: {name}"
    # The curves show one training: no step twice, none missing.
    for curve in ("vae.csv", "sd.csv"):
        lines = (tmp_path / "work" / curve).read_text().splitlines()
        steps = [int(line.split(",")[0]) for line in lines[1:]]
        assert steps == sorted(set(steps))
        assert steps[-1] == 6


def test_diffusers_opens_the_folder(undisturbed: Path) -> None:
    out = undisturbed / "out"
    pipeline = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of sks tram", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    assert np.isfinite(image).all()
    assert {tensor.dtype for file in out.rglob("*.safetensors") for tensor in load_file(file).values()} == {
        torch.float16
    }
    config = pipeline.text_encoder.config
    assert (config.eos_token_id, config.pad_token_id) == (pipeline.tokenizer.eos_token_id,) * 2
    assert config.vocab_size == len(pipeline.tokenizer)
    assert pipeline.scheduler.config.set_alpha_to_one is False
    assert pipeline.scheduler.config.clip_sample is False


def test_lines_of_lost_updates_leave_the_curve(photos: Path, tmp_path: Path) -> None:
    train(photos, tmp_path, "vae", "--stop-at", "3")
    curve = tmp_path / "work" / "vae.csv"
    before = curve.read_text()
    # As after a kill: the line of step 5 was written, the checkpoint of step 5 was not.
    curve.write_text(before + before.splitlines()[-1].replace("3,", "5,", 1) + "\n")
    train(photos, tmp_path, "vae", "--stop-at", "3")
    assert curve.read_text() == before


def test_another_seed_is_refused(photos: Path, undisturbed: Path) -> None:
    with pytest.raises(ValueError, match="seed 3, not 4"):
        train(photos, undisturbed, "vae", "--seed", "4")


def test_a_broken_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, Cursor(seed=0, step=1, position=8), {"w": torch.ones(2)})

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("protectors.reference.checkpoint.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, Cursor(seed=0, step=2, position=16), {"w": torch.zeros(2)})
    saved = load_checkpoint(tmp_path, seed=0)
    assert saved is not None
    assert saved[0] == Cursor(seed=0, step=1, position=8)
    assert torch.equal(saved[1]["w"], torch.ones(2))


def test_split_and_order(photos: Path) -> None:
    train_side, held_out = load_photos(photos, held_out=False), load_photos(photos, held_out=True)
    assert len(train_side) + len(held_out) == len(load_photos(photos, held_out=None)) == 24
    assert len(held_out) == sum(is_held_out(f"asset-{number}") for number in range(24)) > 0
    assert is_held_out("asset-0") == (int(hashlib.sha256(b"asset-0").hexdigest(), 16) % 5 == 0)
    whole = order(10, seed=1, position=0, batch=30)
    assert [sorted(whole[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert order(10, seed=1, position=7, batch=6) == whole[7:13]
    assert order(10, seed=2, position=0, batch=30) != whole


def test_crops_depend_on_the_key_only(photos: Path) -> None:
    image = load_photos(photos, held_out=False).images[0]
    crop = random_crop(image, CropRule(32), (5, 6))
    assert crop.shape == (3, 32, 32)
    assert 0 <= crop.min() < crop.max() <= 1
    assert torch.equal(crop, random_crop(image, CropRule(32), (5, 6)))
    assert not torch.equal(crop, random_crop(image, CropRule(32), (5, 7)))


@pytest.mark.parametrize("word", [*IDENTIFIERS, *ADDED])
def test_identifiers_are_single_tokens_in_every_reading(word: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(CAPTIONS, vocabulary=640, length=32)
    tokenizer.save_pretrained(tmp_path)
    save_vocabulary(tokenizer, tmp_path)
    reread = CLIPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    from_vocabulary = CLIPTokenizer.from_pretrained(tmp_path)
    text = f"A photo of {word.upper()} tram, é!"
    for candidate in (tokenizer, reread, from_vocabulary):
        ids = candidate(text).input_ids
        assert len(candidate(word).input_ids) == 3  # with start and end
        assert ids == tokenizer(text).input_ids
        assert candidate.eos_token_id not in ids[:-1]  # which would mean an unknown letter
        assert candidate.model_max_length == 32


def test_quality_agrees_with_scikit_image() -> None:
    rng = np.random.default_rng(1)
    clean = rng.random((40, 36, 3))
    noisy = np.clip(clean + rng.normal(0, 0.1, clean.shape), 0, 1)
    left, right = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in (noisy, clean))
    expected = structural_similarity(
        noisy, clean, channel_axis=2, data_range=1, gaussian_weights=True, use_sample_covariance=False, sigma=1.5
    )
    assert ssim(left, right).item() == pytest.approx(expected, abs=1e-6)
    assert psnr(left, right).item() == pytest.approx(-10 * np.log10(((noisy - clean) ** 2).mean()))


def test_rate_rises_stays_and_falls() -> None:
    factors = [rate_factor(step, 1000) for step in (0, 49, 99, 500, 700, 850, 999, 1000)]
    assert factors == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 1 / 300, 0])


def test_shipped_weights_are_the_pinned_ones() -> None:
    reference.verify_reference(reference.NANO_SD)
    folder = reference.reference_path()
    shipped = {file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")}
    assert shipped == set(reference.PINNED[reference.NANO_SD])


def test_changed_missing_and_unknown_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.PINNED, "other", {"a.safetensors": hashlib.sha256(b"a").hexdigest()})
    monkeypatch.setattr(reference, "reference_path", lambda name: tmp_path)
    with pytest.raises(reference.ReferenceModelError, match=r"lacks a\.safetensors"):
        reference.verify_reference("other")
    (tmp_path / "a.safetensors").write_bytes(b"a")
    reference.verify_reference("other")
    (tmp_path / "a.safetensors").write_bytes(b"b")
    with pytest.raises(reference.ReferenceModelError, match="pins"):
        reference.verify_reference("other")
    monkeypatch.undo()
    with pytest.raises(reference.ReferenceModelError, match="nano-sd"):
        reference.reference_path("nonexistent")
