"""The pictures of a verification: kept on this machine, put into its own page; what is public goes to Prefect.

Pictures of originals never leave the machine and folder that ``--out`` names. Prefect stores artifacts in its own
database, which may be a hosted one: it gets pictures that anybody can make from the published archive, and no others.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from prefect.artifacts import create_image_artifact

from flows.progress import observer
from pipeline.ids import sha256_hex
from pipeline.verify.difference import AMPLIFIED, difference
from pipeline.verify.html import Strip
from pipeline.verify.trial import TrialResult

STRIPS = 12  # groups and images that the local report shows
PUBLIC = ("protected", "drawn from protected")
"""How the labels of pictures begin that follow from protected images alone; a difference would give originals away."""
ABOUT = "about.json"
THUMBNAIL = 96  # pixels of height in the artifact: it lies in a database


def keep(result: TrialResult, pictures: Path) -> None:
    """Every trial leaves a folder, whole or not at all, within that of its group or image."""
    shard_id, name = result.key.split("/")[-2:]
    folder = pictures / sha256_hex(f"{shard_id}|{result.title}")[:16]  # titles are customers' names
    folder.mkdir(parents=True, exist_ok=True)
    unfinished, own = pictures.with_name(f"{pictures.name}.unfinished"), folder / name.removesuffix(".json")
    for old in (unfinished, own):  # what a run left that was killed, and what an earlier one kept of this trial
        if old.exists():
            shutil.rmtree(old)
    unfinished.mkdir()
    about = {"title": result.title, "unit": result.unit, "shard_id": shard_id, "row": result.row}
    (unfinished / ABOUT).write_text(json.dumps(about), encoding="utf-8")
    for label, data in result.pictures.items():
        (unfinished / f"{label}.png").write_bytes(data)
    unfinished.rename(own)


def kept_trials(pictures: Path) -> int:
    """Number of trials whose pictures are on this machine."""
    return len([path for path in pictures.glob("*/*") if path.is_dir()])


def read_strips(pictures: Path) -> list[Strip]:
    """One strip per group or edited image, from the folders that trials left; folders that cannot be read are named."""
    strips: list[Strip] = []
    for folder in sorted(pictures.iterdir()) if pictures.is_dir() else []:
        if len(strips) == STRIPS or not any(folder.iterdir()):  # empty: a run was killed before its first trial
            continue
        try:
            strips.append(_strip(folder))
        except (OSError, ValueError, TypeError) as error:  # no file or no picture, no JSON, other fields
            observer().note(f"left out of the page: the pictures in {folder} cannot be read ({error})")
    return strips


def _strip(folder: Path) -> Strip:
    found = {file.stem: _whole(file) for file in sorted(folder.glob("*/*.png"), key=_place)}
    if "original" in found and "protected" in found:
        changed = {f"difference x{AMPLIFIED}": _difference(found["original"], found["protected"])}
        first = {name: found.pop(name) for name in ("original", "protected")}
        found = first | changed | found
    about = sorted(folder.glob(f"*/{ABOUT}"))
    if not about:
        raise FileNotFoundError(f"no {ABOUT}")
    return Strip(**json.loads(about[0].read_text(encoding="utf-8")), pictures=found)  # they are equal


def _whole(file: Path) -> bytes:
    """The bytes of a picture file, decoded once to see that none are missing."""
    data = file.read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
    return data


def _place(file: Path) -> tuple[bool, str]:
    return file.stem.startswith("drawn"), file.stem


def _difference(left: bytes, right: bytes) -> bytes:
    """The amplified change, as PNG."""
    one, other = (np.asarray(Image.open(io.BytesIO(data))) for data in (left, right))
    file = io.BytesIO()
    Image.fromarray(difference(one, other)).save(file, "PNG")
    return file.getvalue()


def publish_strip(strips: Sequence[Strip]) -> None:
    """Creates a Prefect artifact of one group or image: the protected pictures and what the attacker makes of them.

    Names of assets and subjects stay out of it, and so does everything that an original was used for.
    """
    for strip in strips:
        shown = {label: data for label, data in strip.pictures.items() if label.startswith(PUBLIC)}
        if shown:
            create_image_artifact(
                key="verify-pictures",
                image_url="data:image/jpeg;base64," + base64.b64encode(side_by_side(list(shown.values()))).decode(),
                description="From left to right: " + "; ".join(shown),
            )
            return


def side_by_side(pictures: Sequence[bytes]) -> bytes:
    """Pictures of any size as one JPEG, scaled to one height."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
    images = [image.resize((max(1, THUMBNAIL * image.width // image.height), THUMBNAIL)) for image in images]
    sheet = Image.new("RGB", (sum(image.width for image in images), THUMBNAIL))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=85)
    return file.getvalue()
