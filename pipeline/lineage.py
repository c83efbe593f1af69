"""Tells a lineage service what a run reads and writes: OpenLineage run events, into a file or over HTTP.

Where to: ``run.lineage``, else OpenLineage's own variables (OPENLINEAGE_URL, OPENLINEAGE_CONFIG,
OPENLINEAGE__TRANSPORT__*). Lineage that cannot be delivered is a warning; it fails no run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.config import JobConfig
from pipeline.errors import PipelineError, UserError
from pipeline.job import Job, code_version
from pipeline.manifest import Manifest
from pipeline.plan import Plan, plan_columns
from pipeline.schema import data_schema
from pipeline.storage import local_path, public_url, url_scheme

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient
    from openlineage.client.event_v2 import RunEvent

INSTALL = "pip install 'fixative[lineage]'"
_VARIABLES = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE__TRANSPORT", "OPENLINEAGE__TRANSPORT__TYPE")
_TRIES = 2  # beside the first; a service that is down costs a run about two seconds
_LONGEST_MESSAGE = 2_000

Warn = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a run came to."""

    job: Job
    plan: Plan
    # Every shard of the plan that is committed, by this run or an earlier one.
    manifests: Sequence[Manifest]


def lineage_target(config: JobConfig) -> str | None:
    """Where events go, in words; None: nowhere."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        return None
    if config.run.lineage is not None:
        return config.run.lineage
    names = [name for name in _VARIABLES if os.environ.get(name)]
    return f"where {names[0]} says" if names else None


def check_lineage(config: JobConfig) -> None:
    """Raises UserError if the job asks for lineage and the package that sends it is missing."""
    if config.run.lineage is not None and find_spec("openlineage") is None:
        raise UserError(f"run.lineage needs the package openlineage-python: {INSTALL}")


@contextmanager
def lineage(config: JobConfig, warn: Warn) -> Iterator[Callable[[Written], None]]:
    """Sends START now, and COMPLETE, FAIL or ABORT as the block ends; the block tells what it wrote.

    Args:
        config: The job.
        warn: Told, in one line, that an event could not be delivered.
    """
    written: list[Written] = []
    sender = _Sender(config, warn)
    sender.send("START")
    try:
        yield written.append
    except Exception as error:
        sender.send("FAIL", error=error)
        raise
    except BaseException as error:  # cancelled or interrupted
        sender.send("ABORT", error=error)
        raise
    else:
        sender.send("COMPLETE", written=written[-1] if written else None)
    finally:
        sender.close()


class _Sender:
    """Holds what the events of one run share. Sends nothing where nobody asked for it."""

    def __init__(self, config: JobConfig, warn: Warn) -> None:
        self.config, self.warn = config, warn
        self.client: OpenLineageClient | None = None
        if lineage_target(config) is not None:
            self._guarded(self._connect)

    def send(self, kind: str, *, written: Written | None = None, error: BaseException | None = None) -> None:
        client = self.client
        if client is not None:
            self._guarded(lambda: client.emit(self._event(kind, written, error)))

    def close(self) -> None:
        if self.client is not None:
            self._guarded(self.client.close)

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - every transport raises classes of its own, and none is worth a run
            self.warn(f"lineage was not delivered: {type(error).__name__}: {public_url(str(error))[:300]}")

    def _connect(self) -> None:
        if find_spec("openlineage") is None:  # only a variable asks for it; a setting is checked before the run
            raise UserError(f"the package openlineage-python is missing: {INSTALL}")
        from openlineage.client import OpenLineageClient
        from openlineage.client.uuid import generate_new_uuid

        self.run_id = str(generate_new_uuid())
        target = self.config.run.lineage
        self.client = OpenLineageClient(transport=_transport(target)) if target else OpenLineageClient()

    def _event(self, kind: str, written: Written | None, error: BaseException | None) -> RunEvent:
        from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import error_message_run, job_type_job, processing_engine_run, set_producer

        producer = f"urn:fixative:{code_version()}"
        set_producer(producer)
        facets: dict[str, Any] = {
            "processing_engine": processing_engine_run.ProcessingEngineRunFacet(version=version("ray"), name="ray")
        }
        if error is not None:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
                message=_message(error), programmingLanguage="PYTHON"
            )
        if written is not None:
            facets["fixative"] = _run_facet(written)
        source, destination = _dataset(self.config.source), _dataset(self.config.destination)
        return RunEvent(
            eventType=RunState[kind],
            eventTime=datetime.now(UTC).isoformat(),
            producer=producer,
            run=Run(runId=self.run_id, facets=facets),
            job=Job(
                namespace=os.environ.get("OPENLINEAGE_NAMESPACE", "default"),
                name=f"fixative.protect {'/'.join(destination)}",
                facets={"jobType": job_type_job.JobTypeJobFacet(processingType="BATCH", integration="FIXATIVE")},
            ),
            inputs=[InputDataset(*source, inputFacets=_input_facets(written))],
            outputs=[OutputDataset(*destination, outputFacets=_output_facets(written), facets=_schema_facets(written))],
        )


def _transport(target: str) -> Any:
    """The transport of a setting; an API key comes from the environment, as for every OpenLineage client."""
    from openlineage.client.transport.file import FileConfig, FileTransport
    from openlineage.client.transport.http import HttpConfig, HttpTransport

    parts = urlsplit(target)
    if parts.scheme == "file":
        file = Path(local_path(target))
        file.parent.mkdir(parents=True, exist_ok=True)
        return FileTransport(FileConfig(log_file_path=str(file), append=True))
    key = os.environ.get("OPENLINEAGE_API_KEY")
    endpoint = parts.path.lstrip("/") or os.environ.get("OPENLINEAGE_ENDPOINT", "api/v1/lineage")
    settings: dict[str, Any] = {
        "url": f"{parts.scheme}://{parts.netloc}",
        "endpoint": endpoint,
        "retry": {"total": _TRIES, "connect": _TRIES, "read": _TRIES},
        "auth": {"type": "api_key", "apiKey": key} if key else {},
    }
    return HttpTransport(HttpConfig.from_dict(settings))


def _dataset(url: str) -> tuple[str, str]:
    """Namespace and name of a place, as OpenLineage's naming specification has them."""
    scheme = url_scheme(url)
    if scheme in ("file", "local"):
        return "file", local_path(url)
    host, _, path = public_url(url).partition("://")[2].partition("/")
    return f"{'s3' if scheme == 's3a' else scheme}://{host}", path.strip("/") or "/"


