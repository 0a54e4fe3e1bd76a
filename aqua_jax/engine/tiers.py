"""Opens the memory that pages go to when their sequence gives way: a lender's first, then our own.

What the user asked for and can't be had is an error that says so, at the start. What is only a
default is left out, and the log says why.
"""

from __future__ import annotations

import contextlib
import dataclasses

from absl import logging

from aqua_jax.config import EngineConfig
from aqua_jax.engine.pager import OwnedStore
from aqua_jax.errors import ConfigError, LenderError
from aqua_jax.memory.arena import PAGE, available_memory
from aqua_jax.memory.borrower import Borrower
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.stores import HostStore, PeerStore
from aqua_jax.ops import library

# Own memory by default: so many pools, but no more than one part in _HOST_SHARE of what is there.
_HOST_FACTOR, _HOST_SHARE = 4, 4


@dataclasses.dataclass(frozen=True)
class Tiers:
    """The stores, fastest first, and what `stats` says about moves."""

    stores: tuple[OwnedStore, ...]
    moves: str  # "ffi", or "none: " and why

    def close(self) -> None:
        """Gives all memory back; for when the engine isn't made after all."""
        for store in self.stores:
            store.close()


def open_tiers(config: EngineConfig, attention: str, pages: int, page_bytes: int) -> Tiers:
    """Opens what the configuration asks for.

    Args:
      config: the engine's.
      attention: the implementation in use.
      pages: of the pool.
      page_bytes: of one page in the pool, and so of a slot.

    Raises:
      ConfigError: the lender can't be reached or grants nothing, or memory that was asked for
        isn't there.
    """
    why = _why_not(config, attention)
    if why:
        if config.peer:
            raise ConfigError("peer", config.peer, f"empty here: {why}")
        if config.host_kv_memory:
            raise ConfigError("host_kv_memory", config.host_kv_memory, f"0 or null here: {why}")
        return Tiers((), f"none: {why}")
    with contextlib.ExitStack() as opened:
        stores: list[OwnedStore] = []
        if config.peer:
            stores.append(opened.enter_context(_peer(config, page_bytes)))
        host = _host(config, pages, page_bytes)
        if host is not None:
            stores.append(opened.enter_context(host))
        opened.pop_all()
    for store in stores:
        logging.info(
            "%s store: %d pages of %d bytes", store.name, store.capacity, store.slot_bytes
        )
    return Tiers(tuple(stores), "ffi" if stores else "none: there is no memory to move pages to")


def _why_not(config: EngineConfig, attention: str) -> str:
    """Why pages can't be kept; empty if they can."""
    if not config.swaps:
        return f"policy {config.policy} recomputes"
    if attention != "ffi":
        # With a bf16 pool XLA converts all of it there and back, pages just copied in included.
        return f"attention {attention} may rewrite pages that others are copying"
    if not library.use("aqua_enqueue_moves"):
        return library.reason() or "moves have no implementation on this platform"
    return ""


def _host(config: EngineConfig, pages: int, page_bytes: int) -> HostStore | None:
    size = config.host_kv_memory
    if size == 0:
        return None
    if size is None:
        size = min(_HOST_FACTOR * pages * page_bytes, available_memory() // _HOST_SHARE)
        if size < page_bytes:
            logging.warning("no memory is available for pages that give way: they are recomputed")
            return None
    elif size < page_bytes:
        raise ConfigError(
            "host_kv_memory", size, f"0, or at least a page: {page_bytes} bytes for this model"
        )
    elif size > (room := available_memory()):
        raise ConfigError("host_kv_memory", size, f"at most {room}, the memory available now")
    try:
        return HostStore(
            size // page_bytes * page_bytes, page_bytes, config.page_tokens, grows=True
        )
    except ConfigError as error:
        raise ConfigError("host_kv_memory", size, error.allowed) from error


def _peer(config: EngineConfig, page_bytes: int) -> PeerStore:
    if config.peer_kv_memory is not None and config.peer_kv_memory < page_bytes:
        raise ConfigError(
            "peer_kv_memory", config.peer_kv_memory,
            f"at least a page: {page_bytes} bytes for this model",
        )
    try:
        lease = _borrow(config, page_bytes)
    except (LenderError, ConfigError) as error:
        if isinstance(error, ConfigError) and error.field in ("peer", "peer_kv_memory"):
            raise
        raise ConfigError(
            "peer", config.peer, f"the socket of a lender that runs (aqua-jax lend): {error}"
        ) from error
    return PeerStore(lease, page_bytes, config.page_tokens)


def _borrow(config: EngineConfig, page_bytes: int) -> Lease:
    """What was asked for, or else the largest piece, by halves, of what is free."""
    borrower = Borrower(config.peer, name="aqua-jax")
    try:
        free = borrower.status()["free"] // PAGE * PAGE
        asked = config.peer_kv_memory
        size = asked or free
        lease = None
        while lease is None and size >= page_bytes:
            lease = borrower.borrow(size)
            if asked:
                break
            size = size // 2 // PAGE * PAGE  # it is free, but not in one piece
        if lease is None:
            if asked:
                raise ConfigError(
                    "peer_kv_memory", asked, f"what the lender has in one piece, of {free} bytes"
                )
            raise ConfigError(
                "peer", config.peer,
                f"a lender with room for a page, {page_bytes} bytes; this one has {free}",
            )
    except BaseException:
        borrower.close()
        raise
    borrower.close_with_leases()
    return lease
