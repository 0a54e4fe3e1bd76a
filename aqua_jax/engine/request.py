"""One accepted request inside the engine: its prompt, parameters, samples and growing answer."""

from __future__ import annotations

import dataclasses

from aqua_jax.config import SamplingParams
from aqua_jax.engine.detokenizer import Detokenizer
from aqua_jax.engine.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from aqua_jax.scheduling.sequence import Sequence


@dataclasses.dataclass
class Sample:
    """One of a request's n samples: the scheduler's sequence, its text and what is handed out."""

    sequence: Sequence
    output: CompletionOutput
    detokenizer: Detokenizer | None  # None: text was not asked for, or there is no tokenizer
    stop_token_ids: frozenset[int]
    banned: tuple[int, ...]  # ids forbidden until min_tokens


@dataclasses.dataclass
class Request:
    """A request from acceptance to its last output."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    key_data: tuple[int, int]  # the request's sampling key, two 32-bit words
    metrics: RequestMetrics
    samples: list[Sample]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.output.finished for sample in self.samples)

    def snapshot(self) -> RequestOutput:
        """The request's state as its caller sees it; lists are copies."""
        outputs = [
            dataclasses.replace(
                sample.output,
                token_ids=list(sample.output.token_ids),
                logprobs=None if sample.output.logprobs is None else list(sample.output.logprobs),
            )
            for sample in self.samples
        ]
        return RequestOutput(
            request_id=self.request_id, prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids, outputs=outputs, finished=self.finished,
            metrics=dataclasses.replace(self.metrics), prompt_logprobs=self.prompt_logprobs,
            error=self.error,
        )
