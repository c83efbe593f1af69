"""Errors that say what to do, stores that break promises, URLs, and the faulty store of the chaos tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from email.message import Message
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from botocore import exceptions as boto
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import AlreadyExists, NotFound, PipelineError, SourceChanged, StorageError, UserError
from pipeline.storage import (
    StorageOptions,
    check_conditional_writes,
    join_url,
    open_store,
    public_url,
    put_json_new,
    same_or_nested,
)
from pipeline.storage_s3 import S3Store, explain
from tests.chaos.faulty_store import FaultyStore, Rule
from tests.conftest import S3Proxy, S3Server, Verdict, free_port

SECRETS = ("testing", "hunter2", "AKIA")


def _one_line(error: PipelineError) -> str:
    text = str(error)
    assert "\n" not in text
    assert not any(secret in text for secret in SECRETS)
    return text


def _client_error(code: str, status: int) -> boto.ClientError:
    answer = {"Error": {"Code": code, "Message": "AKIA hunter2"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (_client_error("InvalidAccessKeyId", 403), UserError, ["refused", "AWS_PROFILE", "--s3-profile"]),
        (_client_error("SignatureDoesNotMatch", 403), UserError, ["refused", "AWS_SECRET_ACCESS_KEY"]),
        (_client_error("ExpiredToken", 400), UserError, ["ExpiredToken", "AWS_PROFILE"]),
        (_client_error("AccessDenied", 403), UserError, ["no permission", "s3:PutObject", "'bkt'"]),
        (_client_error("403", 403), UserError, ["no permission", "--s3-profile"]),
        (_client_error("NoSuchBucket", 404), UserError, ["bucket 'bkt'", "does not exist", "--s3-endpoint"]),
        (_client_error("PermanentRedirect", 301), UserError, ["another region", "--s3-region"]),
        (_client_error("InternalError", 500), StorageError, ["500 InternalError", "s3://bkt/p/key"]),
        (boto.NoCredentialsError(), UserError, ["no usable S3 credentials", "AWS_PROFILE"]),
        (boto.PartialCredentialsError(provider="env", cred_var="x"), UserError, ["no usable S3 credentials"]),
        (boto.ProfileNotFound(profile="x"), UserError, ["profile", "--s3-profile"]),
        (boto.EndpointConnectionError(endpoint_url="x"), StorageError, ["cannot reach", "--s3-endpoint"]),
        (boto.ReadTimeoutError(endpoint_url="x"), StorageError, ["cannot reach", "http://s3.example"]),
        (ValueError("Invalid endpoint: AKIA"), UserError, ["not a valid address", "--s3-endpoint"]),
    ],
)
def test_s3_errors_say_what_to_do(error: Exception, kind: type[PipelineError], words: list[str]) -> None:
    store = S3Store("s3://bkt/p", StorageOptions(endpoint_url="http://s3.example"))
    explained = explain(error, store, "key")
    assert type(explained) is kind
    assert all(word in _one_line(explained) for word in words), str(explained)


def test_missing_bucket(s3_server: S3Server) -> None:
    store = open_store("s3://no-such-bucket/x", s3_server.options)
    calls: list[Callable[[], object]] = [
        lambda: store.put_new("k", b""),
        lambda: store.get("k"),
        lambda: list(store.list()),
        lambda: check_conditional_writes(store),
    ]
    for call in calls:
        with pytest.raises(UserError, match="bucket 'no-such-bucket' does not exist") as caught:
            call()
        assert s3_server.endpoint_url in _one_line(caught.value)


@pytest.fixture
def s3_with_accounts(s3_server: S3Server) -> Iterator[S3Server]:
    """The server while it checks signatures, which it does not by default."""

    def allow(requests: bytes) -> None:
        url = f"{s3_server.endpoint_url}/moto-api/reset-auth"
        request = urllib.request.Request(url, data=requests, headers={"Content-Type": "text/plain"})
        with urllib.request.urlopen(request, timeout=10):
            return

    allow(b"0")
    try:
        yield s3_server
    finally:
        allow(b"inf")


def test_wrong_credentials(s3_bucket: str, s3_with_accounts: S3Server) -> None:
    store = open_store(f"s3://{s3_bucket}", s3_with_accounts.options)
    with pytest.raises(UserError, match=r"refused.*InvalidAccessKeyId.*AWS_PROFILE") as caught:
        store.put_new("k", b"")
    _one_line(caught.value)


def test_no_credentials_and_unknown_profile(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="no usable S3 credentials"):
        open_store("s3://bkt", s3_server.options).put_new("k", b"")
    options = StorageOptions(endpoint_url=s3_server.endpoint_url, profile="nobody")
    with pytest.raises(UserError, match="profile"):
        open_store("s3://bkt", options).get("k")


def test_anonymous_reads_need_no_credentials(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3_server.endpoint_url}/{s3_bucket}/k"
    headers = {"x-amz-acl": "public-read", "Content-Type": "text/plain"}
    public = urllib.request.Request(url, data=b"data", headers=headers, method="PUT")
    urllib.request.urlopen(public, timeout=10).close()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert open_store(f"s3://{s3_bucket}", StorageOptions(s3_server.endpoint_url, anon=True)).get("k") == b"data"


def test_unreachable_endpoint_fails_within_seconds() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    store = open_store("s3://bkt/x", StorageOptions(endpoint_url=endpoint, max_attempts=2))
    begin = time.monotonic()
    with pytest.raises(StorageError, match=f"cannot reach {endpoint}.*--s3-endpoint"):
        store.get("k")
    assert time.monotonic() - begin < 10


def test_secrets_are_refused_and_never_shown() -> None:
    calls: list[Callable[[], object]] = [
        lambda: StorageOptions(endpoint_url="http://AKIA:hunter2@host"),
        lambda: open_store("s3://AKIA:hunter2@bkt/x", StorageOptions()),
        lambda: open_store("http://me:hunter2@host/x", StorageOptions()),
        lambda: open_store("https://host/x?X-Amz-Signature=hunter2", StorageOptions()),
    ]
    for call in calls:
        with pytest.raises(UserError, match="URL") as caught:
            call()
        _one_line(caught.value)
    assert public_url("https://me:hunter2@host/a?X-Amz-Signature=AKIA") == "https://host/a"
    assert public_url("s3://bkt/a?b@c") == "s3://bkt/a?b@c"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("simplecache::https://host/a?sig=AKIA", "simplecache::https://host/a"),
        ("https://host/a?date=12:30&sig=AKIA", "https://host/a"),
        ("HTTPS://host/a?sig=AKIA", "HTTPS://host/a"),
        ("https://host/a?date=12:30&sig=AKIA::https://host/b?sig=AKIA", "https://host/a::https://host/b"),
        ("zip://a.png::https://me:hunter2@host/b.zip?sig=AKIA", "zip://a.png::https://host/b.zip"),
        ("zip://a?b.png::s3://bkt/c.zip", "zip://a?b.png::s3://bkt/c.zip"),
    ],
)
def test_chained_urls_show_no_secrets(url: str, shown: str) -> None:
    assert public_url(url) == shown


@pytest.mark.parametrize("url", ["simplecache::https://host/a?sig=hunter2", "zip://x::https://me:hunter2@host/b.zip"])
def test_secrets_in_chained_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="was given with a password or a query in the URL") as caught:
        open_store(url, StorageOptions())
    _one_line(caught.value)


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match="nonsense"):
        open_store("nonsense://x", StorageOptions())


# --- Stores and networks that break promises


def _is_conditional(headers: Message) -> bool:
    return "If-None-Match" in headers or "If-Match" in headers


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_store_that_ignores_conditions_is_found_out(s3_proxy: S3Proxy, s3_bucket: str, header: str) -> None:
    s3_proxy.rule = lambda method, path, headers: Verdict(unconditional=header in headers)
    with pytest.raises(UserError, match=rf"ignores.*{header}.*--single-writer.*overwrite") as caught:
        check_conditional_writes(open_store(f"s3://{s3_bucket}/x", s3_proxy.options))
    _one_line(caught.value)
    assert list(open_store(f"s3://{s3_bucket}", s3_proxy.options).list()) == []


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_store_that_refuses_conditions_is_named(s3_proxy: S3Proxy, s3_bucket: str, status: int, code: str) -> None:
    s3_proxy.rule = lambda method, path, headers: Verdict(refuse=(status, code) if _is_conditional(headers) else None)
    url = f"s3://{s3_bucket}/x"
    with pytest.raises(UserError, match=rf"{code}.*--single-writer.*overwrite") as caught:
        check_conditional_writes(open_store(url, s3_proxy.options))
    _one_line(caught.value)
    alone = open_store(url, s3_proxy.options, single_writer=True)
    check_conditional_writes(alone)
    etag = alone.put_new("k", b"1").etag
    with pytest.raises(AlreadyExists):
        alone.put_new("k", b"2")
    assert alone.replace("k", b"3", etag=etag).size == 1


def _first(matches: Callable[[str, Message], bool], verdict: Verdict) -> Callable[[str, str, Message], Verdict]:
    """A rule that applies the verdict to the first matching request alone."""
    left = [verdict]
    return lambda method, path, headers: left.pop() if left and matches(method, headers) else Verdict()


def test_lost_answer_over_http_is_recognised_as_own(s3_proxy: S3Proxy, s3_bucket: str) -> None:
    lose = Verdict(answer_bytes=0)
    store = open_store(f"s3://{s3_bucket}", s3_proxy.options)
    s3_proxy.rule = _first(lambda method, headers: method == "PUT", lose)
    assert put_json_new(store, "m.json", {"writer_id": "me"}) == (True, {"writer_id": "me"})
    assert s3_proxy.seen == [f"PUT /{s3_bucket}/m.json"] * 2 + [f"GET /{s3_bucket}/m.json"]
    s3_proxy.rule = _first(lambda method, headers: method == "PUT", lose)
    with pytest.raises(AlreadyExists):
        store.put_new("k", b"data")


def test_broken_off_body_is_read_again(s3_proxy: S3Proxy, s3_bucket: str) -> None:
    store = open_store(f"s3://{s3_bucket}", s3_proxy.options)
    etag = store.put_new("k", b"0123456789" * 1000).etag
    s3_proxy.rule = _first(lambda method, headers: method == "GET", Verdict(answer_bytes=500))
    assert store.get("k", start=5, etag=etag) == (b"0123456789" * 1000)[5:]


def test_server_error_is_retried(s3_proxy: S3Proxy, s3_bucket: str) -> None:
    store = open_store(f"s3://{s3_bucket}", s3_proxy.options)
    for status, code in [(500, "InternalError"), (503, "SlowDown")]:
        s3_proxy.rule = _first(lambda method, headers: method == "PUT", Verdict(refuse=(status, code)))
        store.put_new(code, b"")


def test_conflict_is_tried_again_and_then_decided(s3_proxy: S3Proxy, s3_bucket: str) -> None:
    store = open_store(f"s3://{s3_bucket}", s3_proxy.options)
    conflict = Verdict(refuse=(409, "ConditionalRequestConflict"))
    s3_proxy.rule = _first(lambda method, headers: _is_conditional(headers), conflict)
    etag = store.put_new("k", b"1").etag
    s3_proxy.rule = _first(lambda method, headers: _is_conditional(headers), conflict)
    store.replace("k", b"2", etag=etag)
    s3_proxy.rule = _first(lambda method, headers: _is_conditional(headers), conflict)
    with pytest.raises(AlreadyExists):
        store.put_new("k", b"3")
    assert store.get("k") == b"2"


def test_failed_part_leaves_no_upload_behind(s3_proxy: S3Proxy, s3_bucket: str, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes(12_000_000))
    store = open_store(f"s3://{s3_bucket}", s3_proxy.options)
    s3_proxy.rule = lambda method, path, headers: Verdict(refuse=(400, "BadDigest") if "partNumber=2" in path else None)
    with pytest.raises(StorageError, match="BadDigest"):
        store.put_new_file("big", big)
    with pytest.raises(NotFound):
        store.info("big")
    with urllib.request.urlopen(f"{s3_proxy.endpoint_url}/{s3_bucket}?uploads", timeout=10) as answer:
        assert b"<UploadId>" not in answer.read()


# --- Other fsspec URLs


class QuietFileHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Keeps test output free of requests."""


