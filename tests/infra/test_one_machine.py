"""``infra/README.md``, "One machine", as it is written: from nothing to a schedule whose next run takes only what came.

The page's commands run in one shell, but for the installation and with ports, keys and times of the test. S3 is a moto
server, as the page has it. Contract: 1. the scheduled runs begin every unit once: after two pictures are added and one
is replaced, those three alone; 2. images are signed, lineage is told, Ray's endpoint has the counts, `status` tells
what was replaced; 3. no byte of an original, no thumbnail, key or token is in an object, a log or Prefect's database.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipeline import metrics
from pipeline.storage import Store, open_store
from tests.conftest import S3Server, free_port, make_bucket
from tests.e2e.archives import fill
from tests.e2e.command import FAKE, Command, finished, fixative, running_program, starts, until
from tests.pipeline import images
from tests.pipeline.certificates import Files, make_signer
from tests.pipeline.test_provenance import MARK, RICH_FILES, THUMBNAIL
from tests.pipeline.test_ray_metrics import of, totals

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

README = Path(__file__).parents[2] / "infra" / "README.md"
IP = "127.0.0.6"  # of the Ray head: other clusters of this machine have others
SECRET = "hunter2-secret-key"
WAIT_S = 1200.0
ADDED = {"e.jpg": images.plain("JPEG", height=200, width=300), "f.png": images.plain("PNG", height=200, width=300)}
REPLACED = images.plain("JPEG", height=160, width=240)


def commands() -> str:
    """The first block of the section, without the line that installs."""
    section = README.read_text().partition("## One machine")[2].partition("\n## ")[0]
    install, _, rest = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].partition("\n")
    assert "pip install -c constraints.txt ." in install
    return str(rest)


def swapped(text: str, swaps: dict[str, str]) -> str:
    for old, new in swaps.items():
        assert old in text, f"infra/README.md no longer says {old!r}"
        text = text.replace(old, new)
    return text


@dataclass
class Machine:
    """What runs, and where it leaves what."""

    shell: Command
    folder: Path
    ray: Path
    metrics: str
    api: str
    source: Store
    destination: Store
    signer: Files

    def log(self) -> str:
        return (self.folder / "shell.log").read_text()

    def token(self) -> str:
        """Ray's token, as its processes have it."""
        (token,) = {member.environ().get("RAY_AUTH_TOKEN") for member in self.shell.members()} - {None}
        return str(token)

    def protected(self) -> int:
        """Pictures that the runs protected, as lineage tells it when they end well."""
        assert self.shell.process.poll() is None, self.log()
        file = self.folder / "lineage" / "events.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        ends = [event["run"]["facets"]["fixative"] for event in events if event["eventType"] == "COMPLETE"]
        return sum(facet["protected"] for facet in ends)

    def runs(self) -> list[Any]:
        """Runs that ended well, each begun by the schedule."""
        with temporary_settings({PREFECT_API_URL: self.api}), get_client(sync_client=True) as client:
            ended = [run for run in client.read_flow_runs() if run.state.is_completed()]
        assert all(run.auto_scheduled for run in ended)
        return ended


