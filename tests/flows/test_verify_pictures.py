"""Pictures of a verification: which of them leave the machine, and which number they belong to."""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows import verify_pictures
from flows.progress import Silent
from flows.verify_pictures import THUMBNAIL, keep, kept_trials, publish_strip, read_strips
from pipeline.verify.editors import EDITORS
from pipeline.verify.html import Strip
from pipeline.verify.scores import NO_PURIFIER, Cell, Score
from pipeline.verify.trial import LABELS, TrialResult

PRIVATE, PUBLIC = (255, 0, 0), (0, 0, 255)


def picture(colour: tuple[int, int, int], width: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 32), colour).save(file, "PNG")
    return file.getvalue()


def strip(pictures: dict[str, bytes]) -> Strip:
    return Strip(title="a customer's name", unit="u", shard_id="s", row="a customer's name", pictures=pictures)


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(verify_pictures, "create_image_artifact", lambda **fields: found.append(fields))
    return found


def test_prefect_gets_no_picture_that_an_original_was_used_for(created: list[dict[str, Any]]) -> None:
    of_groups = {
        label.format("chain"): cell in (Cell.PROTECTED, Cell.PURIFIED_PROTECTED)
        for cell, labels in LABELS.items()
        for label in labels
        if label is not None
    }
    of_images = {"original edited by sdedit": False, "protected edited by sdedit": True, "difference x8": False}
    labels = {**of_groups, **of_images}
    pictures = {label: picture(PUBLIC if public else PRIVATE) for label, public in labels.items()}
    publish_strip([strip({"original": picture(PRIVATE)}), strip(pictures), strip(pictures)])
    (artifact,) = created
    kind, _, data = artifact["image_url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert pixels.shape == (THUMBNAIL, 2 * THUMBNAIL * sum(labels.values()), 3)
    assert pixels[..., 0].max() < 30, "red is what nobody may see"
    assert "customer" not in str(artifact["description"])
    assert artifact["description"].count(";") == sum(labels.values()) - 1


def test_nothing_public_makes_no_artifact(created: list[dict[str, Any]]) -> None:
    publish_strip([strip({"original": picture(PRIVATE)})])
    assert created == []


def result(name: str, pictures: dict[str, bytes], *, title: str = "cat.png") -> TrialResult:
    score = Score(attack="e", metric="m", unit=f"shard/{title}", cell=Cell.CLEAN, purifier=NO_PURIFIER, image="0",
                  value=1)  # fmt: skip
    return TrialResult(key=f"v/images/shard/{name}.json", title=title, scores=[score], pictures=pictures)


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found = Notes()
    monkeypatch.setattr(verify_pictures, "observer", lambda: found)
    return found.texts


def test_a_trial_leaves_its_pictures_whole_or_not_at_all(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tmp_path / "campaign"
    keep(result("a-one", {"protected": picture(PUBLIC)}), pictures)
    write = Path.write_bytes

    def killed(path: Path, data: bytes) -> int:
        if path.stem == "second":
            raise KeyboardInterrupt
        return write(path, data)

    two = {"first": picture(PUBLIC), "second": picture(PUBLIC)}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        for title in ("cat.png", "another.png"):
            with pytest.raises(KeyboardInterrupt):
                keep(result("a-two", two, title=title), pictures)
    assert kept_trials(pictures) == 1
    assert [list(found.pictures) for found in read_strips(pictures)] == [["protected"]]
    for _ in range(2):  # a trial whose result was lost runs again
        keep(result("a-two", two), pictures)
    assert kept_trials(pictures) == 2
    assert [list(found.pictures) for found in read_strips(pictures)] == [["first", "protected", "second"]]
    assert [path.name for path in tmp_path.iterdir()] == ["campaign"]
    assert notes == []


def spoil(trial: Path, kind: str) -> None:
    about = trial / "about.json"
    if kind == "no about":
        about.unlink()
    elif kind == "cut about":
        about.write_text('{"title": ')
    elif kind == "older about":
        about.write_text(json.dumps({"title": "x", "shard_id": "s", "row": ""}))
    else:
        data = (trial / "protected.png").read_bytes()
        (trial / "protected.png").write_bytes(data[: len(data) // 2 if kind == "cut picture" else 0])


@pytest.mark.parametrize("kind", ["no about", "cut about", "older about", "cut picture", "empty picture"])
def test_pictures_that_cannot_be_read_are_left_out_and_named(tmp_path: Path, notes: list[str], kind: str) -> None:
    for title in ("good.png", "ill.png"):
        keep(result("a-one", {"protected": picture(PUBLIC)}, title=title), tmp_path)
    (ill,) = (path.parent for path in tmp_path.glob("*/*/about.json") if "ill.png" in path.read_text())
    spoil(ill, kind)
    assert [found.title for found in read_strips(tmp_path)] == ["good.png"]
    (note,) = notes
    assert str(ill.parent) in note


def test_a_strip_has_the_pictures_of_all_trials_of_its_unit_and_its_name_in_tables(tmp_path: Path) -> None:
    editors = list(itertools.islice(EDITORS, 2))
    for editor in editors:
        score = Score(
            attack=editor, metric="m", unit="shard/0f", cell=Cell.CLEAN, purifier=NO_PURIFIER, image="0", value=1
        )
        pictures = {
            "original": picture(PRIVATE),
            "protected": picture(PUBLIC),
            f"protected edited by {editor}": picture(PUBLIC),
        }
        made = TrialResult(key=f"v/images/shard/0f-{editor}.json", title="cat.png", row="cat.png", scores=[score],
                             pictures=pictures)  # fmt: skip
        keep(made, tmp_path)
    assert kept_trials(tmp_path) == 2
    (found,) = read_strips(tmp_path)
    assert (found.title, found.unit, found.shard_id, found.row) == ("cat.png", "shard/0f", "shard", "cat.png")
    assert list(found.pictures)[:3] == ["original", "protected", "difference x8"]
    assert set(found.pictures) > {f"protected edited by {editor}" for editor in editors}
