"""Histories of the ledger that are worth reading: reclaim, quarantine, force, recovery."""

import dataclasses

import pytest

from aqua_jax.coordinator.choice import choose, distance
from aqua_jax.coordinator.intervals import Intervals
from aqua_jax.coordinator.ledger import Ledger
from aqua_jax.coordinator.records import (
    MOST_RANGES,
    PAGE,
    Arena,
    ArenaTerms,
    Claim,
    Entry,
    Kill,
    Lease,
    Lost,
    Refused,
    Returned,
    Revoke,
)
from aqua_jax.errors import LedgerError, StaleHandleError

LENDER, ONE, TWO, THREE = 1, 2, 3, 4


class Case:
    """A ledger with a lender and an arena of `count` clean pages, and three consumers."""

    def __init__(self, count=8, *, scrub=False, **options):
        self.now = 0.0
        self.ledger = Ledger(lambda: self.now, term_s=10, drain_s=5, **options)
        for key in (LENDER, ONE, TWO, THREE):
            self.ledger.join(key, name=f"client{key}", identity=(key, key))
        terms = ArenaTerms(count * PAGE, scrub=scrub)
        self.arena = self.ledger.register(LENDER, terms, [(0, count * PAGE)]).id
        self.zero()

    def zero(self):
        while (taken := self.ledger.next_dirty(PAGE)) is not None:
            self.ledger.scrubbed(*taken)

    def borrow(self, key, count, **options):
        lease = self.ledger.borrow(key, count * PAGE, **options)
        assert isinstance(lease, Lease) and len(lease.ranges) == 1
        return lease.ranges[0]

    def later(self, seconds, *awake):
        self.now += seconds
        for key in (LENDER, *awake):
            self.ledger.renew(key)
        self.ledger.tick()

    def events(self):
        return self.ledger.take_events()


def test_reclaim_takes_what_is_free_at_once_and_asks_the_newest_for_the_rest():
    case = Case(8)
    old, new = case.borrow(ONE, 3), case.borrow(TWO, 3)
    assert case.ledger.reclaim(LENDER, case.arena, 4 * PAGE, 2.0) == 2 * PAGE
    assert case.events() == [
        Returned(LENDER, case.arena, 6 * PAGE, 8 * PAGE), Revoke(TWO, new.generation, PAGE, 2.0)
    ]
    assert isinstance(case.ledger.borrow(THREE, PAGE), Refused), "wanted back, not lent on"
    case.ledger.give_back(TWO, new.generation, 5 * PAGE, 6 * PAGE)
    assert case.events() == [Returned(LENDER, case.arena, 5 * PAGE, 6 * PAGE)]
    case.ledger.give_back(ONE, old.generation, 0, PAGE)  # somebody else was quicker
    assert case.events() == [
        Returned(LENDER, case.arena, 0, PAGE), Revoke(TWO, new.generation, 3 * PAGE, None)
    ]
    assert case.ledger.arenas[case.arena].deadline is None


def test_a_lender_that_changes_its_mind_tells_holders():
    case = Case(4)
    found = case.borrow(ONE, 4)
    case.ledger.reclaim(LENDER, case.arena, 0, 2.0)
    case.ledger.reclaim(LENDER, case.arena, 9 * PAGE, 2.0)
    assert case.events() == [
        Revoke(ONE, found.generation, 0, 2.0), Revoke(ONE, found.generation, 4 * PAGE, None)
    ]


def test_saying_the_same_again_gives_holders_no_more_time():
    case = Case(4)
    found = case.borrow(ONE, 4)
    case.ledger.reclaim(LENDER, case.arena, PAGE, 2.0)
    assert case.events() == [Revoke(ONE, found.generation, PAGE, 2.0)]
    case.later(1.0, ONE)
    assert case.ledger.reclaim(LENDER, case.arena, PAGE, 2.0) == 3 * PAGE
    assert case.events() == [] and case.ledger.arenas[case.arena].deadline == 2.0


def test_who_slept_gives_holders_the_time_and_tells_nobody_twice():
    case = Case(4)
    found = case.borrow(ONE, 4)
    case.ledger.reclaim(LENDER, case.arena, PAGE, 2.0)
    case.events()
    case.now += 3.0
    case.ledger.stalled(3.0)
    case.later(0.5, ONE)
    assert case.events() == []
    assert case.ledger.ranges[found.generation].deadline == 5.0
    case.ledger.reclaim(LENDER, case.arena, 0, 1.0)
    assert case.events() == [Revoke(ONE, found.generation, 0, 4.5)]


