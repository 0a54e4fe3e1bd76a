"""Flag values from text: numbers, sizes, weights, choices, switches. Errors say what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from absl import flags

_UNITS = {
    "": 1, "b": 1,
    "k": 1024, "kib": 1024, "kb": 1000,
    "m": 1024**2, "mib": 1024**2, "mb": 1000**2,
    "g": 1024**3, "gib": 1024**3, "gb": 1000**3,
    "t": 1024**4, "tib": 1024**4, "tb": 1000**4,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes from text such as 256MiB, 1.5GiB, 64k or 4096.

    Raises:
      ValueError: not a size; the message says what is.
    """
    match = _SIZE.fullmatch(text)
    if not match or match[2].lower() not in _UNITS:
        raise ValueError("allowed: a size such as 256MiB, 1.5GiB or 4096 (bytes)")
    value = float(match[1]) * _UNITS[match[2].lower()]
    if value < 1 or value >= 2**63:
        raise ValueError("allowed: a size from 1 byte to 8 EiB")
    return int(match[1]) * _UNITS[match[2].lower()] if match[1].isdigit() else int(value)


def format_size(size: int) -> str:
    """The shortest exact way to write `size` bytes: 268435456 is 256MiB."""
    for unit, factor in (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


class SizeParser(flags.ArgumentParser):
    """Bytes, written with or without a unit."""

    syntactic_help = "SIZE"

    def __init__(self, low: int = 1):
        super().__init__()
        self.low = low

    def parse(self, argument: str | int) -> int:
        """`argument` in bytes; 0 only if `low` is 0."""
        if isinstance(argument, int):
            return argument
        if self.low == 0 and argument.strip() == "0":
            return 0
        return parse_size(argument)

    def flag_type(self) -> str:
        """Name of the type in absl's XML help."""
        return "size"


class SizeSerializer(flags.ArgumentSerializer):
    """Writes a size the way `SizeParser` reads it."""

    def serialize(self, value: int) -> str:
        """Text of `value` bytes."""
        return format_size(value)


class IntegerParser(flags.ArgumentParser):
    """An integer with bounds, or a word that stands for None."""

    syntactic_help = "N"

    def __init__(
        self, low: int | None = None, high: int | None = None, word: str | None = None
    ):
        super().__init__()
        self.low, self.high, self.word = low, high, word
        if word is not None:
            self.syntactic_help = f"{word}|N"

    def parse(self, argument: str | int) -> int | None:
        """`argument` as an integer within the bounds; None for the word."""
        if self.word is not None and argument == self.word:
            return None
        try:
            value = int(argument)
        except (TypeError, ValueError):
            raise ValueError(f"allowed: {self.allowed()}") from None
        if (self.low is not None and value < self.low) or (
            self.high is not None and value > self.high
        ):
            raise ValueError(f"allowed: {self.allowed()}")
        return value

    def allowed(self) -> str:
        """The bounds in words."""
        bounds = [] if self.low is None else [f">= {self.low}"]
        if self.high is not None:
            bounds.append(f"<= {self.high}")
        words = [] if self.word is None else [f"{self.word}, or"]
        return " ".join([*words, "an integer", " and ".join(bounds)]).strip()

    def flag_type(self) -> str:
        """Name of the type in absl's XML help."""
        return "int"


class NumberParser(flags.ArgumentParser):
    """A finite real number with bounds."""

    syntactic_help = "X"

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def parse(self, argument: str | float) -> float:
        """`argument` as a number within the bounds."""
        try:
            value = float(argument)
        except (TypeError, ValueError):
            value = math.nan
        if not self.low <= value <= self.high:
            raise ValueError(f"allowed: a number from {self.low:g} to {self.high:g}")
        return value

    def flag_type(self) -> str:
        """Name of the type in absl's XML help."""
        return "float"


def format_weights(weights: Mapping[str, float]) -> str:
    """`weights` the way `WeightsParser` reads them."""
    return ",".join(f"{name}={weight}" for name, weight in weights.items())


class WeightsParser(flags.ArgumentParser):
    """Names with a weight each: alice=2,bob=0.5."""

    syntactic_help = "NAME=X[,NAME=X...]"

    def parse(self, argument: str | Mapping[str, float]) -> dict[str, float]:
        """Weights by name."""
        if isinstance(argument, Mapping):
            return dict(argument)
        found: dict[str, float] = {}
        for entry in argument.split(","):
            name, _, text = entry.partition("=")
            name = name.strip()
            try:
                weight = float(text)
            except ValueError:
                weight = math.nan
            if not name or name in found or not 0 < weight < math.inf:
                raise ValueError(
                    "allowed: NAME=WEIGHT with commas between, each name once and without = and "
                    "commas, weights finite numbers > 0, such as alice=2,bob=0.5"
                )
            found[name] = weight
        return found

    def flag_type(self) -> str:
        """Name of the type in absl's XML help."""
        return "weights"


class WeightsSerializer(flags.ArgumentSerializer):
    """Writes weights the way `WeightsParser` reads them."""

    def serialize(self, value: Mapping[str, float]) -> str:
        """Text of `value`."""
        return format_weights(value)


class ChoiceParser(flags.ArgumentParser):
    """One of a few words."""

    def __init__(self, choices: Sequence[str]):
        super().__init__()
        self.choices = tuple(choices)
        self.syntactic_help = "|".join(choices)

    def parse(self, argument: str) -> str:
        """`argument`, if it is one of the words."""
        if argument not in self.choices:
            raise ValueError("allowed: " + ", ".join(self.choices))
        return argument

    def flag_type(self) -> str:
        """Name of the type in absl's XML help."""
        return "string enum"


class SwitchParser(flags.BooleanParser):
    """true or false, with an error message that says so."""

    syntactic_help = ""

    def parse(self, argument: str | int | bool) -> bool:
        """`argument` as a bool."""
        try:
            return bool(super().parse(argument))
        except (TypeError, ValueError):
            raise ValueError("allowed: true or false") from None
