"""A source of leases at hand, and contents over it, for tests."""

from __future__ import annotations

import numpy as np

from aqua_jax.memory.arena import PAGE, Arena
from aqua_jax.memory.contents import Contents
from aqua_jax.memory.copies import Span
from aqua_jax.memory.lease import Lease
from aqua_jax.memory.peers import PeerTier
from aqua_jax.memory.policies import Dynamic
from aqua_jax.memory.responder import Responder
from aqua_jax.memory.segments import HostTier


class Source:
    """Lends as long as `room` lasts; its leases are at hand, to be asked back or to die."""

    def __init__(self, room):
        self.room, self.leases, self.told = room, [], 0

    def borrow(self, size):
        size = min(-(-size // PAGE) * PAGE, self.room)
        if size <= 0:
            return ()
        self.room -= size
        lease = Lease(Arena.anonymous(size), len(self.leases) + 1, self._back)
        self.leases.append(lease)
        return (lease,)

    def _back(self, lease, offset, size):
        self.told += size

    def live(self):
        """Leases that still hold something."""
        return [lease for lease in self.leases if lease.alive and not lease.closed]

    def close(self):
        for lease in self.leases:
            lease.close()


def spans_of(data, offset=0):
    """One span over a NumPy array of bytes."""
    return [Span(offset, data.ctypes.data, data.nbytes)] if data.nbytes else []


def tiers_of(pages, *, host=None, policy=None, **options):
    """Contents over a source of so many pages, with what moves them and a clock of one's own."""
    now = [0.0]
    source = Source(pages * PAGE)
    peers = PeerTier([source], step=PAGE, clock=lambda: now[0])
    peers.wish = lambda size: None
    contents = Contents(
        [peers, HostTier(host, step=PAGE)], policy or Dynamic(), chunk_bytes=PAGE,
        clock=lambda: now[0],
    )
    return source, contents, Responder(contents, **options), now


def filled(contents, pages, value):
    """A content of so many pages of one byte."""
    content = contents.create(pages * PAGE)
    data = np.full(pages * PAGE, value, np.uint8)
    contents.write(content, spans_of(data))
    return content


def bytes_in(contents, content):
    """The one byte it is full of."""
    target = np.zeros(content.size, np.uint8)
    contents.read(content, spans_of(target))
    assert (target == target[0]).all()
    return int(target[0])
