"""What a checkpoint is: its defining files by name and content, wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path


def folder_digest(folder: Path) -> str:
    """SHA-256 over the sorted relative names and contents of all JSON, text and safetensors files of a checkpoint."""
    total = hashlib.sha256()
    files = {file.relative_to(folder).as_posix(): file for kind in ("json", "txt", "safetensors")
             for file in folder.rglob(f"*.{kind}")}  # fmt: skip
    for name, file in sorted(files.items()):
        with file.open("rb") as stream:
            total.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
