"""``fixative verify`` and ``fixative attack`` as their users meet them, on a tiny model: bytes in, report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.storage import StorageOptions, open_store
from pipeline.verify.editors.drawn_cases import write_case_set
from tests.e2e.archives import fill, parquet_file, picture
from tests.e2e.command import FAKE, contents, fixative
from tests.protectors.tiny import save_tiny_model

LOCAL = StorageOptions()
FEW_STEPS = {"steps": 2, "prior_images": 2, "sampling": {"steps": 2}}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def archive(ray_cluster: str, prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protected archive of two shards with four pictures each."""
    folder = tmp_path_factory.mktemp("archive")
    shards = {f"{n}.parquet": parquet_file({f"r{n}{i}": picture(4 * n + i) for i in range(4)}) for n in range(2)}
    fill(open_store(str(folder / "source"), LOCAL), shards)
    result = fixative("protect", folder / "source", folder / "destination", "--method", FAKE, "--actors", 1)
    assert result.code == 0, result
    return folder / "destination"


def settings_file(folder: Path, model: Path, **attack: Any) -> Path:
    settings = {
        "groups": 2,
        "edited": 2,
        "generated": 2,
        "purifiers": ["jpeg75"],
        "customizer_overrides": FEW_STEPS,
        "models": {"latent": str(model)},
        **attack,
    }
    file = folder / "verify.yaml"
    file.write_text(yaml.safe_dump({"attack": settings}))
    return file


def report_of(destination: Path) -> tuple[Path, dict[str, Any]]:
    (folder,) = (destination / "reports").glob("verify-*")
    return folder, json.loads((folder / "verification.json").read_text())


def test_a_report_of_every_cell(archive: Path, tiny: Path, tmp_path: Path) -> None:
    store = open_store(str(archive), LOCAL)
    before = contents(store)
    config = settings_file(tmp_path, tiny)
    result = fixative("verify", archive, "-c", config, "--actors", 2, "--out", tmp_path / "report")
    assert result.code == 0, result
    after = contents(store)
    # Nothing that was there is touched, manifests above all.
    assert {key: after[key] for key in before} == before
    folder, document = report_of(archive)
    (customization,), (editing,) = document["customization"], document["editing"]
    assert (customization["attack"], customization["units"]) == ("dreambooth", 2)
    assert (editing["attack"], editing["units"]) == ("sdedit-0.5-quick", 2)
    for table in (customization, editing):
        assert {row["purifier"] for row in table["rows"]} == {"none", "jpeg75"}
        assert table["counts"]["error"] == 0
    assert editing["cells"]["A"] == 1.0
    assert "jpeg75" in result.out
    # The stored page holds no picture; the local one holds those of both groups and both edits.
    assert "data:image/png" not in (folder / "report.html").read_text()
    local = (tmp_path / "report" / "report.html").read_text()
    assert local.count("data:image/png") >= 2 * 8 + 2 * 6
    # The same numbers from one attacker, with nothing left of the first run.
    stored = {key for key in after if key.startswith(("verifications/", "reports/verify-"))}
    for key in stored:
        store.delete(key)
    again = fixative("verify", archive, "-c", config, "--actors", 1)
    assert again.code == 0, again
    assert comparable(report_of(archive)[1]) == comparable(document)
    # And once more, which finds everything stored and runs nothing.
    third = fixative("verify", archive, "-c", config)
    assert third.code == 0, third
    assert comparable(report_of(archive)[1]) == comparable(document)


def comparable(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "created_at"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--purifier", "soap"], ["no purifier named 'soap'", "attack list"]),
        (["--editor", "soap"], ["no editor named 'soap'"]),
        (["--customizer", "soap"], ["no customization attack named 'soap'"]),
        (["--attack-model", "soap=x"], ["no kind of model named 'soap'"]),
        (["--attack-model", "latent"], ["write KIND=FOLDER"]),
        (["--purifier", "noisy-upscaling"], ["no upscaler model given"]),
        (["--groups", "0", "--edited", "0"], ["nothing to attack"]),
    ],
)
def test_wrong_options(archive: Path, options: list[str], words: list[str]) -> None:
    result = fixative("verify", archive, *options)
    assert result.code == 2, result
    assert all(word in result.error for word in words), result.error


def test_nothing_was_ever_protected_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = fixative("verify", tmp_path / "empty")
    assert result.code == 2
    assert "no run has finished here yet" in result.error


def test_settings_that_do_not_exist_are_named(archive: Path, tmp_path: Path, tiny: Path) -> None:
    config = settings_file(tmp_path, tiny, customizer_overrides={"stepz": 3})
    result = fixative("verify", archive, "-c", config)
    assert result.code == 2
    assert "stepz" in result.error


# --- The laboratory bench


def test_attacks_are_listed() -> None:
    out = fixative("attack", "list").out
    for name in ("gridpure", "textual-inversion", "masactrl", "latent", "quick"):
        assert name in out


def test_purify_writes_pictures(archive: Path, tmp_path: Path) -> None:
    source = archive.parent / "source" / "0.parquet"
    result = fixative("attack", "purify", source, tmp_path / "out", "-p", "jpeg75", "-p", "noise", "--count", 2)
    assert result.code == 0, result
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4
    assert json.loads((tmp_path / "out" / "attack.json").read_text())["purifiers"]["jpeg75"]["quality"] == 75


def test_edit_takes_a_folder_or_cases(archive: Path, tmp_path: Path, tiny: Path) -> None:
    latent = ["--attack-model", f"latent={tiny}"]
    source = archive.parent / "source"
    result = fixative("attack", "edit", source, tmp_path / "a", "-e", "inpaint-blended-quick", "--prompt", "x",
                      "--count", 1, *latent)  # fmt: skip
    assert result.code == 0, result
    assert len(list((tmp_path / "a").rglob("*.png"))) == 1
    write_case_set(tmp_path / "cases", side=32)
    result = fixative("attack", "edit", tmp_path / "cases", tmp_path / "b", "-e", "sdedit-0.3-quick", "--cases",
                      "--count", 2, *latent)  # fmt: skip
    assert result.code == 0, result
    assert len(list((tmp_path / "b").rglob("*.png"))) == 2
    both = fixative("attack", "edit", source, tmp_path / "c", "-e", "sdedit-0.3-quick")
    assert both.code == 2
    assert "--prompt, or --cases" in both.error


def test_customize_needs_images(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"no picture")
    result = fixative("attack", "customize", tmp_path / "none", tmp_path / "out", "--class-word", "dog")
    assert result.code == 2
    assert "holds no image that can be read: a.png" in result.error
