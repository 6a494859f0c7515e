"""The plot: bits of a byte, and what the memory's training saves, by how much has been read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..train.measures import by_doubling

WRITING, OFF = "#0072b2", "#d55e00"  # distinguishable by colour-blind readers too


def band(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the files in [files, n], and its standard error."""
    return costs.mean(0), costs.std(0) / len(costs) ** 0.5


def smoothed(costs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Averages over `width` bytes, [files, n], and the byte that each has in its middle, [n]."""
    means = costs.unfold(1, width, width // 4).mean(-1)
    return width / 2 + width // 4 * torch.arange(means.shape[1]), means


def draw(path: Path, writing: Tensor, off: Tensor, title: str) -> None:
    """Plot bits [files, T] of the same text read with writing on and off, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    writing, off = writing.float().cpu(), off.float().cpu()
    files, length = writing.shape
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")

    width = max(8, length // 8)
    for costs, color, label in (
        (off, OFF, "writing switched off"),
        (writing, WRITING, "memory writing"),
    ):
        x, means = smoothed(costs, width)
        mean, error = band(means)
        left.plot(x, mean, color=color, linewidth=2.5, label=f"{label}: {costs.mean():.2f}")
        left.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
    left.set_title(f"Loss (running mean of {width} bytes)")
    left.set_ylabel("bits per byte")
    left.set_xlabel("bytes read so far")
    left.set_xlim(0, length)

    ends, means = by_doubling(off - writing, 16)
    mean, error = band(means)
    right.axhline(0, color="black", linewidth=0.8)
    right.fill_between(ends, mean - error, mean + error, color=WRITING, alpha=0.2, linewidth=0)
    right.plot(ends, mean, color=WRITING, linewidth=2.5, marker="o")
    right.set_xscale("log", base=2)
    labels = [f"{a}-{b}" for a, b in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
    right.set_xticks(ends, labels, rotation=30)
    right.minorticks_off()
    right.set_title("What writing saves")
    right.set_ylabel("bits per byte")
    right.set_xlabel("bytes read so far")

    left.legend(frameon=False, title="mean, bits per byte", alignment="left")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"Mean of {files} files ± standard error", fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
