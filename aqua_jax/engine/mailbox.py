"""Mailboxes between the engine's thread and the event loops that wait for its answers.

A mailbox holds one state of one request, the latest. The thread leaves only how far the answer has
come (copying the answers themselves was a quarter of its work in a profiled step of 64), and each
event loop is woken up once a step, however many of its answers grew.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from aqua_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from aqua_jax.errors import EngineDeadError


class _Mark(NamedTuple):
    """How far one sample had come. Its lists only grow, so lengths say what they held."""

    text: str
    num_tokens: int
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: int | str | None


class Mailbox:
    """Hands the latest state of one request from the thread to its consumer's event loop."""

    __slots__ = (
        "_accepted", "_error", "_finished", "_lock", "_marks", "_output", "_ready", "_signalled",
        "final_only", "loop",
    )

    def __init__(self, final_only: bool) -> None:
        self.final_only = final_only  # only the finished output is handed over
        self.loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._accepted = self._finished = self._signalled = False
        self._output: RequestOutput | None = None  # live: the thread goes on changing it
        self._marks: list[_Mark] | None = None  # None: nothing new
        self._error: BaseException | None = None

    def put(self, output: RequestOutput) -> bool:
        """Replaces what is waiting; called by the thread. Returns whether to `wake` the loop."""
        marks = [
            _Mark(
                sample.text, len(sample.token_ids), sample.cumulative_logprob,
                sample.finish_reason, sample.stop_reason,
            )
            for sample in output.outputs
        ]
        with self._lock:
            self._output, self._marks, self._finished = output, marks, output.finished
            signalled, self._signalled = self._signalled, True
        return not signalled

    def accept(self) -> None:
        """The engine took the request; called by the thread."""
        with self._lock:
            self._accepted = True
        wake([self])

    def fail(self, error: BaseException) -> None:
        """Nothing more will come; called by the thread."""
        with self._lock:
            self._error = error
        wake([self])

    def set_ready(self) -> None:
        """On the event loop: something has come."""
        self._ready.set()

    async def accepted(self) -> None:
        """Waits until the engine has taken the request; raises why it didn't."""
        while not self._accepted:
            await self._ready.wait()
            with self._lock:
                error = self._error
                if not self._accepted and error is None:
                    self._ready.clear()
            if error is not None and not self._accepted:
                raise error

    async def get(self) -> RequestOutput:
        """Waits for something newer than the last call saw; raises the request's error."""
        while True:
            await self._ready.wait()
            with self._lock:
                self._ready.clear()
                self._signalled = False
                output, finished, error = self._output, self._finished, self._error
                marks, self._marks = self._marks, None
                if marks is not None and error is not None:
                    self._ready.set()  # the error comes with the next call
            if marks is not None:
                assert output is not None
                return _state(output, marks, finished)
            if error is not None:
                raise error


def wake(mailboxes: Iterable[Mailbox]) -> None:
    """Tells each event loop once that these mailboxes, all of its own, have something."""
    boxes = list(mailboxes)

    def set_all() -> None:
        for box in boxes:
            box.set_ready()

    try:
        boxes[0].loop.call_soon_threadsafe(set_all)
    except RuntimeError:
        pass  # the consumers' loop is closed: nobody waits any more


def _state(live: RequestOutput, marks: list[_Mark], finished: bool) -> RequestOutput:
    """A request as it was when `marks` were taken, whatever steps have done since."""
    outputs = []
    for sample, mark in zip(live.outputs, marks, strict=True):
        logprobs = sample.logprobs
        outputs.append(CompletionOutput(
            sample.index, mark.text, sample.token_ids[: mark.num_tokens], mark.cumulative_logprob,
            None if logprobs is None else logprobs[: mark.num_tokens], mark.finish_reason,
            mark.stop_reason,
        ))
    times = live.metrics  # copy.copy takes five times as long
    metrics = RequestMetrics(
        times.arrival_time, times.first_token_time, times.finished_time,
        sum([mark.num_tokens for mark in marks]), times.num_cached_tokens, times.num_preemptions,
    )
    return RequestOutput(
        live.request_id, live.prompt, live.prompt_token_ids, outputs, finished, metrics,
        live.prompt_logprobs, live.error,
    )


class AnswerStream:
    """The growing, cumulative output of one accepted request; iterate over it once.

    Close it when you stop before the end: the engine works on until then.

    Attributes:
      request_id: of the request.
    """

    def __init__(self, request_id: str, mailbox: Mailbox, abandon: Callable[[], None]) -> None:
        self.request_id = request_id
        self._mailbox, self._abandon = mailbox, abandon
        self._finished = False

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The latest state, as soon as there is one newer than the last.

        Raises:
          EngineDeadError: the engine has failed or was shut down; says why.
        """
        if self._finished:
            raise StopAsyncIteration
        try:
            output = await self._mailbox.get()
        except EngineDeadError:
            self._finished = True
            raise
        self._finished = output.finished
        return output

    def close(self) -> None:
        """Aborts the request unless it has ended. May be called twice."""
        if not self._finished:
            self._finished = True
            self._abandon()
