"""Pictures of open-loop runs, several variants in each, and the numbers behind them as JSON.

matplotlib is imported when pictures are drawn, and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqua_jax.bench import frontier
from aqua_jax.bench.latency import percentile
from aqua_jax.bench.open_loop import Run
from aqua_jax.bench.service import columns, contended, gaps, service_by_user
from aqua_jax.bench.variants import FLOOR, IDEAL
from aqua_jax.errors import ConfigError, DependencyError

_USERS_SHOWN = 20  # bars with legible names; of more users, those with the most service
# Okabe and Ito's colours, which people with any colour vision tell apart; dashes beside them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "os^Dv*P"


def plot_data(runs: Mapping[str, Run]) -> dict[str, Any]:
    """What the pictures show.

    Args:
      runs: by variant.

    Returns:
      By variant: requests (in order of arrival: due_s, ttft_s, mean_tbt_ms, worst_gap_ms, user;
      None where there were no such tokens), ttft_p99_s, tbt_p99_ms and tbt_max_ms (None without
      gaps), gaps_ms (all, sorted), samples as columns, pages_total, stores_total (pages by tier),
      service by user in tokens and the window it was taken over (None: the whole run).
    """
    data: dict[str, Any] = {}
    for name, run in runs.items():
        requests = []
        for one in run.served:
            own = gaps(one)
            requests.append({
                "due_s": one.due, "user": one.request.user,
                "ttft_s": one.tokens[0] - one.due if one.tokens else None,
                "mean_tbt_ms": sum(own) / len(own) * 1e3 if own else None,
                "worst_gap_ms": max(own) * 1e3 if own else None,
            })
        window = contended(run.served)
        first = [one.tokens[0] - one.due for one in run.served if one.tokens]
        every = sorted(gap * 1e3 for one in run.served for gap in gaps(one))
        data[name] = {
            "requests": requests, "ttft_p99_s": percentile(first, 99) if first else None,
            "tbt_p99_ms": percentile(every, 99) if every else None,
            "tbt_max_ms": every[-1] if every else None, "gaps_ms": every,
            "samples": columns(run, run.samples), "pages_total": run.pages_total,
            "stores_total": dict(run.stores_total), "service_window_s": window,
            "service_tokens": service_by_user(run.served, *(window or ())),
        }
    return data


def require_matplotlib() -> None:
    """Fails early, before anything is measured.

    Raises:
      DependencyError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DependencyError("--plots needs: pip install matplotlib") from error


def prepare_folder(folder: str) -> Path:
    """Makes the folder for pictures, so that a wrong path fails before anything is measured.

    Raises:
      ConfigError: it can't be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "data.json").touch()
    except OSError as error:
        raise ConfigError("plots", folder, f"a folder for pictures ({error.strerror})") from error
    return path


_FRONTIER = ("ttft_p99_s", "tbt_p99_ms", "tbt_max_ms")


def save_plots(
    runs: Mapping[str, Run], folder: Path, title: str,
    medians: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Draws everything.

    Args:
      runs: by variant; "floor" and "ideal" are drawn where others are measured by them.
      folder: exists; files of the same names are replaced.
      title: words above each picture: model and load.
      medians: by variant, metrics over all repeats, for the frontier; the rest shows `runs`. None:
        of `runs` as well.

    Returns:
      The files: data.json, requests.png, cdf.png, pool.png, service.png; paging.png where pages
      were moved; frontier.png where there are several variants with gaps between tokens.

    Raises:
      DependencyError: matplotlib is missing.
    """
    require_matplotlib()
    data = plot_data(runs)
    for name, metrics in (medians or {}).items():
        data[name] |= {field: metrics[field] for field in _FRONTIER if field in metrics}
    files = [folder / "data.json"]
    files[0].write_text(json.dumps({"title": title, "policies": data}, allow_nan=False))
    ours = {name: one for name, one in data.items() if name not in (FLOOR, IDEAL)}
    pictures: dict[str, tuple[Any, dict[str, Any]]] = {
        "requests": (_requests, ours), "cdf": (_cdf, data), "pool": (_pool, ours),
        "service": (_service, ours),
    }
    if any(any(one["samples"].get("bytes_out", ())) for one in ours.values()):
        pictures["paging"] = (_paging, ours)
    points = frontier.points(data)
    if len(points) > 1:
        floor = data.get(FLOOR, {}).get("ttft_p99_s")
        pictures["frontier"] = (
            lambda figure, _: frontier.draw(figure, points, floor, _COLOURS, _MARKERS), data
        )
    for name, (draw, shown) in pictures.items():
        files.append(folder / f"{name}.png")
        _draw(draw, shown, title, files[-1])
    return files


def _draw(draw: Any, data: dict[str, Any], title: str, path: Path) -> None:
    # Figure without pyplot: no global state, no display, whatever the user's backend is.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained", dpi=130)
    figure.suptitle(title, fontsize=11)
    draw(figure, data)
    figure.savefig(path)


def _styles(data: dict[str, Any]) -> list[tuple[str, Any, str, str]]:
    """(variant, its data, colour, dashes) of each."""
    return [
        (name, one, _COLOURS[index % len(_COLOURS)], _DASHES[index % len(_DASHES)])
        for index, (name, one) in enumerate(data.items())
    ]


def _finish(figure: Any, axes: Any) -> None:
    for axis in axes:
        axis.set_axisbelow(True)
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        frontier.plain_ticks(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    # Outside the axes, where it can't cover a line.
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7))


def _log_scale(set_scale: Any, data: dict[str, Any]) -> str:
    """Makes the axis of gaps logarithmic where there are any; what its label says of that."""
    if not any(one["gaps_ms"] and one["gaps_ms"][-1] > 0 for one in data.values()):
        return ""
    set_scale("log")
    return ", log scale"


