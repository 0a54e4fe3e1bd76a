"""In which order tiers are used as lenders' stores come and go."""

from __future__ import annotations

import contextlib

from aqua_jax.paging.stored import Tiers
from tests.scheduling.fake_copies import host_store, peer_store


def test_a_lenders_store_comes_behind_those_of_its_name_and_before_all_others():
    with contextlib.ExitStack() as stack:
        first, second, third = (peer_store(1, 4) for _ in range(3))
        host = stack.enter_context(host_store(4, 4))
        for store in (first, second, third):
            stack.callback(store.close)
        tiers = Tiers([first, host])
        tiers.add(second)
        assert tiers.stores == (first, second, host)
        assert tiers.remove(first) and tiers.remove(second)
        tiers.add(third)  # nobody of its name is there: it is faster than what there is
        tiers.add(first)
        assert tiers.stores == (third, first, host)
        placed = [tiers.place() for _ in range(3)]
        assert [stored.store for stored in placed if stored] == [third, first, host]
        assert not tiers.remove(third)
        for stored in placed:
            tiers.free(stored)
        assert tiers.remove(third)
