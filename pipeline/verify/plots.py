"""Intervals as a picture: one line per purifier, with the lines that they must be compared with.

The picture is inline SVG without a size of its own. Its colours are the page's CSS variables, so that it follows the
reader's light or dark scheme. Shapes differ as well as colours, for readers who do not tell colours apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)

# In points. Drawn as wide as a phone, so that text stays legible there; a desktop shows it larger.
_WIDTH, _LINE, _ABOVE, _BELOW = 270.0, 27.0, 13.0, 31.0
_TEXT = 8.5
_LONGEST_LABEL = 30
# XML 1.0, section 2.2: these cannot even be escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# Colours that nothing else in the picture has stand for the page's variables.
_INK, _MUTED, _RULE = "#010203", "#040506", "#070809"
_GOOD, _BAD = "#0a0b0c", "#0d0e0f"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule", _GOOD: "--good", _BAD: "--bad"}


class Tone(StrEnum):
    """How a finding is shown, in sentences, tables and plots alike."""

    GOOD = "good"
    BAD = "bad"
    # Measured, and not decided.
    OPEN = "open"
    # Not measured, or not to be read.
    VOID = "void"


class _Look(NamedTuple):
    colour: str
    marker: str
    filled: bool
    line: str


_LOOKS: Mapping[Tone, _Look] = MappingProxyType(
    {
        Tone.GOOD: _Look(_GOOD, "o", True, "-"),
        Tone.BAD: _Look(_BAD, "s", True, "-"),
        Tone.OPEN: _Look(_INK, "D", False, "-"),
        Tone.VOID: _Look(_MUTED, "x", False, ":"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One line of the picture."""

    label: str
    # Beside the label: the numbers, or why there are none.
    note: str
    value: float | None
    # None: no limit on this side; without both the value stands alone.
    low: float | None
    high: float | None
    tone: Tone


def interval_plot(spans: Sequence[Span], marks: Sequence[float], *, axis: str, title: str) -> str:
    """Draws intervals, from top to bottom.

    Args:
        spans: the lines; those without a value show their label and note alone.
        marks: vertical lines to compare with, from left to right; zero is drawn solid, the others dashed.
        axis: what the numbers are, with their unit.
        title: what the picture shows, for readers who hear it.

    Returns:
        An ``<svg>`` element, all text escaped; the same arguments give the same text.
    """
    height = _ABOVE + _LINE * len(spans) + _BELOW
    # Text stays text; names in the file follow from its content, not from chance.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure = Figure(figsize=(_WIDTH / 72, height / 72))
        axes = figure.add_axes((0.025, _BELOW / height, 0.95, _LINE * len(spans) / height))
        _draw_frame(axes, spans, marks, axis)
        for place, span in enumerate(spans):
            _draw_span(axes, place, span)
        drawn = io.StringIO()
        no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(drawn, format="svg", transparent=True, metadata=no_metadata)
    return _inline(drawn.getvalue(), title)


def _draw_frame(axes: Axes, spans: Sequence[Span], marks: Sequence[float], label: str) -> None:
    axes.set_ylim(max(1, len(spans)), 0)
    axes.set_xlim(*_limits(spans, marks))
    axes.get_yaxis().set_visible(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", color=_RULE, labelcolor=_MUTED, labelsize=_TEXT)
    axes.set_xlabel(_printable(label), color=_MUTED, fontsize=_TEXT, parse_math=False)
    for place, mark in enumerate(marks):
        axes.axvline(mark, color=_MUTED, linewidth=0.8, linestyle="-" if mark == 0 else (0, (4, 2)))
        side, gap = ("right", -2) if place == 0 else ("left", 2)  # two lines may be close to each other
        axes.annotate(
            f"{mark:g}",
            xy=(mark, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(gap, 3),
            textcoords="offset points",
            ha=side,
            color=_MUTED,
            fontsize=_TEXT,
        )


def _limits(spans: Sequence[Span], marks: Sequence[float]) -> tuple[float, float]:
    ends = [*marks]
    ends += [end for span in spans for end in (span.value, span.low, span.high) if end is not None]
    low, high = min(ends), max(ends)
    room = 0.06 * ((high - low) or 1)
    return low - room, high + room


def _draw_span(axes: Axes, place: int, span: Span) -> None:
    look = _LOOKS[span.tone]
    label = _printable(span.label)
    if len(label) > _LONGEST_LABEL:
        label = label[: _LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
    beside = axes.get_yaxis_transform()
    for x, side, text, colour in ((0.0, "left", label, _INK), (1.0, "right", _printable(span.note), _MUTED)):
        axes.text(x, place + 0.34, text, transform=beside, ha=side, va="center", color=colour, fontsize=_TEXT,
                  parse_math=False)  # fmt: skip
    if span.value is None:
        return
    y = place + 0.74
    if span.low is not None or span.high is not None:
        left, right = axes.get_xlim()
        ends = (left if span.low is None else span.low, right if span.high is None else span.high)
        axes.plot(ends, (y, y), color=look.colour, linewidth=1.8, linestyle=look.line, solid_capstyle="butt")
        limits = [end for end in (span.low, span.high) if end is not None]
        axes.plot(limits, [y] * len(limits), color=look.colour, linestyle="none", marker="|", markersize=6)
    fill = look.colour if look.filled else "none"
    axes.plot(
        [span.value], [y], linestyle="none", marker=look.marker, markersize=5.5, color=look.colour, markerfacecolor=fill
    )


def _printable(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _inline(document: str, title: str) -> str:
    root = ElementTree.fromstring(document)
    for name in ("width", "height"):
        del root.attrib[name]
    root.attrib |= {"class": "plot", "role": "img", "aria-label": title}
    _remove(root, (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"))
    for group in root.iter(f"{{{_SVG}}}g"):
        group.attrib.pop("id", None)  # matplotlib counts them anew in every picture; a page holds several
    svg = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _remove(root: ElementTree.Element, tags: Iterable[str]) -> None:
    """Style rules in an SVG would hold for the whole page."""
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in tags]:
            parent.remove(child)
