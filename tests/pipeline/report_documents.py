"""Documents as a verification stores them, from the real statistics over planted scores."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from pipeline.verify.bootstrap import Plan
from pipeline.verify.cells import build_tables
from pipeline.verify.gate import Decision
from pipeline.verify.html import Strip
from pipeline.verify.scores import Cell, Score
from pipeline.verify.statistics import survival
from pipeline.verify.tables import Question

PLAN = Plan(resamples=300)
LEVELS = {
    (Cell.CLEAN, "none"): 0.8,
    (Cell.PROTECTED, "none"): 0.4,
    (Cell.PURIFIED, "jpeg75"): 0.7,
    (Cell.PURIFIED_PROTECTED, "jpeg75"): 0.55,
    (Cell.PURIFIED, "chain"): 0.68,
    (Cell.PURIFIED_PROTECTED, "chain"): 0.62,
    # Ruins clean images too: an invalid row.
    (Cell.PURIFIED, "blur"): 0.3,
    (Cell.PURIFIED_PROTECTED, "blur"): 0.28,
    (Cell.FLOOR, "none"): 0.2,
    (Cell.CEILING, "none"): 0.9,
}


def scores(
    levels: dict[tuple[Cell, str], float],
    *,
    units: int = 12,
    seeds: int = 1,
    attack: str = "dreambooth",
    metric: str = "subject similarity",
    unit: str = "subject",
) -> list[Score]:
    """Scores around a level per cell, with an offset per unit."""
    draws = np.random.default_rng(7)
    offsets = draws.normal(0, 0.05, units)
    return [
        Score(
            attack=attack,
            metric=metric,
            unit=f"{unit}-{number}",
            cell=cell,
            purifier=purifier,
            image="0",
            seed=seed,
            value=level + offsets[number] + draws.normal(0, 0.02),
        )
        for (cell, purifier), level in levels.items()
        for number in range(units)
        for seed in range(seeds)
    ]


def table(levels: dict[tuple[Cell, str], float] = LEVELS, **options: Any) -> dict[str, Any]:
    """One customization table as it is stored."""
    not_run = options.pop("not_run", {"diffpure": "no pixel model given"})
    question = Question(metric=options.get("metric", "subject similarity"), better=options.pop("better", "down"),
                        primary=True)  # fmt: skip
    (found,) = build_tables(scores(levels, **options), [question], not_run=not_run, plan=PLAN)
    return found.to_dict()


def editing_table() -> dict[str, Any]:
    """One editing table: a distance, where higher is better."""
    levels = {
        (Cell.CLEAN, "none"): 0.10,
        (Cell.PROTECTED, "none"): 0.32,
        (Cell.PURIFIED, "chain"): 0.15,
        (Cell.PURIFIED_PROTECTED, "chain"): 0.17,
    }
    return table(levels, units=4, attack="sdedit-0.5", metric="edit distance", better="up", unit="image", not_run={})


def survivals(images: int = 24) -> list[dict[str, Any]]:
    """What is left of an objective after three purifiers."""
    draws = np.random.default_rng(3)
    left = {"none": 1.0, "jpeg75": 0.72, "half-size": 0.55, "chain@training-scale": 0.31}
    found = survival(
        [{name: (0.0, float(share * draws.normal(1, 0.2))) for name, share in left.items()} for _ in range(images)]
    )
    return [asdict(item) for item in found]


def decision(outcome: str = "pass", value: float | None = 0.7, **fields: Any) -> dict[str, Any]:
    """A gate's decision as it is stored."""
    given: dict[str, Any] = {"rung": 0, "preset": "fast", "metric": "survival", "threshold": 0.5, "reason": ""} | fields
    limits = (None, None) if value is None else (value - 0.1, value + 0.1)
    return asdict(Decision(outcome=outcome, value=value, low=limits[0], high=limits[1], purifier="chain", **given))  # type: ignore[arg-type]


def shard(*decisions: dict[str, Any], images: int = 8) -> dict[str, Any]:
    """The facts of one shard."""
    counts = {"rows_in": 1000, "rows_ok": 998, "rows_quarantined": 2, "sampled": images, "rung": len(decisions) - 1}
    return {**counts, "survival": survivals(images), "gate": list(decisions), "customization": []}


