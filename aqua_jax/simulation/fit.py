"""A line through recorded steps: least squares on relative errors, robust, coefficients >= 0."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from aqua_jax.errors import ConfigError
from aqua_jax.simulation.cost import Line
from aqua_jax.simulation.work import Work

_ROUNDS = 20  # of reweighting; weights settle within a few
_LEAST_SCALE = 1e-3  # relative errors below this count as equally good
_HUBER = 1.5  # in typical errors; what is further off counts less


@dataclasses.dataclass(frozen=True)
class Fit:
    """A line and how well it fits.

    Attributes:
      line: the coefficients.
      steps: it was fitted to.
      error_p50: median of |predicted / measured - 1|.
      error_p90: 90% of them are below.
    """

    line: Line
    steps: int
    error_p50: float
    error_p90: float


def fit_line(steps: Sequence[tuple[Work, float]]) -> Fit:
    """Fits `Line` to steps.

    Errors are relative, so that short steps count as much as long ones; a step that was held up by
    something else on the machine counts less the further off it is (Huber's weights).

    Args:
      steps: (work, seconds) of at least as many different steps as there are coefficients.

    Raises:
      ConfigError: too few steps, or seconds that are not above 0.
    """
    names = [field.name for field in dataclasses.fields(Line)]
    if len({work for work, _ in steps}) < len(names):
        raise ConfigError("steps", len(steps), f"at least {len(names)} different ones")
    if min(seconds for _, seconds in steps) <= 0.0:
        raise ConfigError("steps", min(seconds for _, seconds in steps), "seconds above 0")
    rows = np.array([
        [1.0, w.prefill_tokens, w.decodes, w.decode_context, w.prefill_context, w.moved_bytes]
        for w, _ in steps
    ])
    relative = rows / np.array([seconds for _, seconds in steps])[:, None]
    weights = np.ones(len(steps))
    solution = np.zeros(len(names))
    for _ in range(_ROUNDS):
        solution = _non_negative(relative * weights[:, None], weights)
        error = np.abs(relative @ solution - 1.0)
        scale = max(float(np.median(error)) / 0.6745, _LEAST_SCALE)
        weights = np.sqrt(np.minimum(1.0, _HUBER * scale / np.maximum(error, 1e-12)))
    error = np.abs(relative @ solution - 1.0)
    line = Line(**{name: float(value) for name, value in zip(names, solution, strict=True)})
    return Fit(line, len(steps), statistics.median(error.tolist()), float(np.quantile(error, 0.9)))


def _non_negative(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The least squares solution with no coefficient below 0.

    There are six, so every subset of them that might be 0 is tried: the best solution that has no
    negative coefficient is the answer.
    """
    count = rows.shape[1]
    norms = np.linalg.norm(rows, axis=0)
    scaled = rows / np.where(norms > 0.0, norms, 1.0)  # or the context's column drowns the others
    best, least = np.zeros(count), float(wanted @ wanted)
    for subset in range(1, 1 << count):
        kept = [index for index in range(count) if subset >> index & 1 and norms[index] > 0.0]
        part, *_ = np.linalg.lstsq(scaled[:, kept], wanted, rcond=None)
        if kept and part.min() < 0.0:
            continue
        off = scaled[:, kept] @ part - wanted
        if float(off @ off) < least:
            least, best = float(off @ off), np.zeros(count)
            best[kept] = part / norms[kept]
    return best
