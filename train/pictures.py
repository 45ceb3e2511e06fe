"""This module draws a training run's pictures as PNG files, from the table of its rows (:mod:`train.figures`)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from train.figures import PARTS, seconds_of

COLOURS = dict(zip(PARTS, ("#c44e1c", "#e3b34c", "#2a6f97", "#7fb7d3", "#8a8a8a"), strict=True))
OURS, OTHER, GREY = "#2a6f97", "#c44e1c", "#8a8a8a"
DRAWN = 800
STRETCHES = 60


def loss_picture(table: pd.DataFrame, title: str, split: str, tested: Sequence[tuple[float, float]]) -> bytes:
    """Draw the loss of each step, and ``tested``: steps and the losses after them on cells that none learns from."""
    asked = bool(table["loss_asked"].notna().any())
    figure, axes = _axes(5.2 if asked else 3.8, [2, 1] if asked else [1])
    step = table["step"].to_numpy()
    _curve(axes[0], step, table["loss"], OURS)
    if tested:
        split = f"on {split}: " + " → ".join(f"{loss:.4f}" for loss in (tested[0][1], tested[-1][1])[: len(tested)])
        axes[0].plot(*zip(*tested, strict=True), "D", color="#1b1b1b", markersize=6, label=split, zorder=5)
    _keep_spikes_out(axes[0], table["loss"])
    axes[0].set_title(title, loc="left", parse_math=False)
    axes[0].set_ylabel("loss, nats")
    axes[0].legend(frameon=False, loc="upper right")
    if asked:
        _curve(axes[1], step, table["loss_asked"], OTHER)
        _keep_spikes_out(axes[1], table["loss_asked"])
        axes[1].set_ylabel("of what was\nasked, nats")
    _by_step(axes[-1])
    return _png(figure)


def rate_picture(table: pd.DataFrame, flat: Mapping[str, Any]) -> bytes:
    """Draw the learning rate and the gradients' norm; ``flat`` are the run's settings."""
    figure, axes = _axes(4.2, [1, 1])
    step = table["step"].to_numpy()
    axes[0].plot(*thin(step, table["lr"].to_numpy()), color=OURS, linewidth=2)
    axes[0].set_ylabel("learning rate")
    axes[0].set_ylim(bottom=0)
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _curve(axes[1], step, table["grad_norm"].where(table["grad_norm"] > 0), OURS)
    if "optim.clip_norm" in flat:
        clip = flat["optim.clip_norm"]
        axes[1].axhline(clip, color=OTHER, linewidth=1, linestyle="--", label=f"clipped above {clip:g}")
    axes[1].set_yscale("log")
    axes[1].set_ylabel("gradient norm")
    _legend(axes[1])
    _by_step(axes[1])
    return _png(figure)


def time_picture(table: pd.DataFrame) -> bytes:
    """Draw what the seconds of steps went to."""
    figure, (axes,) = _axes(3.2, [1])
    parts = [part for part in PARTS if table[part].notna().any()]
    stretches = np.array_split(np.arange(len(table)), min(len(table), STRETCHES))
    sums = np.array([table[parts].iloc[rows].sum().to_numpy() for rows in stretches])
    shares = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1e-12)
    step = table["step"].to_numpy()
    edges = [*(step[rows[0]] - 1 for rows in stretches), step[-1]]
    stacked = np.vstack([shares, shares[-1:]]).T
    axes.stackplot(
        edges, stacked, step="post", labels=[PARTS[part] for part in parts], colors=[COLOURS[part] for part in parts]
    )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_ylabel("share of seconds")
    _by_step(axes)
    _legend(axes)
    return _png(figure)


def token_picture(table: pd.DataFrame) -> bytes:
    """Draw tokens a second over time, and shade what lies between steps."""
    figure, (axes,) = _axes(3.2, [1])
    time, seconds = table["time"].to_numpy(), seconds_of(table)
    passed = time - time[0] + seconds.iloc[0]
    units = ((300, 1, "seconds"), (10800, 60, "minutes"), (math.inf, 3600, "hours"))
    unit, name = next((size, name) for most, size, name in units if passed[-1] < most)
    between = np.diff(time) - seconds.to_numpy()[1:]
    gaps = np.flatnonzero(between > max(0.01 * passed[-1], 5 * float(seconds.median())))
    rate = table["tokens"] / seconds.where(seconds > 0)
    for number, rows in enumerate(np.split(np.arange(len(table)), gaps + 1)):
        _curve(axes, passed[rows] / unit, rate.iloc[rows], OURS, window=_window(len(table)), named=number == 0)
    for number, row in enumerate(gaps):
        label = "between steps" if number == 0 else None
        begin = passed[row] / unit
        axes.axvspan(begin, begin + between[row] / unit, color=GREY, alpha=0.25, linewidth=0, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:,.0f}")
    axes.set_ylabel("tokens/s")
    axes.set_xlabel(f"{name} since the first step began")
    _legend(axes)
    return _png(figure)


def mixing_picture(table: pd.DataFrame) -> tuple[str, bytes]:
    """Return what is said of the mixing, and its picture where there is something to mix."""
    ratio = table["entropy_ratio"].to_numpy()
    if not np.isfinite(ratio).any():
        return "There is one dataset only, or its cells are drawn by weight: nothing was measured.", b""
    figure, (axes,) = _axes(2.6, [1])
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--", label="random batches")
    axes.plot(*thin(table["step"].to_numpy(), ratio), color=OURS, linewidth=2, label="this run, all batches so far")
    low, high = float(np.nanmin(ratio)), float(np.nanmax(ratio))
    axes.set_ylim(min(0.95, low - 0.01), max(1.05, high + 0.01))
    axes.set_ylabel("entropy ratio")
    _by_step(axes)
    _legend(axes)
    words = (
        "Entropy of the datasets in a batch over what random batches of its size would have: 1 is an ideal shuffle. "
        f"It ends at {ratio[np.isfinite(ratio)][-1]:.3f}."
    )
    return words, _png(figure)


def _axes(height: float, ratios: list[int]) -> tuple[Figure, list[Any]]:
    """Return a figure with panels one above another, that share their steps."""
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(ratios), sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for axes in grid[:, 0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(grid[:, 0])


def _by_step(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlabel("step")


def _legend(axes: Any) -> None:
    """Put the legend above the panel, where it hides nothing."""
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=len(PARTS), borderaxespad=0.2)


def _window(n_steps: int) -> int:
    """Return how many steps a smoothed value is the median of: an odd number, itself in their middle."""
    return max(7, n_steps // 40) | 1


def _curve(
    axes: Any, x: NDArray[np.float64], values: pd.Series[float], colour: str, *, window: int = 0, named: bool = True
) -> None:
    """Draw values thin, and their medians over neighbouring steps thick: one spike does not lift them."""
    window = window or _window(len(values))
    smooth = values.rolling(window, center=True, min_periods=1).median()
    words = ("each step", f"median of {window:,} steps") if named else (None, None)
    axes.plot(*thin(x, values.to_numpy()), color=colour, linewidth=0.7, alpha=0.5, label=words[0])
    axes.plot(*thin(x, smooth.to_numpy()), color=colour, linewidth=2, label=words[1])


def thin(x: NDArray[np.float64], y: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keep the lowest and highest value of each stretch of a long run: it is drawn soon, and no spike is lost."""
    kept = np.flatnonzero(np.isfinite(y))
    if len(kept) > 2 * DRAWN:
        parts = np.array_split(kept, DRAWN)
        kept = np.unique([part[place] for part in parts for place in (y[part].argmin(), y[part].argmax())])
    return x[kept], y[kept]


def _keep_spikes_out(axes: Any, values: pd.Series[float]) -> None:
    """End the axis below single values that would press all others flat, and say how many there are."""
    low, high, top = (float(one) for one in (values.min(), values.quantile(0.99), values.max()))
    if top - low > 3 * (high - low) > 0:
        limit = high + 0.3 * (high - low)
        axes.set_ylim(low - 0.1 * (high - low), limit)
        n_above = int((values > limit).sum())
        axes.set_title(f"{n_above} above, up to {top:.3g}", loc="center", fontsize=9, color=GREY)


def _png(figure: Figure) -> bytes:
    figure.align_ylabels()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
