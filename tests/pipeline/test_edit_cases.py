"""Folders of edit cases: what loads, what is refused with which reason, and that one bad folder costs no other."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.decode import DecodeLimits
from pipeline.errors import UserError
from pipeline.verify.editors.base import Edit
from pipeline.verify.editors.cases import EditCase, load_cases
from pipeline.verify.editors.drawn_cases import drawing, write_case_set

ORDER = ("disc-on-stripes", "square-on-diagonals", "triangle-on-waves", "hexagon-on-slope", "pentagon-on-bars")


def png(side: int = 24, level: int = 100) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (level, level // 2, 10)).save(out, "PNG")
    return out.getvalue()


def write_case(root: Path, name: str, **files: bytes | str) -> Path:
    """A case folder; by default one PNG and a prompt. Double underscores in file names stand for dots."""
    folder = root / name
    folder.mkdir(parents=True)
    for file, content in ({"image__png": png(), "prompt__txt": "a dog"} | files).items():
        data = content.encode() if isinstance(content, str) else content
        if data != b"absent":
            (folder / file.replace("__", ".")).write_bytes(data)
    return folder


def pixels(case: EditCase) -> np.ndarray:
    return case.image.permute(1, 2, 0).numpy()


def reason(root: Path) -> str:
    """Why the only case of this root is refused."""
    result = load_cases(root)
    assert not result.cases
    return result.refused[0].reason


def test_our_own_set_comes_back_as_drawn(tmp_path: Path) -> None:
    write_case_set(tmp_path)
    result = load_cases(tmp_path)
    assert not result.refused
    cases = {case.id: case for case in result.cases}
    assert len(cases) == 6
    for number, name in enumerate(ORDER):
        expected, actual = np.asarray(drawing(number)), pixels(cases[name])
        assert actual.shape == expected.shape
        difference = np.abs(actual.astype(int) - expected)
        if number == 3:  # the JPEG; lying on its side it would be far off
            assert difference.mean() < 3
        elif number == 4:  # the grey one
            assert np.array_equal(actual, np.asarray(drawing(number).convert("L").convert("RGB")))
        else:
            assert difference.max() == 0
    assert cases["disc-on-dusk"].edit == Edit(target="a photo of a watch")  # byte order mark, Windows line ends
    assert all(case.image.dtype == torch.uint8 for case in result.cases)


def test_broken_folders_are_named_with_their_reason_and_cost_no_other(tmp_path: Path) -> None:
    write_case_set(tmp_path, side=48, broken=True)
    result = load_cases(tmp_path)
    assert len(result.cases) == 6
    reasons = {case.folder: case.reason for case in result.refused}
    assert "is empty" in reasons.pop("broken-empty-prompt")
    assert "no prompt.txt" in reasons.pop("broken-no-prompt")
    assert "image.png, other.png" in reasons.pop("broken-two-images")
    assert "no image" in reasons.pop("broken-no-image")
    assert "truncated" in reasons.pop("broken-half-image")
    assert reasons == {}


def test_the_set_is_never_written_over_another(tmp_path: Path) -> None:
    write_case_set(tmp_path)
    with pytest.raises(FileExistsError):
        write_case_set(tmp_path)
    with pytest.raises(ValueError, match="at least 32"):
        write_case_set(tmp_path / "small", side=31)


@pytest.mark.parametrize("prompt", ["a dog", "\ufeffa dog", "a dog\r\n", "  a dog \t\n\n", "\n\na dog"])
def test_prompts_lose_their_wrapping_only(tmp_path: Path, prompt: str) -> None:
    write_case(tmp_path, "case", prompt__txt=prompt)
    assert load_cases(tmp_path).cases[0].edit.target == "a dog"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("\ufeff", "empty"),
        ("a dog\na cat", "2 lines"),
        ("a dog".encode("utf-16"), "not UTF-8"),
        (b"a dog \xe9", "not UTF-8"),
    ],
)
def test_unclear_prompts_are_refused(tmp_path: Path, prompt: str | bytes, expected: str) -> None:
    write_case(tmp_path, "case", prompt__txt=prompt)
    assert expected in reason(tmp_path)


def test_prompt_file_in_another_case(tmp_path: Path) -> None:
    write_case(tmp_path, "case", prompt__txt="absent", Prompt__TXT="a dog")
    assert load_cases(tmp_path).cases[0].edit.target == "a dog"
    (tmp_path / "case" / "prompt.txt").write_text("a cat")
    assert "several prompts" in reason(tmp_path)


def test_equal_file_names_in_several_cases(tmp_path: Path) -> None:
    for number in range(3):
        write_case(tmp_path, f"case-{number}", image__png=png(level=50 + number))
    result = load_cases(tmp_path)
    assert [case.id for case in result.cases] == ["case-0", "case-1", "case-2"]
    assert [int(case.image[0, 0, 0]) for case in result.cases] == [50, 51, 52]


def test_folders_that_differ_in_case_alone_get_ids_that_do_not(tmp_path: Path) -> None:
    for name in ("Cat", "cat", "dog", "caf\u00e9", "cafe\u0301"):
        write_case(tmp_path, name)
    ids = [case.id for case in load_cases(tmp_path).cases]
    assert len({name.casefold() for name in ids}) == 5
    assert "dog" in ids
    assert "cat" not in ids
    (tmp_path / "another").mkdir()
    assert set(ids) == {case.id for case in load_cases(tmp_path).cases}  # ids do not depend on position


def test_content_decides_what_an_image_is(tmp_path: Path) -> None:
    write_case(tmp_path, "case", image__png="absent", photo__dat=png(), notes__md="a note", Thumbs__db=b"\xd0\xcf\x11")
    assert load_cases(tmp_path).cases[0].image.shape == (3, 24, 24)


def test_a_text_named_as_image_is_no_case(tmp_path: Path) -> None:
    write_case(tmp_path, "case", image__png="not a picture")
    assert "image.png" in reason(tmp_path)


def test_hidden_and_nested_files_do_not_count(tmp_path: Path) -> None:
    folder = write_case(tmp_path, "case")
    (folder / "._image.png").write_bytes(png())
    (folder / "more").mkdir()
    (folder / "more" / "image.png").write_bytes(png())
    write_case(tmp_path, ".hidden")
    (tmp_path / "loose.png").write_bytes(png())
    result = load_cases(tmp_path)
    assert [case.id for case in result.cases] == ["case"]
    assert not result.refused


def test_a_decompression_bomb_is_refused_unopened(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    write_case(tmp_path, "bomb", image__png=b"\x89PNG\r\n\x1a\n" + chunk + png()[33:])
    assert "decompression bomb" in reason(tmp_path)


def test_limits_are_the_callers(tmp_path: Path) -> None:
    write_case(tmp_path, "case")
    assert "max_pixels" in load_cases(tmp_path, limits=DecodeLimits(max_pixels=100)).refused[0].reason


def test_a_dangling_link_is_no_prompt(tmp_path: Path) -> None:
    folder = write_case(tmp_path, "case")
    (folder / "prompt.txt").unlink()
    (folder / "prompt.txt").symlink_to(folder / "gone")
    assert "no prompt.txt" in reason(tmp_path)


def test_roots_without_cases(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        load_cases(tmp_path / "absent")
    with pytest.raises(UserError, match="no case folders"):
        load_cases(tmp_path)
