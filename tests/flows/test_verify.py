"""``fixative verify`` and ``fixative attack`` as their users meet them, on a tiny model: bytes in, report out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from prefect.artifacts import Artifact
from safetensors.torch import save_file

from pipeline.config import VerifyConfig
from pipeline.decode import DecodeLimits
from pipeline.errors import IntegrityError, UserError
from pipeline.ids import fingerprint
from pipeline.plan import Shard
from pipeline.shard_index import schema_to_text
from pipeline.storage import StorageOptions, open_store
from pipeline.verify import campaign
from pipeline.verify.campaign import Campaign, Target, plan_campaign
from pipeline.verify.digest import folder_digest
from pipeline.verify.editors import EDITORS
from pipeline.verify.editors.drawn_cases import write_case_set
from pipeline.verify.metrics.perceptual import AlexNetTrunk
from pipeline.verify.purifiers import PURIFIERS
from protectors.reference import NANO_EMBED, reference_path
from tests.e2e.archives import fill, parquet_file, picture
from tests.e2e.command import FAKE, contents, fixative
from tests.protectors.tiny import save_tiny_model

LOCAL = StorageOptions()
FEW_STEPS = {"steps": 2, "prior_images": 2, "sampling": {"steps": 2}}
EDITOR = "sdedit-0.3-quick"
DISTANCE = "lpips to the edit of the clean image"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("tiny") / "model")


def small_model(folder: Path, seed: int = 0) -> Path:
    """The tiny model, told that it was trained at 32 pixels: quick."""
    save_tiny_model(folder, seed=seed)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    return folder


@pytest.fixture(scope="module")
def archive(ray_cluster: str, prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protected archive of two shards with four pictures each; asset ids repeat across them."""
    folder = tmp_path_factory.mktemp("archive")
    shards = {f"{n}.parquet": parquet_file({f"r{i}": picture(4 * n + i) for i in range(4)}) for n in range(2)}
    fill(open_store(str(folder / "source"), LOCAL), shards)
    result = fixative("protect", folder / "source", folder / "destination", "--method", FAKE, "--actors", 1)
    assert result.code == 0, result
    return folder / "destination"


def settings_file(folder: Path, model: Path, **attack: Any) -> Path:
    file = folder / "verify.yaml"
    file.write_text(yaml.safe_dump({"attack": attack_settings(model, **attack)}))
    return file


def attack_settings(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "groups": 2,
        "edited": 2,
        "editors": [EDITOR],
        "generated": 2,
        "purifiers": ["jpeg75"],
        "customizer_overrides": FEW_STEPS,
        "models": {"latent": str(model)},
        **changes,
    }