@pytest.mark.parametrize("where", ["free", "dirty", "scrubbing", "held"])
@pytest.mark.parametrize(("start", "end"), [(1, 2), (2, 3), (0, 4), (1, 4), (0, 2)])
def test_nothing_is_lent_twice(where, start, end):
    """Of an arena of 6 pages [1, 3) are lent."""
    case = Case(1)
    arena = case.ledger.register(LENDER, ArenaTerms(6 * PAGE), [(PAGE, 3 * PAGE)]).id
    if where == "scrubbing":
        assert case.ledger.next_dirty(2 * PAGE) == (arena, PAGE, 3 * PAGE)
    elif where != "dirty":
        case.zero()
    if where == "held":
        assert case.borrow(ONE, 2).arena == arena
    with pytest.raises(LedgerError, match="aren't lent"):
        case.ledger.lend(LENDER, arena, start * PAGE, end * PAGE)
    assert case.ledger.arenas[arena].lent == 2 * PAGE
    case.ledger.lend(LENDER, arena, 0, PAGE)
    case.ledger.lend(LENDER, arena, 3 * PAGE, 6 * PAGE)
    assert case.ledger.arenas[arena].lent == 6 * PAGE


def test_priority_is_asked_last():
    case = Case(8)
    high = case.borrow(ONE, 4, priority=1)
    low = case.borrow(TWO, 4)
    case.ledger.reclaim(LENDER, case.arena, 5 * PAGE, 60.0)
    assert case.events() == [Revoke(TWO, low.generation, PAGE, 5.0)], "the drain limit counts"
    case.ledger.reclaim(LENDER, case.arena, 3 * PAGE, 1.0)
    assert case.events() == [
        Revoke(TWO, low.generation, 0, 1.0), Revoke(ONE, high.generation, 3 * PAGE, 1.0)
    ]


def test_scrubbed_before_its_owner_gets_it_back():
    case = Case(4, scrub=True)
    found = case.borrow(ONE, 4)
    case.ledger.reclaim(LENDER, case.arena, 0, 2.0)
    case.events()
    case.ledger.give_up(ONE, found.generation)
    assert case.events() == []
    case.zero()
    assert sum(event.end - event.start for event in case.events()) == 4 * PAGE


def test_a_silent_holder_is_quarantined_and_others_are_asked():
    case = Case(8)
    silent, other = case.borrow(ONE, 4), case.borrow(TWO, 4)
    case.later(10, TWO)
    assert case.ledger.clients[ONE].expired and not case.ledger.clients[TWO].expired
    case.ledger.reclaim(LENDER, case.arena, 2 * PAGE, 5.0)
    assert case.events() == [Revoke(TWO, other.generation, 0, 15.0)]
    case.ledger.give_up(TWO, other.generation)
    case.later(100, TWO)
    assert case.ledger.arenas[case.arena].held == 4 * PAGE, "nobody else's until it wakes up"
    case.events()
    case.ledger.renew(ONE)
    assert Revoke(ONE, silent.generation, 2 * PAGE, 15.0) in case.events()
    case.ledger.remove(ONE)
    assert [event for event in case.events() if isinstance(event, Returned)]
    assert not case.ledger.arenas[case.arena].held


def test_who_holds_something_is_not_forgotten_though_it_hung_up_long_ago():
    """Its process may live, and be in the middle of a copy."""
    case = Case(4)
    found = case.borrow(ONE, 4)
    case.ledger.disconnected(ONE)
    case.ledger.disconnected(TWO)
    for _ in range(3):
        case.later(11, THREE)
    assert case.ledger.clients[ONE].expired and TWO not in case.ledger.clients
    assert case.ledger.ranges[found.generation].held.total == 4 * PAGE
    assert case.ledger.next_dirty(PAGE) is None
    assert isinstance(case.ledger.borrow(THREE, PAGE), Refused)


def test_force_ends_the_silent_within_term_and_drain_limit():
    case = Case(8, forced=True)
    case.borrow(ONE, 4), case.borrow(TWO, 2)
    case.ledger.reclaim(LENDER, case.arena, 3 * PAGE, 5.0)
    assert case.ledger.next_tick() == 5.0
    case.later(4.9, TWO)
    case.later(5.1, TWO)  # the term of ONE ends here, the drain limit has passed
    assert Kill(ONE) in case.events() and not case.ledger.clients[TWO].killed
    case.later(1, TWO)
    assert not any(isinstance(event, Kill) for event in case.events()), "once"
    case.ledger.remove(ONE)
    assert case.ledger.arenas[case.arena].excess == 0


