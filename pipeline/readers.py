"""Reads the rows of a source shard, unit by unit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.assets import Asset
from pipeline.config import OtherImages
from pipeline.errors import ErrorInfo, FetchError, NotFound, SourceChanged
from pipeline.ids import sha256_hex
from pipeline.shard_index import ShardIndex, image_layout
from pipeline.storage import Store, in_parallel
from pipeline.units import RowRange

PARQUET_BUFFER_BYTES = 1 << 20  # read a column chunk page by page, not whole
NEAR_BYTES = 1 << 20  # members of a tar that lie closer than this come with one GET

# JPEG, PNG, GIF, WebP and other RIFF, TIFF and raw files, JPEG XL, and the family of HEIC and AVIF.
PICTURE_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"\0\0\0\x0cJXL ",
    *(bytes([0, 0, 0, size]) + b"ftyp" for size in range(16, 64, 4)),
)  # fmt: skip

Place = tuple[int, int]
"""Offset and size within a tar."""


@dataclass(frozen=True, slots=True)
class UnitRows:
    """The assets of one unit, and the customer's columns beside them."""

    assets: list[Asset]
    customer: pa.Table


def read_units(store: Store, index: ShardIndex, units: Sequence[RowRange]) -> Iterator[UnitRows]:
    """Yields the rows of each unit. Units of a Parquet shard must lie in one row group (``group_units``).

    A row whose bytes are missing or damaged comes back as failed; it takes no other row with it.

    Raises:
        SourceChanged: The source is no longer what the index lists.
        StorageError: The store failed after its retries.
    """
    if index.kind == "files":
        yield from (_read_files(store, index, unit) for unit in units)
        return
    read = _read_parquet(store, index, units) if index.kind == "parquet" else _read_tars(store, index, units)
    for rows in read:
        yield rows if index.other_images == "keep" else _without_pictures(rows, index.other_images)


def is_picture(value: bytes) -> bool:
    """Whether bytes begin like a picture file."""
    bitmap = value.startswith(b"BM") and value[6:10] == bytes(4)  # two letters alone would hit random bytes
    return bitmap or value.startswith(PICTURE_SIGNATURES)


def _read_tars(store: Store, index: ShardIndex, units: Sequence[RowRange]) -> Iterator[UnitRows]:
    yield from (_read_tar(store, index, unit) for unit in units)


def _without_pictures(rows: UnitRows, other_images: OtherImages) -> UnitRows:
    """Sees to it that no picture goes out in a plain binary column: the value is dropped, or the row fails."""
    customer = rows.customer
    for position, name in enumerate(customer.column_names):
        kind = customer.schema.field(name).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            continue
        values = customer.column(name).to_pylist()
        pictures = [value is not None and is_picture(value) for value in values]
        if not any(pictures):
            continue
        for asset, picture in zip(rows.assets, pictures, strict=True):
            if picture and other_images == "refuse" and asset.failure is None:
                hint = "use --other-images drop or keep"
                asset.failure = ErrorInfo.of(FetchError(f"column {name} holds a picture, unprotected; {hint}"), "fetch")
        kept = [None if picture else value for value, picture in zip(values, pictures, strict=True)]
        customer = customer.set_column(position, name, pa.array(kept, kind))
    return UnitRows(rows.assets, customer)


def _read_files(store: Store, index: ShardIndex, unit: RowRange) -> UnitRows:
    members = index.members[slice(*unit)]
    data = in_parallel(lambda member: _get(store, member[0], member[1]), members)
    assets = [
        _asset(store, row, name=key, etag=etag, data=content)
        for row, (key, etag, _), content in zip(range(*unit), members, data, strict=True)
    ]
    return UnitRows(assets, pa.table({}))


def _get(store: Store, key: str, etag: str, start: int = 0, length: int | None = None) -> bytes:
    try:
        return store.get(key, start=start, length=length, etag=etag)
    except NotFound as error:
        raise _changed(store, key) from error


def _changed(store: Store, key: str) -> SourceChanged:
    return SourceChanged(f"{store.url}/{key} changed since the plan was made; run again to plan it anew")


def _read_tar(store: Store, index: ShardIndex, unit: RowRange) -> UnitRows:
    members = index.members[slice(*unit)]
    content = _tar_bytes(store, index, [(p[0], p[1]) for _, places in members for p in places.values()])
    problems: dict[int, str] = {}
    columns: dict[str, pa.Array] = {}
    for column in index.schema:
        values: list[bytes | str | None] = []
        for row, (name, places) in zip(range(*unit), members, strict=True):
            value: bytes | str | None = content.get(tuple(places.get(column.name, ())))
            if isinstance(value, bytes) and pa.types.is_string(column.type):
                try:
                    value = value.decode()
                except UnicodeDecodeError as error:
                    problems[row], value = f"{name}: its .{column.name} is not UTF-8 ({error})", None
            values.append(value)
        columns[column.name] = pa.array(values, column.type)
    assets = [
        _asset(
            store,
            row,
            name=f"{index.key}#{name}",
            etag=index.etag,
            data=content[places[""][0], places[""][1]],
            problem=problems.get(row),
        )
        for row, (name, places) in zip(range(*unit), members, strict=True)
    ]
    return UnitRows(assets, pa.table(columns))


