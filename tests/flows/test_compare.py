"""``fixative compare`` as its users meet it.

1. An error of theirs is one line on stderr that says what to do, with exit code 2, and writes nothing.
2. ``--dry-run`` says how much is to do and what is stored, and writes nothing.
3. A run prints a table per attack and writes five files; the same command again does nothing.
4. A method that fails is named, the others are reported, and the exit code is 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.command import FAKE, Result, fixative
from tests.pipeline.archives import photo, write_parquet
from tests.protectors.tiny import save_tiny_model

SIDE = 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and two subjects of two photos."""
    folder = tmp_path_factory.mktemp("compare")
    config = save_tiny_model(folder / "model") / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": SIDE // 2}))
    columns = {"asset_id": list("abcd"), "subject": ["cup", "cup", "rex", "rex"], "subject_class": ["mug"] * 4}
    write_parquet(folder / "subjects.parquet", [photo(place, side=SIDE) for place in range(4)], columns)
    return folder


def compare(folder: Path, out: Path, *options: object) -> Result:
    model, photos = f"latent={folder / 'model'}", folder / "subjects.parquet"
    quick = [f"--set={name}={value}" for name, value in (("steps", 1), ("batch", 1), ("prior_images", 1))]
    given = ["--photos", photos, "--out", out, "--model", model, "--attack-model", model, "--workers", 1]
    return fixative("compare", *given, *quick, "--set", "sampling={steps: 1}", "--generated", 1, *options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "mits"], ["mits", "did you mean 'mist'"]),
        (["--methods", "noise", "--attacks", "dreambooht"], ["dreambooht", "dreambooth", "fixative attack list"]),
        (["--methods", "noise", "--purifiers", "jpeg-75"], ["jpeg-75", "fixative attack list"]),
        (["--methods", "noise", "--subjects", "max"], ["max", "cup, rex"]),
        (["--methods", "noise", "--against", "mist"], ["mist", "it has noise"]),
        (["--methods", "noise", "--set", "stepz=1"], ["stepz"]),
        (["--methods", "noise", "--model", "folder"], ["KIND=FOLDER"]),
        (["--methods-file", "absent.yaml"], ["absent.yaml", "cannot be read"]),
        ([], ["--methods", "--methods-file"]),
    ],
)
def test_wrong_options(options: list[str], words: list[str], folder: Path, tmp_path: Path) -> None:
    result = compare(folder, tmp_path / "out", *options)
    assert result.code == 2, result
    assert all(word in result.error for word in words), result.error
    assert not (tmp_path / "out").exists()


def test_a_run_its_files_and_the_same_again(folder: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--methods", "noise,static@255", "--against", "noise")
    plan = compare(folder, out, *options, "--dry-run")
    assert (plan.code, out.exists()) == (0, False)
    assert "protections of a subject: 4 to run, 0 stored" in plan.out
    assert "trials of dreambooth: 8 to run, 0 stored" in plan.out  # two subjects: F, A, and C of two methods
    result = compare(folder, out, *options)
    assert result.code == 0, result
    assert "attack: 8/8" in result.out
    for words in ("static@255", "CIEDE2000", "worst, less that of noise", "wrote"):
        assert words in result.out
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert names == {"comparison.json", "comparison.csv", "comparison.md", "comparison.png", "sheet.png"}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.parent.name in ("trials", "protected")}
    assert len(before) == 12
    again = compare(folder, out, *options)
    assert again.code == 0, again
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    more = compare(folder, out, "--methods", "noise,static@255,noise@4", "--dry-run")
    assert "protections of a subject: 2 to run, 4 stored" in more.out
    assert "trials of dreambooth: 2 to run, about 0.0 hours of one core, 8 stored" in more.out


def test_a_method_that_fails_is_named(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text(yaml.safe_dump([{"label": "broken", "name": FAKE, "overrides": {"raise_on": 200}}]))
    result = compare(folder, tmp_path / "out", "--methods", "noise", "--methods-file", file, "--subjects", "cup")
    assert result.code == 1, result
    assert "broken: cup: RuntimeError: the fake protector was told to fail" in result.error
    assert "failed: cup" in result.out
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"][0]["failed"] is None
    alone = compare(folder, tmp_path / "out", "--methods-file", file)
    assert (alone.code, "broken: cup" in alone.error) == (1, True)
    assert "failed: cup: RuntimeError" in (tmp_path / "out" / "comparison.md").read_text()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"][0]["failed"].startswith("cup")


def test_a_trial_that_fails_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such shape")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.verify.trial.sample", fail)
        result = compare(folder, tmp_path / "out", "--methods", "noise", "--subjects", "cup")
    assert result.code == 1, result
    assert "dreambooth of cup, noise, purifier none: ValueError: no such shape" in result.error
    plan = compare(folder, tmp_path / "out", "--methods", "noise", "--subjects", "cup", "--dry-run")
    assert "trials of dreambooth: 3 to run, 0 stored" in plan.out


def test_pictures_stay_out_of_archives(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "archive" / "plans").mkdir(parents=True)
    (tmp_path / "archive" / "plans" / "binding.json").write_text("{}")
    result = compare(folder, tmp_path / "archive" / "new" / "out", "--methods", "noise")
    assert (result.code, "a protected archive" in result.error) == (2, True)
    assert not (tmp_path / "archive" / "new").exists()


def test_help_teaches(folder: Path) -> None:
    text = fixative("compare", "--help").out
    for words in (
        "name[:preset][@levels]",
        "static@255",
        "worst case",
        "go on after a stop",
        "Example: fixative compare",
    ):
        assert words in text
