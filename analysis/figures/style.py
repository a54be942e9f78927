"""The figures' common look: colours, sizes, labels, and the grids and heat maps that they are put together from.

Figures are bare ``matplotlib.figure.Figure`` objects: no pyplot state, no window, nothing to close. Colours: "mako" for
amounts and "vlag" for differences (both perceptually uniform), seaborn's "colorblind" for the few lines that are told
apart by colour; where there may be many tasks, each has a panel of its own instead of a colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

Array = NDArray[np.float64]

WIDTH_INCHES = 10.0
INK, MUTED, FAINT, GRID = "#1d2733", "#5d6b7a", "#b8c1cb", "#e6eaee"
ACCENT, WARM = "#0f6f8f", "#c8553d"
MISSING = "#eef0f2"
CONTEXT = "#d2d9e0"
"""For lines that are there to compare with: they must show on white, and on black where a page is dark."""
COLORS: list[Any] = [sns.color_palette("colorblind")[index] for index in (0, 1, 2, 4, 3, 9, 5, 8, 6, 7)]


def _amount_colors() -> Array:
    colors = sns.color_palette("mako_r", as_cmap=True)(np.linspace(0.0, 0.82, 256))
    fade = np.clip(1 - np.linspace(0, 1, 256) / 0.3, 0, 1)[:, None] * 0.9
    return colors * (1 - fade) + np.ones(4) * fade


def amounts() -> Colormap:
    """Return the map for amounts: near white at 0, deep blue at the top."""
    return LinearSegmentedColormap.from_list("amounts", _amount_colors()).with_extremes(bad=MISSING)


def gains_and_losses() -> Colormap:
    """Return the map for scores that may be negative: :func:`amounts` above the middle, ever redder below it."""
    losses = sns.light_palette(WARM, as_cmap=True)(np.linspace(0.08, 0.92, 256))[::-1]
    cmap = LinearSegmentedColormap.from_list("gains_and_losses", np.vstack([losses, _amount_colors()]), N=512)
    return cmap.with_extremes(bad=MISSING)


def differences() -> Colormap:
    """Return the map for signed differences: blue below 0, red above, near white at 0."""
    return sns.color_palette("vlag", as_cmap=True).with_extremes(bad=MISSING)


@contextmanager
def look() -> Iterator[None]:
    """Apply the report's style inside the block, and leave matplotlib's settings as they were."""
    style = sns.axes_style("ticks") | {
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "grid.color": GRID,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
    }
    fonts = {
        "font.size": 9.5,
        "axes.titlesize": 10,
        "axes.labelsize": 9.5,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
    }
    more = {"legend.fontsize": 8.5, "legend.frameon": False, "axes.titlelocation": "left", "axes.titleweight": "bold"}
    ticks = {"xtick.major.size": 3, "ytick.major.size": 3, "axes.titlepad": 6}
    text = {"font.family": ["DejaVu Sans"], "svg.fonttype": "none"}
    settings: dict[Any, Any] = {**style, **fonts, **more, **ticks, **text}
    with mpl.rc_context(settings):
        yield


def new_figure(height_inches: float, width_inches: float = WIDTH_INCHES) -> Figure:
    """Return an empty figure that lays its axes out by itself."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.04)
    return Figure(figsize=(width_inches, height_inches), layout=layout)


def balanced(num: int, most: int) -> int:
    """Return how many columns, at most ``most``, put ``num`` panels into rows as even as can be."""
    return math.ceil(num / math.ceil(num / most))


def panels(num: int, columns: int, height_inches: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``num`` axes in even rows of at most ``columns``; places left over stay empty."""
    columns = balanced(num, columns)
    rows = math.ceil(num / columns)
    width = WIDTH_INCHES if columns > 1 else min(WIDTH_INCHES, 6.5)
    figure = new_figure(rows * height_inches + 0.45, width)
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for spare in grid.ravel()[num:]:
        spare.set_axis_off()
    for column in range(columns):
        lowest = [row for row in range(rows) if row * columns + column < num][-1]
        grid[lowest, column].tick_params(labelbottom=True)
    return figure, list(grid.ravel()[:num])


def short(name: str, length: int = 20) -> str:
    """Return ``name``, with its middle left out when it is longer than ``length``; never read as mathematics."""
    if len(name) > length:
        head = (length - 1) * 2 // 3
        name = f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
    return name.replace("$", r"\$")


def wrapped(name: str, length: int = 13) -> str:
    """Return ``name`` on two lines where one would be longer than ``length``, cut at a separator when it has one."""
    if len(name) <= length:
        return short(name, length)
    breaks = [place + 1 for place, letter in enumerate(name[:-1]) if letter in "_- ./:"]
    middle = min(breaks, key=lambda place: abs(place - len(name) / 2), default=length)
    middle = middle if middle <= length + 3 else length
    return f"{short(name[:middle], length + 3)}\n{short(name[middle:], length + 3)}"


def number(value: float) -> str:
    """Return ``value`` short enough for a cell, with a true minus: 0.64, −3.1, −214, −3.1k, −2.4M."""
    if math.isnan(value):
        return ""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            return (f"{scaled:.1f}{unit}" if abs(scaled) < 1e4 else f"{value:.0e}").replace("-", "−")
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) != 0 else text.lstrip("-")


def signed(value: float) -> str:
    """Return a difference with its sign and three digits: +0.012, −0.300, and 0.000 for what rounds to nothing."""
    text = f"{value:+.3f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def label_next_to(ax: Axes, place: float, text: str, color: str) -> None:
    """Write a row's number at the right edge of the axes, ``place`` its height."""
    ax.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=color)