def _message(error: BaseException) -> str:
    """What failed. Texts of errors that are not ours may hold anything, so they stay here."""
    text = str(error) if isinstance(error, PipelineError) else type(error).__name__
    return public_url(text)[:_LONGEST_MESSAGE]


def _committed_now(written: Written) -> list[Manifest]:
    return [manifest for manifest in written.manifests if manifest.run_id == written.job.run_id]


def _input_facets(written: Written | None) -> dict[str, Any]:
    from openlineage.client.facet_v2 import input_statistics_input_dataset

    if written is None:
        return {}
    shards = _committed_now(written)
    statistics = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(
        rowCount=sum(shard.rows_in for shard in shards), size=sum(shard.source["size"] for shard in shards)
    )
    return {"inputStatistics": statistics}


def _output_facets(written: Written | None) -> dict[str, Any]:
    from openlineage.client.facet_v2 import output_statistics_output_dataset

    if written is None:
        return {}
    files = [shard.data for shard in _committed_now(written) if shard.data is not None]
    statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        rowCount=sum(item["rows"] for item in files),
        size=sum(item["size"] for item in files),
        fileCount=len(files),
    )
    return {"outputStatistics": statistics}


def _schema_facets(written: Written | None) -> dict[str, Any]:
    from openlineage.client.facet_v2 import schema_dataset

    if written is None or not written.plan.shards:
        return {}
    columns = data_schema(plan_columns(written.plan, written.plan.shards[-1]), {})
    fields = [schema_dataset.SchemaDatasetFacetFields(name=c.name, type=str(c.type)) for c in columns]
    return {"schema": schema_dataset.SchemaDatasetFacet(fields=fields)}


def _run_facet(written: Written) -> Any:
    from openlineage.client.facet_v2 import RunFacet

    job, now = written.job, _committed_now(written)
    return RunFacet().with_additional_properties(
        fixativeRunId=job.run_id,
        codeVersion=code_version(),
        method=job.config.job.method.name,
        methodVersion=job.protector_version,
        modelDigest=job.model_digest,
        configFingerprint=job.config_fp,
        assets=written.plan.rows,
        protected=sum(shard.rows_ok for shard in now),
        quarantined=sum(shard.rows_quarantined for shard in now),
    )
