"""Bytes at equal figures: what early first tokens and short pauses cost, by policy.

Any policy moves less if it may let people wait longer, so bytes compare at equal service only. A
*bar* is a TTFT p99 and a longest gap; of a policy's settings (steps of a slice, stores) an operator
would take the one that moves least among those that keep the bar. Bars are round (1, 1.5, 2, 3, 5
or 7 times a power of ten seconds), or settings whose figures are equal but for chance would make
bars by the dozen. Two policies are compared at every round bar that both can keep.
Throughput is no part of a bar, but stands beside the bytes: who leaves pages unused moves few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from aqua_jax.simulation.setups import parse_setup

ROUND = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)

Results = Mapping[str, Mapping[str, float]]


class Bar(NamedTuple):
    """A bar, the cheapest setting of either policy that keeps it, what each moves, and how many
    output tokens a second it has."""

    ttft_p99_s: float
    worst_gap_s: float
    ours: str
    theirs: str
    our_bytes: float
    their_bytes: float
    our_tok_s: float
    their_tok_s: float

    @property
    def kept(self) -> bool:
        """Whether ours moves no more."""
        return self.our_bytes <= self.their_bytes


def moved(one: Mapping[str, float]) -> float:
    """Bytes out of the pool and back."""
    return one["bytes_out"] + one["bytes_in"]


def bars(results: Results, policy: str, rival: str) -> list[Bar]:
    """All round bars that a policy and a rival can both keep, tightest first; of those with the
    same cheapest settings the tightest ones.

    Args:
      results: figures by setting, as `report.compare` has them.
      policy, rival: of `setups.NAMES`.
    """
    ours, theirs = _settings(results, policy), _settings(results, rival)
    corners = sorted({
        tuple(
            rounded(max(one[field], other[field])) for field in ("ttft_p99_s", "worst_gap_s")
        )
        for one in ours.values() for other in theirs.values()
    })
    found: list[Bar] = []
    for ttft, gap in corners:
        ours_at, theirs_at = _cheapest(ours, ttft, gap), _cheapest(theirs, ttft, gap)
        one, other = ours[ours_at], theirs[theirs_at]
        bar = Bar(
            ttft, gap, ours_at, theirs_at, moved(one), moved(other), one["output_tok_s"],
            other["output_tok_s"],
        )
        same = (told for told in found if told[2:] == bar[2:])
        if not any(told.ttft_p99_s <= ttft and told.worst_gap_s <= gap for told in same):
            found.append(bar)
    return found


def rounded(seconds: float) -> float:
    """The least round bar that is no less."""
    if seconds <= 0.0:
        return 0.0
    decade = 10.0 ** math.floor(math.log10(seconds))
    steps = (step * decade for step in (*ROUND, 10.0))
    return next((step for step in steps if seconds <= step), 10.0 * decade)


def _settings(results: Results, policy: str) -> Results:
    return {name: one for name, one in results.items() if parse_setup(name).policy == policy}


def _cheapest(settings: Results, ttft: float, gap: float) -> str:
    keeping = [
        name for name, one in settings.items()
        if one["ttft_p99_s"] <= ttft and one["worst_gap_s"] <= gap
    ]
    return min(keeping, key=lambda name: moved(settings[name]))


def table(results: Results, policy: str, title: str) -> str:
    """A block per rival: a line per bar."""
    rivals = dict.fromkeys(parse_setup(name).policy for name in results)
    lines = [title]
    for rival in rivals:
        if rival == policy:
            continue
        found = bars(results, policy, rival)
        good = sum(bar.kept for bar in found)
        lines.append(
            f"  {policy} moves no more than {rival} at {good} of {len(found)} bars that both keep"
        )
        lines.append(
            f"    {'TTFT p99 s':>10} {'gap s':>8}   {'':<24}{'GB':>8}{'tokens/s':>10}   "
            f"{'':<28}{'GB':>8}{'tokens/s':>10}"
        )
        lines += [
            f"    {bar.ttft_p99_s:>10.3g} {bar.worst_gap_s:>8.3g}   {bar.ours:<24}"
            f"{bar.our_bytes / 1e9:>8.4g}{bar.our_tok_s:>10.4g}   {bar.theirs:<28}"
            f"{bar.their_bytes / 1e9:>8.4g}{bar.their_tok_s:>10.4g}{'' if bar.kept else '  more'}"
            for bar in found
        ]
    return "\n".join(lines)
