"""The files of a comparison that people read, and the folder that may hold them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.compare import pictures, report
from pipeline.compare.results import Findings
from pipeline.compare.store import Results
from pipeline.errors import UserError
from pipeline.plan import BINDING_KEY
from pipeline.storage import json_bytes
from protectors.model_files import MODEL_INDEX


def check_folder(folder: Path) -> None:
    """Refuses a folder in which pictures of originals would lie beside what is published.

    Raises:
        UserError: it is a protected archive or a model, or within one.
    """
    place = folder.resolve()
    for parent in (place, *place.parents):
        for mark, what in ((BINDING_KEY, "a protected archive"), (MODEL_INDEX, "a model")):
            if (parent / mark).exists():
                raise UserError(f"--out {folder} lies within {parent}, {what}: it would show originals there")


def write_files(found: Findings, results: Results) -> list[str]:
    """Writes tables and pictures into the folder of results, each whole or not at all.

    Returns:
        Their names. There is no sheet of pictures where every method has failed.
    """
    texts = {
        "comparison.json": json_bytes(report.document(found)),
        "comparison.csv": report.flat(found).encode(),
        "comparison.md": report.markdown(found).encode(),
    }
    results.folder.mkdir(parents=True, exist_ok=True)
    for name, data in texts.items():
        with replaced(results.folder / name) as file:
            file.write_bytes(data)
    with replaced(results.folder / "comparison.png") as file:
        pictures.plot(found, file)
    if all(row.failed is not None for row in found.rows):
        return [*texts, "comparison.png"]
    with replaced(results.folder / "sheet.png") as file:
        pictures.sheet(found, results, file)
    return [*texts, "comparison.png", "sheet.png"]


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A path to write to: what lies there in the end takes the place of the file at once."""
    new = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        yield new
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
