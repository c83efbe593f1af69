"""Settings from a YAML file and from options, with errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.config import JobConfig, VerifyConfig
from pipeline.errors import UserError
from pipeline.settings_yaml import read_yaml
from pipeline.storage import public_url

Config = TypeVar("Config", JobConfig, VerifyConfig)


def job_config(path: Path | None, given: dict[str, Any]) -> JobConfig:
    """The protection job of a YAML file and options, see `settings`."""
    return settings(JobConfig, path, given)


def settings(model: type[Config], path: Path | None, given: dict[str, Any]) -> Config:
    """The settings of a YAML file with the given dotted fields laid over it; fields that are None change nothing.

    Raises:
        UserError: The file cannot be read, or a field is unknown or has a wrong value.
    """
    document: Any = {}
    if path is not None:
        try:
            document = read_yaml(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(document, dict):
            raise UserError(f"{path} holds no mapping; see `fixative protect --help` for an example")
    for dotted, value in given.items():
        if value is None:
            continue
        place = document
        *parents, name = dotted.split(".")
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise UserError(f"{path}: '{parent}' must be a mapping")
        place[name] = {**place.get(name, {}), **value} if isinstance(value, dict) else value
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise UserError("; ".join(_plain(model, item) for item in error.errors())) from error


def _plain(model: Any, item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if where in ("source", "destination") and item["type"] == "missing":
        return f"no {where} given: name it as an argument or in the job file"
    if item["type"] == "extra_forbidden":
        for part in item["loc"][:-1]:
            model = model.model_fields[part].annotation
        return f"{where}: no such setting; there are {', '.join(model.model_fields)}"
    return f"{where}: {item['msg']} (got {public_url(repr(item.get('input')))})"


def overrides_of(values: list[str] | None) -> dict[str, Any] | None:
    """name=value pairs; values in YAML spelling, so that 3 is a number and true a truth value."""
    if not values:
        return None
    result: dict[str, Any] = {}
    for text in values:
        name, mark, value = text.partition("=")
        if not mark:
            raise UserError(f"--set {text}: write name=value")
        try:
            result[name] = read_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}: the value is no YAML; put it in quotes") from error
    return result
