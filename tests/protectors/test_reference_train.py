"""Training of the reference models, with the real classes at tiny size on random pictures.

Contract: 1. an interrupted and resumed training gives the same weights as an undisturbed one; 2. the result is a
folder that diffusers opens without our code; 3. held-out photos are never trained on; 4. the shipped weights are
the pinned ones.
"""

import hashlib
import io
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import structural_similarity
from transformers import AutoImageProcessor, AutoModel, CLIPTokenizer

from protectors import reference
from protectors.reference.checkpoint import Cursor, load_checkpoint, save_checkpoint
from protectors.reference.curves import draw_curve
from protectors.reference.data import CropRule, centre_crop, is_held_out, load_photos, order, random_crop
from protectors.reference.learner import rate_factor
from protectors.reference.quality import psnr, ssim
from protectors.reference.recipes import STAGES, StageResult, TrainingOrder, train_model
from protectors.reference.tokenizer import ADDED, IDENTIFIERS, build_tokenizer, save_vocabulary
from protectors.reference.train import Task
from protectors.reference.vae import Whitening

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


class Silent:
    """Watches a training and says nothing."""

    def step(self, task: Task, cursor: Cursor, loss: float) -> None:
        assert np.isfinite(loss)

    def row(self, task: Task, row: Mapping[str, float]) -> None:
        assert all(np.isfinite(value) for value in row.values())

    def note(self, text: str) -> None:
        assert text


PLANS = {
    "vae": {"steps": 6, "whiten_at": 3, "fragile_from": 4},
    "decoder": {"steps": 6},
    "sd": {"steps": 6, "crops": 2, "batch": 8},
    "ddpm": {"steps": 6},
    "embed": {"steps": 6, "batch": 8},
}


def train(
    photos: Path, folder: Path, stage: str, *, stop_at: int | None = None, seed: int = 3, begin: Path | None = None
) -> StageResult:
    model = next(model for model, stages in STAGES.items() if stage in stages)
    order = TrainingOrder(
        model=model,
        data=photos,
        out=folder / model,
        work=folder / "work",
        minutes=5,
        stages=(stage,),
        seed=seed,
        size="tiny",
        stop_at=stop_at,
        begin=begin,
        report_every=3,
        plans={stage: PLANS[stage]},
    )
    (result,) = train_model(order, Silent())
    return result


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    for stage in PLANS:
        assert train(photos, folder, stage).complete
    return folder


# The autoencoder whitens its latents before update 3 and goes to whole crops before update 5; the denoiser's
# latents are made before its first update.
@pytest.mark.parametrize(
    ("model", "stops"),
    [
        (
            "nano-sd",
            [("vae", 2), ("vae", 3), ("vae", 5), ("vae", 99), ("decoder", 2), ("decoder", 99), ("sd", 2), ("sd", 99)],
        ),
        ("nano-ddpm", [("ddpm", 2), ("ddpm", 99)]),
        ("nano-embed", [("embed", 2), ("embed", 99)]),
    ],
)
def test_resumed_training_equals_an_undisturbed_one(
    model: str, stops: list[tuple[str, int]], photos: Path, undisturbed: Path, tmp_path: Path
) -> None:
    for stage, stop in stops:
        result = train(photos, tmp_path, stage, stop_at=stop)
        assert (result.step, result.complete) == (min(stop, 6), stop > 6)
    files = sorted(file.relative_to(undisturbed / model) for file in (undisturbed / model).rglob("*.safetensors"))
    assert len(files) == (3 if model == "nano-sd" else 1)
    for file in files:
        expected, resumed = load_file(undisturbed / model / file), load_file(tmp_path / model / file)
        assert expected.keys() == resumed.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, resumed[name]), f"{file}: {name}"
    # The curves show one training: no step twice, none missing.
    for curve in {f"{stage}.csv" for stage, _ in stops}:
        lines = (tmp_path / "work" / curve).read_text().splitlines()
        steps = [int(line.split(",")[0]) for line in lines[1:]]
        assert steps == sorted(set(steps))
        assert steps[-1] == 6
    assert len((tmp_path / "work" / "runs.jsonl").read_text().splitlines()) == len(stops)


