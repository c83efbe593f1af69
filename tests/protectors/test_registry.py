from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import protectors
from protectors import registry
from protectors.advdm import AdvDM
from protectors.fake import FakeProtector
from protectors.photoguard import PhotoGuard


def test_names_lead_to_their_classes() -> None:
    names = registry.protector_names()
    assert names == tuple(sorted(names))
    assert {"advdm", "mist", "noise", "photoguard", "pid", "sds"} <= set(names)
    assert registry.protector_class("advdm") is AdvDM
    assert registry.protector_class("photoguard") is PhotoGuard


def test_fake_is_reached_by_path_only() -> None:
    assert registry.protector_class("protectors.fake:FakeProtector") is FakeProtector
    with pytest.raises(registry.UnknownProtector):
        registry.protector_class("fake")


def test_unknown_name_lists_known_and_closest() -> None:
    with pytest.raises(registry.UnknownProtector, match=r"'fotoguard'; did you mean 'photoguard'\? Known: advdm"):
        registry.protector_class("fotoguard")


@pytest.mark.parametrize(
    "target", ["protectors.nothing:X", "protectors.fake:Nothing", "protectors.fake:FakeConfig", "protectors.fake:"]
)
def test_wrong_path_is_unknown(target: str) -> None:
    with pytest.raises(registry.UnknownProtector):
        registry.protector_class(target)


def test_entry_points_add_but_do_not_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    group, value = registry.ENTRY_POINT_GROUP, "protectors.fake:FakeProtector"
    ours = registry.protector_names()
    points = tuple(EntryPoint(name, value, group) for name in ("theirs", "advdm"))
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert registry.protector_names() == tuple(sorted([*ours, "theirs"]))
    assert registry.protector_class("theirs") is FakeProtector
    assert registry.protector_class("advdm") is AdvDM


def test_listing_loads_no_torch_and_methods_load_no_pipeline() -> None:
    root = str(Path(protectors.__file__).parent.parent)
    code = (
        "import sys; from protectors.registry import protector_class, protector_names as names\n"
        "names(); assert 'torch' not in sys.modules\n"
        "protector_class('protectors.fake:FakeProtector'); assert 'diffusers' not in sys.modules\n"
        "[protector_class(name) for name in names()]\n"
        "assert not {'ray', 'prefect', 'pyarrow', 'pipeline'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
