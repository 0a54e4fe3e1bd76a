"""Typed errors.

Every error a user can cause says three things: which field, which value, what is allowed.
Capacity that runs out is not an error (allocators return a value the caller must handle);
misuse, staleness and broken input are.
"""

from __future__ import annotations

from typing import Any


def _shorten(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class AquaError(Exception):
    """Base of every error raised by aqua_jax."""


class FieldError(AquaError, ValueError):
    """Bad input in one named field.

    Attributes:
      field: name of the field, dotted for nested ones.
      value: what was given.
      allowed: what would have been accepted, in words.
    """

    def __init__(self, field: str, value: Any, allowed: str):
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: got {_shorten(value)}; allowed: {allowed}")


class ConfigError(FieldError):
    """A configuration field (engine, model, command line) is invalid."""


class RequestError(FieldError):
    """A field of one request is invalid; only that request fails."""


class ModelLoadError(AquaError):
    """A checkpoint, tokenizer or model configuration cannot be read, with the file and reason."""


class DependencyError(AquaError, ImportError):
    """An optional package is missing; the message gives the one command that installs it."""


class StaleHandleError(AquaError):
    """A handle's generation has passed: what it named has been freed and possibly reused."""


class PageError(AquaError):
    """Misuse of the page allocator: double free, unknown page, reference count below zero."""


class SequenceStateError(AquaError):
    """Misuse of the scheduler: a sequence ended twice, a token nobody awaits, a stranger."""


class EngineDeadError(AquaError):
    """The engine stopped because of an earlier failure, which is this error's cause."""


class ArenaError(AquaError):
    """Shared memory that cannot be trusted or had, or a range that isn't in it."""


class StoreError(AquaError):
    """Misuse of memory off the device: double free, unknown range, overlap."""


class StoreFullError(StoreError):
    """No tier that the policy allows has room, and there is nothing sensible to go on with."""


class ContentLostError(StoreError):
    """What was offloaded is gone: its lender died or wanted the memory, and no copy was kept."""


class ProtocolError(FieldError):
    """A message from another process that cannot be understood, or asks for what isn't its own."""


class LenderError(AquaError):
    """A lender of memory cannot be reached, doesn't answer, or refuses to talk to us."""


class SimulationError(AquaError):
    """A simulated run came to a state from which nothing could ever happen."""


class LedgerError(FieldError):
    """The ledger refuses: an unknown id, somebody else's, an over-free, a size that can't be."""


class CoordinatorError(LenderError):
    """The coordinator cannot be reached, doesn't answer, or refuses to talk to us."""
