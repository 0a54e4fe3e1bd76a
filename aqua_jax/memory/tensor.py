"""Any JAX array, or tree of them, in memory off the device: `Aqua` and its handles.

    aqua = Aqua(socket="@box")        # what `aqua-jax lend --listen=@box` lends, or host memory
    handle = aqua.offload(state, delete=True)
    ...
    aqua.respond()                    # between steps: gives back what the lender wants
    state = handle.fetch()
    handle.free()

What a handle returns is what was offloaded, bit for bit, or an error that says why not.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from aqua_jax.closing import Closing
from aqua_jax.errors import ConfigError, ContentLostError, StaleHandleError
from aqua_jax.memory import arrays, sources
from aqua_jax.memory.contents import CHUNK, Content, Contents, Counters
from aqua_jax.memory.copies import Span
from aqua_jax.memory.peers import PeerTier
from aqua_jax.memory.policies import Dynamic, Policy, TierView
from aqua_jax.memory.rebuild import rebuild
from aqua_jax.memory.responder import Responder
from aqua_jax.memory.segments import HostTier, Tier

Views = list[tuple[Span, np.ndarray]]

# How often an offload begins again when lenders die while it copies.
ATTEMPTS = 3


class AquaTensor:
    """A handle of something offloaded; made by `Aqua.offload`.

    A context manager that frees itself. One that is forgotten unfreed says so with a
    ResourceWarning, and frees itself then.

    Attributes:
      struct: what was offloaded, with a `jax.ShapeDtypeStruct` for each array.
      nbytes: bytes it takes off the device, padding included.
    """

    def __init__(self, aqua: Aqua, layout: arrays.Layout, content: Content) -> None:
        """Use `Aqua.offload`."""
        self._aqua, self._layout, self._content = aqua, layout, content
        self._ticket: Future[None] | None = None
        self.struct = layout.struct
        self.nbytes = layout.size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, of a single array."""
        return self._single().shape

    @property
    def dtype(self) -> Any:
        """Type, of a single array."""
        return self._single().dtype

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """Sharding, of a single array; None if jax may put it where it likes."""
        return self._single().sharding

    def _single(self) -> jax.ShapeDtypeStruct:
        if not isinstance(self.struct, jax.ShapeDtypeStruct):
            raise AttributeError("the handle is of a tree: see its `struct`")
        return self.struct

    @property
    def tiers(self) -> dict[str, int]:
        """Its bytes by tier; those of a mirrored content count in both."""
        return self._aqua.contents.where(self._content)

    @property
    def freed(self) -> bool:
        """Whether `free` has been called, or the Aqua closed."""
        return self._content.freed or self._aqua.contents.closed

    @property
    def lost(self) -> bool:
        """Whether `fetch` would raise ContentLostError now."""
        return not self.freed and not self._aqua.contents.readable(self._content)

    def done(self) -> bool:
        """Whether the copy has ended, well or not; always, unless offloaded with wait=False."""
        return self._ticket is None or self._ticket.done()

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until the copy has ended.

        Raises:
          TimeoutError: it hasn't within the time.
          StoreError: it failed: the array was deleted before it was computed, or the lender died.
        """
        if self._ticket is not None:
            self._ticket.result(timeout_s)

    def fetch(self, sharding: Any = None) -> Any:
        """Brings it back to the device; the handle keeps its content.

        Args:
          sharding: None: to where it was. A sharding or a device for all its arrays, or a tree of
            these: there instead.

        Returns:
          What was offloaded.

        Raises:
          ContentLostError: its lender died or took the memory back, and there is no other copy.
          StaleHandleError: freed, or the Aqua is closed.
          ConfigError: a sharding that doesn't fit.
        """
        if self.freed:
            raise StaleHandleError("the handle has been freed")
        self.wait()
        contents, content = self._aqua.contents, self._content
        return rebuild(self._layout, lambda spans: contents.read(content, spans), sharding)

    def free(self) -> None:
        """Lets go of the content; a copy under way ends first.

        Raises:
          StaleHandleError: it is free already, or the Aqua closed.
        """
        self._aqua.forget(self)

    def __enter__(self) -> AquaTensor:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.freed:
            self.free()

    def __repr__(self) -> str:
        state = "freed" if self.freed else "lost" if self.lost else str(self.tiers)
        what = self._layout.treedef if self._layout.treedef.num_leaves != 1 else self.struct
        return f"AquaTensor({what}, {self.nbytes} bytes, {state})"

    def __del__(self) -> None:
        aqua = getattr(self, "_aqua", None)
        if aqua is not None and not self.freed:
            warnings.warn(f"not freed: {self.nbytes} bytes of {self.struct}", ResourceWarning,
                          stacklevel=2, source=self)
            aqua.contents.abandon(self._content)


class Aqua(Closing):
    """Memory off the device: borrowed from lenders while they lend, the host's otherwise.

    Methods may be called from any thread. Only `offload` talks to lenders: it may ask for a lease,
    and then waits `timeout_s` at most.
    """

    def __init__(
        self, socket: str | Sequence[str] | None = None, *, host_bytes: int | None = None,
        peer_bytes: int | None = None, policy: Policy | None = None, name: str = "aqua",
        timeout_s: float = 2.0, chunk_bytes: int = CHUNK, huge_pages: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          socket: that of a lender (`aqua-jax lend`) or a coordinator (`aqua-jax coordinator`); or
            several, nearest first. None: host memory only.
          host_bytes: most host memory; None: what the system has.
          peer_bytes: most borrowed memory; None: what is lent. It is borrowed as it is needed.
          policy: which tier; by default `Dynamic()`: the best that has room.
          name: shown in lenders' status lines.
          timeout_s: for questions to lenders.
          chunk_bytes: what moves at once, 64 or more: what is moved beyond what a lender asks for
            is less than that.
          huge_pages: advise the system to use them for host memory; see `segments.HostTier`.
          clock: in seconds.

        Raises:
          LenderError, CoordinatorError: nobody answers at a socket.
          DependencyError: it is a coordinator's, and gRPC isn't installed.
          ConfigError: impossible limits or socket.
        """
        if chunk_bytes < 64:
            raise ConfigError("chunk_bytes", chunk_bytes, "64 or more")
        chunk_bytes -= chunk_bytes % 64
        paths = [socket] if isinstance(socket, str) else list(socket or ())
        tiers: list[Tier] = [HostTier(host_bytes, huge_pages=huge_pages)]
        found: list[sources.LeaseSource] = []
        try:
            for path in paths:
                found.append(sources.connect(path, name=name, timeout_s=timeout_s))
            if paths:
                tiers.insert(0, PeerTier(found, peer_bytes, wait_s=timeout_s, clock=clock))
        except BaseException:
            for source in found:
                source.close()
            raise
        self.contents = Contents(
            tiers, Dynamic() if policy is None else policy, chunk_bytes=chunk_bytes, clock=clock
        )
        self._responder = Responder(self.contents)
        self._lock = threading.Lock()
        self._live: weakref.WeakSet[AquaTensor] = weakref.WeakSet()
        self._copier: ThreadPoolExecutor | None = None

    def offload(self, x: Any, *, wait: bool = True, delete: bool = False) -> AquaTensor:
        """Copies an array, or a tree of arrays as one, off the device.

        Args:
          x: jax arrays of any type and sharding, NumPy arrays; numbers and text stay as they are.
          wait: return when the copy has ended: the arrays may be deleted or donated then. False:
            at once; they may be when the handle is `done()`. An array that is deleted before it was
            computed makes `wait` and `fetch` raise; a NumPy array is copied before this returns.
          delete: delete the jax arrays after the copy, which frees their device memory.

        Returns:
          The handle.

        Raises:
          StoreFullError: no tier that the policy allows has room.
          ConfigError: a leaf that isn't an array, or was deleted, or is being traced.
          StaleHandleError: closed.
        """
        layout, found = arrays.layout_of(x)
        originals = []
        if delete:
            originals = [leaf for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array)]
        handle = AquaTensor(self, layout, self.contents.create(layout.size))
        with self._lock:
            self._live.add(handle)
        try:
            parts = arrays.parts_of(layout, found, snapshot=not wait)
            if wait:
                self._copy(handle, arrays.host_views(layout, parts), originals)
                return handle
            # What is computed already is held from now on, so that deleting it does no harm.
            held = arrays.host_views(layout, parts) if arrays.ready(parts) else None
            handle._ticket = self._thread().submit(
                self._copy_later, handle, parts, held, originals
            )
        except BaseException:
            with contextlib.suppress(StaleHandleError):  # closed meanwhile
                self.forget(handle)
            raise
        return handle

    def _thread(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._copier is None:
                self._copier = ThreadPoolExecutor(1, thread_name_prefix="aqua-copier")
            return self._copier

    def _copy_later(
        self, handle: AquaTensor, parts: list[Any], held: Views | None, originals: list[jax.Array]
    ) -> None:
        if held is None:
            held = arrays.host_views(handle._layout, parts)
        parts.clear()
        self._copy(handle, held, originals)

    def _copy(self, handle: AquaTensor, views: Views, originals: list[jax.Array]) -> None:
        """Fills a handle's content; empties both lists, and deletes the originals."""
        spans = [span for span, _ in views]
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self.contents.write(handle._content, spans)
                break
            except ContentLostError:
                if attempt == ATTEMPTS:
                    raise
                self._begin_again(handle)
        views.clear()  # they hold the memory
        for array in originals:
            array.delete()
        originals.clear()

    def _begin_again(self, handle: AquaTensor) -> None:
        """Another place for a handle whose lender died while it was written."""
        fresh = self.contents.create(handle.nbytes)
        with self._lock:
            former = handle._content
            if former.freed:
                fresh, former = former, fresh
            handle._content = fresh
        self.contents.free(former)

    def forget(self, handle: AquaTensor) -> None:
        """What `AquaTensor.free` does.

        Raises:
          StaleHandleError: it is free already.
        """
        with self._lock:
            self.contents.free(handle._content)
            self._live.discard(handle)

    def respond(self) -> int:
        """To be called between steps: gives back what lenders want, and lets content climb.

        With nothing to do it looks at some flags and returns; it never waits for a lender. Content
        is moved down a tier chunk by chunk until the lender has what it asked for, and up again
        when there is room, some MiB in each call.

        Returns:
          Bytes copied.
        """
        return self._responder.respond()

    @property
    def live(self) -> list[AquaTensor]:
        """The handles that have not been freed."""
        return list(self._live)

    @property
    def tiers(self) -> Mapping[str, TierView]:
        """The tiers, best first: what is used, free, and wanted back; bytes."""
        return self.contents.views()

    @property
    def counters(self) -> Counters:
        """What has been copied, moved, given back and lost so far."""
        return self.contents.counters

    def close(self) -> None:
        """Ends copies, frees everything and gives all memory back; may be repeated.

        Handles still live are named in a ResourceWarning.
        """
        if self.contents.closed:
            return
        if self._copier is not None:
            self._copier.shutdown()
        live = self.live
        if live:
            total = sum(handle.nbytes for handle in live)
            warnings.warn(f"{len(live)} handles of {total} bytes were not freed", ResourceWarning,
                          stacklevel=2, source=live[0])
        self._responder.close()

    def __del__(self) -> None:
        contents = getattr(self, "contents", None)
        if contents is not None and not contents.closed:
            warnings.warn("an Aqua was not closed", ResourceWarning, stacklevel=2, source=self)
