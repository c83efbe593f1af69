"""File names for images that leave the tables: the original's, made safe, each given once."""

from __future__ import annotations

import sqlite3
import unicodedata
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pipeline.ids import sha256_hex
from pipeline.manifest import Manifest
from pipeline.shard_index import IMAGE_SUFFIXES

SUFFIXES = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "WEBP": (".webp",)}
"""By the format of the stored bytes; an image that has one of them keeps it, else it gets the first."""

_FORBIDDEN = frozenset('<>:"|?*\\')  # no file system holds all of them
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))})
_LONGEST = 200  # bytes of one part of a path; file systems take 255, and a mark or suffix may follow


def source_name(row: Mapping[str, Any], manifest: Manifest) -> str:
    """Where an asset lay below the root of its archive: ``a/b.jpg``, ``c.tar#b.jpg``, ``c.parquet#000012``."""
    root = str(manifest.source["uri"]).removesuffix(str(manifest.source["key"]))
    return str(row["source_uri"]).removeprefix(root)


def source_key(name: str, manifest: Manifest) -> str:
    """The source object that a name from ``source_name`` lies in; a file is its own."""
    return name if manifest.source["kind"] == "files" else str(manifest.source["key"])


def image_name(row: Mapping[str, Any], manifest: Manifest) -> str:
    """The wanted path of a protected image: as the customer named it, with the suffix of its format.

    A member of a tar, and a row of a Parquet file without ids, lies in a folder of the shard's name.

    Args:
        row: Holds asset_id, source_uri and format.
        manifest: The row's.
    """
    name, key = source_name(row, manifest), str(manifest.source["key"])
    if manifest.source["kind"] != "files":
        given = str(row["asset_id"])
        if manifest.source["kind"] == "tar" or given == name:
            folder = PurePosixPath(key)
            stem = folder.name.partition(".")[0] or folder.name
            name = str(folder.with_name(stem) / name.removeprefix(f"{key}#").lstrip("/"))
        else:
            name = given
    return safe_path(_with_suffix(name, str(row["format"])))


def safe_path(name: str) -> str:
    """A relative path that stays below its root and that every file system can hold. Equal for equal names."""
    parts = [_safe_part(part) for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join(parts) or "_"


def marked(path: str, mark: str) -> str:
    """The path with a mark before its suffix."""
    whole = PurePosixPath(path)
    return str(whole.with_name(f"{whole.stem}-{mark}{whole.suffix}"))


class Names:
    """Gives every path once, also where file systems tell no case. Held on disk: archives may be large."""

    def __init__(self) -> None:
        self._given = sqlite3.connect("")  # a temporary file without a name
        self._given.execute("CREATE TABLE given (name TEXT PRIMARY KEY) WITHOUT ROWID")

    def close(self) -> None:
        """Drops what was given."""
        self._given.close()

    def give(self, path: str, owner: str) -> str:
        """The path itself, or with a mark that follows from its owner where another has it.

        Who asks first gets the plain path, so ask in one order always.
        """
        chosen, attempt = path, 0
        while not self._free(chosen):
            chosen = marked(path, sha256_hex(f"{owner}|{attempt}" if attempt else owner)[:8])
            attempt += 1
        return chosen

    def _free(self, path: str) -> bool:
        folded = unicodedata.normalize("NFC", path).casefold()
        return self._given.execute("INSERT OR IGNORE INTO given VALUES (?)", (folded,)).rowcount == 1


def _with_suffix(name: str, format: str) -> str:
    allowed = SUFFIXES[format]
    stem, dot, suffix = name.rpartition(".")
    known = f".{suffix.lower()}" if dot and stem and not stem.endswith("/") else ""
    if known in allowed:
        return name
    return (stem if known in IMAGE_SUFFIXES else name) + allowed[0]


def _safe_part(part: str) -> str:
    clean = "".join("_" if c in _FORBIDDEN or not c.isprintable() else c for c in part)
    clean = clean.rstrip(". ") or "_"
    if clean.startswith(".") or clean.partition(".")[0].lower() in _DEVICES:
        clean = f"_{clean}"
    if len(clean.encode()) <= _LONGEST:
        return clean
    stem, dot, suffix = clean.rpartition(".")
    suffix = f"{dot}{suffix}" if dot and len(suffix) <= 5 else ""
    kept = (stem if suffix else clean).encode()[: _LONGEST - 16].decode(errors="ignore")
    return f"{kept}-{sha256_hex(part)[:8]}{suffix}"
