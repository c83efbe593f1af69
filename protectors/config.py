"""Configuration of a method: a frozen dataclass that checks itself and can be rebuilt from its JSON."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

ScheduleName = Literal["constant", "linear", "cosine"]

# Mark of fields that came when results were already stored: at its default such a field is left out of ``to_dict``, of
# which the keys of stored results are made. They stay valid, for the default is what the code did before there was the
# field; so it must never change.
LATE: Mapping[str, bool] = {"late": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """Base of every configuration, of methods that change images and of those that change models.

    Fields hold plain JSON values only, so that ``canonical_json()`` can name the configuration in
    fingerprints. Subclasses add fields and override ``check``; types are checked here for all of them.

    Raises:
        ValueError: a field has the wrong type or a value that cannot work; the message says the fix.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            value = _conform(each.name, hints[each.name], getattr(self, each.name))
            object.__setattr__(self, each.name, value)
        self.check()

    def check(self) -> None:
        """Raises ValueError if the values do not fit together; subclasses call their parent's first."""
        # super() without arguments fails in slots dataclasses on Python 3.11 (the decorator makes a new
        # class): subclasses write ``MethodConfig.check(self)``.

    def canonical_json(self) -> str:
        """The one JSON text of these values: sorted keys, no spaces; 8 and 8.0 give the same text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Field names and values, without late fields at their default; ``from_dict`` of it is equal to this object."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        late = {each.name: each.default for each in fields(self) if each.metadata == LATE}
        return {name: value for name, value in values.items() if name not in late or value != late[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the configuration; missing fields take their defaults, unknown ones raise ValueError."""
        known = [each.name for each in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
        return cls(**values)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one; unknown fields raise ValueError."""
        return self.from_dict({**self.to_dict(), **changes})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectorConfig(MethodConfig):
    """Base of the configurations of methods that change images."""

    # Largest change of any saved pixel value, in 8-bit levels. A file can only use whole levels, so 7.65
    # gives 7. Larger protects better and shows more.
    eps_levels: float = 8.0

    def check(self) -> None:
        MethodConfig.check(self)
        require(1 <= self.eps_levels <= 255, "eps_levels", self.eps_levels, "use 1 to 255 (8-bit levels)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig(ProtectorConfig):
    """Fields of the methods that search by sign steps on every image for itself: how long, and how often."""

    # Sign steps per image. Time grows in proportion; 0 is refused because it would protect nothing.
    steps: int = 100
    # Start at a uniform random point of the budget (True) or at the original (False).
    random_start: bool = True
    # Draws of (timestep, noise) for the objective that is measured before and after. It costs two forward
    # passes per draw; fewer draws make the facts noisier, never the pixels of a single start.
    eval_draws: int = 8
    # Early stop: an image takes no more steps once the last `patience` of them brought less than a tenth of what as
    # many brought on average. 0 never stops; nothing stops before twice this. With less than a fifth of `steps`, noise
    # of the objective passes for its end. Each measurement takes two draws without gradient.
    patience: int = field(default=0, metadata=LATE)
    # Starts per image, each at another random point. The one with the best objective is kept; time grows in proportion.
    restarts: int = field(default=1, metadata=LATE)
    # How the steps shorten from the first, of step_levels, to the last: not at all, to 1 % in a line, or to nearly 0
    # along half a cosine.
    schedule: ScheduleName = field(default="constant", metadata=LATE)

    def check(self) -> None:
        ProtectorConfig.check(self)
        require(self.steps >= 1, "steps", self.steps, "use 1 or more")
        require(self.eval_draws >= 1, "eval_draws", self.eval_draws, "use 1 or more")
        # Nothing stops before it has been measured twice.
        fits = 0 <= 2 * self.patience < self.steps
        require(fits, "patience", self.patience, f"use less than half of the steps ({self.steps}), or 0 (off)")
        require(self.restarts >= 1, "restarts", self.restarts, "use 1 or more")
        again = self.restarts == 1 or self.random_start
        require(again, "restarts", self.restarts, "use 1, or random_start: every start must be another")


@dataclass(frozen=True, slots=True, kw_only=True)
class PgdConfig(SearchConfig):
    """Fields of ``SearchConfig``, with a step length that does not depend on the budget."""

    # Length of one sign step in 8-bit levels. Below eps_levels / steps the budget is never used up.
    step_levels: float = 1.0

    def check(self) -> None:
        SearchConfig.check(self)
        require(0 < self.step_levels <= 255, "step_levels", self.step_levels, "use more than 0 (8-bit levels)")


def require(holds: bool, field: str, value: object, fix: str) -> None:
    """Raises ValueError naming field, value and fix unless the condition holds."""
    if not holds:
        raise ValueError(f"{field}={value!r}: {fix}")


def _conform(name: str, hint: Any, value: Any) -> Any:
    """The value in the one form that the annotation allows, or ValueError.

    Whole numbers become floats and lists become tuples where those are declared, because YAML and JSON
    cannot tell them apart; text is never parsed into numbers.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        require(value in arguments, name, value, f"use one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [argument for argument in arguments if argument is not type(None)]
        return _conform(name, hint, value)
    if origin is tuple:
        require(isinstance(value, list | tuple), name, value, 'use a list: ["a", "b"] or [1, 2]')
        return tuple(_conform(name, arguments[0], item) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # bool is a subclass of int: True must not pass for a number of steps.
    require(type(value) is hint, name, value, f"use a value of type {hint.__name__}")
    require(hint is not float or math.isfinite(value), name, value, "use a finite number")
    return value
