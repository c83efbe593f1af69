"""The methods that protect a model instead of images, by name. Each is loaded when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from protectors.registry import UnknownProtector

if TYPE_CHECKING:
    from protectors.model_base import ModelProtector

_MODEL_PROTECTORS = {
    "anchored": "protectors.anchored:Anchored",
    "apdm": "protectors.apdm:APDM",
    "imma": "protectors.imma:IMMA",
    "naive": "protectors.naive:Naive",
}


def model_protector_names() -> tuple[str, ...]:
    """All names, sorted. Loads none of them."""
    return tuple(sorted(_MODEL_PROTECTORS))


def model_protector_class(name: str) -> type[ModelProtector[Any]]:
    """The class of a method; raises UnknownProtector, which lists the names."""
    target = _MODEL_PROTECTORS.get(name)
    if target is None:
        raise UnknownProtector(f"no model protector named {name!r}. Known: {', '.join(model_protector_names())}")
    module_name, _, class_name = target.partition(":")
    found: type[ModelProtector[Any]] = getattr(import_module(module_name), class_name)
    return found
