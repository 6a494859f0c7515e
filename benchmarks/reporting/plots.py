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

COLOURS = {OURS: ("#1f4e9c", "#5b9bd5"), "SDPA causal": ("#c0504d",)}


def draw(record: Path) -> list[Path]:
    """By length, by chunk size and beside peers: the pictures that there are rows for."""
    import matplotlib

    matplotlib.use("Agg")

    report = json.loads(record.read_text(encoding="utf-8"))
    rows = [Row.from_record(row) for row in report["rows"] if row["problem"] is None]
    machine = report["machine"]
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in rows))
    source = (
        f"{machine['device']}, {machine['threads']} thread(s), {dtypes}, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}"
    )
    drawn = []
    figures = {
        "time": _over_length(rows, "milliseconds a call", lambda row: (row.median_s or 0) * 1e3),
        "memory": _over_length(rows, "peak MiB", lambda row: (row.peak_bytes or 0) / 2**20),
        "chunks": _over_chunks(rows),
        "ratios": _ratios(rows),
        "roofline": _roofline(rows, machine),
    }
    for suffix, figure in figures.items():
        if figure is not None:
            figure.text(0.01, 0.01, source, fontsize=7, color="0.4")
            path = record.with_name(f"{record.stem}-{suffix}.png")
            figure.savefig(path, dpi=130)
            drawn.append(path)
    return drawn


def _over_length(rows: list[Row], label: str, value: Callable[[Row], float]) -> Any:
    """What a call takes by the length of the text; rows that lack it are left out."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = [row for row in rows if row.case in ("operator", "long") and value(row)]
    rows = _of_one_size(rows)
    if not rows:
        return None
    figure = Figure(figsize=(9, 4.2), layout=ConstrainedLayoutEngine(rect=(0, 0.05, 1, 0.95)))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, mode in zip(axes, (FORWARD, BOTH), strict=True):
        for provider, colours in COLOURS.items():
            chunks = sorted({row.shape.chunk for row in rows})
            for chunk, colour in zip(chunks, colours, strict=False):
                points = [
                    (row.shape.T, value(row))
                    for row in rows
                    if (row.mode, row.provider, row.shape.chunk) == (mode, provider, chunk)
                ]
                if not points:
                    continue
                ours = provider == OURS
                name = f"{provider}, chunk {chunk}" if ours else provider
                style = "o-" if ours else "s--"
                axis.plot(*zip(*sorted(points), strict=True), style, color=colour, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted({row.shape.T for row in rows}))
        axis.xaxis.set_major_formatter(lambda T, _: f"{T / 1024:g}k" if T >= 1024 else f"{T:g}")
        axis.set(title=mode, xlabel="tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    axes[0].legend(frameon=False)
    shape = rows[0].shape
    figure.suptitle(f"The operator, {shape.H} heads of {shape.D}, hidden {shape.hidden}")
    return figure


def _over_chunks(rows: list[Row]) -> Any:
    """What a token costs by the chunk, and how much of the machine's products that is."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = [row for row in rows if row.provider == OURS and row.case == "sizes"]
    rows = [row for row in rows if (row.shape.B, row.shape.H, row.shape.D) == (1, 4, 64)]
    chunks = sorted({row.shape.chunk for row in rows})
    if len(chunks) < 2:
        return None
    figure = Figure(figsize=(6, 3.6), layout=ConstrainedLayoutEngine(rect=(0, 0.05, 1, 0.95)))
    axis = figure.subplots()
    for i, (mode, colour) in enumerate(zip((FORWARD, BOTH), COLOURS[OURS], strict=True)):
        found = {row.shape.chunk: row for row in rows if row.mode == mode}
        shapes = [found[chunk] for chunk in chunks]
        cost = [1e6 * (r.median_s or 0) / (r.shape.T * r.shape.H) for r in shapes]
        places = [place + 0.4 * i - 0.2 for place in range(len(chunks))]
        bars = axis.bar(places, cost, 0.36, color=colour, label=mode)
        texts = [f"{r.of_ceiling:.0%}" if r.of_ceiling else "" for r in shapes]
        axis.bar_label(bars, texts, fontsize=8)
    axis.set_xticks(range(len(chunks)), [str(chunk) for chunk in chunks])
    axis.set(xlabel="chunk size", ylabel="microseconds a token and head")
    axis.legend(frameon=False)
    figure.suptitle("The operator by chunk size; of the matrix product ceiling", fontsize=11)
    return figure