def test_latents_are_whitened_and_reconstructions_stay(undisturbed: Path, photos: Path) -> None:
    vae = AutoencoderKL.from_pretrained(undisturbed / "nano-sd" / "vae", dtype=torch.float32)
    images = load_photos(photos, held_out=False).images
    crops = torch.stack([random_crop(image, CropRule(32), (place,)) for place, image in enumerate(images)]) * 2 - 1
    torch.manual_seed(0)
    for layer in (vae.encoder.conv_out, vae.quant_conv, vae.post_quant_conv, vae.decoder.conv_in):
        torch.nn.init.normal_(layer.weight, std=0.2)
        torch.nn.init.normal_(layer.bias)
    with torch.no_grad():
        posterior = vae.encode(crops).latent_dist
        before = vae.decode(posterior.mean).sample
        Whitening.of(vae, crops).fold(vae)
        latents = vae.encode(crops).latent_dist.mean
        after = vae.decode(latents).sample
    flat = latents.transpose(0, 1).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(len(flat)), atol=1e-3)
    assert torch.allclose(torch.cov(flat), torch.eye(len(flat)), atol=1e-2)
    assert torch.allclose(before, after, atol=1e-3)


def test_pixel_model_and_embedder_open_without_our_code(undisturbed: Path) -> None:
    tiles = DDPMPipeline.from_pretrained(undisturbed / "nano-ddpm", dtype=torch.float32)
    tiles.set_progress_bar_config(disable=True)
    image = tiles(num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (16, 16, 3)
    assert np.isfinite(image).all()
    processor = AutoImageProcessor.from_pretrained(undisturbed / "nano-embed")
    model = AutoModel.from_pretrained(undisturbed / "nano-embed", dtype=torch.float32)
    values = processor([np.zeros((40, 60, 3), dtype=np.uint8)] * 2, return_tensors="pt").pixel_values
    assert values.shape == (2, 3, 32, 32)
    with torch.no_grad():
        assert model(values).pooler_output.flatten(1).shape == (2, 16)


def test_the_embedders_batch_normalization_fits_its_averaged_weights(undisturbed: Path, photos: Path) -> None:
    model = AutoModel.from_pretrained(undisturbed / "nano-embed", dtype=torch.float32)
    images = load_photos(photos, held_out=False).images
    crops = (torch.stack([centre_crop(image, 32) for image in images]) - 0.5) / 0.25
    norm = model.embedder.embedder.normalization
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(crops)
    assert torch.allclose(norm.running_mean, seen[0].mean(dim=(0, 2, 3)), atol=0.02)


def test_unknown_models_stages_and_missing_autoencoders_are_refused(photos: Path, tmp_path: Path) -> None:
    order = TrainingOrder(model="nano-sd", data=photos, out=tmp_path / "o", work=tmp_path / "w", minutes=1, size="tiny")
    with pytest.raises(ValueError, match=r"no model 'nano-xl'.*nano-sd"):
        train_model(replace(order, model="nano-xl"), Silent())
    with pytest.raises(ValueError, match="no stage unet; it has: vae, decoder, sd"):
        train_model(replace(order, stages=("unet",)), Silent())
    with pytest.raises(FileNotFoundError, match="train the stage vae first"):
        train_model(replace(order, stages=("sd",)), Silent())


def test_a_stage_that_is_not_complete_ends_the_order(photos: Path, tmp_path: Path) -> None:
    """The decoder and the denoiser must not be trained on an autoencoder that still changes."""
    order = TrainingOrder(
        model="nano-sd", data=photos, out=tmp_path / "out", work=tmp_path / "work", minutes=5, size="tiny",
        plans={stage: PLANS[stage] for stage in ("vae", "decoder", "sd")},
    )  # fmt: skip
    assert [result.stage for result in train_model(replace(order, stop_at=2), Silent())] == ["vae"]
    results = train_model(order, Silent())
    assert [(result.stage, result.complete) for result in results] == [("vae", True), ("decoder", True), ("sd", True)]
    # Another encoder under the same checkpoints of later stages is refused, not trained on with the old ones.
    other = replace(order, seed=1, work=tmp_path / "other", stages=("vae",))
    assert train_model(other, Silent())[0].complete
    for stage in ("decoder", "sd"):
        with pytest.raises(ValueError, match="training with encoder"):
            train_model(replace(order, stages=(stage,)), Silent())


def test_training_begins_from_a_given_model(photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    start = undisturbed / "nano-sd"
    shutil.copytree(start / "vae", tmp_path / "nano-sd" / "vae")
    assert train(photos, tmp_path, "sd", seed=8, stop_at=0, begin=start).step == 0
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        expected, begun = load_file(start / file), load_file(tmp_path / "nano-sd" / file)
        assert all(torch.equal(tensor, begun[name]) for name, tensor in expected.items())
    assert train(photos, tmp_path, "sd", seed=8, stop_at=2, begin=start).step == 2
    with pytest.raises(ValueError, match="training with begin"):
        train(photos, tmp_path, "sd", seed=8)


def test_beginning_needs_a_model_of_the_same_kind_and_size(photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only nano-sd can begin"):
        train(photos, tmp_path, "ddpm", begin=undisturbed / "nano-sd")
    shutil.copytree(undisturbed / "nano-sd" / "vae", tmp_path / "nano-sd" / "vae")
    with pytest.raises(ValueError, match="another geometry"):
        train(photos, tmp_path, "sd", begin=reference.reference_path())


def test_no_update_leaves_no_checkpoint(photos: Path, tmp_path: Path) -> None:
    assert train(photos, tmp_path, "embed", stop_at=0).step == 0
    assert train(photos, tmp_path, "embed").complete


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "gpu"}, "no device 'gpu'; use cpu or cuda"),
        ({"size": "huge"}, "no size 'huge'; there are: nano, tiny"),
        ({"report_every": 0}, "report_every must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"plans": {"embed": {"stepz": 3}}}, "no field 'stepz'; it has: steps"),
        ({"plans": {"embed": {"steps": "many"}}}, "embed.steps must be of type int"),
        ({"plans": {"embed": {"steps": 2.5}}}, "embed.steps must be a whole number"),
    ],
)
def test_orders_that_cannot_work_are_refused_before_anything_is_written(
    change: dict[str, object], words: str, photos: Path, tmp_path: Path
) -> None:
    order = TrainingOrder(model="nano-embed", data=photos, out=tmp_path / "o", work=tmp_path / "w", minutes=1)
    with pytest.raises(ValueError, match=words):
        train_model(replace(order, **change), Silent())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_photos_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    file = tmp_path / "photos.parquet"
    pq.write_table(pa.table({"asset_id": ["a"], "image": [{"bytes": b"x", "path": ""}]}), file)
    with pytest.raises(ValueError, match="no column caption; it needs asset_id, image, caption"):
        load_photos(file, held_out=None)
    pq.write_table(pa.table({"asset_id": [7], "image": [{"bytes": b"x", "path": ""}], "caption": ["c"]}), file)
    with pytest.raises(ValueError, match="photo 7 cannot be decoded"):
        load_photos(file, held_out=None)
    file.write_text("no Parquet")
    with pytest.raises(ValueError, match="is no Parquet file"):
        load_photos(file, held_out=None)