def test_force_ends_those_who_do_not_obey():
    case = Case(8, forced=True)
    case.borrow(ONE, 4), case.borrow(TWO, 4)
    case.ledger.reclaim(LENDER, case.arena, 6 * PAGE, 1.0)
    for _ in range(10):
        case.later(1, ONE, TWO)
        assert not any(isinstance(event, Kill) for event in case.events())
    case.later(1, ONE, TWO)
    assert [event for event in case.events() if isinstance(event, Kill)] == [Kill(TWO)]


def test_no_force_unless_asked_for():
    case = Case(8)
    case.borrow(ONE, 8)
    case.ledger.reclaim(LENDER, case.arena, 0, 1.0)
    case.later(1000)
    assert not any(isinstance(event, Kill) for event in case.events())


def test_quota():
    case = Case(8, quota=4 * PAGE, quotas={"client3": PAGE})
    assert case.ledger.borrow(ONE, 5 * PAGE).reason == "quota"
    assert case.borrow(ONE, 5, minimum=PAGE).size == 4 * PAGE
    assert case.ledger.borrow(ONE, PAGE).reason == "quota"
    assert case.ledger.borrow(TWO, 2 * PAGE).reason == "quota"
    assert case.borrow(TWO, 1).size == PAGE
    assert case.ledger.borrow(THREE, 4 * PAGE).reason == "room"


def test_a_consumer_has_so_many_ranges_and_no_more():
    """Each costs everybody a little time whenever anything is asked."""
    case = Case(2 * MOST_RANGES)
    others = []
    for _ in range(MOST_RANGES - 1):
        case.borrow(ONE, 1)
        others.append(case.borrow(TWO, 1))
    for found in others:  # now what is free is in pieces
        case.ledger.give_up(TWO, found.generation)
    case.zero()
    (last,) = case.ledger.borrow(ONE, 9 * PAGE, pieces=9, minimum=PAGE).ranges
    assert case.ledger.borrow(ONE, PAGE).reason == "quota"
    assert case.borrow(TWO, 1).size == PAGE
    case.ledger.give_up(ONE, last.generation)
    assert case.borrow(ONE, 1).size == PAGE


def test_the_lender_never_borrows_its_own():
    case = Case(8)
    assert case.ledger.borrow(LENDER, PAGE).free == 0


def test_leases_of_several_pieces_from_several_lenders_nearest_first():
    case = Case(2)
    ledger = case.ledger
    ledger.join(ONE, name="client2", domain="node0/gpu0", identity=(ONE, ONE))
    ledger.join(9, identity=(9, 9))
    far = ledger.register(9, ArenaTerms(8 * PAGE, domain="node1"), [(0, 8 * PAGE)]).id
    near = ledger.register(9, ArenaTerms(4 * PAGE, domain="node0/gpu1"), [(0, 4 * PAGE)]).id
    case.zero()
    lease = ledger.borrow(ONE, 10 * PAGE, pieces=3)
    assert [r.size // PAGE for r in lease.ranges] == [4, 2, 4]
    assert [r.arena for r in lease.ranges] == [near, case.arena, far]
    ledger.free(ONE, lease.id)
    case.zero()
    # In one piece only the far one will do.
    assert [r.arena for r in ledger.borrow(ONE, 8 * PAGE).ranges] == [far]
    assert ledger.borrow(ONE, 100 * PAGE, pieces=64).reason == "room"
    assert ledger.borrow(ONE, 5 * PAGE, pieces=2, unit=3 * PAGE).reason == "room"


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [("", "", 0), ("n0", "n0", 0), ("n0/g0", "n0/g1", 2), ("n0/g0", "n0", 1), ("n0", "n1", 2)],
)
def test_distance(a, b, steps):
    assert distance(a, b) == distance(b, a) == steps


