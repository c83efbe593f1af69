"""``fixative measure`` as its users meet it: numbers, their weights, and reasons for the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.verify.digest import folder_digest
from pipeline.verify.metrics.perceptual import AlexNetTrunk
from tests.e2e.command import fixative


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def folders(root: Path) -> tuple[Path, Path]:
    """Two pictures, and the same with a change of three levels in another format."""
    rng = np.random.default_rng(0)
    for name in ("b", "a"):
        picture = rng.integers(10, 240, (48, 64, 3), dtype=np.uint8)
        for folder, ending, change in (("originals", "bmp.png", 0), ("protected", "bmp.webp", 3)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(picture + np.uint8(change)).save(root / folder / f"{name}.{ending}", lossless=True)
    return root / "protected", root / "originals"


def test_numbers_with_their_weights_and_reasons(tmp_path: Path) -> None:
    protected, originals = folders(tmp_path)
    alexnet = tmp_path / "alexnet"
    alexnet.mkdir()
    torch.manual_seed(0)
    save_file(AlexNetTrunk().state_dict(), alexnet / "model.safetensors")
    out = tmp_path / "numbers.json"
    result = fixative("measure", protected, "--originals", originals, "--metric", f"lpips={alexnet}", "--out", out)
    assert result.code == 0, result
    document = json.loads(out.read_text())
    numbers = {number["name"]: number for number in document["numbers"]}
    assert numbers["linf_levels"]["value"] == 3
    assert len(numbers["lpips"]["values"]) == 2
    assert numbers["lpips"]["value"] > 0
    assert numbers["lpips"]["weights"] == folder_digest(alexnet)
    assert folder_digest(alexnet)[:12] in result.out
    assert "dino_i: absent, because no weights given: --metric dino=FOLDER" in result.out
    assert "nano_embed_i: absent, because no photos given" in result.out
    assert {entry["name"] for entry in document["absent"]}.isdisjoint(numbers)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    protected, originals = folders(tmp_path)
    for arguments, reason in (
        (("--metric", "faces"), "write NAME=FOLDER"),
        (("--metric", "arcface=x"), "write NAME=FOLDER"),
        (("--metric", f"lpips={tmp_path}"), "holds 0 safetensors files"),
        (("--originals", originals / "a.bmp.png"), "no original named b.bmp"),
        (("--metric", "lpips=a", "--metric", "lpips=b"), "--metric lpips is given twice"),
    ):
        result = fixative("measure", protected, *arguments)
        assert result.code == 2, result
        assert reason in result.err, result


def test_pictures_of_one_name_and_two_endings_are_refused(tmp_path: Path) -> None:
    """Also behind the last picture that is measured: its original would be a guess."""
    protected, originals = folders(tmp_path)
    Image.new("RGB", (64, 48)).save(originals / "b.bmp.webp")
    result = fixative("measure", protected, "--originals", originals)
    assert result.code == 2, result
    assert "b.bmp.png and b.bmp.webp differ in their endings" in result.err


def test_originals_in_another_order_are_found(tmp_path: Path) -> None:
    """Endings decide which of the two comes first."""
    for file, grey in (("originals/a.webp", 60), ("originals/a.k.png", 200), ("protected/a.jpg", 60),
                       ("protected/a.k.png", 200)):  # fmt: skip
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (grey, grey, grey)).save(tmp_path / file)
    out = tmp_path / "numbers.json"
    result = fixative("measure", tmp_path / "protected", "--originals", tmp_path / "originals", "--out", out)
    assert result.code == 0, result
    document = json.loads(out.read_text())
    assert document["images"] == ["a.jpg", "a.k.png"]
    assert max(number["value"] for number in document["numbers"] if number["name"] == "linf_levels") <= 2
