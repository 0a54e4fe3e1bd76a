"""Machines from files: given by their data sheets, or fitted to a recorded run.

A file is JSON. Of a machine that we don't have, every parameter is {"value", "source"}, where the
source says who published the figure, or that it is our assumption; whatever is simulated from it is
labelled "modelled". Of a recorded run (`aqua-jax profile --engine`) it holds the fitted line, the
sizes of that engine and how well the line fits; such figures are labelled "fitted".
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from aqua_jax.errors import ConfigError
from aqua_jax.models.config import ModelConfig
from aqua_jax.scheduling.cost import CostConfig
from aqua_jax.simulation.cost import Line, ModelShape, Roofline, StepCost
from aqua_jax.simulation.links import Link

_FOLDER = Path(__file__).parent / "presets"
NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))
# Of the device; all are wanted.
_DEVICE = (
    "memory_bytes", "memory_share", "reserve_bytes", "flops_per_s", "flops_share", "bytes_per_s",
    "bytes_share", "step_s", "host_s", "devices", "all_reduce_s", "all_reduce_bytes_per_s",
)
_LINK = ("store_bytes", "bytes_per_s", "bytes_share", "copy_s")


@dataclasses.dataclass(frozen=True)
class System:
    """A machine with a model on it, as the simulator needs it.

    Attributes:
      name: of the machine.
      figures: "modelled" or "fitted"; stands beside every result.
      cost: of a step.
      host_s: the host's work per step.
      page_tokens: tokens of a page.
      page_bytes: of a page of keys and values.
      num_pages: of the pool.
      links: to the stores, fastest first.
      interference: the part of a copy's time that the steps beside it lose.
    """

    name: str
    figures: str
    cost: StepCost
    host_s: float
    page_tokens: int
    page_bytes: int
    num_pages: int
    links: tuple[Link, ...]
    interference: float

    def with_links(self, names: tuple[str, ...]) -> System:
        """The same with these stores only."""
        known = {link.store: link for link in self.links}
        for name in names:
            if name not in known:
                raise ConfigError("stores", name, "of " + ", ".join(known))
        return dataclasses.replace(self, links=tuple(known[name] for name in names))


    def with_rate(self, bytes_per_s: float) -> System:
        """The same with links of this rate."""
        links = (dataclasses.replace(link, bytes_per_s=bytes_per_s) for link in self.links)
        return dataclasses.replace(self, links=tuple(links))


class _File:
    """The parameters of a file; errors name file and parameter."""

    def __init__(self, path: str, values: Any) -> None:
        self.path, self.values = path, values
        if not isinstance(values, dict):
            raise ConfigError(path, type(values).__name__, "a JSON object")

    def part(self, name: str) -> _File:
        return _File(f"{self.path}, {name}", self.values.get(name))

    def number(self, name: str) -> float:
        """A number with its source."""
        given = self.values.get(name)
        value = given.get("value") if isinstance(given, dict) else None
        source = given.get("source") if isinstance(given, dict) else None
        known = isinstance(source, str) and source != ""
        if isinstance(value, (int, float)) and not isinstance(value, bool) and known:
            if 0 <= value < math.inf:
                return float(value)
        raise ConfigError(
            f"{self.path}, {name}", given, '{"value": a number >= 0, "source": who says so}'
        )

    def plain(self, name: str, kind: type | tuple[type, ...]) -> Any:
        value = self.values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{self.path}, {name}", value, f"of type {kind}")
        return value


def read_machine(name: str) -> _File:
    """The file of a machine by name, or at a path.

    Raises:
      ConfigError: there is none, or it is no JSON object.
    """
    path = _FOLDER / f"{name}.json" if name in NAMES else Path(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "machine", name, f"a JSON file or one of {', '.join(NAMES)} ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("machine", name, f"JSON ({error})") from error
    return _File(str(name), values)


def is_fitted(name: str) -> bool:
    """Whether the machine is a recorded run with a model of its own."""
    return "cost" in read_machine(name).values


def build_system(name: str, model: ModelConfig | None, page_tokens: int = 16) -> System:
    """Puts a model on a machine.

    Args:
      name: of a machine in `NAMES`, or a path.
      model: what runs there; None: what the recorded run had.
      page_tokens: tokens of a page; a recorded run's stays what it was.

    Raises:
      ConfigError: a parameter is missing or wrong, or the model doesn't fit.
    """
    file = read_machine(name)
    if "cost" in file.values:
        return _fitted(file)
    if model is None:
        raise ConfigError("model", None, "a model: this machine was not recorded with one")
    device = {field: file.part("device").number(field) for field in _DEVICE}
    devices = max(1, int(device["devices"]))
    shape = ModelShape.of(model)
    usable = device["memory_bytes"] * device["memory_share"] - device["reserve_bytes"]
    room = usable * devices - shape.weight_bytes
    page_bytes = shape.kv_bytes * page_tokens
    num_pages = int(room // page_bytes)
    if num_pages < 1:
        raise ConfigError(
            "model", f"{shape.weight_bytes} bytes of weights",
            f"weights and a page in the {usable * devices:.0f} bytes of {name}",
        )
    cost = Roofline(
        shape, device["flops_per_s"] * device["flops_share"],
        device["bytes_per_s"] * device["bytes_share"], device["step_s"], devices,
        device["all_reduce_s"], device["all_reduce_bytes_per_s"],
    )
    # Each device moves its share of a page over its own link.
    links = tuple(
        Link(
            part.plain("store", str), int(numbers["store_bytes"]),
            devices * numbers["bytes_per_s"] * numbers["bytes_share"], numbers["copy_s"],
        )
        for part in (_File(f"{name}, links", one) for one in file.plain("links", list))
        for numbers in [{field: part.number(field) for field in _LINK}]
    )
    return System(
        file.plain("name", str), "modelled", cost, device["host_s"], page_tokens, page_bytes,
        num_pages, links,
        # Copies take their bytes of the memory's bandwidth; copy engines do the rest.
        min(1.0, max((link.bytes_per_s for link in links), default=0.0)
            / (devices * cost.bytes_per_s)),
    )


def _fitted(file: _File) -> System:
    cost, engine = file.part("cost"), file.part("engine")
    names = [field.name for field in dataclasses.fields(Line)]
    line = Line(**{name: cost.plain(name, (int, float)) for name in names})
    links = tuple(
        Link(
            part.plain("store", str), part.plain("store_bytes", int),
            part.plain("bytes_per_s", (int, float)), part.plain("copy_s", (int, float)),
            bool(part.values.get("duplex", False)),
        )
        for part in (_File(f"{file.path}, links", one) for one in file.plain("links", list))
    )
    return System(
        file.plain("name", str), "fitted", line, float(engine.plain("host_s", (int, float))),
        engine.plain("page_tokens", int), engine.plain("page_bytes", int),
        engine.plain("num_pages", int), links, CostConfig().interference,
    )
