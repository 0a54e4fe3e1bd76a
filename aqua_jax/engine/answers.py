"""What steps bring becomes answers: tokens, text, log probabilities, and why it ends.

A stop may be found one step late: the token that the step behind sampled for the ended sequence is
discarded when it comes.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from aqua_jax.engine import logprobs
from aqua_jax.engine.metrics import EngineMetrics
from aqua_jax.engine.outputs import RequestOutput
from aqua_jax.engine.request import LiveRequests, Request, Sample
from aqua_jax.engine.runner import PromptRows, StepRecord
from aqua_jax.engine.trace_events import TraceEvents
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.scheduling.sequence import Status


class Answers:
    """Carries live requests from their first token to their last output."""

    def __init__(
        self, live: LiveRequests, scheduler: Scheduler, tokenizer: Any, eos: frozenset[int],
        metrics: EngineMetrics, trace: TraceEvents | None,
    ) -> None:
        """
        Args:
          live: the engine's; who ends leaves it.
          scheduler: told of tokens and ends.
          tokenizer: names the tokens of log probabilities; None: there is none.
          eos: ids that end an answer without being a stop that somebody asked for.
          metrics: counted in.
          trace: told of ends; None: there is no timeline.
        """
        self._live, self._scheduler, self._tokenizer = live, scheduler, tokenizer
        self._eos, self._metrics, self._trace = eos, metrics, trace

    def take(
        self, record: StepRecord, packed: np.ndarray | None, prompt_packed: np.ndarray | None
    ) -> list[RequestOutput]:
        """Takes in a step's results, as `Runner.read` has them; the requests that changed."""
        if prompt_packed is not None:
            for rows in record.prompt_rows:
                self._take_prompt_logprobs(rows, prompt_packed)
        if packed is None:
            return []
        now, samples, accept = time.monotonic(), self._live.samples, self._scheduler.accept
        changed: dict[str, Request] = {}
        accepted = 0
        for index, token in enumerate(packed[: len(record.rows), 0].tolist()):
            sequence = record.rows[index]
            if sequence.status is Status.FINISHED:
                self._metrics.discarded_tokens += 1
                continue
            request, sample = samples[sequence.seq_id]
            changed[sequence.request_id] = request
            if token < 0:
                request.output.error = (
                    "the model produced logits that are not finite (NaN or infinity)"
                )
                self.end_sample(request, sample, "error")
                continue
            accept(sequence, token)
            accepted += 1
            ids, metrics = sample.output.token_ids, request.output.metrics
            if not ids:
                cached = sequence.num_cached_tokens
                metrics.num_cached_tokens = max(metrics.num_cached_tokens, cached)
                if metrics.first_token_time is None:
                    metrics.first_token_time = now
            metrics.num_output_tokens += 1
            ids.append(token)
            if sample.output.logprobs is not None:
                self._take_logprobs(request, sample, token, packed[index, 1:])
            if (
                sample.detokenizer is not None or token in sample.stop_token_ids
                or len(sequence.tokens) >= sequence.max_total_tokens
            ):
                self._check_stop(request, sample, token)
        self._metrics.output_tokens += accepted
        return [
            request.output if request.unfinished else self.retire(request)
            for request in changed.values()
        ]

    def end_sample(self, request: Request, sample: Sample, reason: str) -> None:
        """No token of this sample counts from here on; `reason` as in `CompletionOutput`."""
        output = sample.output
        output.finish_reason = reason
        if sample.detokenizer is not None:
            stop = sample.detokenizer.finish()
            output.text = sample.detokenizer.text
            if stop is not None and reason == "length":
                output.finish_reason, output.stop_reason = "stop", stop
        request.unfinished -= 1
        self._scheduler.finish(sample.sequence)
        if self._trace is not None:
            self._trace.ended(sample.sequence, output.finish_reason)

    def end(self, request: Request, reason: str) -> RequestOutput:
        """Ends all samples that haven't, and the request; its last output."""
        for sample in request.samples:
            if not sample.output.finished:
                self.end_sample(request, sample, reason)
        return self.retire(request)

    def retire(self, request: Request) -> RequestOutput:
        """All samples have ended: the request leaves; its last output."""
        output = request.output
        output.finished = True
        output.metrics.finished_time = time.monotonic()
        self._live.remove(request)
        for sample in request.samples:
            self._metrics.recomputed_tokens += sample.sequence.num_lost
        self._metrics.requests_finished += 1
        self._metrics.cached_tokens += output.metrics.num_cached_tokens
        return output

    def _take_logprobs(
        self, request: Request, sample: Sample, token: int, row: np.ndarray
    ) -> None:
        output, width = sample.output, request.params.logprobs
        assert width is not None and output.logprobs is not None
        assert output.cumulative_logprob is not None
        entry = logprobs.unpack_row(row, token, width, self._tokenizer)
        output.logprobs.append(entry)
        output.cumulative_logprob += entry[token].logprob

    def _check_stop(self, request: Request, sample: Sample, token: int) -> None:
        """End the sample if this token stops it: stop ids, then stop strings, then length."""
        output, params = sample.output, request.params
        count = len(output.token_ids)
        if token in sample.stop_token_ids and count > params.min_tokens:
            if token not in self._eos or token in params.stop_token_ids:
                output.stop_reason = token
            # As in vLLM, the text ends before a stop token; the ids keep it.
            self.end_sample(request, sample, "stop")
            return
        if sample.detokenizer is not None:
            stop = sample.detokenizer.append(token)
            output.text = sample.detokenizer.text
            if stop is not None:
                output.stop_reason = stop
                self.end_sample(request, sample, "stop")
                return
        if len(sample.sequence.tokens) >= sample.sequence.max_total_tokens:
            self.end_sample(request, sample, "length")

    def _take_prompt_logprobs(self, rows: PromptRows, packed: np.ndarray) -> None:
        if rows.sequence.status is Status.FINISHED:
            return
        request, _ = self._live.lookup(rows.sequence)
        output = request.output
        assert output.prompt_logprobs is not None and request.params.prompt_logprobs is not None
        for offset in range(rows.count):
            position = rows.first_position + offset + 1
            output.prompt_logprobs[position] = logprobs.unpack_row(
                packed[rows.first_row + offset], output.prompt_token_ids[position],
                request.params.prompt_logprobs, self._tokenizer,
            )
