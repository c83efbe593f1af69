"""Options that several commands have, and the panels that ``--help`` puts options into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import UserError

ARCHIVE, METHOD, OUTPUT, RUN, STORE = "Archive", "Method", "Output and check", "How it runs", "S3"
PROVENANCE = "Rights and provenance (texts: job.provenance of the job file)"


def option(*names: str, panel: str, help: str) -> Any:
    """An option that an environment variable FIXATIVE_NAME can give as well."""
    envvar = "FIXATIVE_" + names[0].lstrip("-").upper().replace("-", "_")
    shown = help.replace("[default", "\\[default")  # else rich takes it for a style, and nobody sees it
    return typer.Option(*names, rich_help_panel=panel, help=shown, envvar=envvar)


def metric_option(beside: str) -> Any:
    """The option --metric of a command; beside: what it takes besides folders that all commands know."""
    return typer.Option(
        "--metric",
        help="A further metric, its weights from this machine; repeatable. dino=FOLDER, clip=FOLDER (of transformers), "
        f"lpips=FOLDER (AlexNet as one safetensors file), {beside}",
    )


Metrics = Annotated[list[str] | None, metric_option("or faces (pip install 'fixative\\[faces]').")]


def metrics_asked(given: Sequence[str] | None) -> dict[str, str]:
    """--metric options as a mapping: folder by name, "installed" where none is given.

    Raises:
        UserError: a name is given twice.
    """
    asked: dict[str, str] = {}
    for name, _, folder in (text.partition("=") for text in given or ()):
        if name in asked:
            raise UserError(f"--metric {name} is given twice: name one")
        asked[name] = folder or "installed"
    return asked


SubjectColumn = Annotated[
    str | None,
    option(
        "--subject-column",
        panel=METHOD,
        help="Names each image's subject, for methods that train on all of it; sort the archive by it.",
    ),
]
Lineage = Annotated[
    str | None,
    option(
        "--lineage",
        panel=RUN,
        help="OpenLineage events to file:///... or http(s)://host. [default: where OPENLINEAGE_URL says]",
    ),
]
SingleWriter = Annotated[
    bool | None,
    option("--single-writer", panel=RUN, help="Stores without conditional writes: only one run at a time."),
]
Mining = Annotated[
    str | None,
    option(
        "--data-mining",
        panel=PROVENANCE,
        help="plus:DataMining for images without: none, unspecified, allowed, prohibited, or prohibited- with "
        "ai-training, generative-ai-training or except-search-indexing. [default: prohibited-ai-training]",
    ),
]
Certificate = Annotated[
    str | None,
    option(
        "--certificate",
        panel=PROVENANCE,
        help="Sign Content Credentials (C2PA) with this PEM chain, the signer first (pip install 'fixative\\[c2pa]').",
    ),
]
Key = Annotated[str | None, option("--key", panel=PROVENANCE, help="PEM file with its private key.")]
Trust = Annotated[
    Path | None,
    typer.Option("--trust", help="PEM file of authorities: signatures must be by someone whom they vouch for."),
]
S3Endpoint = Annotated[str | None, option("--s3-endpoint", panel=STORE, help="URL of an S3 service other than AWS.")]
S3Region = Annotated[str | None, option("--s3-region", panel=STORE, help="Region.")]
S3Profile = Annotated[
    str | None, option("--s3-profile", panel=STORE, help="Profile of ~/.aws; else the usual AWS variables or role.")
]