def test_zip_is_readable_and_refuses_writes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/b.txt", "hello")
        archive.writestr("c.txt", "")
    store = pickle.loads(pickle.dumps(open_store(f"zip://::file://{tmp_path}/x.zip", StorageOptions())))
    infos = list(store.list())
    assert [(info.key, info.size) for info in infos] == [("a/b.txt", 5), ("c.txt", 0)]
    assert infos[0] == store.info("a/b.txt")
    assert store.get("a/b.txt", start=1, length=3, etag=infos[0].etag) == b"ell"
    with store.open("a/b.txt") as file:
        assert file.seek(4) == 4
        assert file.read() == b"o"
    with pytest.raises(SourceChanged):
        store.get("a/b.txt", etag="other")
    with pytest.raises(NotFound):
        store.get("none")
    with pytest.raises(UserError, match="--single-writer"):
        store.put_new("k", b"")
    with pytest.raises(UserError, match="--single-writer"):
        check_conditional_writes(store)


def test_web_folder_is_readable(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.txt").write_bytes(b"hello")
    (tmp_path / "a b.txt").write_bytes(b"")
    handler = partial(QuietFileHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        store = open_store(f"http://127.0.0.1:{server.server_address[1]}/", StorageOptions())
        infos = list(store.list())
        assert [(info.key, info.size) for info in infos] == [("a%20b.txt", 0), ("sub/x.txt", 5)]
        assert store.get("sub/x.txt", etag=infos[1].etag) == b"hello"
        with pytest.raises(NotFound):
            store.info("none")
        server.shutdown()
        thread.join()


def test_memory_as_single_writer() -> None:
    store = open_store("memory://test-storage/x", StorageOptions(), single_writer=True)
    check_conditional_writes(store)
    info = store.put_new("a/b", b"1")
    assert list(store.list()) == list(store.list("a/")) == [info]
    with pytest.raises(AlreadyExists):
        store.put_new("a/b", b"2")
    changed = store.replace("a/b", b"3", etag=info.etag)
    assert store.get("a/b", etag=changed.etag) == b"3"
    with pytest.raises(SourceChanged):
        store.get("a/b", etag=info.etag)
    store.delete("a/b")
    store.delete("a/b")
    assert list(store.list()) == []


# --- URLs

NAMES = st.text("ab.-_ü ", min_size=1, max_size=3).filter(lambda name: name.strip(". ") == name)
PATHS = st.lists(NAMES, max_size=3).map("/".join)
ROOTS = st.sampled_from(["s3://bkt", "s3a://bkt", "s3://other", "file:///no-such", "/no-such", "no-such", "gs://bkt"])
URLS = st.builds(join_url, ROOTS, PATHS)


@given(URLS, URLS)
def test_same_or_nested_is_symmetric(a: str, b: str) -> None:
    assert same_or_nested(a, a)
    assert same_or_nested(a, f"{a}/")
    assert same_or_nested(a, b) == same_or_nested(b, a) == same_or_nested(f"{a}/", b)


@given(URLS, NAMES, NAMES)
def test_same_or_nested_knows_children_and_siblings(base: str, one: str, other: str) -> None:
    assert same_or_nested(base, join_url(base, one))
    assert same_or_nested(join_url(base, one), join_url(base, other)) == (one == other)


def test_same_or_nested_knows_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert same_or_nested("real", f"file://{tmp_path}/real/")
    assert same_or_nested("link/out", str(tmp_path / "real"))
    assert same_or_nested("./real/../real", "real/x/../y")
    assert not same_or_nested("real", "real2")
    assert same_or_nested("s3://bkt/a/", "s3a://bkt/a/b")
    assert same_or_nested("s3://bkt", "s3://bkt/a")
    assert not same_or_nested("s3://bkt/a", "s3://bkt/ab")
    assert not same_or_nested("s3://bkt/real", "real")


def test_join_url() -> None:
    assert join_url("s3://bkt/", "a/b") == join_url("s3://bkt", "a", "b") == "s3://bkt/a/b"
    assert join_url("/", "a") == "/a"
    assert join_url("s3://bkt") == "s3://bkt"


# --- The faulty store


def _write_three(store: FaultyStore) -> None:
    for number in range(3):
        store.put_new(f"parts/{number}", b"")


@pytest.mark.parametrize(("when", "left"), [("before", ["parts/0"]), ("after", ["parts/0", "parts/1"])])
def test_faulty_store_kills_once(tmp_path: Path, when: str, left: list[str]) -> None:
    inner = open_store(str(tmp_path / "root"), StorageOptions())
    rule = Rule("kill", "parts/*", when, nth=2, once=str(tmp_path / "fired"))  # type: ignore[arg-type]
    store = pickle.loads(pickle.dumps(FaultyStore(inner, [rule])))
    process = multiprocessing.get_context("fork").Process(target=_write_three, args=(store,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert [info.key for info in store.list()] == left
    store.put_new("parts/8", b"")
    store.put_new("parts/9", b"")
    assert os.path.exists(tmp_path / "fired")


def test_faulty_store_fails_after_the_write_took_effect(tmp_path: Path) -> None:
    store = FaultyStore(open_store(str(tmp_path), StorageOptions()), [Rule("fail", "m*", "after", nth=None)])
    store.put_new("other", b"")
    for key in ("m1", "m2"):
        with pytest.raises(StorageError, match="injected"):
            store.put_new(key, b"data")
        assert store.get(key) == b"data"
