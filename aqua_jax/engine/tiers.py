"""Opens the memory that pages go to when their sequence gives way: lenders' first, then our own.

What the user asked for and can't be had is an error that says so, at the start; a lender without
room is none, for it may have some later. What is only a default is left out, and the log says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from absl import logging

from aqua_jax.config import EngineConfig
from aqua_jax.engine import device_mapping
from aqua_jax.engine.borrowing import Borrowing
from aqua_jax.engine.device_peer import DeviceSource, gpu_of
from aqua_jax.engine.pager import OwnedStore
from aqua_jax.errors import AquaError, ConfigError
from aqua_jax.memory import sources
from aqua_jax.memory.arena import available_memory
from aqua_jax.memory.sources import LeaseSource
from aqua_jax.memory.stores import HostStore
from aqua_jax.ops import library, pinning

if TYPE_CHECKING:
    from aqua_jax.memory.client import Client

# Own memory by default: so many pools, but no more than one part in _HOST_SHARE of what is there.
_HOST_FACTOR, _HOST_SHARE = 4, 4


@dataclasses.dataclass(frozen=True)
class Tiers:
    """The stores there are, fastest first, and what `stats` says about moves."""

    stores: tuple[OwnedStore, ...]
    slot_bytes: int  # of a page
    moves: str  # "ffi", or "none: " and why
    borrowing: Borrowing | None = None  # brings further stores; of these, the lenders' are its own

    @property
    def usable(self) -> bool:
        """Whether pages are kept, now or once somebody lends."""
        return bool(self.stores or self.borrowing)

    def close(self) -> None:
        """Gives all memory back; for when the engine isn't made after all."""
        for store in self.stores:
            store.close()
        if self.borrowing is not None:
            self.borrowing.close()


def open_tiers(
    config: EngineConfig, attention: str, pages: int, page_bytes: int,
    client: Client | None = None,
) -> Tiers:
    """Opens what the configuration asks for.

    Args:
      config: the engine's.
      attention: the implementation in use.
      pages: of the pool.
      page_bytes: of one page in the pool, and so of a slot.
      client: by which the engine lends, if it does; where it borrows at the same coordinator it
        is not lent its own memory.

    Raises:
      ConfigError: nobody answers at the peer's socket, or memory that was asked for isn't there.
    """
    why = _why_not(config, attention)
    if why:
        if config.peer:
            raise ConfigError("peer", config.peer, f"empty here: {why}")
        if config.host_kv_memory:
            raise ConfigError("host_kv_memory", config.host_kv_memory, f"0 or null here: {why}")
        return Tiers((), page_bytes, f"none: {why}")
    with contextlib.ExitStack() as opened:
        stores: list[OwnedStore] = []
        borrowing = None
        if config.peer:
            borrowing = _peer(config, page_bytes, client)
            opened.callback(borrowing.close)
            stores += borrowing.open()
            if not stores:
                who = "nobody at" if len(set(config.peers)) == 1 else "not each of"
                logging.warning("%s %s lends anything now; asking on", who, config.peer)
        host = _host(config, pages, page_bytes)
        if host is not None:
            stores.append(opened.enter_context(host))
        opened.pop_all()
    for store in stores:
        logging.info(
            "%s store: %d pages of %d bytes", store.name, store.capacity, store.slot_bytes
        )
    if not stores and borrowing is None:
        return Tiers((), page_bytes, "none: there is no memory to move pages to")
    return Tiers(tuple(stores), page_bytes, "ffi", borrowing)


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
            size // page_bytes * page_bytes, page_bytes, config.page_tokens, grows=True,
            pins=pinning.pins(),
        )
    except ConfigError as error:
        raise ConfigError("host_kv_memory", size, error.allowed) from error


def _peer(config: EngineConfig, page_bytes: int, client: Client | None) -> Borrowing:
    limit = config.peer_kv_memory
    if limit is not None and limit < page_bytes:
        raise ConfigError(
            "peer_kv_memory", limit, f"at least a page: {page_bytes} bytes for this model"
        )
    devices = config.tensor_parallel
    entries = config.peers * (devices if len(config.peers) == 1 else 1)
    # Devices with the same socket share its leases: each of these has slots for all of them. A
    # GPU's memory is mapped for one device, so there each has its own. Of a coordinator GPUs in
    # different places ask one by one: near memory is lent first, and each has its own link.
    apart = (
        len(config.peers) == 1 and client is None and gpu_of(config.peer) is None
        and len({device_mapping.domain([device]) for device in range(devices)}) > 1
        and sources.is_coordinator(config.peer)
    )
    homes: list[int] = []
    with contextlib.ExitStack() as opened:
        found: list[LeaseSource] = []
        at: dict[str, int] = {}
        for device, entry in enumerate(entries):
            gpu = gpu_of(entry)
            if gpu is None and entry in at and not apart:
                homes.append(at[entry])
                continue
            homes.append(len(found))
            at[entry] = len(found)
            if gpu is not None:
                source: LeaseSource = DeviceSource(
                    config.peer, gpu, device, share=entries[device:].count(entry)
                )
            else:
                users = [device] if apart else [
                    index for index, other in enumerate(entries) if other == entry
                ]
                unit = page_bytes // devices * len(users)
                source = _socket(config, entry, unit, client, users)
            opened.callback(source.close)
            found.append(source)
        opened.pop_all()
    return Borrowing(found, limit, page_bytes, config.page_tokens, pinning.pins(), homes, apart)


def _socket(
    config: EngineConfig, entry: str, unit: int, client: Client | None, devices: list[int]
) -> LeaseSource:
    # What is lent may be a GPU's: then it is mapped for the devices that copy to it.
    mappers = device_mapping.mappers(devices)
    try:
        if client is not None and entry == config.coordinator:
            return sources.CoordinatorSource(entry, unit=unit, client=client, mappers=mappers)
        return sources.connect(
            entry, name="aqua-jax", unit=unit, domain=device_mapping.domain(devices),
            mappers=mappers,
        )
    except AquaError as error:
        raise ConfigError(
            "peer", config.peer, "the socket of a lender or a coordinator that runs (aqua-jax "
            f"lend, aqua-jax coordinator): {error}",
        ) from error
