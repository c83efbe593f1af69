"""What the documentation of every method must hold, of image and of model protectors alike."""

from __future__ import annotations

PARTS = ("https://", "Distance:", "Args:", "Shape:", "Returns:", "Raises:", "Cost:", "Differs from the paper:")


def assert_complete(method: type) -> None:
    """All parts are there, in this order."""
    text = method.__doc__ or ""
    places = [text.find(part) for part in PARTS]
    assert -1 not in places
    assert places == sorted(places)
