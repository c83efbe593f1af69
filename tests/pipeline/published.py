"""A small published archive of every kind of source, for tests that only read it."""

from __future__ import annotations

from pathlib import Path

from tests.pipeline.archives import photo, photos, write_folder, write_parquet, write_tar
from tests.pipeline.local_job import Outcome, job_config, run_job

FILES = {
    "a/one.png": photo(1),
    "a/two.jpg": photo(2),  # a PNG under a wrong name, as archives have them
    "b/Äpfel am Baum.png": photo(3),
    "b/broken.png": b"no",
}
CAPTIONS = ["first", "second", "third"]
MEMBERS = [("x.png", photo(8)), ("x.txt", b"caption"), ("deep/y.v2.png", photo(9)), ("deep/y.v2.txt", b"another")]


def published(root: Path) -> Outcome:
    """Protects four files (one of them broken), two Parquet shards with and without ids, and a tar into root/out."""
    source = write_folder(root / "in", FILES)
    ids = {"asset_id": ["cats/1.jpg", "../../up.png", "CON"], "caption": CAPTIONS}
    write_parquet(source / "c" / "ids.parquet", photos(3, 20), ids)
    write_parquet(source / "c" / "plain.parquet", photos(2, 30), {"caption": ["fourth", None]})
    write_tar(source / "d.tar", MEMBERS)
    return run_job(job_config(source, root / "out", archive={"unit_assets": 2}))
