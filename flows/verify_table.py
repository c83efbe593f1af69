"""The rows of a verification as the command and the Prefect artifact show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def verdicts(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per attack and purifier, as the Prefect artifact and the command show it."""
    rows = []
    for table in [*document["customization"], *document.get("editing", [])]:
        for row in table["rows"]:
            rows.append(
                {
                    "attack": table["attack"],
                    "metric": table["question"]["metric"],
                    "purifier": row["purifier"],
                    "state": table["state"] if row["state"] == "measured" else row["state"],
                    "clean": _rounded(row["clean"]),
                    "protected": _rounded(row["protected"]),
                    "residual": _interval(row["residual"]),
                    "effect": _interval(row["effect"]),
                    "units": table["units"],
                    "verdict": row["verdict"] or row["reason"],
                }
            )
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _interval(interval: Mapping[str, float | None] | None) -> str:
    if interval is None or interval["value"] is None:
        return ""
    if interval["low"] is None or interval["high"] is None:
        return f"{interval['value']:.3f}"
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
