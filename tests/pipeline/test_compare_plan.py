"""Plans of comparisons, on a tiny model.

1. A result is stored under a name that follows from all that decides it: further methods, purifiers and subjects keep
   what is stored, and whatever else is changed makes new names.
2. Only subjects that are asked for have to be of use.
3. What cannot work is refused before anything is computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.compare import report
from pipeline.compare.methods import MethodSpec, check_label, parse_methods, read_methods
from pipeline.compare.plan import Settings, plan_comparison
from pipeline.compare.results import Findings, MethodResult
from pipeline.compare.subjects import read_subjects
from pipeline.errors import UserError
from pipeline.verify.attack_models import ModelKind
from tests.pipeline.archives import photo, write_parquet
from tests.pipeline.compare_settings import QUICK, SIDE, tiny_settings
from tests.protectors.tiny import save_tiny_model


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return tiny_settings(tmp_path_factory.mktemp("compare"))


# --- Names of results


def keys(settings: Settings) -> tuple[set[str], set[str]]:
    comparison = plan_comparison(settings)
    protections = comparison.protections()
    return {item.key for item in protections}, {trial.key for trial in comparison.trials(protections)}


def test_more_of_the_same_keeps_what_is_stored(settings: Settings) -> None:
    base = replace(settings, attacks=("dreambooth",))
    protections, trials = keys(base)
    for change in (
        {"methods": (*base.methods, *parse_methods("noise@4"))},
        {"subjects": 3},
        {"subjects": ("rex", "cup")},
        {"purifiers": ("median", "jpeg75")},
        {"attacks": ("dreambooth", "sdedit-0.3-quick")},
        {"edit_prompt": "a drawing"},
        {"models": {**base.models, "pixel": "nano-ddpm"}},
    ):
        more_protections, more_trials = keys(replace(base, **change))  # type: ignore[arg-type]
        assert protections <= more_protections, change
        assert trials <= more_trials, change


CHANGES: list[tuple[str, Mapping[str, Any], bool]] = [
    ("eps_levels", {"methods": tuple(parse_methods("noise@7,noise@95"))}, True),
    ("train", {"train": 1}, True),
    ("seed", {"seed": 1}, True),
    ("generated", {"generated": 3}, False),
    ("overrides", {"overrides": {**QUICK, "steps": 3}}, False),
    ("attack", {"attacks": ("lora",)}, False),
    ("sampling", {"overrides": {**QUICK, "sampling": {"steps": 3}}}, False),
]


@pytest.mark.parametrize(("name", "change", "of_pixels"), CHANGES, ids=[change[0] for change in CHANGES])
def test_whatever_decides_a_result_names_it(
    name: str, change: Mapping[str, Any], of_pixels: bool, settings: Settings
) -> None:
    base = replace(settings, attacks=("dreambooth",))
    before, after = keys(base), keys(replace(base, **change))
    assert before[0].isdisjoint(after[0]) == of_pixels
    # Cells on clean photos are the same for another method; everything else is new.
    assert len(before[1] & after[1]) == (6 if name == "eps_levels" else 0)


def test_models_photos_and_versions_name_results(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(settings, methods=tuple(parse_methods("photoguard")))
    protections, trials = keys(base)
    other = {"latent": str(save_tiny_model(tmp_path / "other", seed=1))}
    config = tmp_path / "other" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": SIDE // 2}))
    attacked = keys(replace(base, models=other))
    assert attacked[0] == protections
    assert attacked[1].isdisjoint(trials)
    assert keys(replace(base, surrogates=other))[0].isdisjoint(protections)
    with monkeypatch.context() as patch:
        patch.setattr("protectors.photoguard.PhotoGuard.version", "next")
        assert keys(base)[0].isdisjoint(protections)
    rows = write_parquet(
        tmp_path / "p.parquet",
        [photo(place + 1, side=SIDE) for place in range(4)],
        {"asset_id": list("abcd"), "subject": ["cup", "cup", "rex", "rex"], "subject_class": ["mug"] * 4},
    )
    assert keys(replace(base, photos=rows))[1].isdisjoint(trials)


def test_device_and_libraries_name_results(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(settings)
    for change in (replace(settings, device="cuda:1"), replace(settings, device="cuda")):
        assert all(left.isdisjoint(right) for left, right in zip(before, keys(change), strict=True))
    assert keys(replace(settings, device="cuda:1")) == keys(replace(settings, device="cuda"))
    monkeypatch.setattr("pipeline.compare.plan.version", lambda name: "next" if name == "peft" else "this")
    assert all(left.isdisjoint(right) for left, right in zip(before, keys(settings), strict=True))


def test_the_control_of_edits_names_them(settings: Settings) -> None:
    base = replace(settings, methods=tuple(parse_methods("noise@7")), eps_levels=8.0)
    for attack, same in (("dreambooth", True), ("sdedit-0.3-quick", False)):
        one, other = (keys(replace(base, attacks=(attack,), eps_levels=levels)) for levels in (8.0, 4.0))
        assert one[0] == other[0]
        assert (one[1] == other[1]) == same
        assert same or one[1].isdisjoint(other[1])


def test_a_checkpoint_is_read_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr("pipeline.compare.plan.folder_digest", lambda folder: f"{len(read)}{read.append(folder)}")
    base = replace(settings, methods=tuple(parse_methods("photoguard,advdm,mist")))
    comparison = plan_comparison(base)
    assert len(read) == len(set(read)) == 3  # both sides' latent model, the attacker's pixel model, and the judge
    assert {method.digest for method in comparison.methods} == {comparison.digests[ModelKind.LATENT]}


def test_a_surrogate_of_another_size_is_told(settings: Settings, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "other")  # of 64 pixels
    comparison = plan_comparison(
        replace(settings, methods=tuple(parse_methods("noise,photoguard")), surrogates={"latent": str(folder)})
    )
    rows = [MethodResult(method=method, failed="not run") for method in comparison.methods]
    found = Findings(comparison=comparison, rows=rows, against=None)
    (warning,) = report.warnings(found)
    assert warning == f"photoguard was optimized at 64 pixels against {folder}, and the attacker works at {SIDE}"
    text = report.markdown(found)
    assert warning in text
    assert f"sha256 {comparison.methods[1].digest[:12]}, 64 pixels): photoguard" in text
    assert f"{settings.models['latent']}` (latent, sha256 {comparison.digests[ModelKind.LATENT][:12]})" in text


# --- Subjects


def test_only_wanted_subjects_must_be_of_use(tmp_path: Path) -> None:
    good = [photo(place, side=SIDE) for place in range(4)]
    names = ["cup", None, "cup", "lone", "broken", "broken"]
    columns = {"asset_id": list("abcdef"), "subject": names, "subject_class": ["mug"] * 6}
    file = write_parquet(tmp_path / "p.parquet", [*good, b"no picture", b"nor this"], columns)
    (cup,) = read_subjects(file, SIDE, ("cup",), train=4)
    assert (cup.class_word, len(cup.train), len(cup.references)) == ("mug", 1, 1)
    with pytest.raises(UserError, match="subject 'lone' has one photo"):
        read_subjects(file, SIDE, ("cup", "lone"), train=4)
    with pytest.raises(UserError, match="photo 'e' cannot be decoded"):
        read_subjects(file, SIDE, ("broken",), train=4)
    with pytest.raises(UserError, match="no subject 'None'; it has broken, cup, lone"):
        read_subjects(file, SIDE, ("None",), train=4)


# --- What may be asked for


def test_methods_are_written_shortly() -> None:
    found = parse_methods(" mist, advdm:paper@4.5 ,noise@96,")
    assert [(spec.label, spec.name, spec.preset, spec.eps_levels) for spec in found] == [
        ("mist", "mist", "fast", None),
        ("advdm:paper@4.5", "advdm", "paper", 4.5),
        ("noise@96", "noise", "fast", 96.0),
    ]
    with pytest.raises(UserError, match="'noise@much': write name"):
        parse_methods("noise@much")


def test_methods_come_from_a_file(tmp_path: Path, settings: Settings) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text("- {name: mist, label: short, overrides: {steps: 7}}\n- {name: noise, eps_levels: 3}\n")
    comparison = plan_comparison(replace(settings, methods=tuple(read_methods(file))))
    short, noise = comparison.methods
    assert (short.label, short.config["steps"], short.config["eps_levels"]) == ("short", 7, 8.0)
    assert (noise.label, noise.config["eps_levels"]) == ("noise", 3.0)
    check_label("short", comparison.methods)
    with pytest.raises(UserError, match="no method 'shirt' in this comparison; it has short"):
        check_label("shirt", comparison.methods)
    for text, words in (
        ("mist", "must hold a list"),
        ("- {nam: mist}", "no such field 'nam'"),
        ("- {label: x}", "without a name"),
        ("- {name: mist, overrides: 3}", "must be a mapping"),
        ("- {name: mist, label: 2024}", "the label of mist must be text, not 2024: write it in quotes"),
        ("- {name: mist, preset: 1}", "the preset of mist must be text"),
        ("- {name: mist, eps_levels: many}", "eps_levels of mist must be a number, not 'many'"),
        ("[", "cannot be read as YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            read_methods(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ()}, "nothing to compare"),
        ({"methods": tuple(parse_methods("mits"))}, "did you mean 'mist'"),
        ({"methods": tuple(parse_methods("mist:slow"))}, "no preset 'slow'"),
        ({"methods": tuple(parse_methods("noise@0"))}, "eps_levels"),
        ({"methods": (MethodSpec(label="m", name="mist", overrides={"stepz": 1}),)}, "stepz"),
        ({"methods": tuple(parse_methods("noise,noise"))}, "two methods are called 'noise'"),
        ({"methods": tuple(parse_methods("noise,noise:fast"))}, "'noise' and 'noise:fast' are the same"),
        ({"methods": (*parse_methods("noise"), MethodSpec(label="n", name="protectors.noise:Noise"))}, "are the same"),
        ({"attacks": ("dreambooth", "dreambooth:quick")}, "'dreambooth' and 'dreambooth:quick' are the same"),
        ({"attacks": ()}, "nothing to attack with"),
        ({"attacks": ("sdedit-quick",)}, "did you mean sdedit"),
        ({"attacks": ("dreambooth:slow",)}, "no preset 'slow'"),
        ({"attacks": ("instruct-pix2pix",)}, "no instruct model given"),
        ({"overrides": {"stepz": 1}}, "stepz"),
        ({"purifiers": ("jpeg-75",)}, "no purifier named 'jpeg-75'"),
        ({"models": {"latent": "/no/such/folder"}}, "/no/such/folder"),
        ({"subjects": ("max",)}, "no subject 'max'; it has cup, rex, zoe"),
        ({"subjects": 0}, "no subjects"),
        ({"photos": Path("/no/such.parquet")}, "--photos"),
    ],
)
def test_what_cannot_work_is_refused_at_once(change: dict[str, Any], words: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=words):
        plan_comparison(replace(settings, **change))