def test_choice_prefers_few_pieces_and_keeps_large_runs_whole():
    arena = Arena(
        1, 1, ArenaTerms(32 * PAGE), 0,
        Intervals([(0, 3 * PAGE), (4 * PAGE, 5 * PAGE), (8 * PAGE, 16 * PAGE)]), Intervals(),
        Intervals(), {},
    )
    assert choose([arena], 2, PAGE, 4) == [(arena, 0, 2)]
    assert choose([arena], 9, PAGE, 4) == [(arena, 8 * PAGE, 8), (arena, 4 * PAGE, 1)]
    assert choose([arena], 9, PAGE, 1) == [(arena, 8 * PAGE, 8)], "as much as there is"
    # Units that aren't whole pages: what fits with rounding up.
    assert choose([arena], 100, PAGE + 1, 9) == [(arena, 8 * PAGE, 7), (arena, 0, 2)]


# Recovery.


def restarted(case, **options):
    """Another ledger, as if the first had been killed; the lender is connected."""
    entries = case.ledger.entries(case.arena)
    case.ledger = Ledger(lambda: case.now, term_s=10, drain_s=5, first=10**6, **options)
    case.ledger.join(LENDER, identity=(LENDER, LENDER))
    return entries


def test_holders_that_have_not_come_back_keep_what_they_hold():
    case = Case(8)
    found = case.borrow(ONE, 3)
    entries = restarted(case)
    case.ledger.restore(LENDER, case.arena, ArenaTerms(8 * PAGE), [(0, 8 * PAGE)], entries)
    case.ledger.join(TWO, identity=(TWO, TWO))
    case.zero()
    mine = case.borrow(TWO, 5)
    assert mine.offset == 3 * PAGE and mine.generation >= 10**6 > found.generation
    assert isinstance(case.ledger.borrow(TWO, PAGE), Refused)
    # It has given one page back meanwhile, and forgotten nothing else.
    case.ledger.join(ONE, identity=(ONE, ONE))
    case.ledger.claim(ONE, [Claim(found.generation, case.arena, ((0, 2 * PAGE),))])
    case.zero()
    assert case.borrow(TWO, 1).offset == 2 * PAGE


def test_claims_wait_for_the_lender_for_a_term():
    case = Case(8)
    found = case.borrow(ONE, 3)
    entries = restarted(case)
    claim = Claim(found.generation, case.arena, ((0, 3 * PAGE),))
    for key in (ONE, TWO):
        case.ledger.join(key, identity=(key, key))
    case.ledger.claim(ONE, [claim])
    case.ledger.claim(TWO, [dataclasses.replace(claim, generation=77)])  # never granted
    assert case.events() == []
    case.later(9, ONE, TWO)
    case.ledger.restore(LENDER, case.arena, ArenaTerms(8 * PAGE), [(0, 8 * PAGE)], entries)
    assert case.events() == [Lost(TWO, 77)]
    assert case.ledger.ranges[found.generation].held.total == 3 * PAGE


def test_what_is_given_back_while_the_lender_is_away_is_not_held_afterwards():
    case = Case(8)
    one, two = case.borrow(ONE, 3), case.borrow(ONE, 2)
    entries = restarted(case)
    case.ledger.join(ONE, identity=(ONE, ONE))
    case.ledger.claim(ONE, [
        Claim(one.generation, case.arena, ((0, 3 * PAGE),)),
        Claim(two.generation, case.arena, ((3 * PAGE, 5 * PAGE),)),
    ])
    case.ledger.give_back(ONE, one.generation, PAGE, 2 * PAGE)
    with pytest.raises(LedgerError):
        case.ledger.give_back(ONE, one.generation, PAGE, 2 * PAGE)
    case.ledger.give_up(ONE, two.generation)
    case.ledger.restore(LENDER, case.arena, ArenaTerms(8 * PAGE), [(0, 8 * PAGE)], entries)
    assert {g: list(r.held) for g, r in case.ledger.ranges.items()} == {
        one.generation: [(0, PAGE), (2 * PAGE, 3 * PAGE)]
    }


def test_a_lender_that_does_not_come_back_in_time_is_lost_and_so_are_its_loans():
    case = Case(8)
    found = case.borrow(ONE, 3)
    entries = restarted(case)
    case.ledger.join(ONE, identity=(ONE, ONE))
    case.ledger.claim(ONE, [Claim(found.generation, case.arena, ((0, 3 * PAGE),))])
    case.later(10, ONE)
    assert case.events() == [Lost(ONE, found.generation)]
    # Then it comes after all. The range is asked back, and nobody gets it before that.
    case.ledger.restore(LENDER, case.arena, ArenaTerms(8 * PAGE), [(0, 8 * PAGE)], entries)
    assert case.events() == [Revoke(ONE, found.generation, 0, 10.0)]
    case.ledger.tick()
    assert case.ledger.ranges[found.generation].wanted == 3 * PAGE
    case.ledger.give_up(ONE, found.generation)
    assert not case.ledger.ranges


