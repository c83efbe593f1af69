"""The ``fixative`` command as its users meet it.

1. An error of theirs is one line on stderr that says what to do, with exit code 2, within seconds, and writes nothing.
2. ``--help`` explains every command; ``--dry-run`` shows the plan and writes nothing.
3. An option wins over its environment variable, that over the job file, that over the default.
4. What is not whole is not published: the run says why and exits with 1.
5. ``status`` and ``inspect`` tell finished from unfinished and sound from damaged destinations.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.storage import StorageOptions, open_store
from tests.conftest import S3Proxy, S3Server, Verdict, free_port
from tests.e2e.archives import fill, parquet_file, picture
from tests.e2e.command import FAKE, contents, finished, fixative, job_file

LOCAL = StorageOptions()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables keep their words whole."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with three pictures."""
    folder = tmp_path / "source"
    fill(open_store(str(folder), LOCAL), {f"{i}.png": picture(i) for i in range(3)})
    return folder


@pytest.fixture(scope="session")
def done(ray_cluster: str, prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and finished destination: three pictures, one of them not a picture, and a Parquet file."""
    folder = tmp_path_factory.mktemp("done")
    objects = {
        "0.png": picture(0),
        "1.png": b"no picture",
        "2.png": picture(2),
        "p.parquet": parquet_file({"r": picture(3)}),
    }
    fill(open_store(str(folder / "source"), LOCAL), objects)
    places = (folder / "source", folder / "destination")
    result = fixative("protect", *places, "--method", FAKE, "--actors", 1, "--lineage", f"file://{folder}/events.jsonl")
    assert result.code == 0, result
    return places


# --- Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "photogard"], ["photogard", "did you mean 'photoguard'", "advdm"]),
        (["--method", "some.module:Class"], ["some.module:Class", "cannot be loaded"]),
        (["--preset", "slow"], ["slow", "fast, paper, strong"]),
        (["--method", FAKE, "--set", "sleeps=1"], ["sleeps", "sleep_s"]),
        (["--method", FAKE, "--set", "sleep_s=-1"], ["sleep_s", "-1", "0 or more"]),
        (["--method", FAKE, "--set", "sleep_s=soon"], ["sleep_s", "soon"]),
        (["--set", "sleep_s"], ["--set sleep_s", "name=value"]),
        (["--set", "x=[1"], ["--set x=[1", "no YAML"]),
        (["--eps", "0"], ["eps", "greater than 0"]),
        (["--format", "bmp"], ["format", "bmp", "'png', 'webp' or 'jpeg'"]),
        (["--dry-run", "--model", "no-such-folder/"], ["no-such-folder", "neither a folder nor a model"]),
        (["--config", "absent.yaml"], ["absent.yaml", "cannot be read"]),
    ],
)
def test_wrong_options(options: list[str], words: list[str], source: Path, tmp_path: Path) -> None:
    result = fixative("protect", source, tmp_path / "destination", *options)
    assert result.code == 2, result
    assert all(word in result.error for word in words), result.error
    assert not (tmp_path / "destination").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("job: {methd: {name: advdm}}", ["job.methd: no such setting", "archive, method, output"]),
        ("run: {actors: many}", ["run.actors", "integer", "many"]),
        ("job: [", ["cannot be read as YAML"]),
        ("- job", ["no mapping"]),
        ("job: text", ["job"]),
        ("job: {method: text}", ["method"]),
        ("job: {method:}", []),
    ],
)
def test_wrong_job_files(text: str, words: list[str], source: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(text)
    result = fixative("protect", source, tmp_path / "destination", "-c", config, "--method", FAKE, "--dry-run")
    assert result.code == (2 if words else 0), result
    assert not words or all(word in result.error for word in words), result.error


def test_missing_arguments(tmp_path: Path) -> None:
    assert "no source given" in fixative("protect").error
    result = fixative("protect", tmp_path)
    assert (result.code, "no destination given" in result.error) == (2, True)


def test_model_folder_that_is_no_model(source: Path, tmp_path: Path) -> None:
    result = fixative("protect", source, tmp_path / "destination", "--model", source, "--dry-run")
    assert result.code == 2
    assert f"{source} holds no model_index.json" in result.error


def test_hub_id_while_offline_fails_within_seconds(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    begin = time.monotonic()
    result = fixative("protect", source, tmp_path / "destination", "--model", "some-owner/some-model")
    assert time.monotonic() - begin < 30
    assert result.code == 2, result
    assert "'some-owner/some-model' is neither a folder nor a model in the local cache" in result.error
    assert not (tmp_path / "destination").exists()


@pytest.mark.parametrize("place", ["", "inside", "../source/./x"])
def test_source_and_destination_overlap(place: str, source: Path) -> None:
    result = fixative("protect", source, source / place, "--method", FAKE)
    assert result.code == 2
    assert "overlap" in result.error
    assert "Choose a destination outside the source" in result.error


def test_nothing_to_protect(tmp_path: Path) -> None:
    empty, texts = tmp_path / "empty", tmp_path / "texts"
    empty.mkdir()
    fill(open_store(str(texts), LOCAL), {"a.txt": b"text"})
    for place, words in (
        (tmp_path / "absent", "absent is empty or does not exist"),
        (tmp_path / "absent.parquet", "absent.parquet is empty or does not exist"),
        (empty, "empty is empty or does not exist"),
        (texts, "no images, Parquet files or tars (1 other objects were ignored)"),
    ):
        result = fixative("protect", place, tmp_path / "destination", "--method", FAKE, "--dry-run")
        assert result.code == 2, result
        assert words in result.error


def test_image_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "none.parquet")
    pq.write_table(pa.table({"left": [picture(1)], "right": [picture(2)]}), tmp_path / "two.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")

    def dry(name: str, *options: str) -> str:
        destination = tmp_path / "destination"
        result = fixative("protect", tmp_path / name, destination, "--method", FAKE, "--dry-run", *options)
        assert result.code == 2, result
        return result.error

    assert "no image column; name it with --image-column. Columns are text, n" in dry("none.parquet")
    assert "several could be the image (left, right)" in dry("two.parquet")
    assert "column 'text' holds no images" in dry("none.parquet", "--image-column", "text")
    assert "column 'middle' holds no images" in dry("two.parquet", "--image-column", "middle")
    assert "no column 'key' for --id-column" in dry("two.parquet", "--image-column", "left", "--id-column", "key")
    assert "broken.parquet: not a readable Parquet file" in dry("broken.parquet")


def test_further_pictures_go_out_only_if_asked_for(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": picture(1)}, "mask": {"bytes": picture(2)}, "text": "a"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    protect = ("protect", tmp_path / "rows.parquet", tmp_path / "destination", "--method", FAKE, "--dry-run")
    result = fixative(*protect, "--image-column", "image")
    assert result.code == 2, result
    for words in ("mask hold further pictures, which would go out unprotected", "--other-images drop"):
        assert words in result.error
    for choice in ("drop", "keep"):
        result = fixative(*protect, "--image-column", "image", "--other-images", choice)
        assert (result.code, result.err) == (0, ""), result
    result = fixative(*protect, "--other-images", "show")
    assert (result.code, "'refuse', 'drop' or 'keep'" in result.error) == (2, True)


@pytest.mark.usefixtures("prefect_server")
def test_what_cannot_be_planned_binds_nothing(tmp_path: Path) -> None:
    source, destination = (open_store(str(tmp_path / name), LOCAL) for name in ("source", "destination"))
    fill(source, {"a.parquet": b"PAR1 nothing", "note.txt": b"text"})
    result = fixative("protect", source.url, destination.url, "--method", FAKE)
    assert result.code == 2, result
    assert "a.parquet: not a readable Parquet file" in result.error
    assert not contents(destination)


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("ray_cluster", "prefect_server")
def test_what_is_not_whole_is_not_published(tmp_path: Path) -> None:
    source, destination = (open_store(str(tmp_path / name), LOCAL) for name in ("source", "destination"))
    fill(source, {"a.png": picture(1), "broken.tar": b"no tar", **{f"{i}.png": b"no picture" for i in range(6)}})
    protect = ("protect", source.url, destination.url, "-c")
    config = job_file(tmp_path / "job.yaml", check={"fraction": 0, "min_per_shard": 0})
    unreadable, many = "broken.tar: not a readable plain tar", "6 assets are quarantined, 5 are tolerated"

    def problems(*arguments: object) -> list[str]:
        result = fixative(*protect, config, *arguments)
        assert (result.code, result.err) == (1, ""), result
        return [line for line in result.out.splitlines() if "not complete: " in line or "cannot be read: " in line]

    for words, line in zip((unreadable, unreadable, many), problems(), strict=True):
        assert words in line
    assert len(list(destination.list("manifests/"))) == 1
    assert not any(destination.list("_SUCCESS.json"))
    assert "no run has finished here yet" in fixative("inspect", destination.url).error
    assert "not finished" in fixative("status", destination.url).out
    (line,) = problems("--dry-run")
    assert unreadable in line

    source.delete("broken.tar")
    (line,) = problems()
    assert many in line
    assert not any(destination.list("_SUCCESS.json"))
    document = yaml.safe_load(config.read_text())
    document["run"]["max_quarantine_rows"] = 6
    config.write_text(yaml.safe_dump(document))
    result = fixative(*protect, config)
    assert (result.code, result.err) == (0, ""), result
    assert "this run: 0 units" in result.out
    (manifest,) = finished(destination)
    assert (manifest.rows_ok, manifest.rows_quarantined) == (1, 6)


def test_bound_to_another_configuration(done: tuple[Path, Path]) -> None:
    source, destination = done
    before = contents(open_store(str(destination), LOCAL))
    for options in ([], ["--dry-run"]):
        result = fixative("protect", source, destination, "--method", FAKE, "--eps", "2", "--seed", "7", *options)
        assert result.code == 2, result
        for words in ("method.config.eps_levels: 4.0 -> 2.0", "seed: 0 -> 7", "another destination"):
            assert words in result.error
    assert contents(open_store(str(destination), LOCAL)) == before


# --- Stores


def test_missing_bucket_and_unreachable_endpoint(source: Path, s3_server: S3Server) -> None:
    protect = ("protect", source, "s3://no-such-bucket/x", "--method", FAKE, "--s3-endpoint")
    result = fixative(*protect, s3_server.endpoint_url)
    assert result.code == 2, result
    assert "bucket 'no-such-bucket' does not exist" in result.error
    endpoint = f"http://127.0.0.1:{free_port()}"
    begin = time.monotonic()
    result = fixative(*protect, endpoint)
    assert time.monotonic() - begin < 30
    assert result.code == 2, result
    assert f"cannot reach {endpoint}" in result.error
    assert "--s3-endpoint" in result.error


@pytest.fixture
def checked_signatures(s3_server: S3Server, s3_bucket: str) -> Iterator[None]:
    """The S3 server checks who asks, which it does not by default; the bucket is there already."""

    def allow(requests: bytes) -> None:
        url = f"{s3_server.endpoint_url}/moto-api/reset-auth"
        request = urllib.request.Request(url, data=requests, headers={"Content-Type": "text/plain"})
        urllib.request.urlopen(request, timeout=10).close()

    allow(b"0")
    yield
    allow(b"inf")


@pytest.mark.usefixtures("checked_signatures")
def test_wrong_and_missing_credentials(
    source: Path, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    protect = ("protect", source, f"s3://{s3_bucket}/x", "--method", FAKE, "--s3-endpoint", s3_server.endpoint_url)
    result = fixative(*protect)
    assert result.code == 2, result
    assert f"credentials for s3://{s3_bucket}/x were refused" in result.error
    assert "AWS_PROFILE" in result.error
    assert "testing" not in result.error
    result = fixative(*protect, "--s3-profile", "nobody")
    assert (result.code, "--s3-profile" in result.error) == (2, True)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    result = fixative(*protect)
    assert (result.code, "no usable S3 credentials" in result.error) == (2, True)


def test_secrets_in_urls_are_refused_and_not_shown(source: Path) -> None:
    for options in (["s3://AKIA:hunter2@bucket/x"], ["s3://bucket/x", "--s3-endpoint", "http://AKIA:hunter2@host"]):
        result = fixative("protect", source, *options, "--method", FAKE)
        assert result.code == 2, result
        assert "credentials in" in result.error
        assert "hunter2" not in result.out + result.err


@pytest.mark.usefixtures("prefect_server")
def test_store_without_conditional_writes(source: Path, s3_bucket: str, s3_proxy: S3Proxy) -> None:
    s3_proxy.rule = lambda method, path, headers: Verdict(unconditional=True)
    protect = ("protect", source, f"s3://{s3_bucket}/x", "--method", FAKE, "--s3-endpoint", s3_proxy.endpoint_url)
    result = fixative(*protect)
    assert result.code == 2, result
    assert "ignores create-only writes" in result.error
    assert "--single-writer" in result.error
    assert not contents(open_store(f"s3://{s3_bucket}/x", s3_proxy.options))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("ray_cluster", "prefect_server")
def test_a_single_writer_needs_no_conditional_writes(source: Path, s3_bucket: str, s3_proxy: S3Proxy) -> None:
    s3_proxy.rule = lambda method, path, headers: Verdict(unconditional=True)
    protect = ("protect", source, f"s3://{s3_bucket}/x", "--method", FAKE, "--s3-endpoint", s3_proxy.endpoint_url)
    assert fixative(*protect, "--single-writer", "--actors", 1).code == 0
    assert fixative("inspect", f"s3://{s3_bucket}/x", "--s3-endpoint", s3_proxy.endpoint_url).code == 0


# --- Help, plan, precedence


def test_help_of_every_command() -> None:
    overview = fixative("--help")
    assert overview.code == 0
    for name in ("protect", "status", "inspect", "methods", "demo"):
        assert name in overview.out
        page = fixative(name, "--help")
        assert (page.code, page.err) == (0, "")
        assert "Usage: " in page.out
    options = fixative("protect", "--help").out
    for name in ("--dry-run", "--method", "--eps", "--single-writer", "--s3-endpoint", "FIXATIVE_EPS"):
        assert name in options


def test_dry_run_shows_the_plan_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = fixative("protect", source, tmp_path / "destination", "--dry-run", "-c", job_file(tmp_path / "job.yaml"))
    assert (result.code, result.err) == (0, ""), result
    assert "1 shards, 2 units, 3 assets; 3 still to protect" in result.out
    assert not (tmp_path / "destination").exists()
    result = fixative("protect", source, tmp_path / "destination", "--dry-run", "--set", "steps=2")
    assert (result.code, result.err) == (0, ""), result
    assert "estimate:" in result.out
    assert "s per image on one" in result.out
    assert not (tmp_path / "destination").exists()


def test_options_win_over_environment_over_file_over_default(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eps(*options: object) -> str:
        result = fixative("protect", source, tmp_path / "destination", "--method", FAKE, "--dry-run", *options)
        assert result.code == 0, result
        return result.out.partition("'eps_levels': ")[2].partition(",")[0]

    assert eps() == "4.0"
    config = job_file(tmp_path / "job.yaml", method={"eps": 5})
    assert eps("-c", config) == "5.0"
    monkeypatch.setenv("FIXATIVE_EPS", "6")
    assert eps("-c", config) == "6.0"
    assert eps("-c", config, "--eps", "7") == "7.0"


def test_methods_are_listed_and_shown_with_their_presets() -> None:
    result = fixative("methods")
    assert (result.code, result.err) == (0, "")
    for words in ("photoguard", "antipure", "pixel", "paper, fast, strong", "fixative methods NAME"):
        assert words in result.out
    one = fixative("methods", "mist")
    assert (one.code, one.err) == (0, "")
    for words in ("https://arxiv.org/abs/2305.12683", "Presets of mist", "eps_levels", "16.0"):
        assert words in one.out
    wrong = fixative("methods", "mits")
    assert wrong.code == 2
    assert "did you mean 'mist'" in wrong.err


# --- Looking at destinations


def test_status_and_inspect_of_a_finished_destination(done: tuple[Path, Path]) -> None:
    _, destination = done
    status = fixative("status", destination)
    assert (status.code, status.err) == (0, ""), status
    for words in (f"{destination}: finished", "current", "1 DecodeError", "1.png: decode:"):
        assert words in status.out
    result = fixative("inspect", destination)
    assert (result.code, result.err) == (0, ""), result
    assert "every hash was computed again" in result.out
    (row,) = json.loads(fixative("inspect", destination, "r", "--json").out)
    assert (row["asset_id"], row["status"], row["eps_levels"]) == ("r", "protected", 4.0)
    (row,) = json.loads(fixative("inspect", destination, "1.png", "--json").out)
    assert (row["status"], row["stage"]) == ("quarantined", "decode")
    result = fixative("inspect", destination, "nobody")
    assert result.code == 2
    assert "no asset 'nobody'" in result.error


def test_status_and_inspect_of_others(done: tuple[Path, Path], tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(done[1], unfinished)
    (unfinished / "_SUCCESS.json").unlink()
    next((unfinished / "manifests").iterdir()).unlink()
    status = fixative("status", unfinished)
    assert status.code == 0, status
    for words in ("not finished", "open", "current"):
        assert words in status.out
    result = fixative("inspect", unfinished)
    assert (result.code, "no run has finished here yet" in result.error) == (2, True)
    for command in ("status", "inspect"):
        assert fixative(command, tmp_path / "absent").code == 2
    assert "is no destination of Fixative" in fixative("status", done[0]).error


@pytest.mark.parametrize("kind", ["data", "quarantine", "manifests"])
def test_a_flipped_byte_is_found_and_its_key_named(kind: str, done: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(done[1], damaged)
    file = next((damaged / kind).iterdir())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    result = fixative("inspect", damaged)
    assert result.code == 1, result
    assert f"{kind}/{file.name}" in result.error


# --- What it hands to others


def test_lineage_of_a_run(done: tuple[Path, Path], tmp_path: Path) -> None:
    source, destination = done
    lines = (source.parent / "events.jsonl").read_text().splitlines()
    start, complete = map(json.loads, lines[:2])
    assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
    assert [item["name"] for item in complete["outputs"]] == [str(destination)]
    assert complete["outputs"][0]["outputFacets"]["outputStatistics"]["rowCount"] == 3
    (manifest, _) = finished(open_store(str(destination), LOCAL))
    assert complete["run"]["facets"]["fixative"]["fixativeRunId"] == manifest.run_id
    protect = ("protect", source, tmp_path / "other", "--method", FAKE, "--dry-run", "--lineage")
    assert "lineage events go to https://lineage.example" in fixative(*protect, "https://lineage.example").out
    result = fixative(*protect, "https://me:secret@lineage.example")
    assert (result.code, "OPENLINEAGE_API_KEY" in result.error, "secret" in result.error) == (2, True, False)


def test_export_of_a_finished_destination(done: tuple[Path, Path], tmp_path: Path) -> None:
    destination = done[1]
    images = tmp_path / "images"
    export = ("export", destination, "--to", "files", "--out", images)
    result = fixative(*export, "--dry-run")
    assert (result.code, images.exists()) == (0, False)
    assert "would export 3 images" in result.out
    result = fixative(*export)
    assert (result.code, result.err) == (0, ""), result
    assert {str(path.relative_to(images)) for path in images.rglob("*.png")} == {"0.png", "2.png", "r.png"}
    for words in ("exported 3 images", "3 new", "1 assets are quarantined", "1.png: decode:"):
        assert words in result.out
    (images / "0.png").write_bytes(b"something else")
    result = fixative(*export)
    assert (result.code, "not exported" in result.out, "--replace" in result.out) == (1, True, True)
    told = json.loads(fixative(*export, "--replace", "--json").out)
    assert (told["replaced"], told["present"], told["quarantined"][0]["asset_id"]) == (1, 2, "1.png")
    result = fixative("export", destination, "--to", "webdataset", "--out", tmp_path / "tars")
    assert (result.code, len(list((tmp_path / "tars").glob("shard-*.tar")))) == (0, 2)


def test_exports_that_cannot_be(done: tuple[Path, Path], tmp_path: Path) -> None:
    source, destination = done
    for arguments, words in (
        ((source, "--to", "files", "--out", tmp_path / "out"), "no run has finished here yet"),
        ((destination, "--to", "files", "--out", destination / "images"), "overlap"),
        ((destination, "--to", "files", "--out", "nowhere://out"), "nowhere"),
    ):
        result = fixative("export", *arguments)
        assert (result.code, words in result.error) == (2, True), result
    assert fixative("export", destination, "--to", "zip", "--out", tmp_path).code == 2
    assert fixative("export", destination, "--to", "files").code == 2