def full() -> dict[str, Any]:
    """A document with every part that there can be, as it reads from JSON."""
    weak = decision("strengthen", 0.31)
    document = {
        "schema_version": 2,
        "kind": "verify",
        "run_id": "20261122-093000-5c1f",
        "created_at": "2026-11-22T09:30:00+00:00",
        "destination": "s3://archive/protected",
        "config_fingerprint": "9f" * 32,
        "protector": "photoguard",
        "ladder": [{"preset": "fast", "eps": 8.0, "steps": 40}, {"preset": "strong", "eps": 12.0, "steps": 200}],
        "model_digest": "ab" * 32,
        "code_version": "0.1.0+g868e137",
        "versions": {"torch": "2.9.1", "diffusers": "0.36.0"},
        "measure": "share of the objective's gain that is left after the purifier, on decoded stored bytes",
        "interval": {"kind": "percentile bootstrap over images", "confidence": 0.95, "resamples": 2000},
        "purifiers": ["chain", "half-size", "jpeg75"],
        "training_scale": 128,
        "sampled": 24,
        "survival": survivals(),
        "customization": [table(), table(units=6, attack="lora", not_run={})],
        "editing": [editing_table()],
        "attack": {
            "customizer": "dreambooth",
            "preset": "quick",
            "models": {"latent": "nano-sd", "pixel": "nano-ddpm"},
            "side": 128,
            "generated": 8,
            "seed": 0,
        },
        "not_run": [{"purifier": "diffpure", "reason": "no pixel model given: name a DDPMPipeline folder"}],
        "metrics": [
            {
                "name": "subject similarity",
                "how": "mean cosine",
                "better": "down",
                "weights": "8f" * 32,
                "licence": "free",
            },
            {"name": "edit kept", "how": "SSIM", "better": "down", "weights": "none", "licence": "free"},
            {"name": "face_found", "how": "1 or 0", "better": "neither", "weights": "none", "licence": "free"},
        ],
        "absent": [{"name": "lpips", "reason": "no weights given: --metric lpips=FOLDER, a folder with <weights>"}],
        "fidelity": [
            {"metric": "PSNR, dB", "mean": 34.125, "low": 33.8, "high": 34.5, "images": 24},
            {"metric": "SSIM", "mean": 0.931, "low": 0.925, "high": 0.937, "images": 24},
        ],
        "cost": {
            "seconds": {"protect": 812.4, "check": 120.0},
            "images": 3000,
            "seconds_per_image": 0.271,
            "device": "NVIDIA H200",
        },
        "shards": {
            "shard-00000-3f2a9c1b7d20": shard(decision()),
            "shard-00001-77aa01c2e9f4": shard(weak, decision("flag", 0.44, rung=1, preset="strong")),
            "shard-00002-0c44d1e8b2a6": shard(decision("pass", 0.2)),
        },
    }
    document["shards"]["shard-00001-77aa01c2e9f4"]["customization"] = [table(units=3)]  # type: ignore[index]
    return dict(json.loads(json.dumps(document, allow_nan=False)))


def picture(seed: int, width: int = 128) -> bytes:
    """A PNG of soft noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8 * width // 128, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, 128), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def strips() -> list[Strip]:
    """One of an asset and one of a group, with a wide sheet."""
    single = ("original", "protected", "difference x8", "after chain")
    group = ("original", "protected", "drawn from originals after chain", "drawn from protected after chain")
    return [
        Strip(
            title="cats/tabby 17.png",
            unit="shard-00001-77aa01c2e9f4/0f3a5b7c9d1e",
            shard_id="shard-00001-77aa01c2e9f4",
            row="cats/tabby 17.png",
            pictures={label: picture(place) for place, label in enumerate(single)},
        ),
        Strip(
            title="subject-3",
            unit="subject-3",
            shard_id="shard-00000-3f2a9c1b7d20",
            row="",
            pictures={label: picture(place, 512) for place, label in enumerate(group)},
        ),
    ]


SCRIPT = "<script>alert(1)</script>"
_WORDS = ("state", "outcome", "verdict", "better")  # decide what is shown
_NAMED = ("shards", "unit_residuals", "versions", "models", "seconds")  # their keys are names


def hostile() -> dict[str, Any]:
    """Every name and text is an attack on the page."""
    document = _poisoned(full())
    return dict(document | {"run_id": SCRIPT})


def _poisoned(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        suffix = SCRIPT if key in _NAMED else ""
        found = {name + suffix: _poisoned(inner, name) for name, inner in value.items()}
        if key == "unit_residuals":
            found = {name: {unit + SCRIPT: left for unit, left in units.items()} for name, units in found.items()}
        return found
    if isinstance(value, list):
        return [_poisoned(inner) for inner in value]
    return value + SCRIPT if isinstance(value, str) and key not in _WORDS else value


def many_shards(count: int = 1000) -> dict[str, Any]:
    """More shards than a page shows; the last is the worst."""
    facts = shard(decision(), images=2)
    shards = {f"shard-{number:05d}-aa": facts for number in range(count)}
    shards[f"shard-{count - 1:05d}-aa"] = shard(decision("fail", 0.1), images=2)
    return full() | {"shards": shards}
