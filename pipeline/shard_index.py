"""Where the rows of a source shard are: image files, Parquet files with an image column, WebDataset tars."""

from __future__ import annotations

import base64
import tarfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ArchiveSettings, OtherImages
from pipeline.errors import UserError
from pipeline.storage import ObjectInfo, Store
from pipeline.units import RowRange, cut_units

Kind = Literal["files", "parquet", "tar"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"})
# Pictures that are not protected; beside an image of a tar they would be copied as they are.
OTHER_PICTURES = frozenset(
    {".gif", ".bmp", ".jfif", ".jpe", ".avif", ".heic", ".heif", ".dng", ".jxl", ".jp2", ".psd", ".svg", ".ppm", ".tga"}
)
TEXT_SIDECARS = frozenset({"txt", "json", "cls", "caption", "text"})
IMAGE_COLUMN_NAMES = (
    "image",
    "img",
    "picture",
    "photo",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bytes",
    "image_bytes",
    "content",
)


class UnreadableShard(UserError):
    """A source object that looks like a shard cannot be read as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """Where the rows of one shard are. Stored as JSON beside the plan; units follow from it."""

    kind: Kind
    key: str
    etag: str
    size: int
    # files: [key, etag, size]; tar: [image member, {column: [offset, size]}], "" being the image; parquet: empty.
    members: list[list[Any]] = field(default_factory=list)
    row_groups: list[int] = field(default_factory=list)
    image_column: str = ""
    id_column: str = ""
    units: list[RowRange]
    # What to do with pictures in the customer's binary columns.
    other_images: OtherImages = "refuse"
    # Arrow schema of the customer's columns, IPC form, base64.
    columns: str

    @property
    def rows(self) -> int:
        """Number of assets in the shard."""
        return self.units[-1][1] if self.units else 0

    @property
    def schema(self) -> pa.Schema:
        """The customer's columns, without the image."""
        return schema_from_text(self.columns)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardIndex:
        units = [(int(lo), int(hi)) for lo, hi in value["units"]]
        return cls(**{**value, "units": units})


def schema_to_text(schema: pa.Schema) -> str:
    """An Arrow schema as base64 text, for JSON."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def schema_from_text(text: str) -> pa.Schema:
    """The inverse of ``schema_to_text``."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def kind_of(key: str) -> Kind | None:
    """What a source object is, by its suffix; None for what is no part of an archive."""
    suffix = PurePosixPath(key).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "files"
    return {".parquet": "parquet", ".tar": "tar"}.get(suffix)  # type: ignore[return-value]


def index_files(objects: Sequence[ObjectInfo], etag: str, settings: ArchiveSettings) -> ShardIndex:
    """The index of a virtual shard: image files in key order."""
    return ShardIndex(
        kind="files",
        key=objects[0].key,
        etag=etag,
        size=sum(item.size for item in objects),
        members=[[item.key, item.etag, item.size] for item in objects],
        units=cut_units([item.size for item in objects], settings),
        columns=schema_to_text(pa.schema([])),
    )


def index_parquet(
    store: Store, item: ObjectInfo, settings: ArchiveSettings, subject_column: str | None = None
) -> ShardIndex:
    """The index of a Parquet shard, from its footer and the column of subjects, if one is named and there.

    Raises:
        UnreadableShard: It is no Parquet file, or has no image column.
    """
    try:
        with store.open(item.key) as stream:
            parquet = pq.ParquetFile(stream)
            schema, metadata = parquet.schema_arrow, parquet.metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            rows = [group.num_rows for group in groups]
            bytes_per_row = [group.total_byte_size // max(1, group.num_rows) for group in groups]
            named = subject_column is not None and subject_column in schema.names
            joined = _rows_of_one_subject(parquet, str(subject_column)) if named else set()
    except (pa.ArrowInvalid, OSError) as error:
        raise UnreadableShard(f"{store.url}/{item.key}: not a readable Parquet file ({error})") from error
    doubled = [name for name, count in Counter(schema.names).items() if count > 1]
    if doubled:
        raise UnreadableShard(f"{store.url}/{item.key}: two columns are named {doubled[0]}")
    image = find_image_column(schema, settings.image_column, f"{store.url}/{item.key}")
    sizes = [size for count, size in zip(rows, bytes_per_row, strict=True) for _ in range(count)]
    starts = [sum(rows[:i]) for i in range(len(rows))]
    ids = find_id_column(schema, settings.id_column, f"{store.url}/{item.key}")
    same = ids == "asset_id" and pa.types.is_string(schema.field(ids).type)  # our own column says it already
    kept = [column for column in schema if column.name != image and not (same and column.name == ids)]
    pictures = [column.name for column in kept if _holds_pictures(column.type)]
    left_out = _judge(pictures, settings.other_images, f"{store.url}/{item.key}")
    kept = [column for column in kept if column.name not in left_out]
    customer = pa.schema(kept, metadata=schema.metadata)
    return ShardIndex(
        kind="parquet",
        key=item.key,
        etag=item.etag,
        size=item.size,
        row_groups=rows,
        image_column=image,
        id_column=ids,
        other_images=settings.other_images,
        units=cut_units(sizes, settings, breaks=starts, joined=joined),
        columns=schema_to_text(customer),
    )


def _rows_of_one_subject(parquet: pq.ParquetFile, column: str) -> set[int]:
    """Rows that name the subject of the row before; a row without one stands for itself."""
    joined: set[int] = set()
    row, last = 0, None
    for batch in parquet.iter_batches(columns=[column]):  # a shard's column may be larger than what is kept of it
        for subject in batch.column(0).to_pylist():
            if subject is not None and subject == last:
                joined.add(row)
            row, last = row + 1, subject
    return joined


def find_image_column(schema: pa.Schema, wanted: str | None, where: str) -> str:
    """The name of the column that holds image bytes.

    Raises:
        UnreadableShard: There is none, or more than one could be meant; the message lists the columns.
    """
    candidates = [item.name for item in schema if image_layout(item.type) is not None]
    if wanted is not None:
        if wanted in candidates:
            return wanted
        raise UnreadableShard(
            f"{where}: column '{wanted}' holds no images (needed: binary, or a struct with 'bytes'); "
            f"columns are {', '.join(schema.names)}"
        )
    structs = [name for name in candidates if pa.types.is_struct(schema.field(name).type)]
    named = [name for name in IMAGE_COLUMN_NAMES if name in candidates]
    for choice in (structs, named, candidates):
        if len(choice) == 1:
            return choice[0]
    problem = f"several could be the image ({', '.join(candidates)})" if candidates else "no image column"
    raise UnreadableShard(f"{where}: {problem}; name it with --image-column. Columns are {', '.join(schema.names)}")


def find_id_column(schema: pa.Schema, wanted: str | None, where: str) -> str:
    """The column with asset ids: the one asked for, else ``asset_id`` if it is there, else none ("")."""
    if wanted is not None and wanted not in schema.names:
        raise UnreadableShard(f"{where}: no column '{wanted}' for --id-column; columns are {', '.join(schema.names)}")
    name = wanted or "asset_id"
    if name not in schema.names:
        return ""
    kind = schema.field(name).type
    usable = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
    if wanted is not None and not usable:
        raise UnreadableShard(f"{where}: column '{wanted}' is {kind}; asset ids must be text or integers")
    return name if usable else ""


def image_layout(kind: pa.DataType) -> Literal["struct", "binary"] | None:
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "struct" if "bytes" in names and _is_binary(kind.field(names.index("bytes")).type) else None
    return "binary" if _is_binary(kind) else None


def _holds_pictures(kind: pa.DataType) -> bool:
    """Whether a column's type is made for pictures: the HF struct, or lists of it."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_pictures(kind.value_type)
    return image_layout(kind) == "struct"


def _judge(pictures: Collection[str], other_images: OtherImages, where: str) -> set[str]:
    """Which of the customer's picture columns to leave out.

    Raises:
        UnreadableShard: There are some, and nobody said what to do with them.
    """
    if pictures and other_images == "refuse":
        raise UnreadableShard(
            f"{where}: {', '.join(sorted(pictures))} hold further pictures, which would go out unprotected; "
            "leave them out with --other-images drop, or pass them on with --other-images keep"
        )
    return set(pictures) if other_images == "drop" else set()


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def index_tar(store: Store, item: ObjectInfo, settings: ArchiveSettings) -> ShardIndex:
    """The index of a WebDataset tar: one asset per image member; files of the same sample become its columns.

    Raises:
        UnreadableShard: It is no plain tar, it is cut off, a name occurs twice, or it holds no image.
    """
    where = f"{store.url}/{item.key}"
    samples = _tar_samples(store, item, where)
    members: list[list[Any]] = []
    sidecars: set[str] = set()
    for sample, files in samples.items():
        images = {name for name in files if f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES}
        others = {name: files[name] for name in files.keys() - images}
        members += [[f"{sample}.{extension}", {"": files[extension], **others}] for extension in images]
        sidecars |= others.keys() if images else set()
    if not members:
        raise UnreadableShard(f"{where}: no image in this tar")
    pictures = {name for name in sidecars if f".{name.rpartition('.')[2].lower()}" in OTHER_PICTURES}
    sidecars -= _judge(pictures, settings.other_images, where)
    members.sort(key=lambda member: member[1][""][0])
    fields = [pa.field(name, pa.string() if name in TEXT_SIDECARS else pa.binary()) for name in sorted(sidecars)]
    return ShardIndex(
        kind="tar",
        key=item.key,
        etag=item.etag,
        size=item.size,
        members=members,
        other_images=settings.other_images,
        units=cut_units([member[1][""][1] for member in members], settings),
        columns=schema_to_text(pa.schema(fields)),
    )


def _tar_samples(store: Store, item: ObjectInfo, where: str) -> dict[str, dict[str, list[int]]]:
    """Offset and size of every regular file, by sample and extension."""
    samples: dict[str, dict[str, list[int]]] = {}
    try:
        with store.open(item.key) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                sample, extension = _sample_name(member.name)
                if extension in samples.setdefault(sample, {}):
                    raise UnreadableShard(f"{where}: two files in it are named {member.name}")
                if member.offset_data + member.size > item.size:
                    raise UnreadableShard(f"{where}: the tar is cut off within {member.name}")
                samples[sample][extension] = [member.offset_data, member.size]
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
                raise UnreadableShard(f"{where}: the tar is cut off or damaged at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UnreadableShard(f"{where}: not a readable plain tar ({error})") from error
    return samples


def _sample_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the sample is everything up to the first dot of the file name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension
