"""The flags of one command: absl flags in titled groups, and the help that shows them."""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from absl import flags

from aqua_jax.cli import parsers

HELP_WIDTH = 96


class UsageError(Exception):
    """The command line asks for something that doesn't exist; shown without a traceback."""


@dataclasses.dataclass
class _Group:
    title: str
    names: list[str]


class FlagSet:
    """Defines, parses and explains the flags of one command.

    Every command has its own absl `FlagValues`, so one command's flags are unknown to another.
    """

    def __init__(self) -> None:
        self.values = flags.FlagValues()
        self._groups: list[_Group] = []
        self._hints: dict[str, str] = {}  # what stands after --name=
        self._texts: dict[str, str] = {}

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        """Flags defined inside stand under `title` in the help."""
        self._groups.append(_Group(title, []))
        yield

    def _note(self, name: str, hint: str, text: str) -> None:
        if not self._groups:
            self._groups.append(_Group("Flags", []))
        self._groups[-1].names.append(name)
        self._hints[name], self._texts[name] = hint, text

    def _define(
        self, parser: flags.ArgumentParser, name: str, default: Any, text: str,
        hint: str | None = None, serializer: flags.ArgumentSerializer | None = None,
    ) -> None:
        flags.DEFINE(
            parser, name, default, text, flag_values=self.values,
            serializer=serializer or flags.ArgumentSerializer(),
        )
        self._note(name, hint or parser.syntactic_help, text)

    def string(self, name: str, default: str | None, text: str, hint: str = "TEXT") -> None:
        """A flag that takes any text."""
        self._define(flags.ArgumentParser(), name, default, text, hint)

    def strings(self, name: str, text: str, hint: str = "TEXT") -> None:
        """A flag that may be given several times; its value is a list."""
        flags.DEFINE_multi_string(name, [], text, flag_values=self.values)
        self._note(name, hint, text)

    def integer(
        self, name: str, default: int | None, text: str, low: int | None = None,
        high: int | None = None, word: str | None = None,
    ) -> None:
        """An integer flag with inclusive bounds, or a word that stands for None."""
        self._define(parsers.IntegerParser(low, high, word), name, default, text)

    def number(self, name: str, default: float | None, text: str, low: float, high: float) -> None:
        """A real number flag with inclusive bounds."""
        self._define(parsers.NumberParser(low, high), name, default, text)

    def size(self, name: str, default: int | None, text: str, *, low: int = 1) -> None:
        """A flag in bytes, written like 256MiB; `low` is 1 or 0."""
        self._define(
            parsers.SizeParser(low), name, default, text, serializer=parsers.SizeSerializer()
        )

    def weights(self, name: str, text: str) -> None:
        """A flag that gives names weights, written like alice=2,bob=0.5; none by default."""
        self._define(
            parsers.WeightsParser(), name, {}, text, serializer=parsers.WeightsSerializer()
        )

    def choice(self, name: str, default: str | None, choices: Sequence[str], text: str) -> None:
        """A flag that is one of a few words."""
        self._define(parsers.ChoiceParser(choices), name, default, text)

    def switch(self, name: str, default: bool, text: str) -> None:
        """A flag that is on or off: --name, --noname."""
        flag = flags.BooleanFlag(name, default, text)
        flag.parser = parsers.SwitchParser()
        flags.DEFINE_flag(flag, flag_values=self.values)
        self._note(name, "", text)

    def parse(self, arguments: Sequence[str]) -> None:
        """Reads the command line.

        Args:
          arguments: what stands after the command's name.

        Raises:
          UsageError: unknown flag, bad value, or a word that is no flag.
        """
        try:
            rest = self.values(["aqua-jax", *arguments])[1:]
        except flags.UnrecognizedFlagError as error:
            raise UsageError(self._unknown(error.flagname)) from None
        except flags.CantOpenFlagFileError as error:
            reason = getattr(error.__context__, "strerror", None) or error
            raise UsageError(f"flag --flagfile: {reason}") from None
        except (flags.Error, ValueError) as error:  # ValueError: a value for --noNAME
            raise UsageError(str(error)) from None
        if rest:
            raise UsageError(f"unexpected argument {rest[0]!r}: use flags, --name=value")

    def _unknown(self, name: str) -> str:
        known = list(self._hints) + ["help"]
        known += [f"no{n}" for n in self._hints if self.values[n].boolean]
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean --{near[0]}?" if near else ""
        return f"unknown flag --{name}.{hint}"

    def __getattr__(self, name: str) -> Any:
        """The parsed value of flag `name`."""
        if name.startswith("_") or name in ("values",):
            raise AttributeError(name)
        return getattr(self.values, name)

    def knows(self, name: str) -> bool:
        """Whether there is a flag `name`."""
        return name in self._hints

    def given(self, name: str) -> bool:
        """Whether flag `name` stood on the command line."""
        return bool(self.values[name].present)

    def written(self, name: str, value: Any) -> str:
        """A value of flag `name` as one would write it."""
        if isinstance(value, Mapping):
            return parsers.format_weights(value)
        known = name in self._hints and isinstance(self.values[name].parser, parsers.SizeParser)
        return parsers.format_size(value) if known and isinstance(value, int) else str(value)

    def help(self) -> str:
        """All groups with their flags, defaults and meanings."""
        blocks = []
        for group in self._groups:
            lines = [f"{group.title}:"]
            for name in group.names:
                lines += self._explain(name)
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    def _explain(self, name: str) -> list[str]:
        flag = self.values[name]
        hint = self._hints[name]
        head = f"  --[no]{name}" if flag.boolean else f"  --{name}={hint}"
        default = flag.default
        if flag.boolean:
            shown = "on" if default else "off"
        else:
            shown = "" if default in (None, [], {}, "") else self.written(name, default)
        text = self._texts[name] + (f" (default: {shown})" if shown else "")
        indent = " " * 8
        return [
            head,
            *textwrap.wrap(
                text, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent,
                break_on_hyphens=False,
            ),
        ]
