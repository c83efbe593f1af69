"""``fixative protect-model`` as its users meet it.

1. An error of theirs is one line on stderr that says what to do, with exit code 2, and writes nothing.
2. ``--dry-run`` says what would be done and about how long it takes, and writes nothing.
3. A run shows how far it is and what came of it; the same command again does nothing.
4. ``--help`` teaches, and says who is not hindered.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import Result, fixative
from tests.pipeline.model_jobs import QUICK, contents, world

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines keep their words whole."""
    monkeypatch.setenv("COLUMNS", "200")


def protect(folder: Path, out: Path, *options: object) -> Result:
    quick = [f"--set={name}={value}" for name, value in {**QUICK, "steps": 2}.items()]
    return fixative("protect-model", folder / "model", "--out", out, "--preset", "fast", *quick, *options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--concept", "{}/photos"], ["--class-word dog"]),
        (["--concept", "{}/photos", "--class-word", "dog", "--class-word", "cat"], ["2 --class-word for 1 --concept"]),
        (["--concept", "{}/subjects.parquet"], ["subjects.parquet#SUBJECT", "mia, rex"]),
        (
            ["--concept", "s3://key:secret@photos/rex", "--class-word", "dog"],
            ["s3://photos/rex was given with credentials in the URL: leave them out"],
        ),
        (
            ["--concept", "s3://photos/rex", "--class-word", "dog", "--s3-endpoint", "http://me:secret@127.0.0.1:1"],
            ["the S3 endpoint http://127.0.0.1:1 was given with credentials"],
        ),
        (["--concept", "{}/subjects.parquet#rex", "--method", "mist"], ["mist", "Known: anchored, apdm,"]),
        (["--concept", "{}/subjects.parquet#rex", "--set", "steps=few"], ["steps", "few", "int"]),
        (["--concept", "{}/subjects.parquet#rex", "--seed", str(2**64)], ["seed", "less than 18446744073709551616"]),
    ],
)
def test_wrong_options(options: list[str], words: list[str], folder: Path, tmp_path: Path) -> None:
    result = protect(folder, tmp_path / "out", *(option.format(folder) for option in options))
    assert result.code == 2, result
    assert all(word in result.error for word in words), result.error
    assert "secret" not in result.out + result.err
    assert list(tmp_path.iterdir()) == []


def test_dry_run(folder: Path, tmp_path: Path) -> None:
    concepts = ["--concept", f"{folder}/photos", "--class-word", "dog"]
    concepts += ["--concept", f"{folder}/subjects.parquet#mia", "--class-word", "cat"]
    result = protect(folder, tmp_path / "out", *concepts, "--images", 2, "--dry-run")
    assert (result.code, result.err) == (0, ""), result
    for words in (
        "concept: 2 photos of a dog",
        "concept: 1 photos of a cat",
        "apdm, preset fast: 4 updates, each after 1 steps of a simulated attacker",
        'identifiers: ["sks"]',
        "seconds on this cpu",
    ):
        assert words in result.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("prefect_server")
def test_a_run_and_the_same_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (folder, out, "--concept", f"{folder}/subjects.parquet#rex")
    result = protect(*command)
    assert result.code == 0, result
    for words in ("concept: 3 photos of a dog", "protect: 2/2", "dpo, first and last", f"wrote {out}"):
        assert words in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = contents(out)
    again = protect(*command)
    assert (again.code, f"{out} is finished already" in again.out) == (0, True), again
    assert contents(out) == before
    other = protect(*command, "--seed", 1)
    assert (other.code, "(seed: 0 -> 1)" in other.error) == (2, True)


@pytest.mark.usefixtures("prefect_server")
def test_a_model_for_each(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    concepts = ["--concept", f"{folder}/subjects.parquet#rex", "--concept", f"{folder}/subjects.parquet#mia"]
    bad = protect(folder, out, *concepts, "--separate", "--set", "rate=1e30")
    assert bad.code == 1
    assert "2 of 2 models are not finished: rex: update 1: " in bad.error
    assert "; mia: update 1: " in bad.error
    again = protect(folder, out, *concepts, "--separate", "--work", tmp_path / "work")
    assert (again.code, again.err) == (0, ""), again
    assert again.out.count("protect: 2/2") == 2
    assert {path.name for path in out.iterdir()} == {"rex", "mia", "rex.training", "mia.training"}
    for more in ([], ["--dry-run"]):
        finished = protect(folder, out, *concepts, "--separate", "--work", tmp_path / "work", *more)
        assert (finished.code, finished.out.count("is finished already")) == (0, 2), finished


def test_help_teaches() -> None:
    text = " ".join(fixative("protect-model", "--help").out.split())
    for words in ("Whoever has the original weights is not hindered", "Example: fixative protect-model", "--dry-run"):
        assert words in text
