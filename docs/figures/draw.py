"""Draws the figures of the documentation: `python docs/figures/draw.py [FOLDER]`.

Dark text on white, colours that are told apart by colour-blind readers too. With one release of
matplotlib the same source gives the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
TEXT, LINE = "#1a1a1a", "#555555"
PLAIN, MEMORY, ATTENTION, LEARNED = "#f2f2f2", "#cfe4f5", "#fde3c0", "#d5ecd4"

Point = tuple[float, float]


def box(ax: Axes, x: float, y: float, text: str, colour: str = PLAIN, wide: float = 1.6) -> None:
    """A box around (x, y), 0.7 high."""
    shape = FancyBboxPatch(
        (x - wide / 2, y - 0.35),
        wide,
        0.7,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=colour,
        edgecolor=LINE,
        linewidth=1,
    )
    ax.add_patch(shape)
    note(ax, x, y, text)


def note(ax: Axes, x: float, y: float, text: str, size: float = 10, where: str = "center") -> None:
    ax.text(x, y, text, ha=where, va="center", fontsize=size, color=TEXT, linespacing=1.25)


def arrow(ax: Axes, *points: Point, dashed: bool = False) -> None:
    """Straight pieces from point to point, with a head on the last."""
    style = "--" if dashed else "-"
    for (x0, y0), (x1, y1) in pairwise(points[:-1]):
        ax.plot([x0, x1], [y0, y1], color=LINE, linewidth=1.2, linestyle=style)
    properties = {"arrowstyle": "-|>", "color": LINE, "linewidth": 1.2, "linestyle": style}
    ax.annotate("", points[-1], points[-2], arrowprops={**properties, "shrinkA": 0, "shrinkB": 0})


def memory(ax: Axes) -> None:
    """One token: read with the query, measure the surprise, write."""
    box(ax, 1, 2, "token $x_t$", wide=1.4)
    for y, name in ((3.2, "query $q_t$"), (2, "key $k_t$, value $v_t$"), (0.8, "gates")):
        box(ax, 3.6, y, name, wide=2.2)
        arrow(ax, (1.7, 2), (2.1, 2), (2.1, y), (2.5, y))
    note(ax, 3.6, 0.22, r"$\theta_t,\ \alpha_t,\ \eta_t$")
    box(ax, 7, 3.2, "memory $M(\\cdot\\,; W_t)$", MEMORY, 2.4)
    box(ax, 7, 2, "surprise\n$\\nabla\\,\\|M(k_t) - v_t\\|^2$", LEARNED, 2.4)
    box(ax, 7, 0.8, "momentum $S_t$", LEARNED, 2.4)
    arrow(ax, (4.7, 3.2), (5.8, 3.2))
    arrow(ax, (4.7, 2), (5.8, 2))
    arrow(ax, (4.7, 0.8), (5.8, 0.8))
    arrow(ax, (7, 1.65), (7, 1.15))
    arrow(ax, (8.2, 0.8), (8.8, 0.8), (8.8, 2.95), (8.2, 2.95))
    note(ax, 8.95, 1.85, "update\n$W_t = (1-\\alpha_t)\\,W_{t-1} + S_t$", where="left")
    arrow(ax, (8.2, 3.35), (10.1, 3.35))
    box(ax, 10.9, 3.35, "output $o_t$", wide=1.6)
    ax.set(xlim=(0, 12), ylim=(0, 3.9))


def levels(ax: Axes) -> None:
    """Chunks within a block."""
    for i in range(16):
        box(ax, 0.6 + 0.62 * i, 1.7, f"{i + 1}" if i < 3 else "", PLAIN, 0.5)
    note(ax, -0.1, 1.7, "tokens", where="right")
    for i in range(4):
        left = 0.35 + 2.48 * i
        ax.plot([left, left + 2.36], [2.25, 2.25], color="#0072b2", linewidth=4)
        note(ax, left + 1.18, 2.6, f"chunk {i + 1}")
    note(ax, -0.1, 2.4, "gradients\nanchored", where="right")
    ax.plot([0.35, 10.15], [1.1, 1.1], color="#d55e00", linewidth=4)
    note(ax, 5.25, 0.75, "one block: the weights $W$, $S$ are written once, at its end")
    note(ax, -0.1, 1.1, "state\nwritten", where="right")
    for x, name in ((0.35, "$W_0, S_0$"), (10.15, "$W', S'$")):
        arrow(ax, (x, 0.35), (x, 1.02))
        note(ax, x, 0.15, name)
    ax.set(xlim=(-1.6, 11), ylim=(-0.1, 3))


def family(ax: Axes) -> None:
    """The four blocks, a row each."""
    rows = {"LMM": 7.2, "MAC": 5.0, "MAG": 2.6, "MAL": 0.6}
    for name, y in rows.items():
        note(ax, 0.1, y, f"Titans{name}", 11, "left")
        box(ax, 2.3, y, "$p,\\ x$" if name != "MAC" else "$x$", wide=0.9)
    for name in ("LMM", "MAL"):
        y = rows[name]
        arrow(ax, (2.75, y), (3.8, y))
        box(ax, 4.7, y, "memory", MEMORY, 1.8)
    arrow(ax, (5.6, rows["LMM"]), (10.4, rows["LMM"]))

    y = rows["MAL"]
    arrow(ax, (5.6, y), (6.3, y))
    box(ax, 7.4, y, "window attention", ATTENTION, 2.2)
    arrow(ax, (8.5, y), (10.4, y))

    y = rows["MAG"]
    for up, text, colour in ((0.5, "window attention", ATTENTION), (-0.5, "memory", MEMORY)):
        arrow(ax, (2.75, y), (3.3, y), (3.3, y + up), (3.8, y + up))
        box(ax, 4.9, y + up, text, colour, 2.2)
        arrow(ax, (6, y + up), (9, y + up), (9, y + (0.2 if up > 0 else -0.2)))
    gate(ax, 9, y)

    y = rows["MAC"]
    box(ax, 4.7, y + 0.6, "memory, read", MEMORY, 1.8)
    arrow(ax, (2.75, y), (3.3, y), (3.3, y + 0.6), (3.8, y + 0.6))
    arrow(ax, (5.6, y + 0.6), (5.9, y + 0.6), (5.9, y + 0.15), (6.1, y + 0.15))
    arrow(ax, (2.75, y), (6.1, y))
    note(ax, 4.7, y - 0.45, "persistent $p$")
    arrow(ax, (5.55, y - 0.45), (5.9, y - 0.45), (5.9, y - 0.15), (6.1, y - 0.15))
    box(ax, 6.9, y, "attention", ATTENTION, 1.6)
    arrow(ax, (7.7, y), (8.8, y))
    arrow(ax, (8.0, y), (8.0, y - 0.95), (7.8, y - 0.95))
    box(ax, 6.7, y - 0.95, "memory, learns", MEMORY, 2.2)
    arrow(ax, (6.7, y - 1.3), (6.7, y - 1.45), (9, y - 1.45), (9, y - 0.2))
    gate(ax, 9, y)
    for y in rows.values():
        box(ax, 10.9, y, "$o$", wide=1)
    ax.set(xlim=(0, 11.6), ylim=(0.1, 7.7))


def tnt(ax: Axes) -> None:
    """One global memory over the whole text, local ones that begin anew in every shard."""
    wide, shards = 3.3, 3
    for shard in range(shards):
        left = (wide + 0.3) * shard
        middle = left + wide / 2
        box(ax, middle, 2.6, f"chunk {shard + 1}", MEMORY, wide)
        if shard:
            arrow(ax, (left - 0.3, 2.6), (left, 2.6))
        for part in range(4):
            box(ax, left + wide * (part + 0.5) / 4, 1.0, "", LEARNED, wide / 4 - 0.12)
            if part:
                arrow(
                    ax, (left + wide * part / 4 - 0.08, 1.0), (left + wide * part / 4 + 0.08, 1.0)
                )
        note(ax, middle, 0.45, f"shard {shard + 1}")
        arrow(ax, (left + 0.4, 1.75), (left + 0.4, 1.38))
        note(ax, left + 0.5, 1.72, "starts with $M_0$", 9, "left")
    note(ax, -0.2, 2.6, "global memory,\nlarge chunks", where="right")
    note(ax, -0.2, 1.0, "local memory,\nsmall chunks", where="right")
    end = (wide + 0.3) * shards - 0.3
    note(
        ax,
        end / 2,
        3.2,
        "a chunk after the other; a query reads the weights its chunk starts with",
        9,
    )
    note(ax, end / 2, 0.0, "all shards side by side", 9)
    ax.set(xlim=(-2.2, end + 0.1), ylim=(-0.25, 3.4))


def gate(ax: Axes, x: float, y: float) -> None:
    ax.add_patch(plt.Circle((x, y), 0.2, facecolor="white", edgecolor=LINE, zorder=3))
    ax.text(x, y, "$\\otimes$", ha="center", va="center", fontsize=12, color=TEXT, zorder=4)
    arrow(ax, (x + 0.2, y), (10.4, y))


FIGURES: dict[str, tuple[Callable[[Axes], None], Point]] = {
    "memory": (memory, (9.6, 3.1)),
    "levels": (levels, (9.6, 2.4)),
    "family": (family, (9, 6)),
    "tnt": (tnt, (9.6, 2.9)),
}


def draw(folder: Path) -> None:
    settings = {"svg.hashsalt": "titans", "svg.fonttype": "path", "mathtext.fontset": "dejavusans"}
    with plt.rc_context(settings):
        for name, (paint, size) in FIGURES.items():
            figure, ax = plt.subplots(figsize=size, layout="constrained")
            ax.axis("off")
            paint(ax)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")
            plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
