"""Small files of every odd kind that archives hold, made on the spot."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

JPEG_SIGNATURE = b"\xff\xd8\xff"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
    'xmlns:xmpGImg="http://ns.adobe.com/xap/1.0/g/img/" rdf:about="" xmp:Rating="4"><dc:rights>© Zoë</dc:rights>{extra}'
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
XMP_THUMBNAIL = (
    "<xmp:Thumbnails><rdf:Alt><rdf:li><xmpGImg:format>JPEG</xmpGImg:format><xmpGImg:image>/9j/4AAQSkZJRg"
    "</xmpGImg:image></rdf:li></rdf:Alt></xmp:Thumbnails>"
)


def samples(height: int = 40, width: int = 56, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth gradients with mild noise: uint8 (height, width, channels)."""
    rng = np.random.default_rng(seed)
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
    smooth = 128 + 90 * np.sin(x / 9 + c) * np.cos(y / 7 + 2 * c)
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def picture(mode: str = "RGB", height: int = 40, width: int = 56) -> Image.Image:
    return Image.fromarray(samples(height, width)).convert(mode)


def plain(format: str, mode: str = "RGB", height: int = 40, width: int = 56, **options: Any) -> bytes:
    lossless = {"lossless": True, "exact": True} if format == "WEBP" else {}
    return save(picture(mode, height, width), format, **lossless, **options)


def rgba_png(format: str = "PNG") -> bytes:
    """Colours under transparent alpha included, which careless encoders throw away."""
    four = samples(channels=4)
    four[:20, :, 3] = 0
    return save(Image.fromarray(four), format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))


def grey_alpha_png() -> bytes:
    return save(Image.fromarray(samples(channels=2)), "PNG")


def palette_png(*, transparent: bool) -> bytes:
    image = picture().quantize(16)
    return save(image, "PNG", **({"transparency": 3} if transparent else {}))


def grey16_samples(height: int = 20, width: int = 30) -> NDArray[np.uint16]:
    return np.linspace(0, 65_535, height * width).astype(np.uint16).reshape(height, width)


def grey16(format: str = "PNG") -> bytes:
    return save(Image.fromarray(grey16_samples()), format)


