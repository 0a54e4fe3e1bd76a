"""One accepted request inside the engine: its parameters, its samples and its growing answer."""

from __future__ import annotations

import dataclasses

from aqua_jax.config import SamplingParams
from aqua_jax.engine.detokenizer import Detokenizer
from aqua_jax.engine.outputs import CompletionOutput, RequestOutput
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

    params: SamplingParams
    key_data: tuple[int, int]  # the request's sampling key, two 32-bit words
    output: RequestOutput  # live: what `Engine.step` hands out
    samples: list[Sample] = dataclasses.field(default_factory=list)
    unfinished: int = 0  # samples that have not ended

    def add_sample(self, sample: Sample) -> None:
        """Add one of the n samples, before the request starts."""
        self.samples.append(sample)
        self.output.outputs.append(sample.output)
        self.unfinished += 1


class LiveRequests:
    """Requests accepted and not ended.

    Attributes:
      requests: by id, in order of arrival.
      samples: by number of the sequence, with their request.
    """

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.samples: dict[int, tuple[Request, Sample]] = {}

    def add(self, request: Request) -> None:
        """One more, with all its samples."""
        self.requests[request.output.request_id] = request
        for sample in request.samples:
            self.samples[sample.sequence.seq_id] = (request, sample)

    def remove(self, request: Request) -> None:
        """It has ended."""
        del self.requests[request.output.request_id]
        for sample in request.samples:
            del self.samples[sample.sequence.seq_id]

    def lookup(self, sequence: Sequence) -> tuple[Request, Sample]:
        """Of a live sequence."""
        return self.samples[sequence.seq_id]
