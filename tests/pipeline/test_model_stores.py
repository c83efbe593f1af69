"""The protection of a model from bucket to bucket, against a server that speaks S3 over HTTP.

1. Model, photos, output and checkpoints may lie in S3: the objects are those of a local run, byte for byte; nothing
   of the run is left; index and provenance are written last.
2. A run that was stopped goes on elsewhere from the checkpoint in the bucket, and ends with the same bytes.
3. A half-published model is completed; what is there is not replaced; what is another's is refused; files of two runs
   never meet in one model, on a server whose uploads of many parts overwrite either.
4. A finished one is not written to again. A damaged checkpoint, and another run's hand on it, are found out.
5. Any other fsspec URL serves a single writer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.config import S3Settings
from pipeline.errors import IntegrityError, PipelineError, UserError
from pipeline.protect_model.concepts import read_concept
from pipeline.protect_model.job import ConceptSource, ModelJob
from pipeline.protect_model.plan import plan_model
from pipeline.protect_model.publish import upload
from pipeline.protect_model.run import protect_model
from pipeline.protect_model.work import Work
from pipeline.storage import ObjectInfo, Store, open_store
from tests.conftest import S3Proxy, S3Server, Verdict, make_bucket
from tests.e2e.archives import fill
from tests.pipeline.archives import write_folder
from tests.pipeline.model_jobs import LEFT_OUT, SIDE, contents, job, traces, world

pytestmark = pytest.mark.usefixtures("one_thread")
Rule = Callable[[str, str, Message], Verdict]


@pytest.fixture(scope="module")
def folder(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, with a model protected in ``protected``."""
    folder = world(tmp_path_factory.mktemp("world"))
    protect_model(plan_model(job(folder, folder / "protected")))
    return folder


@pytest.fixture(scope="module")
def source(folder: Path, s3_server: S3Server) -> str:
    """The world in a bucket."""
    url = f"s3://{make_bucket(s3_server)}/world"
    fill(open_store(url, s3_server.options), contents(folder))
    return url


@pytest.fixture
def far(source: str, s3_proxy: S3Proxy, s3_bucket: str) -> Callable[..., ModelJob]:
    """Makes jobs from bucket to bucket, through the proxy."""

    def make(**changes: Any) -> ModelJob:
        given: dict[str, Any] = {
            "model": f"{source}/model",
            "concepts": (ConceptSource(path=f"{source}/photos", class_word="dog"),),
            "s3": S3Settings(endpoint_url=s3_proxy.endpoint_url, region="us-east-1"),
            "out": f"s3://{s3_bucket}/models/rex",
        }
        return job(Path("nowhere"), **{**given, **changes})

    return make


def stored(store: Store) -> dict[str, bytes]:
    return {item.key: store.get(item.key) for item in store.list()}


def written(proxy: S3Proxy) -> list[str]:
    return [line.partition("?")[0].partition("/models/")[2] for line in proxy.seen if line.startswith("PUT")]


def stop_after(updates: int, seen: list[int]) -> Callable[[int, int], None]:
    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == updates:
            raise KeyboardInterrupt

    return stop


def test_from_bucket_to_bucket(folder: Path, far: Callable[..., ModelJob], s3_proxy: S3Proxy) -> None:
    asked = far()
    for store in (asked.out_store(), asked.work_store()):  # of a run that was killed at its first write
        store.put_new("plans/.selftest-0", b"first")
    s3_proxy.seen.clear()
    plan = plan_model(asked)
    assert not written(s3_proxy)
    fetched = contents(plan.folder)
    assert fetched == {name: data for name, data in contents(folder / "model").items() if name not in LEFT_OUT}
    s3_proxy.seen.clear()
    assert plan_model(asked).folder == plan.folder
    assert not [line for line in s3_proxy.seen if "safetensors" in line], "it is not fetched twice"
    protect_model(plan)
    for store in (asked.out_store(), asked.work_store()):
        store.delete("plans/.selftest-0")
    assert stored(asked.out_store()) == contents(folder / "protected")
    assert stored(asked.work_store()) == {}
    made = [name for name in written(s3_proxy) if name.startswith("rex/") and ".selftest" not in name]
    assert (made[0], made[-2:]) == ("rex/publishing.json", ["rex/model_index.json", "rex/provenance.json"])
    assert len(made) == 1 + len(contents(folder / "protected"))
    files = json.loads(asked.out_store().get("provenance.json"))["files"]
    assert files.keys() == contents(folder / "protected").keys() - {"provenance.json"}

    s3_proxy.seen.clear()
    finished = plan_model(asked)
    assert finished.finished
    protect_model(finished)
    assert {line.partition(" ")[0] for line in s3_proxy.seen} <= {"GET", "HEAD"}
    where = plan.folder
    del plan, finished
    assert not where.exists(), "it goes when nobody needs it"
    asked.out_store().delete("vae/config.json")
    with pytest.raises(UserError, match=r"holds this model, but vae/config.json is gone"):
        plan_model(asked)


