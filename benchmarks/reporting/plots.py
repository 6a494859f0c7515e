"""Pictures of a recorded run: `python -m benchmarks.reporting.plots benchmarks/results/<name>.json`

Needs matplotlib (`pip install -e '.[bench]'`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..machine_code.model import forward_bytes
from ..running.cases import OURS
from ..running.harness import Row
from ..running.shapes import BOTH, FORWARD
from . import style

Figure = Any
Drawn = tuple[Figure, list[Row]]
OVER_LENGTH = {"operator": "operator", "long": "operator", "layer": "layer", "layer-paper": "layer"}


def draw(record: Path) -> list[Path]:
    """By length, by chunk size and with peers: the pictures that there are rows for."""
    import matplotlib

    matplotlib.use("Agg")

    report = json.loads(record.read_text(encoding="utf-8"))
    rows = [Row.from_record(row) for row in report["rows"] if row["problem"] is None]
    machine = report["machine"]
    pictures = {
        "time": _over_length(rows, "milliseconds a call", lambda row: (row.median_s or 0) * 1e3),
        "memory": _over_length(rows, "peak MiB", lambda row: (row.peak_bytes or 0) / 2**20),
        "chunks": _over_chunks(rows),
        "ratios": _ratios(rows),
        "roofline": _roofline(rows, machine),
    }
    return [
        style.save(
            picture[0],
            record.with_name(f"{record.stem}-{suffix}.png"),
            _source(machine, picture[1]),
        )
        for suffix, picture in pictures.items()
        if picture is not None
    ]


def _source(machine: dict[str, Any], rows: list[Row]) -> str:
    """What is below a picture: the machine, and the dtypes of the rows in it."""
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in rows))
    return (
        f"{machine['device']}, {machine['threads']} thread(s), {dtypes}, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}"
    )


def _over_length(rows: list[Row], label: str, value: Callable[[Row], float]) -> Drawn | None:
    """What a call takes by the length of the text; rows that lack it are left out."""
    rows = [row for row in rows if row.case in OVER_LENGTH and value(row)]
    rows = _of_one_size(rows)
    if not rows:
        return None
    modes = [mode for mode in (FORWARD, BOTH) if any(row.mode == mode for row in rows)]
    figure, axes = style.panels(2.6 + 3.4 * len(modes), 4.2, columns=len(modes))
    looks = _looks(rows)
    for axis, mode in zip(axes[0], modes, strict=True):
        for name, look in looks.items():
            # A peer that several chunks of ours are compared with has a row for each.
            found = [row for row in reversed(rows) if row.mode == mode and _series(row) == name]
            points = {row.shape.T: value(row) for row in found}
            if points:
                axis.plot(*zip(*sorted(points.items()), strict=True), label=name, **look)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted({row.shape.T for row in rows}))
        axis.xaxis.set_major_formatter(lambda T, _: f"{T / 1024:g}k" if T >= 1024 else f"{T:g}")
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
        axis.set(title=mode, xlabel="tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    style.legend_beside(figure, axes[0][0])
    shape = rows[0].shape
    figure.suptitle(f"{shape.B} x {shape.H} heads of {shape.D}, hidden {shape.hidden}", fontsize=10)
    return figure, rows


def _series(row: Row) -> str:
    """The line that a row is on."""
    if row.provider == OURS:
        return f"{OURS}, {OVER_LENGTH[row.case]}, chunk {row.shape.chunk}"
    if row.provider.startswith("titans-pytorch"):
        return row.provider.replace(" paper", ", paper form") + ", layer"
    return row.provider


def _looks(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """By line: ours solid, all others dashed, each with a colour and a marker."""
    names = {_series(row): row.provider == OURS for row in rows}
    own = ((style.BLUE, "o"), (style.SKY, "o"), (style.BLACK, "D"), (style.GREY, "D"))
    others = tuple(zip(style.OTHERS, style.MARKERS, strict=True))
    looks = {}
    for ours, choice in ((True, own), (False, others)):
        for i, name in enumerate(sorted((n for n in names if names[n] == ours), key=_order)):
            colour, marker = choice[i % len(choice)]
            looks[name] = {"color": colour, "marker": marker, "ls": "-" if ours else "--"}
    return looks


def _order(name: str) -> tuple[bool, str]:
    """Operators before layers."""
    return "layer" in name, name


def _over_chunks(rows: list[Row]) -> Drawn | None:
    """What a token costs by the chunk, and how much of the machine's products that is."""
    rows = [row for row in rows if row.provider == OURS and row.case == "sizes"]
    rows = [row for row in rows if (row.shape.B, row.shape.H, row.shape.D) == (1, 4, 64)]
    chunks = sorted({row.shape.chunk for row in rows})
    if len(chunks) < 2:
        return None
    figure, axes = style.panels(7, 3.6)
    axis = axes[0][0]
    for i, (mode, colour) in enumerate(((FORWARD, style.BLUE), (BOTH, style.ORANGE))):
        found = {row.shape.chunk: row for row in rows if row.mode == mode}
        shapes = [found[chunk] for chunk in chunks if chunk in found]
        cost = [1e6 * (r.median_s or 0) / (r.shape.T * r.shape.H) for r in shapes]
        places = [chunks.index(r.shape.chunk) + 0.4 * i - 0.2 for r in shapes]
        bars = axis.bar(places, cost, 0.36, color=colour, label=mode)
        texts = [f"{r.of_ceiling:.0%}" if r.of_ceiling else "" for r in shapes]
        axis.bar_label(bars, texts, fontsize=8, padding=1)
    axis.margins(y=0.1)
    axis.set_xticks(range(len(chunks)), [str(chunk) for chunk in chunks])
    axis.set(xlabel="chunk size", ylabel="microseconds a token and head")
    style.legend_beside(figure, axis)
    axis.set_title(
        "The operator by chunk size; above bars: share of the product ceiling", fontsize=10
    )
    return figure, rows


