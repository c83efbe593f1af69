"""Output columns: the union over shards, own names protected, the customer's metadata kept."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.schema import CHECKED, PROTECTED, RESERVED, data_schema, output_columns, output_name, part_schema


def described(**features: object) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": features}, "fingerprint": "x"})}


def test_union_of_columns_over_shards() -> None:
    first = pa.schema([("a", pa.int64()), ("b", pa.string())])
    second = pa.schema([("b", pa.string()), ("c", pa.list_(pa.float32()))])
    found = output_columns([first, second])
    assert found.names == ["a", "b", "c"]
    assert found.field("c").type == pa.list_(pa.float32())


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_own_names_are_not_taken(name: str) -> None:
    found = output_columns([pa.schema([(name, pa.int8())])])
    assert found.names == [f"source_{name}"] == [output_name(name)]
    assert found.field(0).metadata == {b"fixative.source": name.encode()}


def test_two_types_for_one_column_are_refused() -> None:
    shards = [pa.schema([("label", pa.int64())]), pa.schema([("label", pa.string())])]
    with pytest.raises(UserError, match="'label' is int64 in one shard and string in another"):
        output_columns(shards)


def test_a_renamed_column_must_not_meet_another() -> None:
    with pytest.raises(UserError, match="both be stored as 'source_width'; rename one"):
        output_columns([pa.schema([("width", pa.int32()), ("source_width", pa.int32())])])


def test_features_and_metadata_of_the_customer_are_kept() -> None:
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    first = pa.schema([("label", pa.int64()), ("width", pa.int64())])
    first = first.with_metadata(
        {**described(label=label, width={"dtype": "int64", "_type": "Value"}), "licence": "CC0"}
    )
    second = pa.schema([("note", pa.string())], metadata={"camera": "X", "pandas": "{}"})
    schema = data_schema(output_columns([first, second]), {"about": {"b": 1, "a": 2}})
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    features = json.loads(metadata["huggingface"])["info"]["features"]
    assert features == {
        "image": {"_type": "Image"},
        "label": label,
        "source_width": {"dtype": "int64", "_type": "Value"},
    }
    assert metadata["licence"] == "CC0"
    assert metadata["camera"] == "X"
    assert metadata["fixative.about"] == '{"a": 2, "b": 1}'
    assert "pandas" not in metadata
    assert schema.names == [*PROTECTED.names, *CHECKED.names, "label", "source_width", "note"]


@pytest.mark.parametrize("text", ["", "[]", '{"info": null}', '{"info": {"features": null}}', "\N{SNOWMAN}"])
def test_unreadable_features_are_left_out(text: str) -> None:
    found = output_columns([pa.schema([("a", pa.int8())], metadata={"huggingface": text})])
    assert json.loads(found.metadata[b"huggingface"]) == {"info": {"features": {}}}


def test_a_part_holds_protected_and_quarantined_rows() -> None:
    schema = part_schema()
    assert all(item.nullable for item in schema)
    assert len(set(schema.names)) == len(schema.names)
