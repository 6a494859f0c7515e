"""How pictures look: dark on white, colours that colour-blind readers tell apart (Okabe and Ito),
markers as well as colours, legends outside the axes, and below what was measured where."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

BLUE, SKY, VERMILION, ORANGE = "#0072b2", "#56b4e9", "#d55e00", "#e69f00"
GREEN, PURPLE, BLACK, GREY = "#009e73", "#cc79a7", "#1a1a1a", "#6e6e6e"
OTHERS = (VERMILION, ORANGE, PURPLE, GREEN, BLACK, GREY)
MARKERS = "s^DvPX"


def panels(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure with room for the line below it, and its axes [rows, columns]."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    room = 0.55 / height
    layout = ConstrainedLayoutEngine(rect=(0, room, 1, 1 - room))
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    return figure, figure.subplots(rows, columns, sharey=True, squeeze=False)


def legend_beside(figure: Any, axis: Any) -> None:
    """One legend for the figure, to the right of its axes."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)


def save(figure: Any, path: Path, source: str) -> Path:
    """Written, with its source in the lower left corner."""
    lines = textwrap.fill(source, int(13 * figure.get_figwidth()))
    figure.text(0.01, 0.01, lines, fontsize=7, color=BLACK, va="bottom")
    figure.savefig(path, dpi=130)
    return path