def _of_one_size(rows: list[Row]) -> list[Row]:
    """Those of the batch, heads and head dimension that there are most lengths of."""

    def size(row: Row) -> tuple[int, int, int]:
        return row.shape.B, row.shape.H, row.shape.D

    lengths: dict[tuple[int, int, int], set[int]] = {}
    for row in rows:
        lengths.setdefault(size(row), set()).add(row.shape.T)
    most = max(lengths, key=lambda x: (len(lengths[x]), x), default=None)
    return [row for row in rows if size(row) == most]


def _roofline(rows: list[Row], machine: dict[str, Any]) -> Drawn | None:
    """FLOP per second over FLOP per byte, of ours, under what the machine reaches."""
    rows = [row for row in rows if row.case == "operator" and row.provider == OURS and row.flop]
    rows = [row for row in rows if row.mode == FORWARD]
    if not rows or not machine.get("copy_bytes"):
        return None
    from matplotlib.ticker import LogLocator

    figure, axes = style.panels(8, 4.2)
    axis = axes[0][0]
    peak, copy = machine["matmul_flops"], machine["copy_bytes"]
    knee = peak / copy
    # On a GPU, what our kernels move; else the least that any implementation moves.
    moved = [forward_bytes(r.shape) if machine["driver"] else r.least_bytes or 1 for r in rows]
    intensities = [(r.flop or 0) / m for r, m in zip(rows, moved, strict=True)]
    ends = [knee / 8, knee, 2 * max(8 * knee, *intensities)]
    roof = [copy * ends[0] / 1e9, peak / 1e9, peak / 1e9]
    axis.plot(ends, roof, color=style.BLACK, label="copies and products, measured")
    chunks = sorted({row.shape.chunk for row in rows})
    sizes = sorted({(row.shape.B, row.shape.H, row.shape.D, row.shape.T) for row in rows})
    for row, intensity in zip(rows, intensities, strict=True):
        shape = row.shape
        size = shape.B, shape.H, shape.D, shape.T
        look = {
            "color": (style.BLUE, *style.OTHERS)[chunks.index(shape.chunk) % 7],
            "marker": ("o" + style.MARKERS)[sizes.index(size) % 7],
            "markerfacecolor": "none",
            "linestyle": "none",
        }
        name = f"{shape.B} x {shape.H} x {shape.D}, T {shape.T:,}, chunk {shape.chunk}"
        axis.plot(intensity, (row.flop or 0) / (row.median_s or 1) / 1e9, label=name, **look)
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte, counted", ylabel="GFLOP/s")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter(lambda x, _: f"{x:,g}")
        ticks.set_minor_formatter(lambda x, _: "")
    axis.grid(alpha=0.3)
    style.legend_beside(figure, axis)
    axis.set_title("The operator, forward", fontsize=10)
    return figure, rows


def _ratios(rows: list[Row]) -> Drawn | None:
    """Time and memory of titans-pytorch over ours."""
    rows = [row for row in rows if row.provider.startswith("titans-pytorch")]
    quantities = (
        ("time", style.BLUE, [row.time_ratio for row in rows]),
        ("peak memory", style.SKY, [row.memory_ratio for row in rows]),
    )
    drawn = [quantity for quantity in quantities if any(quantity[2])]
    if not drawn:
        return None
    figure, axes = style.panels(3 + 3 * len(drawn), 1.4 + 0.5 * len(rows), columns=len(drawn))
    labels = [f"{row.provider}\n{row.case}, {row.mode}, T {row.shape.T:,}" for row in rows]
    for axis, (what, colour, ratios) in zip(axes[0], drawn, strict=True):
        widths = [(ratio or 1.0) - 1.0 for ratio in ratios]
        axis.barh(labels, widths, left=1.0, color=colour, height=0.6)
        for i, ratio in enumerate(ratios):
            text = " not measured" if ratio is None else f" {ratio:.2g}x"
            axis.text(max(ratio or 1.0, 1.0), i, text, va="center", fontsize=8, color=style.BLACK)
        axis.axvline(1, color=style.BLACK, linewidth=1)
        axis.set_xscale("log")
        known = [ratio for ratio in ratios if ratio] + [1.0]
        axis.set_xlim(min(known) / 1.5, max(known) * 5)
        axis.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
        axis.xaxis.set_minor_formatter(lambda ratio, _: "")
        axis.set_title(f"{what}, over that of {OURS}", fontsize=10)
        axis.tick_params(axis="y", labelsize=8)
    axes[0][0].invert_yaxis()
    return figure, rows


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for drawn in draw(Path(argument)):
            print(drawn)