def report_of(destination: Path) -> tuple[Path, dict[str, Any]]:
    (folder,) = (destination / "reports").glob("verify-*")
    return folder, json.loads((folder / "verification.json").read_text())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of further metrics; LPIPS has random ones."""
    alexnet = tmp_path_factory.mktemp("alexnet")
    save_file(AlexNetTrunk().state_dict(), alexnet / "model.safetensors")
    return {"dino": str(reference_path(NANO_EMBED)), "lpips": str(alexnet)}


def test_a_report_of_every_cell(archive: Path, tiny: Path, weights: dict[str, str], tmp_path: Path) -> None:
    store = open_store(str(archive), LOCAL)
    before = contents(store)
    config = settings_file(tmp_path, tiny, metrics=weights)
    result = fixative("verify", archive, "-c", config, "--actors", 2, "--out", tmp_path / "report")
    assert result.code == 0, result
    after = contents(store)
    # Nothing that was there is touched, manifests above all.
    assert {key: after[key] for key in before} == before
    folder, document = report_of(archive)
    (customization, likeness), (editing, distance) = document["customization"], document["editing"]
    assert (customization["attack"], customization["units"]) == ("dreambooth", 2)
    assert (editing["attack"], editing["units"]) == (EDITOR, 2)
    assert document["planned"] == document["done"] == {"groups": 2, "images": 2, "trials": 2 * 5 + 2}
    assert document["failed"] == {}
    assert document["attack"]["digests"] == {"latent": folder_digest(tiny)}
    # Names and digests, and no place on this machine.
    assert document["attack"]["models"] == {"latent": tiny.name, "pixel": "nano-ddpm"}
    assert document["settings"]["metrics"] == {name: Path(folder).name for name, folder in weights.items()}
    assert [entry["name"] for entry in document["attack"]["metrics"]] == ["dino_i", DISTANCE]
    told = json.dumps({name: part for name, part in document.items() if name != "destination"})
    assert not [place for place in (weights["lpips"], tiny, reference_path(NANO_EMBED)) if str(place) in told]
    for table in (customization, likeness, editing, distance):
        assert {row["purifier"] for row in table["rows"]} == {"none", "jpeg75"}
        assert table["counts"]["error"] == 0
    # Further metrics are secondary, with the digest of their weights; that of nano-embed by another name is equal.
    assert [table["question"]["primary"] for table in (customization, likeness, editing, distance)] == [
        True, False, True, False,
    ]  # fmt: skip
    assert likeness["question"]["metric"] == "dino_i"
    assert likeness["cells"] == pytest.approx(customization["cells"], abs=1e-5)
    assert distance["cells"]["R"] == 0.0 < distance["cells"]["A"]
    measured = {item["name"]: item["weights"] for item in document["metrics"]}
    assert measured["dino_i"] == measured["subject similarity"] == folder_digest(reference_path(NANO_EMBED))
    assert measured[DISTANCE] == folder_digest(Path(weights["lpips"]))
    assert {item["name"] for item in document["absent"]} >= {"clip_i", "ism_all", "fid"}
    assert measured["dino_i"][:12] in (folder / "report.html").read_text()
    assert editing["cells"]["A"] < 1.0
    assert "jpeg75" in result.out
    assert "attack: 12/12" in result.out
    # The stored page holds no picture; the local one holds those of both groups and both edits.
    assert "data:image/png" not in (folder / "report.html").read_text()
    local = (tmp_path / "report" / "report.html").read_text()
    assert local.count("data:image/png") >= 2 * 8 + 2 * 6
    for table in (customization, editing):
        for unit in table["unit_residuals"]["none"]:
            assert re.search(rf'<a href="#picture-\d+">{re.escape(unit)}</a>', local), unit
    # Prefect shows what anybody can make from the published archive.
    shown = Artifact.get("verify-pictures")
    assert shown is not None
    assert str(shown.data).startswith("data:image/jpeg;base64,")
    # Once more: it finds everything stored and runs nothing.
    again = fixative("verify", archive, "-c", config, "--out", tmp_path / "elsewhere")
    assert again.code == 0, again
    assert report_of(archive)[1] == document
    assert "attack: 12/12" in again.out
    assert "12 trials were done before; their pictures are not here" in again.out
    here = fixative("verify", archive, "-c", config, "--out", tmp_path / "report")
    assert "pictures are not here" not in here.out
    assert (tmp_path / "report" / "report.html").read_text().count("data:image/png") == local.count("data:image/png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--purifier", "soap"], ["no purifier named 'soap'", "attack list"]),
        (["--editor", "soap"], ["no editor named 'soap'"]),
        (["--customizer", "soap"], ["no customization attack named 'soap'"]),
        (["--attack-model", "soap=x"], ["no kind of model named 'soap'"]),
        (["--attack-model", "latent"], ["write KIND=FOLDER"]),
        (["--purifier", "noisy-upscaling"], ["no upscaler model given"]),
        (["--editor", "inpaint"], ["no inpaint model given"]),
        (["--attack-model", "pixel=/nowhere"], ["no folder '/nowhere'"]),
        (["--metric", "soap=x"], ["no metric soap=", "lpips=FOLDER", "faces"]),
        (["--metric", "lpips=/nowhere"], ["holds 0 safetensors files"]),
        (["--metric", "lpips=a", "--metric", "lpips=b"], ["--metric lpips is given twice"]),
        (["--groups", "0", "--edited", "0"], ["nothing to attack"]),
        (["--subject-column", "whom"], ["no published shard has the columns whom"]),
    ],
)
def test_wrong_options(archive: Path, options: list[str], words: list[str]) -> None:
    result = fixative("verify", archive, *options)
    assert result.code == 2, result
    assert all(word in result.error for word in words), result.error


@pytest.mark.usefixtures("prefect_server")
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


def test_pictures_do_not_go_into_the_archive(archive: Path) -> None:
    for inside in (archive / "report", archive.parent / "source" / "report"):
        result = fixative("verify", archive, "--out", inside)
        assert result.code == 2, result
        assert "overlap" in result.error
        assert not inside.exists()


def test_a_shard_that_cannot_be_attacked_is_named_and_made_up_for(
    archive: Path, tiny: Path, weights: dict[str, str], tmp_path: Path
) -> None:
    destination, source = tmp_path / "destination", tmp_path / "source"
    shutil.copytree(archive, destination, ignore=shutil.ignore_patterns("verif*"))
    shutil.copytree(archive.parent / "source", source)
    (source / "1.parquet").rename(tmp_path / "away")
    command = ["verify", destination, "-c", settings_file(tmp_path, tiny, metrics=weights), "--actors", 1]
    first = fixative(*command, "--source", source / "0.parquet")  # a file stands for its folder, as when protecting
    assert first.code == 1, first
    assert EDITOR in first.out
    for line in ("1 of 2 groups", "1 of 2 edited images"):
        assert line in first.out
    _, document = report_of(destination)
    ((shard, reason),) = document["failed"].items()
    assert shard in first.err
    assert "SourceChanged" in reason
    assert document["editing"][0]["units"] == document["customization"][0]["units"] == 1
    # Once it can be reached, the same command goes on, and the whole report takes the place of the first. Its numbers
    # are those of two attackers who were not disturbed.
    (tmp_path / "away").rename(source / "1.parquet")
    second = fixative(*command, "--source", source)
    assert second.code == 0, second
    assert "attack: 6/12" in second.out
    assert numbers(report_of(destination)[1]) == numbers(report_of(archive)[1])


def numbers(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in ("created_at", "destination")}


# --- What is chosen


def planned(destination: Path, model: Path, **attack: Any) -> tuple[Campaign, list[Target]]:
    return plan_campaign(VerifyConfig(destination=str(destination), attack=attack_settings(model, **attack)))


@pytest.fixture
def copy(archive: Path, tmp_path: Path) -> Path:
    """A copy of the archive that a test may spoil."""
    return shutil.copytree(archive, tmp_path / "copy")


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_only_the_manifests_of_chosen_shards_are_read(copy: Path, tiny: Path) -> None:
    _, (target,) = planned(copy, tiny, groups=1, edited=1)
    assert (target.groups, target.edited) == (1, 1)
    (other,) = (file for file in (copy / "manifests").iterdir() if file.stem != target.shard.shard_id)
    other.write_text("spoiled")
    assert planned(copy, tiny, groups=1, edited=1)[1] == [target]
    with pytest.raises(IntegrityError, match="not the manifest that was published"):
        planned(copy, tiny, groups=2)


def test_a_target_is_the_shard_that_was_planned(archive: Path, tiny: Path) -> None:
    plan = json.loads(next((archive / "plans").glob("plan-*.json")).read_text())
    listed = {entry["shard_id"]: Shard(**entry) for entry in plan["shards"]}
    for target in planned(archive, tiny)[1]:
        assert replace(target.shard, units=0) == replace(listed[target.shard.shard_id], units=0)


def test_groups_and_images_are_dealt_out_evenly(archive: Path, tiny: Path) -> None:
    for groups, edited in ((3, 4), (0, 1), (5, 0)):
        targets = planned(archive, tiny, groups=groups, edited=edited)[1]
        for wanted, shares in ((groups, [t.groups for t in targets]), (edited, [t.edited for t in targets])):
            assert sum(shares) == wanted
            assert max(shares) - min(shares) <= 1


def test_groups_come_from_the_shards_that_name_subjects(copy: Path, tiny: Path) -> None:
    """An archive may hold folders of images beside its tables; edits take an image from anywhere."""
    names = sorted(file.stem for file in (copy / "manifests").iterdir())
    for named in names:
        for name in names:
            columns = pa.schema([pa.field("who", pa.string())] if name == named else [])
            rewrite(copy / "plans" / "index" / f"{name}.json", columns=schema_to_text(columns))
        targets = planned(copy, tiny, groups=3, edited=2, subject_column="who")[1]
        assert {target.shard.shard_id: target.groups for target in targets if target.groups} == {named: 3}
        assert [target.edited for target in targets] == [1, 1]
    with pytest.raises(UserError, match="no published shard has the columns kind, who"):
        planned(copy, tiny, subject_column="who", class_column="kind")


def test_shards_whose_originals_were_replaced_are_left_out(copy: Path, tiny: Path) -> None:
    shards = [file.stem for file in (copy / "manifests").iterdir()]
    rewrite(copy / "_SUCCESS.json", superseded={shards[0]: ["0.parquet"]})
    assert [target.shard.shard_id for target in planned(copy, tiny)[1]] == [shards[1]]
    rewrite(copy / "_SUCCESS.json", superseded={shard: ["x"] for shard in shards})
    with pytest.raises(UserError, match="no protected images"):
        planned(copy, tiny)


def test_images_are_accepted_as_they_were_protected(copy: Path, tiny: Path) -> None:
    binding = copy / "plans" / "binding.json"
    fields = json.loads(binding.read_text())["fields"]
    rewrite(binding, fields=fields | {"limits": {"max_pixels": 5000, "min_side": 40}})
    assert planned(copy, tiny)[0].limits == DecodeLimits(max_pixels=5000, min_side=40)


def test_a_campaign_is_named_by_what_decides_its_numbers(archive: Path, tiny: Path, tmp_path: Path) -> None:
    name = planned(archive, tiny)[0].campaign_id
    moved = shutil.copytree(tiny, tmp_path / "moved")
    (moved / "README.md").write_text("a checkpoint is what its weights and settings are")
    assert planned(archive, moved)[0].campaign_id == name
    others = [
        planned(archive, small_model(tmp_path / "other", seed=1)),
        planned(archive, tiny, seed=1),
        planned(archive, tiny, edited=3),
        planned(archive, tiny, purifiers=["jpeg75", "gridpure-quick"]),
    ]
    names = {name, *(campaign.campaign_id for campaign, _ in others)}
    assert len(names) == 5
    # A checkpoint that is only there for others does not count.
    assert list(others[0][0].digests) == ["latent"]
    assert list(others[3][0].digests) == ["latent", "pixel"]


def test_metrics_name_a_campaign_only_where_they_are_asked_for(
    archive: Path, tiny: Path, weights: dict[str, str]
) -> None:
    """Without them it is what it was before there were any: stored verifications are found again."""
    plain, targets = planned(archive, tiny)
    settings = plain.config.attack
    binding = json.loads((archive / "plans" / "binding.json").read_text())
    before = {
        "attack": settings.model_dump(mode="json", exclude={"models", "metrics"}),
        "parameters": campaign._parameters(settings),
        "models": {"latent": folder_digest(tiny)},
        "embedder": folder_digest(reference_path(NANO_EMBED)),
        "least_likeness": campaign.LEAST_LIKENESS,
        "shards": [[target.shard.shard_id, target.manifest.logical_sha256] for target in targets],
        "config": binding["config_fingerprint"],
        "code": campaign.code_version(),
        "versions": {name: campaign.version(name) for name in campaign.DECIDING},
    }
    assert plain.campaign_id == fingerprint(before)[:16]
    names = {
        planned(archive, tiny, metrics=asked)[0].campaign_id for asked in (weights, dict(reversed(weights.items())))
    }
    assert len(names | {plain.campaign_id}) == 2
    # Where no image is edited, there is nothing for LPIPS to measure.
    without = planned(archive, tiny, edited=0)[0]
    unused = planned(archive, tiny, edited=0, metrics={"lpips": weights["lpips"]})[0]
    assert unused.campaign_id == without.campaign_id
    assert unused.metrics == without.metrics


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(campaign, "LEAST_LIKENESS", 0.5),
        lambda patch: patch.setattr(campaign, "version", lambda name: f"another {name}"),
        lambda patch: patch.setattr(campaign, "PURIFIERS", {**PURIFIERS, "jpeg75": PURIFIERS["jpeg50"]}),
        lambda patch: patch.setattr(campaign, "EDITORS", {**EDITORS, EDITOR: EDITORS["sdedit-0.5-quick"]}),
        lambda patch: patch.setattr(campaign, "reference_path", lambda name: reference_path("nano-ddpm")),
    ],
    ids=["likeness", "libraries", "purifier", "editor", "embedder"],
)
def test_another_version_of_what_decides_the_numbers_is_another_campaign(
    archive: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    name = planned(archive, tiny)[0].campaign_id
    assert planned(archive, tiny)[0].campaign_id == name
    change(monkeypatch)
    assert planned(archive, tiny)[0].campaign_id != name


def test_a_digest_changes_with_every_defining_file_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    found = {folder_digest(tmp_path)}
    for name, text in (
        ("unet/config.json", "1"),
        ("unet/a.safetensors", "1"),
        ("merges.txt", "1"),
        ("merges.txt", "2"),
    ):
        (tmp_path / name).write_text(text)
        found.add(folder_digest(tmp_path))
    (tmp_path / "unet" / "a.safetensors").rename(tmp_path / "unet" / "b.safetensors")
    found.add(folder_digest(tmp_path))
    assert len(found) == 6
    (tmp_path / "preview.png").write_text("1")
    assert folder_digest(tmp_path) in found
    # Stored comparisons and verifications are named by it.
    assert (
        folder_digest(reference_path(NANO_EMBED)) == "8fd7351d4a3a7b7fe55799cac7b50501209ae2372810c0f31d0291eaf5b105de"
    )


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
