"""A picture of a sweep: figures over request rates or link bandwidths, a line per contestant.

matplotlib is imported when it is drawn, and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

_PANELS = (
    ("ttft_p99_s", "Time to first token, p99", "seconds"),
    ("output_tok_s", "Throughput", "output tokens/s"),
    ("worst_gap_s", "Longest gap between two tokens", "seconds"),
    ("bytes_in", "Moved back into the pool", "bytes"),
)
# Okabe and Ito's colours, which people with any colour vision tell apart; dashes beside them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")

Points = Mapping[str, Mapping[str, Mapping[str, float]]]


def save_sweep(points: Points, folder: Path, title: str) -> Path:
    """Draws sweep.png and writes its numbers beside it, data.json.

    Args:
      points: figures by point of the sweep and contestant.
      folder: exists.
      title: words above the picture; they say whether the figures are modelled.

    Returns:
      The picture's path.
    """
    from matplotlib.figure import Figure

    text = json.dumps({"title": title, "points": points}, allow_nan=False)
    (folder / "data.json").write_text(text)
    names = list(next(iter(points.values())))
    figure = Figure(figsize=(9, 7), layout="constrained", dpi=100)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(2, 2).flat
    for axis, (field, words, unit) in zip(axes, _PANELS, strict=True):
        for index, name in enumerate(names):
            axis.plot(
                list(points), [results[name][field] for results in points.values()],
                _DASHES[index // len(_COLOURS) % len(_DASHES)], marker="os^Dv*"[index % 6],
                markersize=4, color=_COLOURS[index % len(_COLOURS)], label=name,
            )
        axis.set_title(words, fontsize=10)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.tick_params("x", rotation=30)
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
    path = folder / "sweep.png"
    figure.savefig(path)
    return path
