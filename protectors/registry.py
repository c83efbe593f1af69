"""The methods by name. Each is loaded when it is asked for; other packages add theirs by entry point."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protectors.base import ImageProtector

ENTRY_POINT_GROUP = "fixative.protectors"

_PROTECTORS = {
    "advdm": "protectors.advdm:AdvDM",
    "anti_diffusion": "protectors.anti_diffusion:AntiDiffusion",
    "antipure": "protectors.antipure:AntiPure",
    "aspl": "protectors.aspl:ASPL",
    "diffusion_guard": "protectors.diffusion_guard:DiffusionGuard",
    "fixative": "protectors.fixative:Fixative",
    "fsmg": "protectors.fsmg:FSMG",
    "metacloak": "protectors.metacloak:MetaCloak",
    "mist": "protectors.mist:Mist",
    "noise": "protectors.noise:Noise",
    "photoguard": "protectors.photoguard:PhotoGuard",
    "pid": "protectors.pid:PID",
    "sds": "protectors.sds:SDS",
    "simac": "protectors.simac:SimAC",
    "static": "protectors.static:Static",
}


class UnknownProtector(ValueError):
    """No method has this name; the message lists the known ones."""


def protector_names() -> tuple[str, ...]:
    """All names, sorted: the methods of this package and those that others registered. Loads none of them."""
    return tuple(sorted({*_PROTECTORS, *(point.name for point in _entry_points())}))


def protector_class(name: str) -> type[ImageProtector[Any, Any]]:
    """The class of a method.

    Args:
        name: a registered name, or ``module:Class`` for a class that is not registered. The names of this
            package cannot be taken over by an entry point.

    Raises:
        UnknownProtector: no such name, or it leads to no ``ImageProtector``.
    """
    target = name if ":" in name else _PROTECTORS.get(name)
    if target is None:
        target = next((point.value for point in _entry_points() if point.name == name), None)
    if target is None:
        raise UnknownProtector(_unknown(name))
    return _load(target)


def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _load(target: str) -> type[ImageProtector[Any, Any]]:
    from protectors.base import ImageProtector  # brings torch in: names can be listed without it

    module_name, _, class_name = target.partition(":")
    try:
        found = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownProtector(f"{target!r} cannot be loaded: {error}; use 'module:Class'") from error
    if not (isinstance(found, type) and issubclass(found, ImageProtector)):
        raise UnknownProtector(f"{target!r} is no ImageProtector; derive it from protectors.base.ImageProtector")
    return found


def _unknown(name: str) -> str:
    known = protector_names()
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no protector named {name!r}{hint} Known: {', '.join(known)}"
