"""The frontier: early first tokens against short gaps, a labelled point for each variant.

Whoever gives way often lets others start early and makes its own readers wait in mid-sentence; the
picture shows what a setting pays for what it gets. Down and left is better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aqua_jax.bench.variants import FLOOR


class Point(NamedTuple):
    """A variant: TTFT p99 in seconds, time between tokens p99 and longest gap in milliseconds."""

    name: str
    ttft_p99_s: float
    tbt_p99_ms: float
    tbt_max_ms: float


def points(data: Mapping[str, Any]) -> list[Point]:
    """The variants of `plots.plot_data` that have gaps, the floor excepted."""
    return [
        Point(name, one["ttft_p99_s"], one["tbt_p99_ms"], one["tbt_max_ms"])
        for name, one in data.items()
        if name != FLOOR and one["tbt_p99_ms"] is not None and one["ttft_p99_s"] is not None
    ]


def draw(
    figure: Any, found: Sequence[Point], floor_s: float | None, colours: Sequence[str],
    markers: str,
) -> None:
    """Draws two panels side by side: against the p99 of gaps, against the longest gap.

    Args:
      figure: empty.
      found: the points.
      floor_s: TTFT p99 that nobody can go below; None: unknown.
      colours, markers: of the points, in turn.
    """
    left, right = figure.subplots(1, 2, sharey=True)
    panels = (
        (left, "tbt_p99_ms", "time between tokens, p99, milliseconds, log scale"),
        (right, "tbt_max_ms", "longest gap, milliseconds, log scale"),
    )
    for axis, field, label in panels:
        for index, point in enumerate(found):
            axis.plot(
                [max(getattr(point, field), 1e-3)], [max(point.ttft_p99_s, 1e-6)],
                markers[index % len(markers)], color=colours[index % len(colours)], markersize=7,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.margins(0.25)
        axis.set_xlabel(label)
        axis.set_axisbelow(True)
        axis.grid(True, which="both", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if floor_s is not None and floor_s > 0:
            axis.axhline(floor_s, color="#666666", linestyle=":", linewidth=1.2)
        plain_ticks(axis)
    left.set_ylabel("TTFT p99, seconds, log scale")
    if floor_s is not None and floor_s > 0:
        left.set_title("Dotted: the floor, one token each with room for all", fontsize=10)
    # The layout moves axes; labels are placed where they will be.
    figure.draw_without_rendering()
    for axis, field, _ in panels:
        _label(figure, axis, [
            (point.name, max(getattr(point, field), 1e-3), max(point.ttft_p99_s, 1e-6))
            for point in found
        ])


def plain_ticks(axes: Any) -> None:
    """On logarithmic axes few ticks with plain numbers: 200 and not 2x10^2. Call when all is drawn,
    for they are fixed to what is in view."""
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
    )

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "log":
            continue
        low, high = axis.get_view_interval()
        decades = math.log10(high / low) if 0 < low < high else 1.0
        subs = (1, 2, 5) if decades < 2 else (1,)
        locator = MaxNLocator(4) if decades < 0.7 else LogLocator(subs=subs, numticks=8)
        ticks = locator.tick_values(low, high)
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _label(figure: Any, axis: Any, named: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, where they cover neither a point nor another name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(figure).get_renderer()
    scale = figure.dpi / 72
    places = [axis.transData.transform((x, y)) for _, x, y in named]
    taken = [
        Bbox.from_extents(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale)
        for x, y in places
    ]
    inside = axis.get_window_extent(renderer)
    for name, x, y in named:
        best = None
        for distance, turn in itertools.product((10, 18, 28, 40, 54), range(12)):
            angle = math.pi * (1 + turn) / 6
            right, up = math.cos(angle), math.sin(angle)
            text = axis.annotate(
                name, (x, y), xytext=(distance * right, distance * up),
                textcoords="offset points", fontsize=9,
                ha="left" if right > 0.3 else "right" if right < -0.3 else "center",
                va="bottom" if up > 0.3 else "top" if up < -0.3 else "center",
                arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6}
                if distance > 10 else None,
            )
            text.set_in_layout(False)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(1)  # without the line
            if best is not None:
                best.remove()
            best = text
            contained = inside.x0 <= box.x0 and box.x1 <= inside.x1
            contained = contained and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if contained and not any(box.overlaps(other) for other in taken):
                break
        assert best is not None
        taken.append(Text.get_window_extent(best, renderer).padded(1))