def png_from_chunks(header: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG put together by hand: IHDR content, unfiltered rows (each with its filter byte), chunks before IDAT."""
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


def bomb_png(side: int = 100_000) -> bytes:
    """A header that announces side x side pixels in a file of some bytes."""
    return png_from_chunks(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"\0" * 100)


def bomb_webp() -> bytes:
    data = bytearray(rgba_png("WEBP"))
    data[21:25] = (16_382 | 16_382 << 14).to_bytes(4, "little")
    return bytes(data)


def grey4_png_with_key() -> bytes:
    """16 x 16 pixels of 4-bit grey, level x in column x; level 5 is declared transparent."""
    row = b"\0" + bytes(range(0x01, 0x100, 0x22))
    return png_from_chunks(struct.pack(">IIBBBBB", 16, 16, 4, 0, 0, 0, 0), row * 16, (b"tRNS", b"\0\x05"))


def rgb16_png(*, key: bool = False) -> bytes:
    row = b"\0" + struct.pack(">48H", *range(0, 48_000, 1000))
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    return png_from_chunks(header, row * 16, *([(b"tRNS", bytes(6))] if key else []))


def rgb_png_with_key() -> bytes:
    pixels = samples()
    pixels[:5] = (10, 20, 30)
    return save(Image.fromarray(pixels), "PNG", transparency=(10, 20, 30))


def tiff_from_samples(array: NDArray[Any], photometric: int, *, bits: int | None = None) -> bytes:
    """An uncompressed little-endian TIFF of one strip; photometric 0 is white-is-zero."""
    channels = 1 if array.ndim == 2 else array.shape[2]
    depth, data = bits or array.dtype.itemsize * 8, array.tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    entries = {256: array.shape[1], 257: array.shape[0], 258: depth, 259: 1, 262: photometric, 277: channels}
    entries |= {278: array.shape[0], 279: len(data), 339: kind}
    offset = 8 + 2 + 12 * (len(entries) + 1) + 4
    shared = b"" if channels == 1 else struct.pack(f"<{2 * channels}H", *[depth] * channels, *[kind] * channels)
    entries[273] = offset + len(shared)
    body = struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        if tag in (258, 339) and channels > 1:
            body += struct.pack("<HHII", tag, 3, channels, offset + (0 if tag == 258 else 2 * channels))
        else:
            body += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    return b"II*\0" + struct.pack("<I", 8) + body + bytes(4) + shared + data


def packed_12_bit(levels: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Two 12-bit samples in three bytes, as TIFF packs them; uint8 (H, W * 3 / 2)."""
    first, second = levels[:, ::2], levels[:, 1::2]
    three = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
    return three.reshape(levels.shape[0], -1).astype(np.uint8)


def multi_page_tiff() -> bytes:
    return save(picture(), "TIFF", save_all=True, append_images=[picture()])


def animated_webp() -> bytes:
    return save(picture(), "WEBP", save_all=True, append_images=[Image.new("RGB", (56, 40), "red")])


def tiff_with_previews(data: bytes, preview: bytes, *, pages: tuple[int, ...] = (1,)) -> bytes:
    """A little-endian TIFF with the JPEG in a SubIFD, and in further pages of these NewSubfileTypes (1: preview)."""
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    entries = [data[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    out = data + bytes(len(data) % 2)
    picture_at = len(out)
    out += preview + bytes(len(preview) % 2)
    depths = struct.pack("<HHII", 258, 3, 3, len(out))
    out += struct.pack("<3H", 8, 8, 8)

    def directory(fields: list[bytes], following: int) -> bytes:
        fields.sort(key=lambda field: struct.unpack("<H", field[:2]))
        return struct.pack("<H", len(fields)) + b"".join(fields) + struct.pack("<I", following)

    def page(kind: int, following: int) -> bytes:
        with Image.open(io.BytesIO(preview)) as shown:
            width, height = shown.size
        values = {254: kind, 256: width, 257: height, 259: 7, 262: 6, 277: 3, 278: height}
        values |= {273: picture_at, 279: len(preview)}
        fields = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items()]
        return directory([depths, *fields], following)

    following = 0
    for kind in reversed(pages):
        at = len(out)
        out += page(kind, following)
        following = at
    hidden = struct.pack("<HHII", 330, 4, 1, len(out))
    out += page(1, 0)
    first = directory([*entries, hidden], following)
    return out[:4] + struct.pack("<I", len(out)) + out[8:] + first


def camera_mpo(kind: int, preview: Image.Image | None = None, **options: Any) -> bytes:
    """A JPEG with a second picture behind it, of an MPF type such as 0x010002 (preview) or 0x020002 (stereo)."""
    further = preview or Image.new("RGB", (56, 40), "red")
    data = save(picture(), "MPO", save_all=True, append_images=[further], **options)
    at = data.index(b"MPF\0") + 4
    second = data.rindex(struct.pack("<I", 0x030000), at, at + 100) + 16  # 16 bytes per entry, attributes first
    return data[:second] + struct.pack("<I", kind) + data[second + 4 :]


def exif(orientation: int | None = None, *, thumbnail: bool = False) -> bytes:
    """Copyright, dates, lens, GPS; with `thumbnail` also IFD1, MakerNote and a preview in a private tag."""
    block = Image.Exif()
    block[0x8298], block[0x013B] = "© Zoë Müller".encode(), "Zoe"
    if orientation is not None:
        block[0x0112] = orientation
    camera, gps = block.get_ifd(0x8769), block.get_ifd(0x8825)
    camera |= {0x9003: "2024:05:06 07:08:09", 0xA434: "50mm F1.8", 0x829A: (1, 250), 0x9286: b"ASCII\0\0\0hello"}
    gps |= {1: "N", 2: (47.0, 22.0, 30.5)}
    if not thumbnail:
        return block.tobytes()
    preview = save(Image.new("RGB", (160, 120), "red"), "JPEG")
    camera[0x927C] = b"Maker\0" + preview
    block[0xC6FD] = preview
    block[0x010E] = b"small " + JPEG_SIGNATURE + b" preview"
    plain_block = block.tobytes()[6:]  # IFD1 is appended by hand, Pillow does not write one
    count = struct.unpack_from(">H", plain_block, 8)[0]
    link, at = 10 + 12 * count, len(plain_block)
    entries = struct.pack(">HHII", 0x0201, 4, 1, at + 30) + struct.pack(">HHII", 0x0202, 4, 1, len(preview))
    ifd1 = struct.pack(">H", 2) + entries + bytes(4)
    return b"Exif\0\0" + plain_block[:link] + struct.pack(">I", at) + plain_block[link + 4 :] + ifd1 + preview


def jpeg_with_exif_thumbnail() -> bytes:
    return plain("JPEG", exif=exif(6, thumbnail=True), dpi=(300, 300))


def rich_png(**options: Any) -> bytes:
    """Orientation 6, EXIF, XMP with a thumbnail, 300 dpi, texts."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.format(extra=XMP_THUMBNAIL))
    info.add_itxt("Title", "Möwe")
    info.add_text("Comment", "not kept")
    return plain("PNG", exif=exif(6), pnginfo=info, dpi=(300, 300), **options)


def oriented(format: str, orientation: int) -> bytes:
    return plain(format, exif=exif(orientation))


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _icc(space: bytes, tags: dict[bytes, bytes], device: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data = data.ljust(-(-len(data) // 4) * 4, b"\0")
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = offset + len(body)
    illuminant = struct.pack(">3i", 63_190, 65_536, 54_061)
    head = struct.pack(">I4sI4s4s4s", size, b"test", 0x02400000, device, space, pcs)
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp"
    return head.ljust(68, b"\0") + illuminant + bytes(128 - 80) + table + body


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65_536) for v in (x, y, z)))


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def _text_tags() -> dict[bytes, bytes]:
    name = b"test\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    return {b"desc": desc, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(0.9642, 1, 0.8249)}


def adobe_rgb_profile() -> bytes:
    """Adobe RGB (1998) from its published primaries, adapted to D50, and gamma 2.2."""
    tags = _text_tags() | {
        b"rXYZ": _xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": _xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": _xyz(0.14919, 0.06322, 0.74457),
    }
    return _icc(b"RGB ", tags | {name: _gamma(2.19921875) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(gamma: float = 1.0) -> bytes:
    return _icc(b"GRAY", _text_tags() | {b"kTRC": _gamma(gamma)})


def cmyk_profile() -> bytes:
    """A 4-ink profile whose table says: any ink takes away lightness, and cyan tints to Lab (50, 0, 100)."""
    corners = np.zeros((2, 2, 2, 2, 3))
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        corners[c, m, y, k] = (0, 0, 0) if c + m + y + k > 1 or k else (50, 0, 100 * c) if c + m + y else (100, 0, 0)
    lab = np.rint((corners + np.array((0, 128, 128))) * (65_280 / 100, 256, 256)).clip(0, 65_535).astype(">u2")
    ramp = struct.pack(">2H", 0, 65_535)
    head = struct.pack(">BBBB9i", 4, 3, 2, 0, *(65_536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft2\0\0\0\0" + head + struct.pack(">2H", 2, 2) + ramp * 4 + lab.tobytes() + ramp * 3
    return _icc(b"CMYK", _text_tags() | {b"A2B0": lut, b"A2B1": lut}, device=b"prtr", pcs=b"Lab ")


def cmyk_jpeg(profile: bytes | None = None, ink: tuple[int, int, int, int] = (255, 0, 0, 0)) -> bytes:
    options = {"icc_profile": profile} if profile else {}
    return save(Image.new("CMYK", (24, 20), ink), "JPEG", quality=95, **options)
