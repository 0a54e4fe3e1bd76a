"""The engine: requests in, steps on the device, answers out.

One thread drives it: `step` plans and dispatches step n+1, then waits for the tokens of step n, so
that the host's work hides behind the device's. A stop the host finds in the tokens of n is
corrected one step later: the token that n+1 sampled for the ended sequence is discarded.

Pages that move ride on steps (`pager`). Each `step` first takes in which moves have ended and gives
back what lenders want; it waits for moves only when neither a step nor a token is left to wait for.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Reversible
from typing import Any

import jax
from absl import logging

from aqua_jax.closing import Closing
from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine import inputs, startup
from aqua_jax.engine.answers import Answers
from aqua_jax.engine.batch import BANNED_TOKENS
from aqua_jax.engine.detokenizer import Detokenizer
from aqua_jax.engine.metrics import EngineMetrics
from aqua_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from aqua_jax.engine.request import LiveRequests, Request, Sample
from aqua_jax.engine.runner import Runner, StepRecord
from aqua_jax.errors import EngineDeadError, RequestError
from aqua_jax.prompts import Prompt
from aqua_jax.scheduling.plan import Plan
from aqua_jax.scheduling.scheduler import Scheduler
from aqua_jax.scheduling.sequence import Sequence, Status

_RUN_AHEAD = 1  # steps dispatched beyond the one whose tokens the host waits for
_MAX_RESETS = 3  # device failures in a row before the engine gives up
_MOVES_WAIT_S = 0.05  # longest wait for page moves in one `step`: requests may come meanwhile


class Engine(Closing):
    """An inference engine over one model. Not thread-safe: one thread calls all methods.

    `observe`, if set, is told every step's plan and seconds on the device when its tokens come.
    """

    def __init__(
        self, config: EngineConfig, *, progress: Callable[[int, int], None] | None = None
    ):
        """Load the model, make the KV pool, compile.

        Args:
          config: validated configuration.
          progress: called with (done, total) programs while compiling.

        Raises:
          ConfigError: the configuration does not fit the model or the pool.
          ModelLoadError: the checkpoint or tokenizer cannot be read.
          DependencyError: an optional package is missing.
        """
        self.config = config
        self._live = LiveRequests()
        parts = startup.build(config, self._live.lookup, self._live.samples.values, progress)
        self.model_config, self.tokenizer = parts.model_config, parts.tokenizer
        self.max_model_len = parts.max_model_len
        self.model_name = parts.model_name
        self._eos = frozenset(parts.eos_token_ids)
        self._scheduler, self._pool = parts.scheduler, parts.pool
        self._runner: Runner = parts.runner
        self._pager, self._lender, self._trace = parts.pager, parts.lender, parts.trace
        self._memory, self._startup = parts.memory, parts.timings
        self._implementations = parts.implementations
        self.metrics = EngineMetrics()
        self._answers = Answers(
            self._live, self._scheduler, self.tokenizer, self._eos, self.metrics, self._trace
        )
        self._ended: list[RequestOutput] = []  # ended outside a step (aborts)
        self._pending: collections.deque[StepRecord] = collections.deque()
        self._numbers = itertools.count()
        self._sequence_ids = itertools.count()
        self._failures_in_row = 0
        self._taken_in = 0.0  # when the last step's results had come, on time.perf_counter()
        self._dead: BaseException | None = None
        self.observe: Callable[[Plan, float], None] | None = None
        # What is there by now stays until the engine is closed. Python's full collections, in the
        # midst of steps, would go through it each time: 30 ms, without it next to nothing.
        gc.freeze()

    # Requests.

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, *,
        priority: int = 0, user: str = "", weight: float = 1.0, arrival: float | None = None,
    ) -> None:
        """Accept a request; its answer comes out of `step`.

        Args:
          request_id: unique among live requests.
          prompt: text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`.
          params: how tokens are chosen; None: the defaults.
          priority: for policies that use it; lower runs first.
          user: fairness key, for policies that use it.
          weight: share of its user's service, for policies that use it.
          arrival: seconds on `time.monotonic()`; None: now.

        Raises:
          RequestError: a field is invalid; nothing was accepted.
          EngineDeadError: the engine has stopped.
        """
        self._check_alive()
        params = params or SamplingParams()
        if request_id in self._live.requests:
            raise RequestError("request_id", request_id, "an id no live request has")
        text, ids = inputs.tokenize_prompt(prompt, self.tokenizer)
        inputs.check_tokens(ids, self.model_config.vocab_size, self.max_model_len)
        inputs.check_params(
            params, self.model_config.vocab_size, BANNED_TOKENS, len(self._eos)
        )
        arrival = time.monotonic() if arrival is None else arrival
        output = RequestOutput(
            request_id, text, ids, [], False, RequestMetrics(arrival),
            [None] * len(ids) if params.prompt_logprobs is not None else None,
        )
        key = inputs.request_key(params.seed, self.config.seed, next(self._numbers))
        request = Request(params, key, output)
        limit = self.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(ids) + params.max_tokens)
        parent: Sequence | None = None
        for index in range(params.n):
            sequence = Sequence(
                seq_id=next(self._sequence_ids), request_id=request_id, tokens=list(ids),
                max_total_tokens=limit, arrival=arrival, sample_index=index, parent=parent,
                priority=priority, user=user, weight=weight, salt=self._salt(len(ids)),
                no_prefix_read=params.prompt_logprobs is not None and index == 0,
            )
            parent = parent or sequence
            request.add_sample(self._make_sample(sequence, params, index))
        for sample in request.samples:
            self._scheduler.add(sample.sequence)  # refuses the first one or none
            if self._trace is not None:
                self._trace.added(sample.sequence)
        self._live.add(request)
        self.metrics.requests_added += 1

    def abort(self, request_id: str) -> None:
        """End a request now; its last output, with finish reason "abort", comes out of `step`.

        Unknown and ended ids are ignored: an abort may cross the request's own end.
        """
        request = self._live.requests.get(request_id)
        if request is None:
            return
        self.metrics.requests_aborted += 1
        self._ended.append(self._answers.end(request, "abort"))

    def has_unfinished(self) -> bool:
        """Whether another `step` may bring outputs, or has page moves to see through."""
        moving = self._pager is not None and self._pager.unfinished
        return bool(self._live.requests or self._ended or moving)

    @property
    def num_live_requests(self) -> int:
        """Requests accepted and not ended."""
        return len(self._live.requests)

    # For those who look inside and change nothing.

    @property
    def requests(self) -> Reversible[Request]:
        """Those accepted and not ended, in order of arrival."""
        return self._live.requests.values()

    @property
    def scheduler(self) -> Scheduler:
        """Who runs next, and where everyone's pages are."""
        return self._scheduler

    @property
    def page_bytes(self) -> int:
        """Of a page of keys and values."""
        kv = self._runner.kv
        return kv.nbytes // kv.shape[0]

    # Steps.

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step and take in the tokens of the one before.

        Returns:
          The requests that changed: their live outputs, which later steps go on changing. Empty
          lists are normal (the first step of a run has nothing before it).

        Raises:
          EngineDeadError: the engine has stopped; every live request has been ended with an error.
        """
        self._check_alive()
        started = time.perf_counter()
        waited = self._waited_s
        outputs, self._ended = self._ended, []
        try:
            if self._pager is not None and self._pending:
                self._pager.linger(self._scheduler.costs.patience_s)
            self.tend()
            plan = self._scheduler.plan(time.monotonic())
            record = None
            if plan is not None:
                record = self._runner.dispatch(plan)
                self._count_plan(plan)
                if self._trace is not None:
                    self._trace.dispatched(plan, started)
            if record is not None:
                self._pending.append(record)
            if self._pending and (record is None or len(self._pending) > _RUN_AHEAD):
                outputs += self._take_in(self._pending.popleft())
            elif plan is None and self._pager is not None and self._pager.unfinished:
                self._runner.fence()  # moves end once the step they ride on has begun
                self._pager.wait(_MOVES_WAIT_S)
        except jax.errors.JaxRuntimeError as error:
            outputs += self._recover(error)
        except Exception as error:  # ours, not the device's: going on could only hide it
            outputs += self._die(error)
        self.metrics.host_s += time.perf_counter() - started - (self._waited_s - waited)
        return outputs

    def tend(self) -> None:
        """What lenders of memory are owed at a step boundary. `step` does it; call it now and then
        while there is nothing to step, or a lender waits for what it wants back."""
        if self._pager is not None and self._dead is None:
            self._pager.poll()
            self._pager.respond()
        if self._lender is not None and self._dead is None:
            self._lender.tend(self.metrics.steps, len(self._pending), self.metrics.requests_added)

    def close(self) -> None:
        """End live requests with an error, wait for the device, let go of all memory."""
        if self._dead is None:
            self._dead = RuntimeError("the engine was closed")
            self._end_all("the engine was closed")

    def stats(self, *, bounds: bool = True) -> dict[str, Any]:
        """Counters, pool use, what is compiled and which implementations are in use. Without
        `bounds`, nothing that costs by the live sequence: how many are swapped, and the bound on
        waiting, 1 us for each of them; these are None."""
        programs = self._runner.programs
        bound = self._scheduler.waiting_bound(run_ahead=_RUN_AHEAD) if bounds else None
        return {
            **self.metrics.as_dict(),
            "pages": {
                "total": self._pool.num_pages, "in_use": self._pool.in_use,
                "cached": self._pool.cached, "free": self._pool.free,
                "page_tokens": self.config.page_tokens,
            },
            "live_requests": len(self._live.requests),
            "running": self._scheduler.num_running,
            "waiting": self._scheduler.num_waiting,
            "swapped": None if not bounds else sum(
                sample.sequence.swapped and sample.sequence.status is Status.WAITING
                for _, sample in list(self._live.samples.values())
            ),
            "paging": self._paging_stats(),
            "lending": None if self._lender is None else self._lender.stats(),
            "switches": self._scheduler.counters.switches,
            **self._scheduler.guard.stats(),
            "waiting_bound_steps": None if bound is None else bound.steps,
            "compiles": programs.compiles,
            "compiles_after_warmup": programs.compiles_after_warmup,
            "tensor_parallel": self.config.tensor_parallel,
            "implementations": dict(self._implementations),
            "memory": self._memory.as_dict(),
            "startup": dict(self._startup),
        }

    # Inside.

    def _paging_stats(self) -> dict[str, Any] | None:
        if self._pager is None:
            return None
        residency = self._scheduler.residency
        planned = {} if residency is None else dataclasses.asdict(residency.counters)
        return {**self._pager.stats(), **planned}

    @property
    def _waited_s(self) -> float:
        """Seconds in which the host had nothing to do, for the device or for pages."""
        pager = self._pager
        return self.metrics.wait_s + (0.0 if pager is None else pager.wait_s + pager.linger_s)

    def _salt(self, prompt_len: int) -> bytes:
        # With dynamic NTK scaling a prompt past the trained context rotates all its keys by its
        # own length, so only prompts of that length may share pages.
        scaling = self.model_config.rope_scaling
        trained = scaling.original_max_position or self.model_config.max_position
        if scaling.kind == "dynamic" and prompt_len > trained:
            return prompt_len.to_bytes(8, "little")
        return b""

    def _make_sample(self, sequence: Sequence, params: SamplingParams, index: int) -> Sample:
        wants_logprobs = params.logprobs is not None
        output = CompletionOutput(
            index, "", [], 0.0 if wants_logprobs else None, [] if wants_logprobs else None
        )
        eos = frozenset() if params.ignore_eos else self._eos
        stops = eos | frozenset(params.stop_token_ids)
        has_text = params.detokenize and self.tokenizer is not None
        detokenizer = Detokenizer(self.tokenizer, params) if has_text else None
        banned = tuple(sorted(stops)) if params.min_tokens else ()
        return Sample(sequence, output, detokenizer, stops, banned)

    def _count_plan(self, plan: Plan) -> None:
        metrics = self.metrics
        metrics.steps += bool(plan.chunks)
        metrics.preemptions += len(plan.preempted)
        for sequence in plan.preempted:
            self._live.lookup(sequence)[0].output.metrics.num_preemptions += 1
        metrics.prompt_tokens += sum(
            chunk.count for chunk in plan.chunks if chunk.start < chunk.sequence.prompt_len
        )

    def _take_in(self, record: StepRecord) -> list[RequestOutput]:
        started = time.perf_counter()
        packed, prompt_packed = Runner.read(record)
        ended = time.perf_counter()
        self.metrics.wait_s += ended - started
        # The device began with it when it had been dispatched and the step before had ended.
        began = max(record.dispatched, self._taken_in)
        self._scheduler.costs.observe_step(record.prefill, record.decodes, ended - began)
        if self.observe is not None:
            self.observe(record.plan, ended - began)
        self._taken_in = ended
        if self._trace is not None:
            self._trace.taken_in(record, started)
        self._failures_in_row = 0
        return self._answers.take(record, packed, prompt_packed)

    def _fail(self, request: Request, why: str) -> RequestOutput:
        request.output.error = why
        self.metrics.requests_failed += 1
        return self._answers.end(request, "error")

    def _recover(self, error: Exception) -> list[RequestOutput]:
        """A failed step consumed the donated pool: start a new one and recompute every sequence."""
        self._failures_in_row += 1
        self.metrics.pool_resets += 1
        if self._failures_in_row >= _MAX_RESETS:
            return self._die(error)
        logging.exception("a step failed on the device; all live requests are recomputed")
        self._quiesce()
        if self._pager is not None:
            self._pager.reset()
        self._scheduler.reset()
        self._runner.reset()
        if self._trace is not None:
            self._trace.reset()
        return []

    def _die(self, error: Exception) -> list[RequestOutput]:
        """Stop for good; every live request ends with the reason."""
        logging.exception("the engine stops")
        self._dead = error
        return self._end_all(f"the engine failed: {error}")

    def _quiesce(self) -> None:
        """Wait until nothing runs on the device; drop what its steps brought, or failed with."""
        self._pending.clear()
        try:
            self._runner.fence()
        except (RuntimeError, ValueError) as error:
            # Reported already, or about to be; a pool that a failed step consumed is "deleted".
            logging.info("waiting for the device: %s", error)

    def _end_all(self, why: str) -> list[RequestOutput]:
        """End every live request with an error and let go of the device's and lenders' memory."""
        self._quiesce()
        try:
            if self._pager is not None:
                self._pager.settle()
            return [self._fail(request, why) for request in list(self._live.requests.values())]
        finally:
            if self._pager is not None:
                self._pager.close()
            self._runner.close()
            if self._lender is not None:
                self._lender.close()
            if self._trace is not None:
                self._trace.close()
            gc.unfreeze()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"the engine has stopped: {self._dead}") from self._dead
