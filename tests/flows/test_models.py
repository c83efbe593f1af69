"""``fixative models`` as its users meet it: list, train, evaluate."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.e2e.command import fixative


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables keep their words whole; one thread, because the models are tiny."""
    monkeypatch.setenv("COLUMNS", "250")
    torch.set_num_threads(1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(16):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, size=(40, 48, 3), dtype=np.uint8)).save(data, "PNG")
        image = {"bytes": data.getvalue(), "path": ""}
        rows.append({"asset_id": f"a{number}", "image": image, "caption": "a photo of a tram"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "photos.parquet")
    return tmp_path / "photos.parquet"


def train(photos: Path, *options: object) -> object:
    given = ("--data", photos, "--out", photos.parent / "out", "--size", "tiny", "--threads", 1, "--report-every", 2)
    return fixative("models", "train", "nano-embed", *given, "--set", "embed.batch=4", *options)


def test_training_stops_and_goes_on_and_leaves_a_curve(photos: Path) -> None:
    first = train(photos, "--set", "embed.steps=4", "--stop-at", 2)
    assert first.code == 1, first
    assert "embed: 2 of 4 updates" in first.out
    assert "run the same command to go on" in first.out
    second = train(photos, "--set", "embed.steps=4")
    assert second.code == 0, second
    assert "embed: 4 of 4 updates" in second.out
    assert "held_out_loss" in second.out
    work = photos.parent / "out.training"
    with Image.open(work / "embed.png") as curve:
        assert curve.width > 400
    runs = [json.loads(line) for line in (work / "runs.jsonl").read_text().splitlines()]
    assert [(run["stage"], run["step"], run["samples"]) for run in runs] == [("embed", 2, 8), ("embed", 4, 16)]
    assert (photos.parent / "out" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "steps=4"], "write stage.field=value"),
        (["--set", "embed.stepz=4"], "no field 'stepz'"),
        (["--set", "embed.rate=fast"], "embed.rate must be of type float"),
        (["--device", "gpu"], "no device 'gpu'"),
        (["--size", "huge"], "no size 'huge'"),
        (["--stage", "vae"], "nano-embed has no stage vae; it has: embed"),
    ],
)
def test_wrong_options_take_one_line(options: list[str], words: str, photos: Path) -> None:
    result = train(photos, *options)
    assert result.code == 2, result
    assert words in result.error
    assert not (photos.parent / "out").exists()


def test_evaluation_says_what_it_needs(tmp_path: Path) -> None:
    result = fixative("models", "evaluate", "--out", tmp_path / "e")
    assert result.code == 2
    assert "--data and --subjects" in result.error
    result = fixative("models", "evaluate", "nano-sd", "--quick", "--out", tmp_path / "e")
    assert result.code == 2
    assert "leave out MODELS" in result.error
    nothing = ("--data", tmp_path / "none.parquet", "--subjects", tmp_path / "none.parquet")
    result = fixative("models", "evaluate", "nano-embed", *nothing, "--out", tmp_path / "e")
    assert result.code == 2
    assert "none.parquet" in result.error
    result = fixative("models", "evaluate", "nano-xl", "--out", tmp_path / "e")
    assert result.code == 2
    assert "no model nano-xl; there are: nano-ddpm, nano-embed, nano-sd" in result.error
    result = fixative("models", "evaluate", "--quick", "--folder", "nano-xl=here", "--out", tmp_path / "e")
    assert result.code == 2
    assert "write MODEL=FOLDER" in result.error


def test_quick_evaluation_of_the_embedded_models(tmp_path: Path) -> None:
    """Everything that is embedded loads, reconstructs, samples, purifies and embeds; the numbers are not absurd."""
    result = fixative("models", "evaluate", "--quick", "--out", tmp_path / "e")
    assert result.code == 0, result
    document = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert {figure["model"] for figure in figures.values()} == {"nano-ddpm", "nano-embed", "nano-sd"}
    assert all(figure["reached"] is None for figure in figures.values())
    assert all(np.isfinite(figure["value"]) and figure["sample"] for figure in figures.values())
    assert figures["reconstruction at 128 px, PSNR dB"]["value"] > 18
    assert figures["latent shift by encoder attack, 8 levels, 10 steps"]["value"] > 0.05
    assert figures["clean photo purified at t = 10, PSNR dB"]["value"] > 28
    # Two crops of each of seven photos: chance is 1 in 13.
    assert figures["nearest neighbour is of the same subject, embedding"]["value"] > 0.5
    with Image.open(tmp_path / "e" / "samples.png") as sheet:
        assert np.asarray(sheet).std() > 10


def test_models_are_listed() -> None:
    result = fixative("models", "list")
    assert result.code == 0, result
    for name in ("nano-ddpm", "nano-embed", "nano-sd"):
        assert name in result.out
