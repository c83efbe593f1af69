"""SIGKILL to every process of a run (driver, Ray, actors), then the same command again.

The proxy in front of S3 holds the write at which the run is to die, so that each point is exact and nothing in
the program knows of it. After the rerun, at every point:

1. no asset is missing and none is there twice; every hash holds;
2. the logical hashes are those of an undisturbed run;
3. only units that were begun and not stored are computed again: at most two per actor while these are at work
   (units that wait for a slow store come on top).
"""

from __future__ import annotations

import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable
from email.message import Message
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pytest

from pipeline.manifest import rows_of
from pipeline.storage import Store, open_store
from tests.conftest import S3Proxy, S3Server, Verdict, make_bucket
from tests.e2e.archives import fill, marked_pictures
from tests.e2e.command import finished, fixative, job_file, meaning, running, starts, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "prefect_server"), pytest.mark.timeout(480)]
ACTORS = 2
UNITS = 6
# Slow enough that both actors are within a unit when the run dies.
METHOD = {"method": {"name": "protectors.fake:FakeProtector", "overrides": {"sleep_s": 0.4}}}
NO_CHECK = {"check": {"fraction": 0, "min_per_shard": 0}}


class Hold:
    """A rule of the proxy: holds the first matching PUT for ever, and every later write with it."""

    def __init__(self, matches: Callable[[str], bool]) -> None:
        self.matches = matches
        self.reached = threading.Event()
        self.released = threading.Event()

    def __call__(self, method: str, path: str, headers: Message) -> Verdict:
        key = urllib.parse.unquote(urllib.parse.urlsplit(path).path).partition("/protected/")[2]
        if method == "PUT" and (self.reached.is_set() or self.matches(key)):
            self.reached.set()
            self.released.wait()
            return Verdict(refuse=(503, "SlowDown"))
        return Verdict()


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    """A bucket with the archive of twelve pictures, six units."""
    url = f"s3://{make_bucket(s3_server)}"
    fill(open_store(f"{url}/originals", s3_server.options), marked_pictures())
    return url


@pytest.fixture(scope="module")
def undisturbed(bucket: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Logical hashes of a run that nobody kills."""
    destination = f"{bucket}/undisturbed"
    config = job_file(tmp_path_factory.mktemp("job") / "job.yaml", **METHOD, **NO_CHECK)
    result = fixative(*_protect(bucket, destination, config, s3_server, actors=1))
    assert result.code == 0, result
    return meaning(finished(open_store(destination, s3_server.options)))


def _protect(bucket: str, destination: str, config: Path, server: S3Server, actors: int = ACTORS) -> list[object]:
    return [
        *("protect", f"{bucket}/originals", destination, "-c", config),
        *("--actors", actors, "--s3-endpoint", server.endpoint_url),
    ]


@pytest.mark.parametrize(
    ("died", "left"),
    [
        # What is in the store when the run dies: optimizer starts, parts, data files, manifests.
        pytest.param("attempts/*", (0, 0, 0, 0), marks=pytest.mark.slow),
        # Beside every change a run dies in its optimizer by SIGTERM only (test_workers.py): time is short there.
        pytest.param("mid optimizer", (range(1, 2 * ACTORS + 1), 0, 0, 0), marks=pytest.mark.slow),
        pytest.param("second part", (range(2, UNITS + 1), range(1, 3), 0, 0), marks=pytest.mark.slow),
        pytest.param("data/*", (UNITS, UNITS, 0, 0), marks=pytest.mark.slow),
        ("manifests/*", (UNITS, UNITS, 1, 0)),
        pytest.param("_SUCCESS.json", (UNITS, UNITS, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_resume_after_kill(
    died: str,
    left: tuple[int | range, ...],
    bucket: str,
    undisturbed: dict[str, str],
    s3_server: S3Server,
    s3_proxy: S3Proxy,
    prefect_server: str,
    prefect_home: Path,
    tmp_path: Path,
) -> None:
    name = f"{bucket}/{''.join(filter(str.isalpha, died)).lower()}/protected"
    destination = open_store(name, s3_server.options)
    config = job_file(tmp_path / "job.yaml", **METHOD, **NO_CHECK)
    hold = Hold(_point(died, destination))
    s3_proxy.rule = hold
    arguments, shared = _protect(bucket, name, config, s3_proxy), {"PREFECT_API_URL": prefect_server}
    with running(*arguments, home=prefect_home, environment=shared) as command:
        try:
            begun = partial(starts, destination) if died == "mid optimizer" else hold.reached.is_set
            until(lambda: begun() or command.process.poll() is not None, died, 150)
            assert command.process.poll() is None, command.wait(1)
            command.kill()
        finally:
            hold.released.set()
    before = starts(destination)
    stored = _count(destination, "parts/")
    found = (sum(before.values()), stored, _count(destination, "data/"), _count(destination, "manifests/"))
    assert all(n in w if isinstance(w, range) else n == w for n, w in zip(found, left, strict=True)), found

    result = fixative(*_protect(bucket, name, config, s3_server))
    assert result.code == 0, result
    manifests = finished(destination)
    ids = Counter(row["asset_id"] for item in manifests for row in rows_of(destination, item, ["asset_id"]))
    assert ids == Counter(list(marked_pictures()))
    assert meaning(manifests) == undisturbed
    assert fixative("inspect", name, "--s3-endpoint", s3_server.endpoint_url).code == 0
    recomputed = sum(starts(destination).values()) - UNITS
    print(f"{died}: {found} left, {recomputed} of {UNITS} units computed again")
    assert recomputed == sum(before.values()) - stored


def _point(died: str, destination: Store) -> Callable[[str], bool]:
    """Which write is held."""
    if died == "mid optimizer":
        return lambda key: fnmatchcase(key, "parts/*")  # dies as soon as a unit has begun; no part may get in
    if died == "second part":
        return lambda key: fnmatchcase(key, "parts/*") and _count(destination, "parts/") > 0
    return lambda key: fnmatchcase(key, died)


def _count(store: Store, prefix: str) -> int:
    return sum(1 for _ in store.list(prefix))
