"""What a request answers with. Class and field names are vLLM's, so its users' code reads on."""

from __future__ import annotations

import copy
import dataclasses


@dataclasses.dataclass
class Logprob:
    """One token's log probability under the model, before temperature and filters."""

    logprob: float
    rank: int  # 1: the likeliest token of the vocabulary
    decoded_token: str | None = None


# Per position: token id -> Logprob; holds the chosen token and the asked-for alternatives.
TokenLogprobs = dict[int, Logprob]


@dataclasses.dataclass
class CompletionOutput:
    """One sample of a request, cumulative: everything generated so far."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # None unless logprobs were asked for
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None: still running
    stop_reason: int | str | None = None  # the stop string or token id that matched

    @property
    def finished(self) -> bool:
        """Whether this sample has ended."""
        return self.finish_reason is not None


@dataclasses.dataclass
class RequestMetrics:
    """Times of one request. Clock: `time.monotonic()`, seconds."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_output_tokens: int = 0  # over all samples
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_preemptions: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from arrival to the first output token on the host."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time

    @property
    def e2e_s(self) -> float | None:
        """From arrival to the end of the last sample."""
        if self.finished_time is None:
            return None
        return self.finished_time - self.arrival_time

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two tokens."""
        if self.finished_time is None or self.first_token_time is None:
            return None
        if self.num_output_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (self.num_output_tokens - 1)


@dataclasses.dataclass
class RequestOutput:
    """The state of one request, cumulative.

    `Engine.step` hands out the request's one live object, which later steps go on changing: copying
    64 growing answers was a quarter of the host's work in a profiled step. `copy` what must stay as
    it is.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # first entry is None
    error: str | None = None  # why, when a finish_reason is "error"

    def copy(self) -> RequestOutput:
        """The state now; later steps don't change it."""
        state = copy.copy(self)
        state.metrics = copy.copy(self.metrics)
        state.outputs = [copy.copy(sample) for sample in self.outputs]
        for sample in state.outputs:
            sample.token_ids = list(sample.token_ids)
            sample.logprobs = None if sample.logprobs is None else list(sample.logprobs)
        return state
