"""One sample of one request, as the scheduler sees it."""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

from aqua_jax.paging.pages import PageHandle
from aqua_jax.paging.prefix import DigestChain


class Status(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = enum.auto()  # holds no page and no slot: new, or preempted
    RUNNING = enum.auto()  # holds a slot and the pages of all it has computed, or that arrive
    FINISHED = enum.auto()  # holds nothing and never will again


class Standing(NamedTuple):
    """What a policy that keeps accounts says of a live sequence, for people to look at."""

    vruntime: float  # weighted service, on its user's scale
    slice_left: float  # decode steps; infinite: a slice without end
    user_vruntime: float


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """Tokens and their KV: how many there are, how many are computed, and where.

    Three counts say all. `tokens` are on the host. `num_inflight` more have been sampled by steps
    that are dispatched but not yet read back. `num_computed` of them all have their KV in `pages`
    once every dispatched step has run. A running sequence always has
    `num_computed < total_len`, and `num_inflight > 0` implies that one token is pending.

    The engine fills the first block and reads the rest; only the scheduler writes it.
    """

    seq_id: int  # unique and rising; breaks ties of arrival
    request_id: str
    tokens: list[int]  # the prompt at first; accepted output tokens are appended
    max_total_tokens: int  # prompt and output together
    arrival: float = 0.0  # seconds on the caller's clock
    sample_index: int = 0
    parent: Sequence | None = None  # shares the prompt's pages with this one (n > 1)
    priority: int = 0
    user: str = ""
    weight: float = 1.0
    salt: bytes = b""  # what else the KV depends on; equal salts may share pages
    no_prefix_read: bool = False  # every prompt token must be computed (prompt_logprobs)

    prompt_len: int = dataclasses.field(init=False)
    status: Status = dataclasses.field(default=Status.WAITING, init=False)
    num_inflight: int = dataclasses.field(default=0, init=False)
    num_computed: int = dataclasses.field(default=0, init=False)
    pages: list[PageHandle] = dataclasses.field(default_factory=list, init=False)
    slot: int = dataclasses.field(default=-1, init=False)
    epoch: int = dataclasses.field(default=-1, init=False)  # of the slot, when it was given
    chain: DigestChain | None = dataclasses.field(default=None, init=False)
    num_registered: int = dataclasses.field(default=0, init=False)  # leading pages offered to cache
    num_cached_tokens: int = dataclasses.field(default=0, init=False)  # found at first admission
    num_dropped: int = dataclasses.field(default=0, init=False)  # KV tokens of the last preemption
    num_reached: int = dataclasses.field(default=0, init=False)  # KV tokens it had, giving way
    num_lost: int = dataclasses.field(default=0, init=False)  # dropped and computed again, in all
    preemptions: int = dataclasses.field(default=0, init=False)
    swapped: bool = dataclasses.field(default=False, init=False)  # the last time it gave way
    returned: int = dataclasses.field(default=-1, init=False)  # plan of a return; -1: it has run
    switch_price: float = dataclasses.field(default=0.0, init=False)  # of that, in decode tokens
    gave_turn: bool = dataclasses.field(default=False, init=False)  # to whose turn it was

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def total_len(self) -> int:
        """Tokens on the host and in flight."""
        return len(self.tokens) + self.num_inflight

    @property
    def pending(self) -> int:
        """Tokens whose KV is not computed: 1 in a decode, more in an unfinished prefill."""
        return len(self.tokens) + self.num_inflight - self.num_computed

    @property
    def complete(self) -> bool:
        """Whether the length stop is reached once the tokens in flight arrive."""
        return len(self.tokens) + self.num_inflight >= self.max_total_tokens

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id}/{self.sample_index} #{self.seq_id} {self.status.name} "
            f"{len(self.tokens)}+{self.num_inflight} tokens, {self.num_computed} computed, "
            f"{len(self.pages)} pages, slot {self.slot})"
        )
