"""The protection of a model, from the job to the folder.

1. The folder holds the given model's components byte for byte, the protected UNet, a card, curves and provenance,
   and opens in diffusers. No other form of the given UNet's weights gets into it, and no part of a photo.
2. Provenance names everything that decided the weights, photos by hashes.
3. A run that was stopped between two checkpoints goes on at the last, and ends with the same bytes. Until the end
   there is no folder. A finished one is not made again.
4. Folders that are another's are refused before anything is written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.config import S3Settings
from pipeline.errors import PipelineError, UserError
from pipeline.protect_model.concepts import read_concept, read_kept
from pipeline.protect_model.job import ConceptSource
from pipeline.protect_model.plan import plan_model
from pipeline.protect_model.run import protect_model, seconds_for, unet_bytes
from pipeline.verify.attack_models import load_pipeline
from protectors.diffusion import load_model, model_digest
from protectors.reference.data import is_held_out
from tests.pipeline.archives import photo, write_parquet
from tests.pipeline.model_jobs import LEFT_OUT, QUICK, SIDE, contents, job, traces, world

UNET = "unet/diffusion_pytorch_model.safetensors"
POSITIVES = {f"positives/{name}" for name in ("0.safetensors", "0.png", "manifest.json")}
MADE = {UNET, "README.md", "curves.png", "provenance.json", *POSITIVES}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, with a model protected in one go in ``protected``."""
    folder = world(tmp_path_factory.mktemp("world"))
    protect_model(plan_model(job(folder, folder / "protected")))
    return folder