def _tar_bytes(store: Store, index: ShardIndex, places: Sequence[Place]) -> Mapping[tuple[int, ...], bytes]:
    """The contents of tar members; neighbours come with one GET."""
    content: dict[tuple[int, ...], bytes] = {}
    run: list[Place] = []
    for place in [*sorted(set(places)), None]:
        if run and (place is None or place[0] > run[-1][0] + run[-1][1] + NEAR_BYTES):
            start, end = run[0][0], max(offset + size for offset, size in run)
            block = _get(store, index.key, index.etag, start, end - start)
            content |= {p: block[p[0] - start : p[0] - start + p[1]] for p in run}
            run = []
        if place is not None:
            run.append(place)
    return content


def _read_parquet(store: Store, index: ShardIndex, units: Sequence[RowRange]) -> Iterator[UnitRows]:
    """Streams one row group; rows behind a damaged page come back failed, so that only they are quarantined."""
    todo = deque(units)
    stuck = 0
    while todo:
        open_units = len(todo)
        try:
            if store.info(index.key).etag != index.etag:
                raise _changed(store, index.key)
            for table in _stream_row_group(store, index, list(todo)):
                yield _parquet_rows(store, index, todo.popleft(), table)
        except NotFound as error:
            raise _changed(store, index.key) from error
        except (pa.ArrowInvalid, OSError) as error:
            stuck = stuck + 1 if len(todo) == open_units else 0
            if stuck < 2:
                continue  # a broken connection heals, a damaged page does not
            _get(store, index.key, index.etag, 0, 1)  # a store that is down raises here instead
            while todo:
                yield _damaged_rows(store, index, todo.popleft(), error)


def _stream_row_group(store: Store, index: ShardIndex, units: Sequence[RowRange]) -> Iterator[pa.Table]:
    group, position = 0, 0
    while position + index.row_groups[group] <= units[0][0]:
        position += index.row_groups[group]
        group += 1
    with store.open(index.key) as stream:
        parquet = pq.ParquetFile(stream, buffer_size=PARQUET_BUFFER_BYTES)
        batches = parquet.iter_batches(batch_size=units[0][1] - units[0][0], row_groups=[group])
        held = parquet.schema_arrow.empty_table()
        for low, high in units:
            while position + held.num_rows < high:
                batch = next(batches, None)
                if batch is None:
                    raise pa.ArrowInvalid(f"row group {group} ends before row {high}")
                held = pa.concat_tables([held, pa.Table.from_batches([batch])])
                skipped = min(max(0, low - position), held.num_rows)
                held, position = held.slice(skipped), position + skipped
            yield held.slice(low - position, high - low)
            held = held.slice(high - position)
            position = high


def _parquet_rows(store: Store, index: ShardIndex, unit: RowRange, table: pa.Table) -> UnitRows:
    image = table.column(index.image_column)
    if image_layout(image.type) == "struct":
        image = pc.struct_field(image, "bytes")
    ids = table.column(index.id_column).to_pylist() if index.id_column else [None] * table.num_rows
    assets = [
        _asset(store, row, name=_row_name(index, row), etag=index.etag, data=data, asset_id=given)
        for row, data, given in zip(range(*unit), image.to_pylist(), ids, strict=True)
    ]
    return UnitRows(assets, table.select(index.schema.names))


def _damaged_rows(store: Store, index: ShardIndex, unit: RowRange, error: Exception) -> UnitRows:
    problem = f"the Parquet file is damaged here: {error}"
    assets = [
        _asset(store, row, name=_row_name(index, row), etag=index.etag, data=None, problem=problem)
        for row in range(*unit)
    ]
    nothing = {column.name: pa.nulls(len(assets), column.type) for column in index.schema}
    return UnitRows(assets, pa.table(nothing))


def _row_name(index: ShardIndex, row: int) -> str:
    return f"{index.key}#{row:06d}"


def _asset(
    store: Store,
    row: int,
    *,
    name: str,
    etag: str,
    data: bytes | None,
    asset_id: object = None,
    problem: str | None = None,
) -> Asset:
    """Args: name: its place below the source's root, unique; asset_id: the customer's, else the name is used."""
    asset = Asset(
        row=row,
        asset_id=name if asset_id is None else str(asset_id),
        source_uri=f"{store.url}/{name}",
        source_etag=etag,
        data=data,
        source_sha256=sha256_hex(data) if data else None,
    )
    reason = problem or (None if data else "there are no image bytes here")
    if reason is not None:
        asset.failure = ErrorInfo.of(FetchError(reason), "fetch")
    return asset
