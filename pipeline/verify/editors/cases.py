"""Edit cases on disk: one folder per case with one image and its `prompt.txt`, as the Defense-Edit set has them."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.decode import DecodeLimits, decode, model_view
from pipeline.errors import DecodeError, UserError
from pipeline.verify.editors.base import Edit

PROMPT_FILE = "prompt.txt"
# A file of such a name is meant to be an image, whatever is in it; any other counts if it decodes as one.
_IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_LIMITS = DecodeLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class EditCase:
    """One image and what is wanted of it.

    Attributes:
        id: the folder's name, unique without regard to case; where several folders differ in case alone, each has
            eight digits of its name's SHA-256 added.
        image: uint8 `(3, H, W)`, sRGB, upright, without its alpha.
        edit: the target is the prompt; such sets have no source.
    """

    id: str
    image: Tensor
    edit: Edit


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedCase:
    """A folder that is no case, and why."""

    folder: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSet:
    """Everything that a root holds; each folder is in exactly one of the two, in the order of their names."""

    cases: Sequence[EditCase]
    refused: Sequence[RefusedCase]


class CaseError(ValueError):
    """This folder is no case; the others may be."""


def load_cases(root: Path, *, limits: DecodeLimits = _LIMITS) -> CaseSet:
    """Reads `root/<case>/{image, prompt.txt}` into memory.

    What an image is goes by its content, not by its name. Loose files in the root, hidden files and folders, folders
    inside a case, and files that are neither image nor prompt are ignored.

    Args:
        root: folder of the case folders.
        limits: of the images.

    Raises:
        UserError: there is no such folder, or no case folder in it.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder; name the folder that holds the case folders")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not _hidden(path))
    if not folders:
        raise UserError(f"{root} holds no case folders; each has one image and {PROMPT_FILE}")
    names = _unique_ids([folder.name for folder in folders])
    cases, refused = [], []
    for folder, name in zip(folders, names, strict=True):
        try:
            cases.append(EditCase(id=name, image=_read_image(folder, limits), edit=Edit(target=_read_prompt(folder))))
        except (CaseError, OSError) as error:
            refused.append(RefusedCase(folder=folder.name, reason=str(error)))
    return CaseSet(cases=cases, refused=refused)


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not _hidden(path))


def _is_prompt(path: Path) -> bool:
    return path.name.casefold() == PROMPT_FILE


def _unique_ids(names: Sequence[str]) -> list[str]:
    """Ids that may name files on any file system, where case and Unicode's forms may not count."""
    folded = [unicodedata.normalize("NFC", name).casefold() for name in names]
    count = Counter(folded)
    return [
        name if count[key] == 1 else f"{name}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"
        for name, key in zip(names, folded, strict=True)
    ]


def _read_prompt(folder: Path) -> str:
    files = [path for path in _files(folder) if _is_prompt(path)]
    if len(files) != 1:
        found = ", ".join(path.name for path in files)
        raise CaseError(f"several prompts: {found}; keep one" if files else f"no {PROMPT_FILE}")
    try:
        text = files[0].read_bytes().decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise CaseError(f"{files[0].name} is not UTF-8 ({error}); save it as such") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != 1:
        reason = f"has {len(lines)} lines; make a case of each" if lines else "is empty"
        raise CaseError(f"{files[0].name} {reason}")
    return lines[0]


def _read_image(folder: Path, limits: DecodeLimits) -> Tensor:
    found: dict[str, Tensor | DecodeError] = {}
    for path in _files(folder):
        if _is_prompt(path):
            continue
        try:
            pixels = model_view(decode(path.read_bytes(), limits=limits))
            found[path.name] = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
        except DecodeError as error:
            if path.suffix.casefold() in _IMAGE_SUFFIXES:
                found[path.name] = error
    if len(found) != 1:
        raise CaseError(f"several images: {', '.join(found)}; keep one" if found else "no image")
    name, image = next(iter(found.items()))
    if isinstance(image, DecodeError):
        raise CaseError(f"{name}: {image}") from image
    return image
