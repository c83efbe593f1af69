"""``fixative verify-model`` as its users meet it.

1. An error of theirs is one line on stderr that says what to do, with exit code 2, and writes nothing.
2. ``--dry-run`` says which photos are seen, how much is to do and what is stored, and writes nothing.
3. A run prints tables and a line for every bar that is missed, which is no error; the same command again does nothing.
4. A trial that fails is named, and the exit code is 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import Result, fixative
from tests.pipeline.model_verifications import QUICK, protected, world

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = world(tmp_path_factory.mktemp("world"))
    protected(made, "same", ["rex"])
    protected(made, "other", ["rex"], noise=0.3)
    return made


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines keep their words whole."""
    monkeypatch.setenv("COLUMNS", "300")


def verify(folder: Path, out: Path, *options: object, base: str = "model") -> Result:
    quick = [f"--set={name}={json.dumps(value)}" for name, value in QUICK.items()]
    given = ["--base", folder / base, "--photos", folder / "subjects.parquet", "--out", out, "--workers", 1]
    return fixative("verify-model", *given, *quick, "--generated", 2, "--draws", 0, *options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{}/model"], ["provenance.json", "protect-model"]),
        (["s3://key:secret@bucket/protected"], ["s3://bucket/protected is no folder of this machine: download it"]),
        (["{}/same", "{}/other"], ["both 'apdm fast' on rex", "LABEL=FOLDER"]),
        (["{}/same", "--sets", "mirrored"], ["--sets mirrored", "seen, unseen, flipped, blurred"]),
        (["{}/same", "--attacks", "dreambooht"], ["dreambooht", "dreambooth"]),
        (["{}/same", "--against", "naive"], ["--against naive", "apdm fast"]),
        (["{}/same", "--held-out", "absent.parquet"], ["--held-out", "absent.parquet"]),
        (["{}/same", "--photos", "absent.parquet"], ["--photos", "absent.parquet"]),
    ],
)
def test_wrong_options(options: list[str], words: list[str], folder: Path, tmp_path: Path) -> None:
    result = verify(folder, tmp_path / "out", *(option.format(folder) for option in options))
    assert result.code == 2, result
    assert all(word in result.error for word in words), result.error
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    result = verify(folder, tmp_path / "out", folder / "same", base="other")
    assert (result.code, "name the model that it was made from" in result.error) == (2, True), result


def test_pictures_of_originals_stay_out_of_a_model(folder: Path) -> None:
    result = verify(folder, folder / "same" / "verification", folder / "same")
    assert (result.code, "same, a model: it would show originals there" in result.error) == (2, True), result
    assert not (folder / "same" / "verification").exists()


def test_a_run_and_the_same_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = (folder / "same", f"mine={folder}/other", "--sets", "seen", "--others", 0, "--against", "mine")
    plan = verify(folder, out, *options, "--dry-run")
    assert (plan.code, out.exists()) == (0, False), plan
    assert "rex: 2 seen, 1 unseen photos" in plan.out
    assert "trainings by dreambooth:quick: 3 to run, 0 stored" in plan.out
    result = verify(folder, out, *options)
    assert result.code == 0, result
    assert "attack: 6/6" in result.out
    for words in ("prevented", "apdm fast less mine", "largest change", "over pictures of one attack", "not met: "):
        assert words in result.out
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert names == {"verification.json", "verification.md", "verification.png", "sheet.png"}
    before = {path: path.stat().st_mtime_ns for path in (out / "trials").iterdir()}
    again = verify(folder, out, *options)
    assert again.code == 0, again
    assert {path: path.stat().st_mtime_ns for path in (out / "trials").iterdir()} == before
    more = verify(folder, out, *options, "--identifiers", "sks,ktn", "--dry-run")
    assert "trainings by dreambooth:quick: 3 to run, about 0.0 hours of one core, 3 stored" in more.out


def test_a_trial_that_fails_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such shape")

    monkeypatch.setattr("pipeline.verify.trial.sample", fail)
    result = verify(folder, tmp_path / "out", folder / "same", "--sets", "seen", "--others", 0)
    assert result.code == 1, result
    assert "dreambooth of rex, model" in result.error
    assert "ValueError: no such shape" in result.error
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["rows"][0]["state"] == "error"


def test_help_teaches() -> None:
    text = " ".join(fixative("verify-model", "--help").out.split())
    for words in (
        "share of what the attack gains on the base",
        "Example: fixative verify-model",
        "sheet.png",
        "--dry-run",
    ):
        assert words in text