@pytest.fixture
def machine(s3_server: S3Server, tmp_path: Path) -> Iterator[Machine]:
    signer = make_signer(tmp_path / "signer")
    source, destination = (f"s3://{make_bucket(s3_server)}/2026" for _ in range(2))
    prefect, ray, dashboard, client, exported = (free_port() for _ in range(5))
    temporary = Path(f"/tmp/one-{ray}")  # short: the paths of Ray's sockets lie below it
    document = {
        "source": source,
        "destination": destination,
        "job": {
            "archive": {"unit_assets": 1},
            "method": {"name": FAKE},
            "provenance": {"signer": signer.settings},
        },
        "run": {
            "ray_address": f"{IP}:{ray}",
            "actors": 1,
            "lineage": f"file://{tmp_path}/lineage/events.jsonl",
            "s3": {"endpoint_url": s3_server.endpoint_url, "region": "us-east-1"},
        },
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    api = f"http://127.0.0.1:{prefect}/api"
    head = (
        f"ray start --head --node-ip-address={IP} --port={ray} --ray-client-server-port={client} "
        f"--temp-dir={temporary} --object-store-memory=100000000 --dashboard-port={dashboard}"
    )
    script = swapped(
        commands(),
        {
            "http://127.0.0.1:4200/api": api,
            "AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...": f"AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY={SECRET}",
            "prefect server start": f"prefect server start --port {prefect}",
            "ray start --head": head,
            "--num-cpus=8": "--num-cpus=3",
            "--metrics-export-port=8080": f"--metrics-export-port={exported}",
            '"0 3 * * *"': '"* * * * *"',
        },
    )
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "RAY_raylet_start_wait_time_s": "600",
    }
    line = f"cd {tmp_path}; exec >shell.log 2>&1; {script}"
    options = s3_server.options
    fill(open_store(source, options), RICH_FILES)
    with running_program(["bash", "-c", line], environment) as shell:
        yield Machine(
            shell=shell,
            folder=tmp_path,
            ray=temporary,
            metrics=f"{IP}:{exported}",
            api=api,
            source=open_store(source, options),
            destination=open_store(destination, options),
            signer=signer,
        )
    shutil.rmtree(temporary)


def test_from_nothing_to_a_schedule(machine: Machine, s3_server: S3Server) -> None:
    source, destination = machine.source, machine.destination
    until(lambda: machine.protected() == 4, "the first run", WAIT_S, every_s=2)
    source.replace("a.jpg", REPLACED, etag=source.info("a.jpg").etag)
    fill(source, ADDED)
    until(lambda: machine.protected() == 7, "the next run", WAIT_S, every_s=2)
    until(lambda: len(machine.runs()) > 1, "its end", WAIT_S, every_s=2)
    token = machine.token()

    assert len(starts(destination)) == 7
    assert starts(destination) == dict.fromkeys(starts(destination), 1)
    assert [manifest.rows_ok for manifest in finished(destination)] in ([4, 3], [4, 1, 2], [4, 2, 1])
    told = fixative("status", destination.url, "--s3-endpoint", s3_server.endpoint_url)
    assert "newer version in another shard, which `export` takes: 1" in told.out
    checked = fixative(
        "inspect", destination.url, "--trust", machine.signer.authority, "--s3-endpoint", s3_server.endpoint_url
    )
    assert (checked.code, checked.out.count("signatures agree")) == (0, len(finished(destination))), checked
    until(lambda: of(totals(machine.metrics), metrics.IMAGES_COMMITTED, status="protected") == 7, "the count", WAIT_S)
    _nothing_got_out(machine, token)


def _nothing_got_out(machine: Machine, token: str) -> None:
    machine.shell.kill()
    found = {item.key: machine.destination.get(item.key) for item in machine.destination.list()}
    written = [path for root in (machine.folder, machine.ray) for path in root.rglob("*") if path.is_file()]
    assert {"shell.log", "prefect.db", "events.jsonl", "raylet.out"} <= {path.name for path in written}
    found |= {str(path): path.read_bytes() for path in written if machine.signer.key.parent not in path.parents}
    for key in [key for key in found if key.endswith(".parquet")]:  # some columns are compressed
        rows = pq.read_table(io.BytesIO(found[key])).to_pylist()
        found[f"{key}, decoded"] = b"".join(
            value["bytes"] if isinstance(value, dict) and "bytes" in value else str(value).encode()
            for row in rows
            for value in row.values()
        )
    signing = machine.signer.key.read_bytes().splitlines()[1:-1]
    secrets = [MARK, THUMBNAIL[-60:], SECRET.encode(), token.encode(), *signing]
    for original in (*ADDED.values(), REPLACED):  # behind the header, compressed pixels alone
        secrets += [original[at : at + 32] for at in range(700, len(original) - 32, 499)]
    leaks = [(where, secret[:40]) for where, data in found.items() for secret in secrets if secret in data]
    assert leaks == []