def test_a_stopped_run_goes_on_elsewhere(folder: Path, far: Callable[..., ModelJob]) -> None:
    asked, seen = far(), list[int]()
    with pytest.raises(KeyboardInterrupt):
        protect_model(plan_model(asked), stop_after(3, seen))
    left = stored(asked.work_store())
    (state,) = (key for key in left if key.startswith("checkpoint/"))
    assert left.keys() == {"run.json", "checkpoint.json", state}
    assert not any(trace in data for trace in traces(folder) for data in left.values())
    with pytest.raises(UserError, match=r"rex\.training holds checkpoints of another run \(identity.seed: 0 -> 1\)"):
        plan_model(far(seed=1))
    asked.work_store().replace(state, b"damaged", etag=asked.work_store().info(state).etag)
    with pytest.raises(IntegrityError, match=r"is not what was stored: remove .* and begin again"):
        protect_model(plan_model(asked))
    asked.work_store().replace(state, left[state], etag=asked.work_store().info(state).etag)
    pointer = json.loads(left["checkpoint.json"])
    elsewhere = {**pointer, "state": pointer["state"].replace('"tensors": "', '"tensors": "../')}
    for document in (elsewhere, pointer):
        etag = asked.work_store().info("checkpoint.json").etag
        asked.work_store().replace("checkpoint.json", json.dumps(document).encode(), etag=etag)
        if document is elsewhere:
            with pytest.raises(IntegrityError, match=r"names '\.\./state-.*', which is no file of a checkpoint"):
                protect_model(plan_model(asked))
    protect_model(plan_model(asked), stop_after(99, seen))
    assert seen == [1, 2, 3, 3, 4]
    assert stored(asked.out_store()) == contents(folder / "protected")
    assert stored(asked.work_store()) == {}


def test_another_hand_on_the_checkpoint_ends_the_run(far: Callable[..., ModelJob]) -> None:
    asked = far()

    def meddle(done: int, total: int) -> None:
        if done == 2:
            store = asked.work_store()
            pointer = json.loads(store.get("checkpoint.json"))
            other = json.dumps({**pointer, "key": "checkpoint/other"}).encode()
            store.replace("checkpoint.json", other, etag=store.info("checkpoint.json").etag)

    with pytest.raises(PipelineError, match=r"rex\.training was written to by another run: this one ends"):
        protect_model(plan_model(asked), meddle)
    assert json.loads(asked.work_store().get("checkpoint.json"))["key"] == "checkpoint/other"
    assert stored(asked.out_store()) == {}


def test_a_half_published_model_is_completed(folder: Path, far: Callable[..., ModelJob], s3_proxy: S3Proxy) -> None:
    asked = far()

    def full(method: str, path: str, headers: Message) -> Verdict:
        refused = method == "PUT" and path.partition("?")[0].endswith(("/model_index.json", "/provenance.json"))
        return Verdict(refuse=(403, "AccessDenied")) if refused else Verdict()

    s3_proxy.rule = full
    with pytest.raises(UserError, match=r"no permission for .*model_index.json"):
        protect_model(plan_model(asked))
    s3_proxy.rule = lambda method, path, headers: Verdict()
    half = asked.out_store()
    before = {item.key: item.etag for item in half.list() if item.key != "publishing.json"}
    assert before.keys() == contents(folder / "protected").keys() - {"model_index.json", "provenance.json"}
    with pytest.raises(UserError, match=r"--out .*rex is neither empty nor a folder of this command"):
        plan_model(far(work=f"{asked.out}.elsewhere"))
    with pytest.raises(UserError, match=r"holds no model_index.json"):
        plan_model(far(model=asked.out, out=f"{asked.out}-again"))
    half.put_new("thesis.tex", b"years of work")
    with pytest.raises(UserError, match=r"holds thesis.tex, which is no part of this model"):
        protect_model(plan_model(asked))
    half.delete("thesis.tex")
    curves = half.get("curves.png")
    half.replace("curves.png", b"another", etag=before["curves.png"])
    with pytest.raises(IntegrityError, match=r"another curves.png than this run made: remove"):
        protect_model(plan_model(asked))
    half.replace("curves.png", curves, etag=half.info("curves.png").etag)
    seen: list[int] = []
    protect_model(plan_model(asked), stop_after(99, seen))
    assert seen == []
    assert stored(half) == contents(folder / "protected")
    assert before.items() <= {item.key: item.etag for item in half.list()}.items()
    assert stored(asked.work_store()) == {}


