"""The files of a verification that people read."""

from __future__ import annotations

from pipeline.compare.files import replaced
from pipeline.storage import json_bytes
from pipeline.verify_model import pictures, report
from pipeline.verify_model.results import Findings
from pipeline.verify_model.store import Results


def write_files(found: Findings, results: Results) -> list[str]:
    """Writes tables and pictures into the folder of results, each whole or not at all; returns their names."""
    texts = {
        "verification.json": json_bytes(report.document(found)),
        "verification.md": report.markdown(found).encode(),
    }
    results.folder.mkdir(parents=True, exist_ok=True)
    for name, data in texts.items():
        with replaced(results.folder / name) as file:
            file.write_bytes(data)
    with replaced(results.folder / "verification.png") as file:
        pictures.plot(found, file)
    with replaced(results.folder / "sheet.png") as file:
        pictures.sheet(found, results, file)
    return [*texts, "verification.png", "sheet.png"]
