"""Completely fair scheduling: users share the machine by service, a user's requests by turns.

Two levels of weighted fair queueing (`virtual_time.py`).

*Users* compete by service: prefill and decode tokens at their relative costs, recomputed tokens
and moved bytes included, for all of it is machine time that others don't get. One user's thousand
requests get what another's single one gets, as long as that one can use it. A user without waiting
requests has all it asked for, so it may not save up a claim: it lags behind the clock by at most a
few slices. And what is served beyond a slice while nobody waits is free: it was taken from nobody.

*Sequences* of a user compete by slices: being admitted is charged as one slice, whatever is used of
it, and each further step that others wait through as what it is; back in the queue, it is at most
one slice ahead of the clock or behind it. (While nobody waits, whoever runs pays nothing, and the
clock goes on with every newcomer: without that limit, two requests that had run for long beside
brief ones would come back with a claim to longer still.) Prompts are charged to the user alone.
Were they charged to the request as well, one with a long prompt would get its first slice and then
wait until every other has had as much; so the gap would depend on the longest prompt in the house.
n samples of a request share the weight of one.

A newcomer starts at the clock of its queue, but its first token is worth more than others' next
ones, so it may go first. A new user starts one slice ahead, paid from a tenth of the service given.
A new sequence has an *early turn*, ahead of all that wait, as long as no more than `credit_share`
of its user's turns are early ones, and some more that are saved up; so a stream of newcomers delays
the others by that share at most. (A small one is used up as soon as more comes than fits, and
first tokens wait for turns again.) Where there are stores, early turns end when these have no room
left for what is displaced: then more would be begun than can be kept.

Within a slice nothing changes the order, and equal vruntimes go by arrival. So with infinite slices
and one user this is first come, first served, step for step.

Source: CFS (Linux), WF2Q+ (Bennett and Zhang, 1996), and VTC (Sheng et al., OSDI 2024), which
counts service in tokens but never takes a running request off.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from aqua_jax.errors import ConfigError
from aqua_jax.paging.pages import PagePool
from aqua_jax.scheduling.bounds import Load, Machine, WaitingBound, waiting_bound
from aqua_jax.scheduling.cost import Costs
from aqua_jax.scheduling.guard import Budget, Guard
from aqua_jax.scheduling.limits import SchedulerConfig
from aqua_jax.scheduling.sequence import Sequence, Standing, Status
from aqua_jax.scheduling.slices import SliceConfig, Slices
from aqua_jax.scheduling.virtual_time import Member, VirtualTimeQueue

EARLY_TURNS = 32  # early turns that a user can save up
_HEAD_STARTS = 0.1  # of all service, what new users may get ahead of the others
_SAVED_HEAD_STARTS = 4
_LAG_SLICES = 16  # what a user who has all it asked for may be behind
_LONG_SLICE = 256.0  # steps; what counts as a slice there when slices are infinite
_LEAST_PREFILL_COST = 0.01  # a prompt is never free, whatever was measured
_IDLE_USERS = 1024  # remembered users without requests, at least, before debts are swept


@dataclasses.dataclass(frozen=True)
class FairConfig:
    """Costs, weights and slices.

    Raises:
      ConfigError: a field is out of range.
    """

    slices: SliceConfig = dataclasses.field(default_factory=SliceConfig)
    prefill_cost: float | None = None  # of one prompt token, in decode tokens; None: as measured
    decode_cost: float = 1.0
    user_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # others: 1
    credit_share: float = 0.75  # of a user's turns, what newcomers may have early

    def __post_init__(self) -> None:
        for field in ("prefill_cost", "decode_cost"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(field, value, "a number > 0")
        if not 0 <= self.credit_share < 1:
            raise ConfigError("credit_share", self.credit_share, "from 0 to less than 1")
        if not all(0 < weight < math.inf for weight in self.user_weights.values()):
            raise ConfigError("user_weights", dict(self.user_weights), "numbers > 0")


class _User(Member):
    """A user with live sequences, or with a debt."""

    __slots__ = ("credit", "live", "name", "newcomers", "sequences")

    def __init__(self, name: str, weight: float, tie: tuple[float, int], credit: float) -> None:
        super().__init__(weight, tie)
        self.name = name
        self.live = 0
        self.sequences: VirtualTimeQueue[_Account] = VirtualTimeQueue()
        self.newcomers: dict[_Account, None] = {}  # of those that wait, in the order they came
        self.credit = credit  # early turns

    def first(self, early: bool) -> _Account | None:
        """Whose turn is next: a newcomer's if it may have an early one."""
        if early and self.newcomers and self.credit >= 1.0:
            return next(iter(self.newcomers))
        return self.sequences.first()


