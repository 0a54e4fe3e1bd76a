"""An engine for asyncio programs: one background thread steps it, consumers await their answers.

The engine is not thread-safe, so only the thread touches it: `generate` and aborts leave commands
that it carries out between steps. Each consumer has a mailbox of one: outputs are cumulative, so a
slow consumer skips states but misses no token, and no queue grows. With nothing to do the thread
sleeps on a condition.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.outputs import RequestOutput
from aqua_jax.errors import EngineDeadError
from aqua_jax.prompts import Prompt

_log = logging.getLogger(__name__)


class _Mailbox:
    """Hands the latest output of one request from the thread to its consumer's event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None

    def put(self, output: RequestOutput | None, error: BaseException | None = None) -> None:
        """Replaces what is waiting; called by the thread."""
        with self._lock:
            self._output = output if output is not None else self._output
            self._error = error if error is not None else self._error
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            pass  # the consumer's loop is closed: nobody waits any more

    async def get(self) -> RequestOutput:
        """Waits for something newer than the last call saw; raises the request's error."""
        while True:
            await self._ready.wait()
            with self._lock:
                self._ready.clear()
                output, self._output = self._output, None
                error = self._error
                if output is not None and error is not None:
                    self._ready.set()  # the error comes with the next call
            if output is not None:
                return output
            if error is not None:
                raise error


class AsyncEngine:
    """Streams answers to any number of asyncio tasks, in one or several event loops.

    Example:
      >>> async with AsyncEngine(EngineConfig(model="demo")) as engine:
      ...     async for output in engine.generate("The sea", SamplingParams(max_tokens=32)):
      ...         print(output.outputs[0].text)
    """

    def __init__(self, config: EngineConfig, *, make_engine: Callable[..., Any] = Engine):
        """Builds the engine (blocking) and starts the thread.

        Args:
          config: of the engine.
          make_engine: builds it from `config`.

        Raises:
          ConfigError, ModelLoadError: as `Engine`.
        """
        self._engine = make_engine(config)
        self._wake = threading.Condition()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._mailboxes: dict[str, _Mailbox] = {}  # the thread's alone
        self._numbers = itertools.count()
        self._stopping = False
        self._dead: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="aqua-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.shutdown)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None; safe to use from any thread."""
        return self._engine.tokenizer

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        user: str = "",
        weight: float = 1.0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the request's growing, cumulative output; the last one is finished.

        Closing the generator, or cancelling the task that runs it, aborts the request.

        Args:
          prompt: text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`.
          sampling_params: how tokens are chosen; None: the defaults.
          request_id: unique among live requests; None: a fresh one.
          priority: see `Engine.add_request`.
          user: see `Engine.add_request`.
          weight: see `Engine.add_request`.

        Raises:
          RequestError: a field is invalid.
          EngineDeadError: the engine has failed or was shut down; says why.
        """
        name = f"async-{next(self._numbers)}" if request_id is None else request_id
        mailbox = _Mailbox()

        def add() -> None:
            try:
                self._engine.add_request(
                    name, prompt, sampling_params, priority=priority, user=user, weight=weight
                )
            except Exception as error:  # the consumer's, whatever it is
                mailbox.put(None, error)
            else:
                self._mailboxes[name] = mailbox

        self._send(add)
        finished = False
        try:
            while not finished:
                output = await mailbox.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._abandon(name, mailbox)

    def abort(self, request_id: str) -> None:
        """Ends a request; its consumer gets a last output with finish reason "abort".

        Unknown and ended ids are ignored.
        """
        self._try_send(lambda: self._engine.abort(request_id))

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        return dict(self._engine.stats())

    def shutdown(self) -> None:
        """Ends every request with an error that says so, stops the thread, frees the model.

        Blocks until the running step is done. May be called twice, and from any thread.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _abandon(self, name: str, mailbox: _Mailbox) -> None:
        """The consumer of `name` has gone."""

        def drop() -> None:
            # A later request may have taken the name.
            if self._mailboxes.get(name) is mailbox:
                del self._mailboxes[name]
                self._engine.abort(name)

        self._try_send(drop)

    def _send(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._dead is not None or self._stopping:
                why = self._dead or "it was shut down"
                raise EngineDeadError(f"the engine takes no requests: {why}") from self._dead
            self._commands.append(command)
            self._wake.notify()

    def _try_send(self, command: Callable[[], None]) -> None:
        try:
            self._send(command)
        except EngineDeadError:
            pass  # everything has ended already

    def _work(self) -> None:
        """The thread: commands, then a step, for as long as there is something to do."""
        reason: BaseException | None = None
        try:
            while self._next_commands():
                if self._engine.has_unfinished():
                    self._deliver(self._engine.step())
        except BaseException as error:
            reason = error
        self._end(reason)

    def _next_commands(self) -> bool:
        """Carries out what is waiting, sleeping if nothing runs; False: stop."""
        with self._wake:
            while not (self._commands or self._stopping or self._engine.has_unfinished()):
                self._wake.wait()
            commands, self._commands = self._commands, collections.deque()
            stopping = self._stopping
        for command in commands:
            command()
        return not stopping

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is None:
                continue
            if output.finished:
                del self._mailboxes[output.request_id]
            mailbox.put(output.copy())  # the engine goes on changing its own

    def _end(self, reason: BaseException | None) -> None:
        """Tells every consumer why there is nothing more to come, and closes the engine."""
        why = "the engine was shut down" if reason is None else f"the engine failed: {reason}"
        with self._wake:
            self._dead = reason or EngineDeadError(why)
            commands, self._commands = self._commands, collections.deque()
        for command in commands:  # requests sent meanwhile learn of it through their mailboxes
            command()
        for mailbox in self._mailboxes.values():
            error = EngineDeadError(why)
            error.__cause__ = reason
            mailbox.put(None, error)
        self._mailboxes.clear()
        try:
            self._engine.close()
        except Exception:
            # Everybody has been told already; there is no one to raise to.
            _log.exception("closing the engine failed")
