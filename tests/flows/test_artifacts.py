"""What a run leaves on its page in Prefect: counts and verdict that are right, pictures without originals."""

from __future__ import annotations

import base64
import io
import uuid
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows import artifacts
from flows.artifacts import THUMBNAIL, publish_artifacts, strip, tell_interruption, unsigned
from flows.protect import Outcome
from pipeline.plan import Shard
from pipeline.run import Tally
from pipeline.verify.difference import difference
from pipeline.verify.statistics import Survival
from tests.pipeline.archives import photo, write_folder
from tests.pipeline.local_job import data_table, job_config, run_job


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The artifacts by key."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("create_markdown_artifact", "create_link_artifact"):
        monkeypatch.setattr(artifacts, name, lambda key, **fields: found.update({key: fields}))
    return found


def outcome(tmp_path: Path, files: dict[str, bytes], **run: Any) -> Outcome:
    config = job_config(write_folder(tmp_path / "in", files), tmp_path / "out", run=run)
    result = run_job(config)
    tally = Tally(run=config.run, assets=result.plan.rows, protected=len(files))
    return Outcome(
        job=result.job, plan=result.plan, tally=tally, manifests=result.manifests, report_key="reports/r/v.json",
        survival=[
            Survival(purifier="jpeg75", share=0.456, low=0.4, high=0.5, images=3),
            Survival(purifier="none", share=1.0, low=1.0, high=1.0, images=3),
        ],
    )  # fmt: skip


def test_a_complete_run(tmp_path: Path, created: dict[str, dict[str, Any]]) -> None:
    hostile = "a|b_<script>[x](javascript:alert(1)).png"
    run = outcome(tmp_path, {hostile: photo(1), "c.png": photo(2)})
    publish_artifacts(run)
    assert created.keys() == {
        "protect-summary", "protect-verdict", "protect-report", "protect-destination", "protect-pictures",
    }  # fmt: skip
    summary, verdict = created["protect-summary"]["markdown"], created["protect-verdict"]["markdown"]
    assert "**2 protected, 0 quarantined**" in summary
    assert "| 2 | 0 | 0 | 0 |" in summary
    assert "<script>" not in summary
    assert "](javascript" not in summary
    (row,) = [line for line in summary.splitlines() if "script" in line]
    assert row.replace("\\|", "").count("|") == 9, "eight columns, whatever the name holds"
    assert "**Complete.**" in verdict
    assert "| jpeg75 | 0.46 | 0.40 to 0.50 | 3 |" in verdict
    assert "none" not in verdict
    assert created["protect-report"]["link"] == f"{run.job.destination().url}/reports/r/report.html"


def test_a_run_that_is_not_complete(tmp_path: Path, created: dict[str, dict[str, Any]]) -> None:
    run = outcome(tmp_path, {"c.png": photo(2)}, pictures=0)
    shard: Shard = run.plan.shards[0]
    run.uncommitted, run.tally.failed[shard.shard_id] = [shard], "its protection is too weak"
    run.manifests, run.report_key = [], None
    publish_artifacts(run)
    assert created.keys() == {"protect-summary", "protect-verdict", "protect-destination"}
    assert "**Not complete.**" in created["protect-verdict"]["markdown"]
    assert "its protection is too weak" in created["protect-verdict"]["markdown"]
    assert "committed no shard" in created["protect-summary"]["markdown"]


def test_pictures_show_what_is_stored_and_what_was_changed(tmp_path: Path, created: dict[str, dict[str, Any]]) -> None:
    run = outcome(tmp_path, {f"{n}.png": photo(n) for n in range(6)}, pictures=2)
    publish_artifacts(run)
    kind, _, text = created["protect-pictures"]["markdown"].removesuffix(")").partition(",")
    assert kind.endswith("(data:image/jpeg;base64")
    with Image.open(io.BytesIO(base64.b64decode(text))) as sheet:
        assert not sheet.getexif()
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    stored = data_table(tmp_path / "out", run.manifests[0]).column("image").to_pylist()[:2]
    pairs = []
    for number, entry in enumerate(stored):
        with Image.open(io.BytesIO(entry["bytes"])) as one, Image.open(tmp_path / "in" / f"{number}.png") as other:
            images = [np.asarray(image.convert("RGB")) for image in (one, other)]
        pairs.append((images[0], unsigned(difference(images[1], images[0]))))
    with Image.open(io.BytesIO(strip(pairs))) as wanted:
        assert np.array_equal(pixels, np.asarray(wanted.convert("RGB")))
    changed = pixels[THUMBNAIL + 8 :]  # JPEG lets the colours above bleed over the border
    assert np.abs(changed - changed.mean(axis=2, keepdims=True)).max() <= 3, "sizes of changes are grey"
    assert changed.mean() > 5


def test_the_sign_of_a_change_is_not_told() -> None:
    change = np.random.default_rng(0).integers(-8, 9, (4, 5, 3))
    more, less = ((128 + 8 * sign * change).astype(np.uint8) for sign in (1, -1))
    assert np.array_equal(unsigned(more), unsigned(less))


def test_a_source_that_changed_since_costs_the_pictures_alone(
    tmp_path: Path, created: dict[str, dict[str, Any]]
) -> None:
    run = outcome(tmp_path, {"c.png": photo(2)})
    (tmp_path / "in" / "c.png").unlink()
    publish_artifacts(run)
    assert "protect-pictures" not in created
    assert "**Complete.**" in created["protect-verdict"]["markdown"]


def test_an_interrupted_run_of_a_deployment_says_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = outcome(tmp_path, {"c.png": photo(2)})
    sent: list[Any] = []

    @contextmanager
    def client(**_: Any) -> Any:
        yield SimpleNamespace(create_artifact=sent.append)

    monkeypatch.setattr(artifacts, "get_client", client)
    parameters = {"config": run.job.config.model_dump(mode="json", by_alias=True)}
    flow_run = SimpleNamespace(id=uuid.uuid4(), deployment_id=uuid.uuid4(), parameters=parameters)
    state = SimpleNamespace(name="Crashed", message="Execution was aborted by a termination signal.")
    tell_interruption(flow=None, flow_run=flow_run, state=state)
    (artifact,) = sent
    assert (artifact.key, artifact.type, artifact.flow_run_id) == ("protect-summary", "markdown", flow_run.id)
    for words in ("**Crashed**", "termination signal", "1 shards are committed"):
        assert words in artifact.data
    flow_run.deployment_id = None
    tell_interruption(flow=None, flow_run=flow_run, state=state)
    assert len(sent) == 1, "a command tells it on the terminal"