def test_curves_are_drawn(undisturbed: Path, tmp_path: Path) -> None:
    for stage in PLANS:
        assert draw_curve(undisturbed / "work" / f"{stage}.csv", tmp_path / "curve.png") is not None
        with Image.open(tmp_path / "curve.png") as picture:
            assert picture.width > 400
            assert len(picture.convert("RGB").getcolors(100_000) or []) > 10
    assert draw_curve(tmp_path / "none.csv", tmp_path / "none.png") is None


def test_diffusers_opens_the_folder(undisturbed: Path) -> None:
    out = undisturbed / "nano-sd"
    pipeline = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32, safety_checker=None)
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
    train(photos, tmp_path, "vae", stop_at=3)
    curve = tmp_path / "work" / "vae.csv"
    before = curve.read_text()
    # As after a kill: the line of step 5 was written, the checkpoint of step 5 was not.
    curve.write_text(before + before.splitlines()[-1].replace("3,", "5,", 1) + "\n")
    train(photos, tmp_path, "vae", stop_at=3)
    assert curve.read_text() == before


def test_another_seed_is_refused(photos: Path, undisturbed: Path) -> None:
    with pytest.raises(ValueError, match="seed 3, not 4"):
        train(photos, undisturbed, "vae", seed=4)


def test_a_broken_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, Cursor(seed=0, step=1, position=8), {"w": torch.ones(2)}, {"data": "a"})

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("protectors.reference.checkpoint.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, Cursor(seed=0, step=2, position=16), {"w": torch.zeros(2)}, {"data": "a"})
    saved = load_checkpoint(tmp_path, seed=0, binding={"data": "a"})
    assert saved is not None
    assert saved[0] == Cursor(seed=0, step=1, position=8)
    assert torch.equal(saved[1]["w"], torch.ones(2))
    with pytest.raises(ValueError, match="training with data a, not b: remove it"):
        load_checkpoint(tmp_path, seed=0, binding={"data": "b"})


def test_split_and_order(photos: Path) -> None:
    train_side, held_out = load_photos(photos, held_out=False), load_photos(photos, held_out=True)
    assert len(train_side) + len(held_out) == len(load_photos(photos, held_out=None)) == 24
    assert len(held_out) == sum(is_held_out(f"asset-{number}") for number in range(24)) > 0
    assert is_held_out("asset-0") == (int(hashlib.sha256(b"asset-0").hexdigest(), 16) % 5 == 0)
    whole = order(10, seed=1, position=0, batch=30)
    assert [sorted(whole[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert order(10, seed=1, position=7, batch=6) == whole[7:13]
    assert order(10, seed=2, position=0, batch=30) != whole


def test_few_photos_are_spread_over_the_file_or_over_the_captions(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    captions = ["a"] * 5 + ["b", "c"] + ["d"] * 3 + [None]
    rows = [
        {"asset_id": f"asset-{number}", "image": {"bytes": image.getvalue(), "path": None}, "caption": caption}
        for number, caption in enumerate(captions)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "photos.parquet")

    def found(limit: int, **options: bool) -> str:
        return ",".join(load_photos(tmp_path / "photos.parquet", held_out=None, limit=limit, **options).captions)

    assert found(5) == "a,a,a,c,d"
    assert found(3, over_captions=True) == "a,b,d"
    assert found(5, over_captions=True) == "a,b,c,d,"
    assert found(7, over_captions=True) == "a,a,b,c,d,d,"
    assert found(8, over_captions=True) == "a,a,a,b,c,d,d,"
    assert found(99, over_captions=True) == found(11)


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


@pytest.mark.parametrize("name", sorted(reference.PINNED))
def test_shipped_weights_are_the_pinned_ones(name: str) -> None:
    reference.verify_reference(name)
    folder = reference.reference_path(name)
    shipped = {file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")}
    assert shipped == set(reference.PINNED[name])


def test_all_shipped_weights_together_are_small() -> None:
    folders = [reference.reference_path(name) for name in reference.PINNED]
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors")) <= 40_000_000


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
