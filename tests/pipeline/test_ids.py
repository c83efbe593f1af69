"""Names follow from content alone, and from all of it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ids import asset_seed, canonical_json, differing_fields, fingerprint, sha256_hex, unit_id

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def shuffled(value: object) -> object:
    """The same value, every mapping filled in the other order."""
    if isinstance(value, dict):
        return {key: shuffled(item) for key, item in reversed(value.items())}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(json_values)
def test_canonical_json_has_one_spelling(value: object) -> None:
    assert canonical_json(value) == canonical_json(shuffled(value))


def test_canonical_json_form() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_fingerprint_is_a_sha256_of_every_field() -> None:
    fields = {"eps": 8.0, "method": {"name": "x"}}
    assert fingerprint(fields) == hashlib.sha256(b'{"eps":8.0,"method":{"name":"x"}}').hexdigest()
    assert fingerprint(fields) != fingerprint({**fields, "method": {"name": "y"}})


def test_sha256_takes_text_as_utf8() -> None:
    assert sha256_hex("ü") == sha256_hex("ü".encode())


def test_unit_id_depends_on_each_argument() -> None:
    base = ("a.tar", "e1", (0, 8), "fp", 0)
    others = [
        ("b.tar", *base[1:]),
        ("a.tar", "e2", *base[2:]),
        (*base[:2], (0, 9), *base[3:]),
        (*base[:2], (1, 8), *base[3:]),
        (*base[:3], "fq", 0),
        (*base[:4], 1),
    ]
    names = {unit_id(*arguments) for arguments in [base, *others]}
    assert len(names) == 7
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)


@given(st.text(), st.text(), st.text())
def test_asset_seed_is_a_stable_63_bit_number(source: str, config_fp: str, salt: str) -> None:
    seed = asset_seed(source, config_fp, salt)
    assert 0 <= seed < 2**63  # fits the int64 column
    assert seed == asset_seed(source, config_fp, salt)
    assert seed != asset_seed(source + "x", config_fp, salt)
    assert seed != asset_seed(source, config_fp, salt + "x")


def test_differing_fields_names_the_leaves() -> None:
    ours = {"method": {"eps": 8, "steps": 1}, "model": "a" * 64, "new": 1}
    theirs = {"method": {"eps": 4, "steps": 1}, "model": "b" * 64}
    assert differing_fields(ours, theirs) == [
        "method.eps: 4 -> 8",
        'model: "bbbbbbbbbbbbbbb... -> "aaaaaaaaaaaaaaa...',
        "new: null -> 1",
    ]
    assert differing_fields(ours, ours) == []
