"""What ends with its `with` block."""

from __future__ import annotations

import abc
from typing import Self


class Closing(abc.ABC):
    """An owner of memory, descriptors, threads or connections that `close` gives back.

    A `with` block closes it when it is left, by an error or not; an error goes on to the caller.
    """

    @abc.abstractmethod
    def close(self) -> object:
        """Gives everything back. What it returns, if anything, a `with` block drops."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
