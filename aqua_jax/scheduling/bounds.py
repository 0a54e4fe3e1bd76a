"""How long a runnable sequence can wait under `fair`, from configuration and live counts.

A *turn* is what a sequence gets by one admission. The bound is the number of turns that others can
take before a waiting sequence is admitted, times what a turn takes.

*Turns within a user.* A sequence goes into the queue at most one of its own turns ahead of the
clock or behind it (`VirtualTimeQueue.forgive`, `catch_up`); a newcomer at the clock. Every turn of
another moves the clock by at least `slice / (sum of weights)`, so after `inverse_share = samples *
(sum of weights) / weight` turns the clock has reached the one that waits, and after as many again
it is so far beyond it that nobody who comes or comes back later is served before it, newcomers with
an early turn excepted: their share of all turns is `credit_share`, and a few more are saved up.
Those who were there and are behind it take at most one turn each: the head is always the one
furthest behind.

    turns = (2 inverse_share + sequences) / (1 - credit_share) + saved early turns

*Turns between users.* A user gets one turn each time the others, together, have got
`inverse_user_share` times the service of a turn; and where its turns cost the most and theirs the
least, that is `turn_ratio` turns to one (a tenth more, for the head starts of new users). With one
user the factor is 1. Users who had all they asked for come with claims of a few slices, once.

    turns = inverse_user_share * turn_ratio * (turns within + 2) + claims

*Steps.* While someone waits, at least `concurrent` sequences hold slots (the pool holds so many of
the longest, and the head needs no more). The prompts of all turns need at most
`turns * ceil(longest / prefill_tokens)` steps, for what decodes leave of a step goes to prompts. In
a step without a prompt every running sequence decodes, so slices end at a rate of
`concurrent / slice_steps`, and each change of places takes some steps more until the tokens in
flight have arrived. (A plan that changes no more places, for `max_switches` have, has begun a turn,
so its step is among those of prompts.)

    steps = turns * ceil(longest / prefill_tokens) + (turns / concurrent + 1) * (slice + latency)

With the guard, a switch waits until other tokens have paid for it as well, and for what is
overdrawn; each earns `rate` of its price:

    + ceil((turns * switch + overdrawn) / rate / concurrent)

where a switch costs what copying the longest sequence out and back does, as long as stores have
room and that is cheaper, and else computing it again. What a store loses afterwards is overdrawn
then.
"""

from __future__ import annotations

import dataclasses
import math

_SWITCH_LATENCY = 2  # steps besides those the host runs ahead: the switch, and the end of a step


@dataclasses.dataclass(frozen=True)
class Load:
    """What is live."""

    sequences: int
    users: int
    longest: int  # tokens of a sequence, prompt and output
    inverse_share: float  # greatest of samples * (its user's sequences' weight) / weight
    inverse_user_share: float  # all users' weight / the least, / what head starts leave
    turn_ratio: float  # service of the dearest turn, with its copies / the cheapest
    claims: float = 0.0  # of all users, in turns


@dataclasses.dataclass(frozen=True)
class Machine:
    """What serves it."""

    concurrent: int  # sequences of the longest kind that slots and pool hold
    prefill_tokens: int  # prompt tokens of one sequence that a step has room for, at least
    slice_steps: float
    credit_share: float
    early_turns: int  # saved up
    switch_rate: float  # what a decode earns for the guard's budget; infinite: there is none
    switch_price: float  # of the dearest
    overdrawn: float = 0.0  # of the budget
    run_ahead: int = 1


@dataclasses.dataclass(frozen=True)
class WaitingBound:
    """Nobody who could run waits longer, as long as the load is no greater."""

    turns: float
    steps: float


def waiting_bound(load: Load, machine: Machine) -> WaitingBound:
    """The bound of the module's text. Infinite where slices are."""
    if machine.slice_steps == math.inf:
        return WaitingBound(math.inf, math.inf)
    turns = math.ceil((2.0 * load.inverse_share + load.sequences) / (1.0 - machine.credit_share))
    turns += machine.early_turns
    if load.users > 1:
        turns = math.ceil(load.inverse_user_share * load.turn_ratio * (turns + 2) + load.claims)
    latency = machine.run_ahead + _SWITCH_LATENCY
    steps = turns * math.ceil(load.longest / machine.prefill_tokens)
    steps += (math.ceil(turns / machine.concurrent) + 1) * (int(machine.slice_steps) + latency)
    owed = turns * machine.switch_price + machine.overdrawn
    steps += math.ceil(owed / machine.switch_rate / machine.concurrent)
    return WaitingBound(turns, steps)