def step_of(num: int, most: int) -> int:
    """Return how far apart to put labels, so that at most ``most`` of ``num`` are drawn."""
    return next(
        step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100, 200, 500, num) if math.ceil(num / step) <= most
    )


def label_some(ax: Axes, axis: str, labels: Sequence[str], most: int, rotation: float = 0.0) -> None:
    """Label a heat map's cells along ``axis`` ("x" or "y"), as many as fit."""
    places = np.arange(0, len(labels), step_of(len(labels), most))
    upright = rotation == 90
    turn: dict[str, Any] = {"rotation": rotation, "ha": "right", "rotation_mode": "anchor"} if rotation else {}
    turn |= {"va": "center"} if upright else {}
    chosen = [labels[int(place)] for place in places]
    if axis == "x":
        ax.set_xticks(places + 0.5, chosen, **turn)
    else:
        ax.set_yticks(places + 0.5, chosen, rotation=0)


def heat(
    ax: Axes,
    values: Array,
    cmap: Colormap,
    limits: tuple[float, float],
    text: Array | None = None,
    logarithmic: bool = False,
    write: Callable[[float], str] = number,
) -> Any:
    """Draw a heat map without a colour bar and return what a colour bar is made from.

    Args:
        ax: Where.
        values: Shape (rows, columns); NaN cells are a light grey.
        cmap: The colours.
        limits: The values of the first and the last colour.
        text: What to write into the cells, as numbers of the same shape; nothing is written for None.
        logarithmic: Whether colours go by the values' logarithm; values and limits are then above 0.
        write: How a number is written.
    """
    written: dict[str, Any] = {"norm": LogNorm(*limits)} if logarithmic else {}
    if text is not None and text.size:
        size = 8.5 if values.shape[1] <= 12 else 7
        written |= {"annot": np.vectorize(write, otypes=[object])(text), "fmt": "", "annot_kws": {"size": size}}
    sns.heatmap(
        values,
        ax=ax,
        cmap=cmap,
        vmin=limits[0],
        vmax=limits[1],
        cbar=False,
        linewidths=0.0 if values.size > 600 else 0.6,
        linecolor="white",
        rasterized=values.size > 400,
        xticklabels=False,
        yticklabels=False,
        **written,
    )
    for spine in ax.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.6)
    return ax.collections[0]


def colour_bar(figure: Figure, mappable: Any, axes: Sequence[Axes], label: str, extend: str = "neither") -> None:
    """Put one slim colour bar beside ``axes``."""
    alone = len(axes) == 1
    shrink = 0.95 if alone else min(0.9, 3.0 / figure.get_figheight())
    bar = figure.colorbar(
        mappable,
        ax=list(axes),
        shrink=shrink,
        aspect=max(24.0, 7 * figure.get_figheight() * shrink),
        pad=0.015,
        extend=extend,
        fraction=0.05,
        anchor=(0, 1 - 0.5 * alone),
    )
    bar.set_label(label)
    bar.ax.spines["outline"].set_visible(False)
    bar.ax.tick_params(length=0)


def outline(ax: Axes, row: float, column: float, width: float = 1.0, **more: Any) -> None:
    """Draw a frame around cells of a heat map."""
    style = {"fill": False, "edgecolor": WARM, "linewidth": 1.8, "clip_on": False, "zorder": 5} | more
    ax.add_patch(Rectangle((column, row), width, 1, **style))


def stage_axis(ax: Axes, last_stage: int, label: str = "after stage") -> None:
    """Mark an x axis that counts stages, 0 being the untrained model."""
    step = step_of(last_stage + 1, 11)
    ax.set_xticks(range(0, last_stage + 1, step))
    ax.set_xlim(-0.25, max(last_stage, 1) + 0.25)
    ax.set_xlabel(label)


def trained_line(ax: Axes, stage: int, last_stage: int) -> None:
    """Mark the stage that trains a panel's task."""
    if stage <= last_stage:
        ax.axvline(stage, color=WARM, linewidth=1, alpha=0.7, zorder=1)


def outer_labels(axes: Sequence[Axes], columns: int, x_label: str, y_label: str) -> None:
    """Label only the outer panels of a grid: y in the first column, x under each column's last panel."""
    columns = balanced(len(axes), columns)
    for place, ax in enumerate(axes):
        ax.set_ylabel(y_label if place % columns == 0 else "")
        ax.set_xlabel(x_label if place + columns >= len(axes) else "")


def key_line(color: Any, label: str) -> Line2D:
    """Return a legend's entry for a line of a colour."""
    return Line2D([], [], color=color, linewidth=2.2, label=short(label, 30))


def figure_of(axes: Axes | list[Axes]) -> Figure:
    """Return the whole figure that axes stand in."""
    figure = (axes if isinstance(axes, Axes) else axes[0]).figure
    assert isinstance(figure, Figure)
    return figure
