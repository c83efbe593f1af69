"""A cluster of three nodes, each with its own raylet and address on this machine; one is lost while it is at work.

1. A process without the cluster's token is refused, in one line.
2. The run ends well without the lost node: every asset is there once, logical hashes are those of an undisturbed run,
   and only what was at work on the node is computed again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.manifest import rows_of
from pipeline.storage import StorageOptions, open_store
from tests.conftest import free_port
from tests.e2e.archives import fill, marked_pictures
from tests.e2e.command import FAKE, finished, job_file, meaning, running, starts, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]
RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 3}
UNITS = 6
START_S = 600  # nodes are slow to come up on a busy machine


@dataclass(frozen=True)
class Node:
    """A ``ray start`` process."""

    process: subprocess.Popen[bytes]
    ip: str

    def raylet(self) -> psutil.Process:
        """Its raylet, the parent of its workers."""
        (found,) = (
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.name() == "raylet" and f"--node_ip_address={self.ip}" in child.cmdline()
        )
        return found

    def protects(self) -> bool:
        """Whether an actor on it is at work; idle ones have another title."""
        return any(child.name() == "ray::MapWorker(MapBatches(Protect)).submit" for child in self.raylet().children())


@contextmanager
def node(log: Path, ip: str, *arguments: str) -> Iterator[Node]:
    """Starts a node and waits until it is there; it is gone with all of its processes in the end."""
    command = [RAY, "start", "--block", f"--node-ip-address={ip}", "--object-store-memory=100000000", *arguments]
    environment = {**os.environ, **TOKEN, "RAY_raylet_start_wait_time_s": str(START_S)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        until(lambda: b"Ray runtime started" in log.read_bytes() or process.poll() is not None, f"node {ip}", START_S)
        assert process.poll() is None, log.read_text()
        yield Node(process, ip)
    finally:
        members = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in members:
            member.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, no_real_aws: None) -> Iterator[tuple[str, list[Node]]]:
    """Address of a cluster with a head of one core and two workers of two, and the workers."""
    logs, port = tmp_path_factory.mktemp("ray"), free_port()
    # Short: the paths of Ray's sockets lie below it.
    address, folder = f"127.0.0.2:{port}", f"/tmp/ray-{port}"
    head = ("--head", f"--port={port}", f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}")
    join = ("--num-cpus=2", f"--address={address}")
    with (
        node(logs / "head", "127.0.0.2", "--num-cpus=1", "--include-dashboard=false", *head),
        node(logs / "first", "127.0.0.3", *join) as first,
        node(logs / "second", "127.0.0.4", *join) as second,
    ):
        yield address, [first, second]
    shutil.rmtree(folder, ignore_errors=True)


def test_a_run_goes_on_without_a_lost_node(
    cluster: tuple[str, list[Node]], prefect_server: str, prefect_home: Path, tmp_path: Path
) -> None:
    address, workers = cluster
    source, whole, hurt = (open_store(str(tmp_path / name), StorageOptions()) for name in ("source", "whole", "hurt"))
    fill(source, marked_pictures())
    slow = {"method": {"name": FAKE, "overrides": {"sleep_s": 5.0}}, "check": {"fraction": 0, "min_per_shard": 0}}
    config = job_file(tmp_path / "job.yaml", **slow)
    options = ("-c", config, "--actors", 2, "--ray-address", address)
    environment = {"PREFECT_API_URL": prefect_server, **TOKEN}

    refused = {**environment, "RAY_AUTH_TOKEN": "f" * 48}
    with running("protect", source.url, whole.url, *options, home=prefect_home, environment=refused) as command:
        result = command.wait(START_S)
    assert result.code == 2, result
    assert "RAY_AUTH_TOKEN" in result.error

    with running("protect", source.url, whole.url, *options, home=prefect_home, environment=environment) as command:
        begun = time.monotonic()
        result = command.wait(START_S)
        undisturbed_s = time.monotonic() - begun
    assert result.code == 0, result

    with running("protect", source.url, hurt.url, *options, home=prefect_home, environment=environment) as command:
        begun = time.monotonic()
        until(lambda: starts(hurt) or command.process.poll() is not None, "a unit to begin", START_S)
        assert command.process.poll() is None, command.wait(10)
        lost = until(lambda: next((worker for worker in workers if worker.protects()), None), "an actor at work")
        before = sum(1 for _ in hurt.list("parts/"))
        lost.raylet().kill()
        result = command.wait(START_S)
        took_s = time.monotonic() - begun
    assert result.code == 0, result
    again = sum(starts(hurt).values()) - UNITS
    print(f"node {lost.ip} lost with {before} parts stored; {again} of {UNITS} units again; "
          f"{took_s:.0f} s, undisturbed {undisturbed_s:.0f} s")  # fmt: skip
    manifests = finished(hurt)
    assert meaning(manifests) == meaning(finished(whole))
    ids = Counter(row["asset_id"] for item in manifests for row in rows_of(hurt, item, ["asset_id"]))
    assert ids == Counter(list(marked_pictures()))
    assert 1 <= again <= 2
