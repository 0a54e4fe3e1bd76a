"""An engine for asyncio programs: one background thread steps it, consumers await their answers.

The engine is not thread-safe, so only the thread touches it: requests, aborts and `call` leave
commands that it carries out between steps. Each consumer has a mailbox of one: outputs are
cumulative, so a slow consumer skips states but misses no token, and no queue grows. With nothing
to do the thread sleeps on a condition.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any, TypeVar

from aqua_jax.config import EngineConfig, SamplingParams
from aqua_jax.engine.engine import Engine
from aqua_jax.engine.mailbox import AnswerStream, Mailbox, wake
from aqua_jax.engine.outputs import RequestOutput
from aqua_jax.errors import EngineDeadError
from aqua_jax.prompts import Prompt

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Between two looks of an engine that has nothing to step, if it borrows or lends: that long a
# lender may wait. A look takes 0.1 ms of a processor, waking up included.
_TEND_EVERY_S = 0.05


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
        # What an idle engine owes to lenders of memory.
        self._tend: Callable[[], None] | None = getattr(self._engine, "tend", None)
        self._wake = threading.Condition()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._mailboxes: dict[str, Mailbox] = {}  # the thread's alone
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

    @property
    def model_name(self) -> str:
        """What the model is called."""
        name: str = self._engine.model_name
        return name

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer together."""
        length: int = self._engine.max_model_len
        return length

    @property
    def dead(self) -> BaseException | None:
        """Why the engine takes no requests any more; None while it does."""
        return self._dead

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        user: str = "",
        weight: float = 1.0,
        arrival: float | None = None,
        final_only: bool = False,
    ) -> AnswerStream:
        """Returns once the engine has accepted the request, before its first token.

        Args:
          prompt: text, token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`.
          sampling_params: how tokens are chosen; None: the defaults.
          request_id: unique among live requests; None: a fresh one.
          priority: see `Engine.add_request`.
          user: see `Engine.add_request`.
          weight: see `Engine.add_request`.
          arrival: see `Engine.add_request`.
          final_only: the stream yields the finished output alone; nobody is woken up before.

        Raises:
          RequestError: a field is invalid.
          EngineDeadError: the engine has failed or was shut down; says why.
        """
        name = f"async-{next(self._numbers)}" if request_id is None else request_id
        mailbox = Mailbox(final_only)

        def add() -> None:
            try:
                self._engine.add_request(
                    name, prompt, sampling_params, priority=priority, user=user, weight=weight,
                    arrival=arrival,
                )
            except Exception as error:  # the consumer's, whatever it is
                mailbox.fail(error)
            else:
                self._mailboxes[name] = mailbox
                mailbox.accept()

        self._send(add)
        stream = AnswerStream(name, mailbox, lambda: self._abandon(name, mailbox))
        try:
            await mailbox.accepted()
        except BaseException:
            stream.close()
            raise
        return stream

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
        Arguments and errors are those of `submit`.
        """
        stream = await self.submit(
            prompt, sampling_params, request_id, priority=priority, user=user, weight=weight
        )
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def call(self, function: Callable[[Any], T]) -> T:
        """What `function(engine)` returns, run by the thread between two steps.

        The only safe way to look inside the engine while it runs. Every step waits for it: keep it
        short.

        Raises:
          EngineDeadError: the engine has failed or was shut down.
          Exception: what `function` raised.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # the caller has gone
            try:
                future.set_result(function(self._engine))
            except Exception as error:  # the caller's
                future.set_exception(error)

        self._send(run)
        return await asyncio.wrap_future(future)

    def abort(self, request_id: str) -> None:
        """Ends a request; its consumer gets a last output with finish reason "abort".

        Unknown and ended ids are ignored.
        """
        self._try_send(lambda: self._engine.abort(request_id))

    def stats(self) -> dict[str, Any]:
        """The engine's counters, read without waiting for the step; see `call` for consistency."""
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

    def _abandon(self, name: str, mailbox: Mailbox) -> None:
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
                elif self._tend is not None:
                    self._tend()
        except BaseException as error:
            reason = error
            if not isinstance(error, EngineDeadError):  # of its own end the engine has told
                _log.exception("the engine stops")
        self._end(reason)

    def _next_commands(self) -> bool:
        """Carries out what is waiting, sleeping if nothing runs; False: stop."""
        with self._wake:
            if not (self._commands or self._stopping or self._engine.has_unfinished()):
                self._wake.wait(None if self._tend is None else _TEND_EVERY_S)
            commands, self._commands = self._commands, collections.deque()
            stopping = self._stopping
        for command in commands:
            command()
        return not stopping

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        waiting: dict[asyncio.AbstractEventLoop, list[Mailbox]] = {}
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is None:
                continue
            if output.finished:
                del self._mailboxes[output.request_id]
            elif mailbox.final_only:
                continue
            if mailbox.put(output):
                waiting.setdefault(mailbox.loop, []).append(mailbox)
        for mailboxes in waiting.values():
            wake(mailboxes)

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
            mailbox.fail(error)
        self._mailboxes.clear()
        try:
            self._engine.close()
        except Exception:
            # Everybody has been told already; there is no one to raise to.
            _log.exception("closing the engine failed")