def _requests(figure: Any, data: dict[str, Any]) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    for index, (name, one, colour, _) in enumerate(_styles(data)):
        marker = _MARKERS[index % len(_MARKERS)]
        for axis, field in ((upper, "ttft_s"), (lower, "worst_gap_ms")):
            points = [
                (number, request[field]) for number, request in enumerate(one["requests"], 1)
                if request[field] is not None
            ]
            axis.plot(
                [x for x, _ in points], [y for _, y in points], marker, color=colour, label=name,
                markersize=4, alpha=0.8,
            )
        points = [
            (number, request["mean_tbt_ms"]) for number, request in enumerate(one["requests"], 1)
            if request["mean_tbt_ms"] is not None
        ]
        lower.plot(
            [x for x, _ in points], [y for _, y in points], "_", color=colour, markersize=6,
        )
    upper.set_title("Time to first token", fontsize=10)
    upper.set_ylabel("seconds")
    upper.set_ylim(bottom=0)
    lower.set_title("Time between tokens: longest gap (symbol) and mean (dash)", fontsize=10)
    lower.set_ylabel("milliseconds" + _log_scale(lower.set_yscale, data))
    lower.set_xlabel("request, in order of arrival")
    _finish(figure, (upper, lower))


def _cdf(figure: Any, data: dict[str, Any]) -> None:
    upper, lower = figure.subplots(2, 1)
    for name, one, colour, dashes in _styles(data):
        first = sorted(
            request["ttft_s"] for request in one["requests"] if request["ttft_s"] is not None
        )
        for axis, values in ((upper, first), (lower, one["gaps_ms"])):
            shares = [(number + 1) / len(values) * 100 for number in range(len(values))]
            axis.step(values, shares, where="post", color=colour, linestyle=dashes, label=name)
    upper.set_title("Time to first token, share of requests at or below", fontsize=10)
    upper.set_xlabel("seconds")
    lower.set_title("Time between tokens, share of gaps at or below", fontsize=10)
    lower.set_xlabel("milliseconds" + _log_scale(lower.set_xscale, data))
    for axis in (upper, lower):
        axis.set_ylabel("percent")
        axis.set_ylim(0, 102)
    _finish(figure, (upper, lower))


def _pool(figure: Any, data: dict[str, Any]) -> None:
    stores = list(dict.fromkeys(name for one in data.values() for name in one["stores_total"]))
    axes = figure.subplots(2 + len(stores), 1, sharex=True)
    for name, one, colour, dashes in _styles(data):
        samples = one["samples"]
        rows = [[pages / one["pages_total"] * 100 for pages in samples["pages_in_use"]]]
        for store in stores:
            total = one["stores_total"].get(store)
            # Without this tier the line stays at 0.
            pages = samples.get(f"{store}_pages", [0] * len(samples["time_s"]))
            rows.append([count / total * 100 if total else 0.0 for count in pages])
        rows.append(samples["waiting"])
        for axis, values in zip(axes, rows, strict=True):
            axis.step(
                samples["time_s"], values, where="post", color=colour, linestyle=dashes,
                label=name, linewidth=1.2,
            )
    titles = ["KV pool in use", *(f"Store in use: {name}" for name in stores)]
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("percent of pages")
        axis.set_ylim(0, 104)
    axes[-1].set_title("Requests waiting for their first token", fontsize=10)
    axes[-1].set_ylabel("requests")
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel("seconds after the run's start")
    _finish(figure, axes)


def _paging(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for name, one, colour, dashes in _styles(data):
        samples = one["samples"]
        for axis, field in zip(axes, ("bytes_out", "bytes_in"), strict=True):
            moved = samples.get(field, [0] * len(samples["time_s"]))
            axis.step(
                samples["time_s"], [size / 2**20 for size in moved], where="post", color=colour,
                linestyle=dashes, label=name, linewidth=1.2,
            )
    for axis, title in zip(axes, ("Paged out of the pool", "Paged in"), strict=True):
        axis.set_title(f"{title}, since the start", fontsize=10)
        axis.set_ylabel("MiB")
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("seconds after the run's start")
    _finish(figure, axes)


def _service(figure: Any, data: dict[str, Any]) -> None:
    axis = figure.subplots()
    totals: dict[str, float] = {}
    for one in data.values():
        for user, tokens in one["service_tokens"].items():
            totals[user] = totals.get(user, 0.0) + tokens
    users = sorted(sorted(totals, key=lambda user: -totals[user])[:_USERS_SHOWN])
    height = 0.8 / len(data)
    for index, (name, one, colour, _) in enumerate(_styles(data)):
        window = one["service_window_s"]
        span = "whole run" if window is None else f"{window[0]:.3g} to {window[1]:.3g} s"
        axis.barh(
            [place + (index - (len(data) - 1) / 2) * height for place in range(len(users))],
            [one["service_tokens"].get(user, 0.0) for user in users], height * 0.92,
            color=colour, label=f"{name} ({span})",
        )
    names = [user if len(user) <= 24 else f"{user[:22]}.." for user in users]
    axis.set_yticks(range(len(users)), [name or "(no name)" for name in names])
    axis.invert_yaxis()
    shown = f", the {len(users)} with most of {len(totals)}" if len(totals) > len(users) else ""
    contest = all(one["service_window_s"] is not None for one in data.values())
    when = " in the time in which all have work" if contest else ""
    axis.set_title(f"Service per user{when}{shown}", fontsize=10)
    axis.set_xlabel("prompt and output tokens")
    _finish(figure, (axis,))
