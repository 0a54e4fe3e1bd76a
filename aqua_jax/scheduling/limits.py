"""What a scheduler may use, what it has done, and which sequences it can never serve."""

from __future__ import annotations

import dataclasses
import math

from aqua_jax.errors import ConfigError, RequestError
from aqua_jax.paging.pages import PagePool
from aqua_jax.scheduling.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of a sequence.

    Raises:
      ConfigError: a field is out of range.
    """

    max_num_seqs: int  # sequences in a step, and slots
    max_step_tokens: int  # tokens in a step, prompt chunks and decodes together
    max_model_len: int  # tokens of one sequence, prompt and output
    max_chunk_tokens: int | None = None  # longest prompt chunk of a sequence; None: the step's
    growth_tokens: int = 48  # room to grow, per running sequence, that an admission must leave
    # Sequences that give way in one plan to others who come back; as many as end in a step where
    # slices are short. The rest run on until the next plans: a round at once takes long to plan.
    # Newcomers are limited by the room for their prompts; spread as well, the last of a burst of
    # 256 with 64 tokens each got its first one 5% later (modelled).
    max_switches: int = 8
    switch_share: float = 0.15  # of all time, what changing places may cost (`Guard`); 1: no bound
    # With stores below the pool.
    max_moves: int = 256  # page copies that a step has room for
    swap_growth_tokens: int = 4  # in place of growth_tokens: running short costs little there
    write_behind_pages: int = 64  # copied ahead of need, at most, per step
    write_behind_share: float = 0.25  # of a step, that those copies may take
    move_steps: int = 3  # that a copy is expected to take at most, from plan to plan

    def __post_init__(self) -> None:
        for field in ("max_num_seqs", "max_model_len"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "an integer > 0")
        if self.max_step_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_step_tokens", self.max_step_tokens,
                f"at least max_num_seqs ({self.max_num_seqs}), so that every decode fits a step",
            )
        if self.max_chunk_tokens is not None and self.max_chunk_tokens < 1:
            raise ConfigError("max_chunk_tokens", self.max_chunk_tokens, "an integer > 0 or None")
        for field in ("growth_tokens", "swap_growth_tokens", "write_behind_pages", "move_steps"):
            if getattr(self, field) < 0:
                raise ConfigError(field, getattr(self, field), "an integer >= 0")
        if not 0 < self.switch_share <= 1:
            raise ConfigError(
                "switch_share", self.switch_share, "above 0 and at most 1, which bounds nothing"
            )
        for field in ("max_moves", "max_switches"):
            if getattr(self, field) < 1:
                raise ConfigError(field, getattr(self, field), "an integer > 0")


@dataclasses.dataclass
class SchedulerCounters:
    """Totals since the start."""

    plans: int = 0
    tokens: int = 0  # computed, recomputed ones included
    recomputed_tokens: int = 0  # computed before, dropped, and not found in the prefix cache
    preemptions: int = 0
    swaps: int = 0  # preemptions that kept what was computed
    switches: int = 0  # preemptions because somebody else's turn had come
    finished: int = 0
    aborted: int = 0


def check_request(sequence: Sequence, config: SchedulerConfig, pool: PagePool) -> None:
    """Refuses what could not end even with the whole pool to itself, or be served fairly.

    Of a pool that is lent in part only what always stays counts: nobody's end depends on borrowers.

    Raises:
      RequestError: prompt or output is too long, or empty; the weight is not a number > 0.
    """
    if not 0.0 < sequence.weight < math.inf:
        raise RequestError("weight", sequence.weight, "a number > 0")
    limit = min(config.max_model_len, pool.certain * pool.page_tokens + 1)
    why = (
        f"max_model_len ({config.max_model_len})"
        if limit == config.max_model_len
        else f"what the KV pool of {pool.certain} pages holds ({limit})"
    )
    if not 1 <= sequence.prompt_len < limit:
        raise RequestError(
            "prompt", f"{sequence.prompt_len} tokens", f"1 token or more, fewer than {why}"
        )
    if not sequence.prompt_len < sequence.max_total_tokens <= limit:
        raise RequestError(
            "max_tokens", sequence.max_total_tokens - sequence.prompt_len,
            f"1 or more; with the prompt's {sequence.prompt_len} at most {why}",
        )