def _of_one_size(rows: list[Row]) -> list[Row]:
    """Those of the batch, heads and head dimension that there are most lengths of."""

    def size(row: Row) -> tuple[int, int, int]:
        return row.shape.B, row.shape.H, row.shape.D

    lengths: dict[tuple[int, int, int], set[int]] = {}
    for row in rows:
        lengths.setdefault(size(row), set()).add(row.shape.T)
    most = max(lengths, key=lambda x: (len(lengths[x]), x), default=None)
    return [row for row in rows if size(row) == most]


def _roofline(rows: list[Row], machine: dict[str, Any]) -> Any:
    """FLOP per second over FLOP per byte, of ours, under what the machine reaches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = [row for row in rows if row.case == "operator" and row.provider == OURS and row.flop]
    rows = [row for row in rows if row.mode == FORWARD]
    if not rows or not machine.get("copy_bytes"):
        return None
    figure = Figure(figsize=(6, 4.2), layout=ConstrainedLayoutEngine(rect=(0, 0.05, 1, 0.95)))
    axis = figure.subplots()
    peak, copy = machine["matmul_flops"], machine["copy_bytes"]
    knee = peak / copy
    # Of a GPU, what our kernels move; else what nobody can do without.
    moved = [forward_bytes(r.shape) if machine["driver"] else r.least_bytes or 1 for r in rows]
    intensities = [(r.flop or 0) / m for r, m in zip(rows, moved, strict=True)]
    ends = [knee / 8, knee, 2 * max(8 * knee, *intensities)]
    roof = [copy * ends[0], peak, peak]
    axis.plot(ends, roof, color="0.3", label="copies and products, measured")
    for row, intensity in zip(rows, intensities, strict=True):
        label = f"{row.shape.B} x {row.shape.H} x {row.shape.D}, T {row.shape.T:,}, "
        reached = (row.flop or 0) / (row.median_s or 1)
        axis.plot(intensity, reached, "o", label=f"{label}chunk {row.shape.chunk}")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte, counted", ylabel="FLOP/s")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=6)
    figure.suptitle("The operator, forward")
    return figure


def _ratios(rows: list[Row]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = [row for row in rows if row.provider.startswith("titans-pytorch")]
    if not rows:
        return None
    figure = Figure(
        figsize=(9, 1.4 + 0.5 * len(rows)), layout=ConstrainedLayoutEngine(rect=(0, 0.05, 1, 0.95))
    )
    axes = figure.subplots(1, 2, sharey=True)
    labels = [f"{row.provider}\n{row.case}, {row.mode}, T {row.shape.T}" for row in rows]
    quantities = (
        ("time", "#1f4e9c", [row.time_ratio for row in rows]),
        ("peak memory", "#5b9bd5", [row.memory_ratio for row in rows]),
    )
    for axis, (what, colour, ratios) in zip(axes, quantities, strict=True):
        widths = [(ratio or 1.0) - 1.0 for ratio in ratios]
        bars = axis.barh(labels, widths, left=1.0, color=colour, height=0.6)
        texts = ["" if ratio is None else f" {ratio:.3g}x" for ratio in ratios]
        axis.bar_label(bars, texts, fontsize=8)
        axis.axvline(1, color="0.3", linewidth=1)
        axis.set_xscale("log")
        known = [ratio for ratio in ratios if ratio] + [1.0]
        axis.set_xlim(min(known) / 2, max(known) * 4)
        axis.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
        axis.set_title(f"{what}, over that of {OURS}", fontsize=10)
        axis.tick_params(axis="y", labelsize=8)
    axes[0].invert_yaxis()
    return figure


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for drawn in draw(Path(argument)):
            print(drawn)
