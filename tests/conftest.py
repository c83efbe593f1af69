"""Fixtures that every test folder may use: an S3 server in a process of its own, and no way to real AWS."""

from __future__ import annotations

import http.client
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import flows  # noqa: F401 - sets what Ray and Prefect read when they are imported
from pipeline.storage import StorageOptions


@dataclass(frozen=True)
class S3Server:
    """An S3 endpoint on this machine, and how a store reaches it."""

    endpoint_url: str

    @property
    def options(self) -> StorageOptions:
        return StorageOptions(endpoint_url=self.endpoint_url, region="us-east-1", part_bytes=5 * 2**20)


def free_port() -> int:
    """A loopback port on which nothing listens right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that need a Ray cluster, however they come by it."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session", autouse=True)
def no_real_aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hides the developer's AWS settings and sets fake credentials, for this process and its children."""
    absent = tmp_path_factory.mktemp("aws") / "absent"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", str(absent))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(absent))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory, no_real_aws: None) -> Iterator[S3Server]:
    """A moto server process for the whole session; it keeps its objects in memory."""
    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "moto.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            server = S3Server(f"http://127.0.0.1:{port}")
            _wait_until_up(server, process, log)
            yield server
        finally:
            process.terminate()


def make_bucket(server: S3Server) -> str:
    """Creates a bucket and returns its name."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{server.endpoint_url}/{name}", method="PUT")
    with urllib.request.urlopen(request, timeout=10):
        return name


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> str:
    """The name of a fresh, empty bucket."""
    return make_bucket(s3_server)


@pytest.fixture
def s3_proxy(s3_server: S3Server) -> Iterator[S3Proxy]:
    """A faulty network in front of the S3 server; set its ``rule``."""
    proxy = S3Proxy(s3_server.endpoint_url)
    thread = threading.Thread(target=proxy.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: more cost more than they give on tiny models, and other tests may share the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_cluster(no_real_aws: None) -> Iterator[str]:
    """One local Ray for all tests that run a job in this process; the address at which other processes join it."""
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # as the command does where it starts a cluster
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # tests of metrics need not wait for ten seconds
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, handler)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """One Prefect server for all flows of this process; its URL, for flows of others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_LOGGING_LEVEL", "CRITICAL")  # as the command sets it
        from prefect.settings import PREFECT_API_URL
        from prefect.testing.utilities import prefect_test_harness

        with prefect_test_harness(server_startup_timeout=120):
            yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def prefect_home(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands in processes of their own keep Prefect's database: a copy, since it takes long to build."""
    from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL as URL

    home = tmp_path_factory.mktemp("prefect")
    built = str(URL.value()).partition("///")[2]
    with closing(sqlite3.connect(built)) as source, closing(sqlite3.connect(home / "prefect.db")) as copy:
        source.backup(copy)
    return home


@dataclass(frozen=True)
class Verdict:
    """What the proxy does to one request; the default passes it on."""

    # Answer with this status and S3 error code instead of asking the server.
    refuse: tuple[int, str] | None = None
    # Drop If-Match and If-None-Match, as stores do that do not know them.
    unconditional: bool = False
    # Send only this much of the server's answer, then close the connection. 0: not even the status.
    answer_bytes: int | None = None


class S3Proxy(S3Server):
    """Forwards requests as ``rule(method, path, headers)`` says; every request is counted in ``seen``."""

    def __init__(self, upstream: str) -> None:
        address = urlsplit(upstream).netloc
        self.rule: Callable[[str, str, Message], Verdict] = lambda method, path, headers: Verdict()
        self.seen: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, address))
        super().__init__(f"http://127.0.0.1:{self.server.server_address[1]}")

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the base is frozen; the rule is meant to be set


def _handler(proxy: S3Proxy, upstream: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client may be dead by now
                super().handle()

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            proxy.seen.append(f"{self.command} {self.path}")
            verdict = proxy.rule(self.command, self.path, self.headers)
            if verdict.refuse:
                status, code = verdict.refuse
                self.reply(status, {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
                return
            dropped = {"expect", "if-match", "if-none-match"} if verdict.unconditional else {"expect"}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            connection = http.client.HTTPConnection(upstream, timeout=30)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            self.reply(answer.status, dict(answer.getheaders()), content, verdict.answer_bytes)
            connection.close()

        def reply(self, status: int, headers: dict[str, str], content: bytes, limit: int | None = None) -> None:
            if limit != 0:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content[:limit])
            self.close_connection = limit is not None

        def log_message(self, format: str, *args: object) -> None:
            """Keeps test output free of requests."""

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

    return Handler


def _wait_until_up(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{server.endpoint_url}/moto-api/", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"moto did not start: {log.read_text()}")