def test_the_folder(folder: Path) -> None:
    base, made = contents(folder / "model"), contents(folder / "protected")
    assert set(made) == (set(base) - set(LEFT_OUT)) | MADE
    assert {name for name in made if made[name] != base.get(name)} == MADE
    assert {path.name for path in folder.iterdir()} == {"model", "photos", "subjects.parquet", "protected"}
    before, after = (load_file(folder / name / UNET) for name in ("model", "protected"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    pipeline = load_pipeline(folder / "protected")
    drawn = pipeline("a dog", num_inference_steps=1, output_type="np", height=SIDE, width=SIDE).images
    assert drawn.shape == (1, SIDE, SIDE, 3)
    assert all(torch.equal(weight, after[name]) for name, weight in pipeline.unet.state_dict().items())


def test_the_weights_are_the_method_s(folder: Path) -> None:
    plan = plan_model(job(folder, folder / "other"))
    protected = plan.method(plan.config, load_model(str(folder / "model"))).protect(plan.concepts, seed=0)
    written = load_file(folder / "protected" / UNET)
    assert all(torch.equal(weight, written[name]) for name, weight in protected.weights.items())


def test_provenance(folder: Path) -> None:
    made = folder / "protected"
    found = json.loads((made / "provenance.json").read_text())
    identity = found["identity"]
    assert identity["base"] == model_digest(str(folder / "model"))
    assert found["weights"]["digest"] == model_digest(str(made)) != identity["base"]
    assert found["weights"]["unet_sha256"] == hashlib.sha256((made / UNET).read_bytes()).hexdigest()
    assert (identity["method"], found["preset"], identity["seed"]) == ("apdm 1", "fast", 0)
    assert QUICK.items() <= identity["config"].items()
    assert found["environment"]["versions"]["torch"] == torch.__version__
    images = read_concept(ConceptSource(path=str(folder / "photos"), class_word="dog"), side=SIDE, most=None).images
    hashes = [hashlib.sha256((image * 255).round().byte().numpy().tobytes()).hexdigest() for image in images]
    assert identity["concepts"] == [{"class_word": "dog", "images": sorted(hashes)}]
    assert [image["sha256"] for image in found["pairs"][0]["images"]] == sorted(hashes)
    assert found["facts"]["updates"] == 4
    assert found["facts"]["drift"] > 0
    assert {name: len(curve) for name, curve in found["curves"].items()} == dict.fromkeys(
        ("personalization", "dpo", "margin", "prior"), 4
    )
    card = (made / "README.md").read_text()
    for words in (identity["base"], found["weights"]["digest"], "not hindered", "apdm 1", "(dog)", "library_name"):
        assert words in card
    assert str(folder) not in card + json.dumps(found), "a path of this machine is nobody's business"


def test_a_stopped_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "protected", tmp_path / "protected.training"
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protect_model(plan_model(job(folder, out)), stop)
    assert not out.exists()
    left = contents(work)
    assert sorted(left) == ["checkpoint/state-00000002.safetensors", "checkpoint/state.json", "run.json"]
    assert not any(trace in data for trace in traces(folder) for data in left.values())
    with pytest.raises(UserError, match=r"checkpoints of another run \(identity.seed: 0 -> 1\).*another --work"):
        plan_model(job(folder, out, seed=1))
    assert contents(work) == left
    state = work / "checkpoint" / "state.json"
    state.write_text(state.read_text().replace('"concepts": "', '"concepts": "0'))
    with pytest.raises(UserError, match=r"protected\.training was begun where numbers come out otherwise"):
        protect_model(plan_model(job(folder, out)))
    state.write_bytes(left["checkpoint/state.json"])
    protect_model(plan_model(job(folder, out)), stop)
    assert seen == [1, 2, 3, 3, 4]
    assert contents(out) == contents(folder / "protected")
    assert [path.name for path in tmp_path.iterdir()] == ["protected"]

    monkeypatch.setattr("pipeline.protect_model.run.load_model", None)
    finished = plan_model(job(folder, out))
    assert finished.finished
    protect_model(finished)
    with pytest.raises(UserError, match=r"another protected model \(seed: 0 -> 1\): choose another --out"):
        plan_model(job(folder, out, seed=1))


def test_no_photo_gets_out(folder: Path) -> None:
    pieces, made = traces(folder), contents(folder / "protected")
    assert all(any(piece in data for data in contents(folder / "photos").values()) for piece in pieces[:3])
    assert not [name for name, data in made.items() for piece in pieces if piece in data]


def test_a_folder_is_written_whole_or_not_at_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "protected"
    out.mkdir()  # an empty one may be there
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.protect_model.folder.model_card", _full)
        with pytest.raises(PipelineError, match=r"No space left.*the checkpoints stay"):
            protect_model(plan_model(job(folder, out)))
    assert (list(out.iterdir()), {path.name for path in tmp_path.iterdir()}) == (
        [],
        {"protected", "protected.training"},
    )
    seen: list[int] = []
    protect_model(plan_model(job(folder, out)), lambda done, total: seen.append(done))
    assert seen == []
    assert contents(out) == contents(folder / "protected")


def test_what_a_kill_leaves_is_removed(folder: Path, tmp_path: Path) -> None:
    """SIGKILL while the folder is written: the next run removes its part, but not that of a run that is alive."""
    asked = job(folder, tmp_path / "protected", overrides={**QUICK, "steps": 2})
    script = (
        "import os, sys, torch; from pipeline.protect_model import folder, job, plan, run\n"
        "torch.set_num_threads(1)\n"
        "folder.model_card = lambda *_: os.kill(os.getpid(), 9)\n"
        "run.protect_model(plan.plan_model(job.ModelJob.model_validate_json(sys.argv[1])))"
    )
    ended = subprocess.run([sys.executable, "-c", script, asked.model_dump_json()], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    names = {path.name for path in tmp_path.iterdir()}
    (part,) = names - {"protected.training"}
    assert re.fullmatch(r"\.protected-[0-9a-f]{8}", part)
    others = [tmp_path / name for name in (".protected-0123456", ".protectedly-01234567", ".protected-89abcdef")]
    for other in others:
        other.mkdir()
    descriptor = os.open(others[-1], os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    seen: list[int] = []
    protect_model(plan_model(asked), lambda done, total: seen.append(done))
    os.close(descriptor)
    assert seen == []
    assert {path.name for path in tmp_path.iterdir()} == {"protected", *(other.name for other in others)}


def _full(*_: Any) -> str:
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out": Path("photos")}, "--out .* and --concept .* overlap"),
        ({"work": Path("photos/work")}, "--work .* and --concept .* overlap"),
        ({"out": Path("model/out")}, "--out .* and the model .* overlap"),
        ({"work": Path("out/.work")}, "--work .* and --out .* overlap"),
        ({"out": Path("taken")}, "neither empty nor a folder of this command"),
        ({"work": Path("taken")}, "neither empty nor a folder of this command"),
        ({"out": "s3://bucket"}, "--out s3://bucket is a whole bucket: name a prefix"),
        ({"out": "s3://key:secret@bucket/out"}, "s3://bucket/out was given with credentials in the URL"),
        ({"work": "s3://bucket/out", "out": "s3://bucket/out/rex"}, "--work .* and --out .* overlap"),
        ({"work": "no-such-scheme://folder"}, "cannot open no-such-scheme://folder"),
        ({"out": Path("folders")}, "neither empty nor a folder of this command"),
        ({"out": Path("file")}, "--out .*/file is a file: name a folder"),
        ({"method": "apmd"}, "no model protector named 'apmd'. Known: anchored, apdm, .*naive"),
        ({"preset": "slow"}, "no preset 'slow'; it has paper, fast, .*strong"),
        ({"overrides": {"stepz": 1}}, "no field 'stepz'"),
        ({"overrides": {"steps": 0}}, "steps=0: use 1 or more"),
        ({"keep": "none.parquet"}, "'apdm' has no use for --keep; anchored has"),
        ({"keep": "none.parquet", "method": "anchored", "overrides": {"rate": 1e-3}}, "--keep .*none.parquet"),
        ({"device": "gpu"}, "--device gpu: use cpu or cuda"),
    ],
)
def test_refused(changes: dict[str, Any], words: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folders" / "empty").mkdir(parents=True)
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    for name in ("photos", "model"):
        (tmp_path / name).symlink_to(folder / name)
    before = contents(tmp_path)
    changes = {name: tmp_path / value if isinstance(value, Path) else value for name, value in changes.items()}
    with pytest.raises(UserError, match=words):
        plan_model(job(tmp_path, **{"out": tmp_path / "out", **changes}))
    assert contents(tmp_path) == before


def test_what_the_model_shall_do_as_before_decides_too(folder: Path, tmp_path: Path) -> None:
    names = [f"photo {number}" for number in range(12)]
    trained_on = sum(not is_held_out(name) for name in names)
    columns = {"asset_id": names, "caption": [f"a photo of a {name}" for name in names]}
    write_parquet(tmp_path / "others.parquet", [photo(20 + number) for number in range(12)], columns)
    small = {**QUICK, "steps": 2, "attack_length": 2, "kept_images": 2, "retention_batch": 2}
    made = {}
    for name, keep, images in (("drawn", None, 9), ("photos", "others.parquet", 99), ("few", "others.parquet", 2)):
        given = None if keep is None else str(tmp_path / keep)
        changes = {"method": "anchored", "overrides": small, "keep": given, "keep_images": images}
        protect_model(plan_model(job(folder, tmp_path / name, **changes)))
        made[name] = json.loads((tmp_path / name / "provenance.json").read_text())
    kept = [made[name]["identity"].get("kept", {}).get("photos") for name in ("drawn", "photos", "few")]
    assert kept == [None, trained_on, 2]
    assert 2 < trained_on < 12
    assert len({(tmp_path / name / UNET).read_bytes() for name in made}) == 3
    # Pictures of others get out no more than the subject's.
    crop = read_kept(str(tmp_path / "others.parquet"), side=SIDE, most=1, s3=S3Settings()).images[0]
    row = (crop * 255).round().to(torch.uint8).permute(1, 2, 0)[8].numpy().tobytes()
    assert not any(row in data for data in contents(tmp_path / "photos").values())


def test_the_preset_follows_from_the_model(folder: Path, tmp_path: Path) -> None:
    assert plan_model(job(folder, tmp_path / "out", preset=None)).preset == "paper"
    assert plan_model(job(folder, tmp_path / "out", preset=None, model="nano-sd")).preset == "fast"


def test_the_estimate(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_model(job(folder, tmp_path / "out", overrides={**QUICK, "steps": 4000, "inner_steps": 100}))
    assert unet_bytes(plan) == 4 * sum(weight.numel() for weight in load_file(folder / "model" / UNET).values())
    # The start; after the first update, with one drawn image before it; after the second.
    clock = SimpleNamespace(monotonic=iter([0.0, 10.0, 12.0]).__next__)
    monkeypatch.setattr("pipeline.protect_model.run.time", clock)
    images = QUICK["class_images"] + 3
    assert seconds_for(plan) == images * 8.0 + 4000 * 100 * 2.0
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_breaks_down(folder: Path, tmp_path: Path) -> None:
    plan = plan_model(job(folder, tmp_path / "out", overrides={**QUICK, "rate": 1e30}))
    with pytest.raises(PipelineError, match=r"not finite.*lower the rate.*remove .*out\.training"):
        protect_model(plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("No space left on device"), r"out\.training cannot be written or read: No space left.*to go on"),
        (SafetensorError("header too small"), r"out\.training cannot be .*header too small.*begin again"),
        (torch.OutOfMemoryError("CUDA out of memory"), "gradient_checkpointing=true"),
    ],
)
def test_what_a_machine_lacks_is_told(
    error: Exception, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("protectors.protected_weights.save_checkpoint", fail)
    with pytest.raises(PipelineError, match=words):
        protect_model(plan_model(job(folder, tmp_path / "out", overrides={**QUICK, "steps": 2})))