def test_files_of_two_runs_never_meet_in_one_model(far: Callable[..., ModelJob], tmp_path: Path) -> None:
    """Also where an upload of many parts overwrites what another one has put there, as it may on SeaweedFS 4.48."""
    first, second = (Work(far(work=f"{far().out}.{run}"), tmp_path / "none") for run in ("first", "second"))
    folders = {run: write_folder(tmp_path / run, model_files(run)) for run in ("first", "second")}
    out, met = first.job.out_store(), list[str]()

    class Careless:
        """The store of the first run; the second comes between."""

        def __getattr__(self, name: str) -> Any:
            return getattr(out, name)

        def put_new_file(self, key: str, path: Path) -> ObjectInfo:
            if not met:
                met.append(key)
                with pytest.raises(UserError, match=r"rex is being filled by another run"):
                    upload(Careless(), folders["second"], second)
            out.delete(key)
            return out.put_new(key, path.read_bytes())

    upload(Careless(), folders["first"], first)
    assert met
    assert stored(out) == {**model_files("first"), "publishing.json": out.get("publishing.json")}
    first.clean()
    with pytest.raises(UserError, match=r"rex has become another run's model meanwhile: choose another --out"):
        upload(out, folders["second"], second)
    assert stored(out) == model_files("first")
    assert stored(first.store) == stored(second.store) == {}


def model_files(run: str) -> dict[str, bytes]:
    return {name: run.encode() for name in ("model_index.json", "provenance.json", "unet.safetensors")}


def test_concepts_and_positives_in_a_bucket(folder: Path, source: str, far: Callable[..., ModelJob]) -> None:
    s3 = far().s3
    near = read_concept(ConceptSource(path=f"{folder}/subjects.parquet#rex"), side=SIDE, most=2)
    rows = read_concept(ConceptSource(path=f"{source}/subjects.parquet#rex"), side=SIDE, most=2, s3=s3)
    photos = read_concept(ConceptSource(path=f"{source}/photos", class_word="dog"), side=SIDE, most=2, s3=s3)
    assert near.images.tolist() == rows.images.tolist() == photos.images.tolist()
    for path, words in (
        (f"{source}/subjects.parquet", "name a subject, as subjects.parquet#SUBJECT; it has mia, rex"),
        (f"{source}/nowhere.parquet#rex", "nowhere.parquet does not exist"),
        (f"{source}/nowhere", "holds no image that can be read"),
        (source, "holds subjects.parquet: name a folder of one subject"),
    ):
        with pytest.raises(UserError, match=words):
            read_concept(ConceptSource(path=path, class_word="dog"), side=SIDE, most=None, s3=s3)
    plan = plan_model(far(positives=f"{source}/protected/positives"))
    manifest = json.loads((folder / "protected" / "positives" / "manifest.json").read_text())
    assert plan.identity["positives"] == [[pair["latents_sha256"] for pair in manifest["concepts"][0]["pairs"]]]


def test_any_other_url_serves_a_single_writer(folder: Path, far: Callable[..., ModelJob]) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/world/{name}": data for name, data in contents(folder / "model").items()})
    places = {"model": "memory://world", "out": "memory://models/rex"}
    near = {"concepts": (ConceptSource(path=f"{folder}/photos", class_word="dog"),)}
    with pytest.raises(UserError, match="--single-writer"):
        protect_model(plan_model(far(**places, **near)))
    asked = far(**places, **near, single_writer=True)
    with pytest.raises(KeyboardInterrupt):
        protect_model(plan_model(asked), stop_after(3, []))
    protect_model(plan_model(asked))
    made = stored(asked.out_store())
    expected = contents(folder / "protected")
    assert {name for name in expected if made[name] != expected[name]} == {"README.md", "provenance.json"}
    memory.rm("/", recursive=True)


def test_a_model_without_its_parts_is_named_by_its_url(far: Callable[..., ModelJob], s3_bucket: str) -> None:
    asked = far(model=f"s3://{s3_bucket}/bare")
    bare = asked.source_store(asked.model)
    bare.put_new("model_index.json", json.dumps({"_class_name": "StableDiffusionPipeline"}).encode())
    with pytest.raises(UserError, match=rf"^s3://{s3_bucket}/bare has no"):
        plan_model(asked)


def test_weights_in_a_bucket_are_not_pickles(folder: Path, far: Callable[..., ModelJob], s3_bucket: str) -> None:
    """A folder whose UNet has pickle weights alone is refused before they are fetched."""
    asked = far(model=f"s3://{s3_bucket}/pickled")
    files = {name: data for name, data in contents(folder / "model").items() if not name.endswith("model.safetensors")}
    fill(asked.source_store(asked.model), files)
    with pytest.raises(UserError, match="holds no safetensors weights; pickle files are refused"):
        plan_model(asked)
