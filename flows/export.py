"""``fixative export``: images back out of a protected archive, as files or as WebDataset tars."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from flows import show
from flows.options import RUN, S3Endpoint, S3Profile, S3Region, option
from flows.progress import observer, shown_on
from pipeline.config import S3Settings

app = typer.Typer()
console = show.terminal()


class Form(StrEnum):
    """What an archive can be exported as."""

    files = "files"
    webdataset = "webdataset"


@app.command("export")
def export(
    destination: Annotated[str, typer.Argument(help="Folder or s3:// prefix that holds results.")],
    to: Annotated[Form, typer.Option("--to", help="files: under their original names; webdataset: tars with JSON.")],
    out: Annotated[str, typer.Option("--out", help="Folder, s3:// prefix or other fsspec URL to write to.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Write over files that hold other bytes, e.g. of an earlier version.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at both sides and count, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    single_writer: Annotated[
        bool, option("--single-writer", panel=RUN, help="Stores without conditional writes: only one export at a time.")
    ] = False,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Write the protected images of a finished archive as plain files, or as WebDataset tars.

    Only what published manifests list. Run it again to go on after a stop, or after the archive has grown: images
    that are there with the right bytes are left alone. Ends with 1 if an image could not be exported.

    Example: fixative export s3://stock-protected/2026 --to files --out images/
    """
    from pipeline.export import Options, rows_to_export, summary
    from pipeline.export import export as write_out
    from pipeline.job import storage_options
    from pipeline.storage import open_store

    s3 = storage_options(S3Settings(endpoint_url=s3_endpoint, region=s3_region, profile=s3_profile))
    store, target = open_store(destination, s3), open_store(out, s3, single_writer=single_writer)
    options = Options(form=to.value, replace=replace, dry_run=dry_run)
    if as_json:
        result = write_out(store, target, options)
        console.print_json(json.dumps(asdict(result)))
    else:
        with shown_on(console):
            observer().step("export", rows_to_export(store))
            result = write_out(store, target, options, observer().advance)
        for line in summary(result):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    raise typer.Exit(1 if result.problems else 0)