class _Account(Member):
    """What a sequence was granted and has used."""

    __slots__ = (
        "begun", "prefill_left", "prepaid", "sequence", "slice_left", "user",
    )

    def __init__(self, sequence: Sequence, user: _User) -> None:
        super().__init__(sequence.weight, (sequence.arrival, sequence.seq_id))
        self.sequence = sequence
        self.user = user
        self.prefill_left = 0  # tokens known at admission that are still to be computed
        self.slice_left = 0.0  # decode steps; 0: the slice is over
        self.begun = True  # whether the turn has brought a token yet
        self.prepaid = 0.0  # service charged to the user in advance


class Fair:
    """The policy `fair`. Every operation is O(log n) in live sequences, or O(running)."""

    timeless = False

    def __init__(self, config: FairConfig | None = None) -> None:
        self.config = config or FairConfig()
        self.slices = Slices(self.config.slices)
        self._users: VirtualTimeQueue[_User] = VirtualTimeQueue()
        self._active: dict[str, _User] = {}
        self._idle: dict[str, _User] = {}  # left while ahead of the clock: debts stay
        self._sweep_at = _IDLE_USERS
        self._accounts: dict[Sequence, _Account] = {}
        self._siblings: Counter[tuple[str, str]] = Counter()  # live samples by user and request
        self._num_waiting = 0
        self._num_users = 0
        self._credit = 0.0
        self._costs: Costs | None = None
        self._price: Callable[[Sequence], float] = lambda sequence: float(sequence.num_computed)
        self._prices: dict[Sequence, float] = {}  # of this plan
        self._merits: list[_Account] | None = None  # of this plan
        self._keeps: Callable[[], bool] | None = None
        self._budget = Budget(math.inf)
        self._early = True  # whether there are early turns in this plan

    def bind(
        self, costs: Costs, price: Callable[[Sequence], float],
        keeps: Callable[[], bool] | None, guard: Guard,
    ) -> None:
        """What a prompt token costs, where the configuration doesn't say, and what a switch."""
        self._costs, self._price, self._keeps = costs, price, keeps
        self._budget = guard.turns

    @property
    def prefill_cost(self) -> float:
        """Of one prompt token, in decode tokens."""
        if self.config.prefill_cost is not None:
            return self.config.prefill_cost
        if self._costs is None:
            return 1.0
        return min(max(self._costs.prefill, _LEAST_PREFILL_COST), 1.0)

    def standing(self, sequence: Sequence) -> Standing | None:
        """Its account; None once it has ended."""
        account = self._accounts.get(sequence)
        if account is None:
            return None
        return Standing(account.vruntime, account.slice_left, account.user.vruntime)

    # The waiting queue.

    def push(self, sequence: Sequence) -> None:
        """Queues a newcomer at the clock, a preempted sequence where its service puts it."""
        account = self._accounts.get(sequence)
        if account is None:
            account = self._join(sequence)
        else:
            self._settle(account)
            account.user.sequences.forgive(account, self._turn(account, self.slices.steps))
            self._catch_up(account)
        user = account.user
        user.sequences.wait(account)
        if sequence.preemptions == 0 and self.slices.steps != math.inf:
            user.newcomers[account] = None
        if user not in self._users:
            self._users.catch_up(user, self._lag())
            self._users.wait(user)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """Unqueues; KeyError if it isn't queued."""
        account = self._accounts[sequence]
        user = account.user
        user.sequences.unwait(account)
        user.newcomers.pop(account, None)
        if not len(user.sequences):
            self._users.unwait(user)
        self._num_waiting -= 1

    def head(self, now: float) -> Sequence | None:
        """Of the least served user that has one waiting, the sequence whose turn is next."""
        user = self._users.first()
        if user is None:
            return None
        account = user.first(self._early)
        assert account is not None
        return account.sequence

    def __len__(self) -> int:
        return self._num_waiting

    # Slices.

    @property
    def growth_steps(self) -> float:
        """A slice, so that nobody gives way in the middle of one."""
        return self.slices.steps if self.slices.steps < math.inf else 0.0

    def begin(self, now: float, running: int) -> None:
        """A plan begins."""
        self._prices.clear()
        self._merits = None
        swaps = self._keeps is not None and self._costs is not None
        switch = self._costs.switch_steps if swaps and self._costs is not None else 0.0
        self._early = self._keeps is None or self._keeps()
        self.slices.observe(now, len(self._accounts), running, switch)

    def admitted(self, sequence: Sequence) -> None:
        """Charges a slice and the prompt in advance, so that the admissions of one plan alternate
        between users."""
        account = self._accounts[sequence]
        steps, user = self.slices.steps, account.user
        account.prefill_left = sequence.pending
        account.slice_left, account.begun = steps, steps == math.inf
        account.prepaid = self.prefill_cost * sequence.pending
        if steps != math.inf:
            ahead = min(steps, sequence.max_total_tokens - sequence.total_len)
            account.prepaid += self.config.decode_cost * ahead
            self._count_turn(account)
            self._charge_turn(account, steps)
        self._users.charge(user, account.prepaid)

    def yielding(self, head: Sequence, running: Iterable[Sequence]) -> Iterator[Sequence]:
        """Sequences whose slice is over and that have had no less than `head`, or whatever they
        had if its turn is an early one; most served first, as many as the guard affords. Where
        their pages are kept, a newcomer takes the place of those inside their slices as well, after
        their first token: its first is worth more than their next ones a little earlier."""
        if self.slices.steps == math.inf:
            return
        waiting = self._accounts[head]
        least, users_least = waiting.vruntime, waiting.user.vruntime
        if self._early and waiting in waiting.user.newcomers and waiting.user.credit >= 1.0:
            least = -math.inf
        begun = 0.0
        if self._early and self._keeps is not None and head.preemptions == 0:
            begun = self.slices.steps - 1
        price = 0.0
        for account in reversed(self._by_merit(running)):
            user, one = account.user, account.sequence
            if account.slice_left > begun:
                return  # those that are left are further inside their slices
            if one.status is not Status.RUNNING:
                continue  # gone since the plan began
            if account.vruntime < least if user is waiting.user else user.vruntime < users_least:
                continue
            if self._budget.bounds:
                if one not in self._prices:  # asked for each head of a plan
                    self._prices[one] = self._price(one)
                price += self._prices[one]
                if not self._budget.affords(price):
                    return
            yield one

    def _by_merit(self, running: Iterable[Sequence]) -> list[_Account]:
        """Accounts of those who run, most served last. Found once a plan, for in its course
        sequences only go, or come with a slice before them; but users are charged."""
        merits = self._merits
        if merits is None:
            merits = self._merits = [self._accounts[one] for one in running]
            merits.sort(key=_merit)
            return merits
        while merits and merits[-1].sequence.status is not Status.RUNNING:
            merits.pop()
        if len(self._active) > 1:
            merits.sort(key=_merit)
        return merits

    def running_order(self, running: Iterable[Sequence], now: float) -> list[Sequence]:
        """Sequences inside their slices first, those before the first token of a slice (who would
        have waited in vain), then the least served."""
        ordered = [
            (
                account.slice_left <= 0, account.begun, account.user.vruntime, account.vruntime,
                account.tie, account,
            ) for account in map(self._accounts.__getitem__, running)
        ]
        ordered.sort()
        return [entry[-1].sequence for entry in ordered]

    def victim(self, candidates: Iterator[Sequence]) -> Sequence:
        """The last in the order: inside its slice only when everyone unplanned is."""
        return next(candidates)

    # Service.

    def leaving_next(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Those whose slice ends first, without those that end before."""
        accounts = [
            account for account in map(self._accounts.__getitem__, running)
            if account.sequence.max_total_tokens - account.sequence.total_len > account.slice_left
        ]
        accounts.sort(key=lambda account: account.slice_left)
        return [account.sequence for account in accounts]

    def on_service(self, sequence: Sequence, *, tokens: int = 0, price: float = 0.0) -> None:
        """Charges the user for what was not charged in advance, and the sequence beyond its
        slice."""
        account, config = self._accounts[sequence], self.config
        prefill = min(tokens, account.prefill_left) if account.prefill_left else 0
        sampled = decodes = tokens - prefill
        amount = config.decode_cost * (decodes + price)
        if prefill:
            amount = self.prefill_cost * prefill + amount
            account.prefill_left -= prefill
            sampled += account.prefill_left == 0  # the first token of a turn comes with its prompt
        self._credit += _HEAD_STARTS * amount
        account.prepaid -= amount
        if account.prepaid < 0.0:
            excess, account.prepaid = -account.prepaid, 0.0
            if self._num_waiting:
                self._users.charge(account.user, excess)
                if account.user not in self._users:
                    self._users.catch_up(account.user, self._lag())
        account.begun |= sampled > 0
        if account.slice_left > 0:
            account.slice_left -= sampled
        elif decodes and len(account.user.sequences):
            self._catch_up(account)
            self._charge_turn(account, decodes)

    def on_finish(self, sequence: Sequence) -> None:
        """Closes the account; what was charged in advance and not used goes back."""
        account = self._accounts.pop(sequence, None)
        if account is None:  # a fork that ended before it could run
            return
        self._settle(account)
        user, request = account.user, (account.user.name, sequence.request_id)
        self._siblings[request] -= 1
        if not self._siblings[request]:
            del self._siblings[request]
        user.sequences.leave(account)
        user.live -= 1
        if user.live == 0:
            self._users.leave(user)
            del self._active[user.name]
            if not self._active:
                self._idle.clear()  # nobody is left to whom anything could be owed
            elif user.vruntime > self._users.clock:
                self._remember(user)

    def waiting_bound(
        self, limits: SchedulerConfig, pool: PagePool, run_ahead: int = 1,
        dearest: Callable[[int, int], float] | None = None,
    ) -> WaitingBound | None:
        """The longest wait of a runnable sequence under the present load; None without load. O(n).

        Args:
          limits: the scheduler's.
          pool: the scheduler's.
          run_ahead: steps that are planned before the tokens of a step are known.
          dearest: `Room.dearest`; None: whoever gives way is recomputed.
        """
        if not self._accounts:
            return None
        config, steps = self.config, self.slices.steps
        longest, pages, shares, turns = 0, 0, [], []  # turns: service that each takes, at least
        for account in self._accounts.values():
            sequence, queue = account.sequence, account.user.sequences
            longest = max(longest, sequence.max_total_tokens)
            pages += pool.pages_for(sequence.max_total_tokens)
            shares.append(self._turn(account, 1) / config.decode_cost * queue.weight
                          / account.weight)
            output = sequence.max_total_tokens - sequence.prompt_len
            turns.append(
                self.prefill_cost * sequence.prompt_len + config.decode_cost * min(steps, output)
            )
        switch = float(longest) if dearest is None else dearest(longest, pages)
        most = self.prefill_cost * longest + config.decode_cost * (steps + switch)
        head_starts = config.decode_cost * _SAVED_HEAD_STARTS * min(steps, _LONG_SLICE)
        users, least = self._users, min(user.weight for user in self._active.values())
        load = Load(
            sequences=len(self._accounts), users=len(self._active), longest=longest,
            inverse_share=max(shares),
            inverse_user_share=users.weight / least / (1.0 - _HEAD_STARTS),
            turn_ratio=most / min(turns),
            claims=((len(self._active) - 1) * self._lag() + head_starts) / min(turns),
        )
        chunk = limits.max_chunk_tokens or limits.max_step_tokens
        return waiting_bound(load, Machine(
            concurrent=max(1, min(limits.max_num_seqs, pool.certain // pool.pages_for(longest))),
            prefill_tokens=min(chunk, limits.max_step_tokens - limits.max_num_seqs + 1),
            slice_steps=steps, credit_share=config.credit_share, early_turns=self._early_turns,
            switch_rate=self._budget.rate, switch_price=switch, overdrawn=self._budget.overdrawn,
            run_ahead=run_ahead,
        ))

    # Inside.

    def _join(self, sequence: Sequence) -> _Account:
        user = self._active.get(sequence.user)
        if user is None:
            user = self._idle.pop(sequence.user, None) or self._new_user(sequence)
            self._active[user.name] = user
            self._users.join(user, self._head_start())
        account = self._accounts[sequence] = _Account(sequence, user)
        user.sequences.join(account)
        user.live += 1
        self._siblings[user.name, sequence.request_id] += 1
        return account

    def _new_user(self, sequence: Sequence) -> _User:
        self._num_users += 1
        weight = self.config.user_weights.get(sequence.user, 1.0)
        tie = (sequence.arrival, self._num_users)
        return _User(sequence.user, weight, tie, float(self._early_turns))

    def _remember(self, user: _User) -> None:
        self._idle[user.name] = user
        if len(self._idle) > self._sweep_at:
            clock = self._users.clock
            self._idle = {n: u for n, u in self._idle.items() if u.vruntime > clock}
            self._sweep_at = max(_IDLE_USERS, 2 * len(self._idle))

    def _head_start(self) -> float:
        """Of a new user: one slice, in service, if the credit covers it. No more than a few are
        saved up."""
        if self.slices.steps == math.inf:
            return 0.0
        start = self.config.decode_cost * self.slices.steps
        self._credit = min(self._credit, _SAVED_HEAD_STARTS * start)
        if start > self._credit:
            return 0.0
        self._credit -= start
        return start

    @property
    def _early_turns(self) -> int:
        return EARLY_TURNS if self.config.credit_share else 0

    def _count_turn(self, account: _Account) -> None:
        """An early turn uses up credit; any other earns some."""
        user, share = account.user, self.config.credit_share
        ahead = user.sequences.peek()
        if ahead is not None and (ahead.vruntime, ahead.tie) < (account.vruntime, account.tie):
            user.credit -= 1.0
        else:
            user.credit = min(user.credit + share / (1.0 - share), float(self._early_turns))

    def _lag(self) -> float:
        """What a user without waiting sequences may be behind the clock, in service."""
        return self.config.decode_cost * _LAG_SLICES * min(self.slices.steps, _LONG_SLICE)

    def _catch_up(self, account: _Account) -> None:
        """Forgets what a sequence that runs is behind the clock beyond a turn, its own or, if it
        weighs more than others and its turns are short therefore, a mean one."""
        queue = account.user.sequences
        turn = self._turn(account, self.slices.steps)
        queue.catch_up(account, turn * max(1.0, account.weight / queue.mean_weight))

    def _charge_turn(self, account: _Account, steps: float) -> None:
        account.user.sequences.charge(account, self._turn(account, steps))

    def _turn(self, account: _Account, steps: float) -> float:
        """What so many steps are charged to a sequence; its siblings count as much as itself."""
        samples = self._siblings[account.user.name, account.sequence.request_id]
        return self.config.decode_cost * steps * samples

    def _settle(self, account: _Account) -> None:
        if account.prepaid:
            self._users.charge(account.user, -account.prepaid)
        account.prepaid = 0.0
        account.slice_left = 0.0
        account.prefill_left = 0


def _merit(account: _Account) -> tuple[float, float, float, tuple[float, int]]:
    """Greatest for who should go first: who has used most of its slice, then the most served."""
    return -account.slice_left, account.user.vruntime, account.vruntime, account.tie