def test_what_a_lender_did_not_hear_it_is_told_again():
    case = Case(8)
    case.ledger.reclaim(LENDER, case.arena, 5 * PAGE, 1.0)
    heard = case.events()
    case.ledger.disconnected(LENDER)
    case.ledger.join(LENDER, name="client1", identity=(LENDER, LENDER))
    case.ledger.resume(LENDER, case.arena, [(0, 8 * PAGE)])
    assert case.events() == heard
    with pytest.raises(LedgerError):
        case.ledger.resume(LENDER, case.arena, [(0, 4 * PAGE)])


def entry(**changes):
    return dataclasses.replace(
        Entry(5, 4, ONE, "client2", (ONE, ONE), 0, 2 * PAGE, ((0, 2 * PAGE),), 0, 0.0), **changes
    )


@pytest.mark.parametrize(
    "entries",
    [
        [entry(held=((0, 9 * PAGE),))], [entry(held=((0, 100),))], [entry(held=())],
        [entry(offset=-PAGE)], [entry(size=2**63)], [entry(size=PAGE)],
        [entry(generation=10**6)], [entry(generation=0)], [entry(lease=2**64)],
        [entry(), entry()], [entry(), entry(generation=6)], [entry(identity=(9, 9))],
        [entry(held=((0, 2 * PAGE), (0, 2 * PAGE)))],
    ],
)
def test_journals_that_cannot_be_true_are_refused(entries):
    case = Case(8)
    restarted(case)
    case.ledger.join(ONE, identity=(ONE, ONE))
    before = repr(case.ledger.clients), repr(case.ledger.arenas)
    with pytest.raises(LedgerError):
        case.ledger.restore(LENDER, 3, ArenaTerms(8 * PAGE), [(0, 8 * PAGE)], entries)
    assert (repr(case.ledger.clients), repr(case.ledger.arenas)) == before
    assert not case.ledger.ranges and not case.events()
    case.ledger.restore(LENDER, 3, ArenaTerms(8 * PAGE), [(0, 8 * PAGE)], [entry()])
    with pytest.raises(LedgerError, match="registered"):
        case.ledger.restore(LENDER, 3, ArenaTerms(8 * PAGE), [(0, 8 * PAGE)], [])
    with pytest.raises(LedgerError, match="nobody else's"):
        case.ledger.restore(LENDER, 4, ArenaTerms(8 * PAGE), [(0, 8 * PAGE)], [entry()])


def test_claims_that_cannot_be_true_are_refused():
    case = Case(8)
    found = case.borrow(ONE, 2)
    good = Claim(found.generation, case.arena, ((0, 2 * PAGE),))
    for key, claims in (
        (TWO, [good]), (ONE, [good, good]), (ONE, [dataclasses.replace(good, arena=99)]),
        (ONE, [dataclasses.replace(good, held=((0, 3 * PAGE),))]),
        (ONE, [dataclasses.replace(good, held=((0, PAGE), (0, PAGE)))]),
    ):
        with pytest.raises(LedgerError):
            case.ledger.claim(key, claims)
    assert case.ledger.ranges[found.generation].held.total == 2 * PAGE
    case.ledger.claim(ONE, [good, Claim(2, 99, ((0, PAGE),)), Claim(10**9, 99, ())])
    assert case.events() == [Lost(ONE, 2)]


def test_a_key_is_one_process():
    case = Case()
    with pytest.raises(LedgerError, match="another process"):
        case.ledger.join(ONE, identity=(1, 2))
    case.ledger.remove(ONE)
    case.ledger.join(ONE, identity=(1, 2))


def test_ended_leases_are_stale_and_unknown_ones_are_not():
    case = Case()
    found = case.borrow(ONE, 2)
    case.ledger.free(ONE, found.lease)
    with pytest.raises(StaleHandleError):
        case.ledger.free(ONE, found.lease)
    with pytest.raises(StaleHandleError):
        case.ledger.give_back(ONE, found.generation, 0, PAGE)
    with pytest.raises(LedgerError):
        case.ledger.give_back(ONE, 10**6, 0, PAGE)


def test_who_is_gone_and_had_nothing_is_forgotten():
    case = Case()
    case.ledger.disconnected(THREE)
    case.later(10, ONE)
    assert THREE not in case.ledger.clients and TWO in case.ledger.clients
