"""The methods of a comparison: how they are written, and what that means on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.ids import fingerprint
from pipeline.job import NO_MODEL, model_folder
from pipeline.settings_yaml import read_yaml
from protectors.loading import model_source
from protectors.model_files import ModelError
from protectors.reference import ReferenceModelError
from protectors.registry import UnknownProtector, protector_class

_WRITTEN = re.compile(r"(?P<name>[\w.-]+)(:(?P<preset>[\w.-]+))?(@(?P<levels>\d+(\.\d+)?))?")
DEFAULT_PRESET = "fast"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """A method as it was asked for."""

    # Names its row; unique in the comparison.
    label: str
    # Registered, or "module:Class".
    name: str
    preset: str = DEFAULT_PRESET
    # Budget in 8-bit levels; None: the comparison's.
    eps_levels: float | None = None
    # Fields of the method's configuration in place of the preset's.
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method that is ready to run, or the reason why it is not."""

    spec: MethodSpec
    version: str
    config: Mapping[str, Any]
    # Folder of the checkpoint that it optimizes against, and the digest of its files; NO_MODEL where it needs none.
    model: str = NO_MODEL
    digest: str = NO_MODEL
    # Side in pixels at which it sees images, by that checkpoint; None where it needs none.
    side: int | None = None
    # Why it cannot run; None: it can.
    failed: str | None = None

    @property
    def label(self) -> str:
        """Names its row."""
        return self.spec.label

    def identity(self) -> dict[str, Any]:
        """Everything of it that decides pixels."""
        return {"name": self.spec.name, "version": self.version, "config": self.config, "model": self.digest}


def parse_methods(text: str) -> list[MethodSpec]:
    """Reads `name[:preset][@levels]`, several of them between commas.

    Raises:
        UserError: one of them is written otherwise.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _WRITTEN.fullmatch(part)
        if match is None:
            raise UserError(f"method {part!r}: write name, name:preset, name@levels or name:preset@levels")
        levels = match["levels"]
        found.append(
            MethodSpec(
                label=part,
                name=match["name"],
                preset=match["preset"] or DEFAULT_PRESET,
                eps_levels=None if levels is None else float(levels),
            )
        )
    return found


def read_methods(file: Path) -> list[MethodSpec]:
    """Reads a YAML list of rows `{label, name, preset, eps_levels, overrides}`; `name` alone is needed.

    Raises:
        UserError: it cannot be read, or a row has another form.
    """
    try:
        rows = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file} must hold a list of methods, such as `- {{name: mist, overrides: {{steps: 50}}}}`")
    return [_row(file, row) for row in rows]


def _row(file: Path, row: dict[str, Any]) -> MethodSpec:
    known = [item.name for item in fields(MethodSpec)]
    if unknown := sorted(set(row) - set(known)):
        raise UserError(f"{file}: no such field {unknown[0]!r}; a method has {', '.join(known)}")
    if not isinstance(row.get("name"), str):
        raise UserError(f"{file}: a method without a name: {row}")
    for name in ("label", "preset"):
        if not isinstance(row.get(name, ""), str):
            raise UserError(f"{file}: the {name} of {row['name']} must be text, not {row[name]!r}: write it in quotes")
    levels = row.get("eps_levels")
    if levels is not None and (isinstance(levels, bool) or not isinstance(levels, int | float)):
        raise UserError(f"{file}: eps_levels of {row['name']} must be a number, not {levels!r}")
    if not isinstance(row.get("overrides", {}), dict):
        raise UserError(f"{file}: the overrides of {row['name']} must be a mapping")
    return MethodSpec(**{"label": row["name"], **row})


def resolve_methods(
    specs: Sequence[MethodSpec], *, eps_levels: float, surrogates: Mapping[str, str], digest: Callable[[str], str]
) -> tuple[Method, ...]:
    """Applies presets and budgets, and finds the checkpoint.

    Args:
        specs: what is compared.
        eps_levels: budget of those that name none.
        surrogates: what methods optimize against, by kind of `protectors.loading`; else the embedded ones.
        digest: of a checkpoint's folder.

    Raises:
        UserError: an unknown method, preset or field, a value that cannot work, or the same twice. A checkpoint
            that is not there is no such error: it fails the method alone.
    """
    labels = [spec.label for spec in specs]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"two methods are called {repeated[0]!r}: give one of them another label")
    methods = tuple(_resolve(spec, eps_levels, surrogates, digest) for spec in specs)
    same: dict[str, str] = {}
    for method in methods:
        chosen = protector_class(method.spec.name)  # a registered one may also be asked for as "module:Class"
        whole = method.identity() | {"name": f"{chosen.__module__}:{chosen.__qualname__}"}
        other = same.setdefault(fingerprint(whole), method.label)
        if other != method.label:
            raise UserError(f"methods {other!r} and {method.label!r} are the same: leave one of them out")
    return methods


def _resolve(
    spec: MethodSpec, eps_levels: float, surrogates: Mapping[str, str], digest: Callable[[str], str]
) -> Method:
    try:
        chosen = protector_class(spec.name)
    except UnknownProtector as error:
        raise UserError(str(error)) from error
    if spec.preset not in chosen.presets:
        raise UserError(f"method {spec.name!r} has no preset {spec.preset!r}; it has {', '.join(chosen.presets)}")
    budget = eps_levels if spec.eps_levels is None else spec.eps_levels
    try:
        config = chosen.presets[spec.preset].replace(**{"eps_levels": float(budget), **spec.overrides})
    except (ValueError, TypeError) as error:
        raise UserError(f"method {spec.label!r}: {error}") from error
    method = Method(spec=spec, version=chosen.version, config=config.to_dict())
    if not chosen.needs_model():
        return method
    try:
        source = model_source(chosen)
        name = surrogates.get(source.kind, source.embedded)
        if name is None:
            raise ModelError(f"it attacks {source.form} models and none is embedded: give --model {source.kind}=FOLDER")
        folder = model_folder(name)
        side = source.training_scale(folder)
    except (ModelError, ReferenceModelError) as error:
        return replace(method, failed=str(error))
    return replace(method, model=folder, digest=digest(folder), side=side)


def check_label(label: str, methods: Iterable[Method]) -> None:
    """Raises UserError unless a method has this label."""
    known = [method.label for method in methods]
    if label not in known:
        close = get_close_matches(label, known, n=1)
        raise UserError(f"no method {label!r} in this comparison; it has {', '.join(close or known)}")
