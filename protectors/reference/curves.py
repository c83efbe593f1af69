"""Draws a loss curve as a picture."""

import csv
from pathlib import Path


def draw_curve(file: Path, picture: Path) -> Path | None:
    """Draws the CSV of a training as PNG, the training loss above, each held-out figure below.

    Returns:
        `picture`, or None where there is no line to draw.
    """
    # Imported here: it costs a second, and only drawing needs it. The object API leaves global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows: list[dict[str, float]] = []
    if file.exists():
        with file.open(newline="") as lines:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]
    if not rows:
        return None
    names = [name for name in rows[0] if name not in ("step", "samples_per_s", "loss")]
    # Losses of one kind share an axis, so that a gap between training and held-out photos is seen.
    losses, others = [n for n in names if n.endswith("_loss")], [n for n in names if not n.endswith("_loss")]
    panels = [["loss"], *([losses] if losses else []), *([name] for name in others)]
    figure = Figure(figsize=(7, 2.4 * len(panels)), layout="constrained")
    steps = [row["step"] for row in rows]
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        for name in panel:
            axes.plot(steps, [row[name] for row in rows], label=name)
        axes.legend()
        axes.grid(alpha=0.3)
    axes.set_xlabel("updates")
    FigureCanvasAgg(figure)
    figure.savefig(picture)
    return picture
